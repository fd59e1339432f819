"""What a model costs, from its settings alone: python -m experiments.cost --preset ucf101.

It takes the flags of train.py, and without --preset prints all presets. Parameters, FLOPs of a training step
and bytes are counted on the meta device: nothing is allocated.
"""
import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import config
from diffusion import loss
from magicvideo import build_network
from presets import PRESETS
from settings import Settings, read_settings


def step_cost(s: Settings) -> tuple[int, int]:
    """Parameters of the network, and FLOPs of one clip's forward and backward pass."""
    unet, images = s.network, s.data.num_images
    with torch.device("meta"):
        model = build_network(s.train.arch, unet)
        x = torch.empty(1, unet.channels, unet.frames + images, unet.size, unet.size)
        cond = None
        if unet.cond_dim:
            cond = torch.empty(1, s.text.tokens, unet.cond_dim)

    def step() -> None:
        loss(model, x, s.diffusion, cond, images).mean().backward()

    return count(model), flops(step)


def flops(call: Callable[[], object]) -> int:
    """The FLOPs of what call runs, by PyTorch's counter (no element-wise operations)."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def count(model: nn.Module) -> int:
    """The number of a network's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def line(s: Settings) -> str:
    """Parameters, FLOPs of a training step of one process, float32 bytes of what Adam needs."""
    parameters, work = step_cost(s)
    clips = s.train.batch_size * s.train.accumulate
    gib = 4 * parameters / 2**30
    return (f"{s.train.preset}: {parameters / 1e6:.1f} M parameters, {work * clips / 1e12:.2f} TFLOP per training "
            f"step of {clips} clips; float32: weights {gib:.2f} GiB, gradients {gib:.2f} GiB, "
            f"optimizer {2 * gib:.2f} GiB, EMA {gib:.2f} GiB")


def main() -> None:
    """Prints a line for the preset that is given, or for each of them."""
    flags = sys.argv[1:]
    if any(flag.startswith("--preset") for flag in flags):
        print(line(read_settings(flags)))
        return
    for preset, values in PRESETS.items():
        if values.get("arch") != "autoencoder":  # which has no network that diffuses
            print(line(read_settings(["--preset", preset, *flags])))


if __name__ == "__main__":
    config.run(main)

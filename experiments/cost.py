"""What a model costs, from its settings alone: parameters, FLOPs and bytes, counted on the meta device."""
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffusion import DiffusionConfig, loss
from magicvideo import MagicVideoConfig, between, build_network


def step_cost(unet: MagicVideoConfig, diffusion: DiffusionConfig, num_images: int, tokens: int,
              arch: str = "unet3d") -> tuple[int, int]:
    """Parameters of the network, and FLOPs of one clip's forward and backward pass, without any memory."""
    model = network(unet, arch)
    with torch.device("meta"):
        x = torch.empty(1, unet.channels, unet.frames + num_images, unet.size, unet.size)
        cond = torch.empty(1, tokens, unet.cond_dim) if unet.cond_dim else None
    call = between(model, x, diffusion) if unet.keys else model
    return count(model), flops(lambda: loss(call, x, diffusion, cond, num_images).mean().backward())


def flops(call: Callable[[], object]) -> int:
    """The FLOPs of what call runs, by PyTorch's counter (no element-wise operations)."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def network(unet: MagicVideoConfig, arch: str) -> nn.Module:
    """The network without any memory."""
    with torch.device("meta"):
        return build_network(arch, unet)


def count(model: nn.Module) -> int:
    """The number of a network's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def table_row(name: str, parameters: int, flops: int, clips: int) -> str:
    """One line: parameters, FLOPs of a training step of that many clips, float32 bytes of what Adam needs."""
    gib = 4 * parameters / 2**30
    return (f"{name}: {parameters / 1e6:.1f} M parameters, {flops * clips / 1e12:.2f} TFLOP per training "
            f"step of {clips} clips; float32: weights {gib:.2f} GiB, gradients {gib:.2f} GiB, "
            f"optimizer {2 * gib:.2f} GiB, EMA {gib:.2f} GiB")

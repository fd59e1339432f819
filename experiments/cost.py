"""What a model costs, from its settings alone: python -m experiments.cost --preset ucf101.

It takes the flags of train.py, and without --preset prints all presets. Parameters, FLOPs of a training step,
bytes and the peak of memory are counted on tensors that have shapes and no numbers: nothing is allocated.
"""
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import config
from diffusion import loss
from magicvideo import build_network
from presets import PRESETS
from settings import Settings, read_settings

CARDS = 8, 12, 16, 24, 40, 80  # GB of a GPU's memory


def batch(s: Settings, clips: int) -> tuple[Tensor, Tensor | None]:
    """Clips and the tokens of their captions, None without any."""
    unet = s.network
    x = torch.empty(clips, unet.channels, unet.frames + s.data.num_images, unet.size, unet.size)
    if unet.cond_dim == 0:
        return x, None
    return x, torch.empty(clips, s.text.tokens, unet.cond_dim)


def step_cost(s: Settings) -> tuple[int, int]:
    """Parameters of the network, and FLOPs of one clip's forward and backward pass."""
    with torch.device("meta"):
        model = build_network(s.train.arch, s.network)
        x, cond = batch(s, 1)

    def step() -> None:
        loss(model, x, s.diffusion, cond, s.data.num_images).mean().backward()

    return count(model), flops(step)


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that live while it is on: now, and the most there ever were."""
    def __init__(self):
        super().__init__()
        self.now, self.peak, self.sizes = 0, 0, {}

    def __torch_dispatch__(self, operation: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.meet(tensor.untyped_storage())
        return result

    def meet(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def peak_memory(s: Settings, clips: int, checkpointing: bool) -> float:
    """GiB of all tensors at the peak of a training step in bf16 on a GPU, with so many clips at a time.

    Modelled: with gradients of clips before, EMA and Adam; without what kernels take and what lies idle.
    """
    on_cuda = mock.patch.object(FakeTensor, "is_cuda", True)  # as far as our own code asks
    with FakeTensorMode(), on_cuda, Live() as live:
        model = build_network(s.train.arch, replace(s.network, checkpointing=checkpointing))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        x, cond = batch(s, clips)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model, x, s.diffusion, cond, s.data.num_images).mean()
        value.backward()
    others = 3 * 4 * count(model)  # EMA, and two of Adam's
    return (live.peak + others) / 2**30


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


def memory(s: Settings, checkpointing: bool) -> str:
    """The peak by the number of clips at a time, and how many leave a fifth of a card's memory to spare."""
    one, sixteen = peak_memory(s, 1, checkpointing), peak_memory(s, 16, checkpointing)
    each = (sixteen - one) / 15
    fitting = []
    for card in CARDS:
        clips = 1
        while one + (clips - 1) * each <= 0.8 * card:
            clips *= 2
        fitting.append(f"{clips // 2} in {card}")
    flag = "--checkpointing" if checkpointing else "--no-checkpointing"
    return (f"  {flag}, modelled: {one:.1f} GiB with one clip at a time and {each:.2f} with each more; clips that "
            f"fit in GB, with a fifth to spare: {', '.join(fitting)}")


def show(s: Settings) -> None:
    """Prints what the settings cost. Raises ValueError for an autoencoder, which is not counted."""
    if s.train.arch == "autoencoder":
        raise ValueError("networks that diffuse are counted, and not --arch autoencoder")
    print(line(s))
    for checkpointing in (False, True):
        print(memory(s, checkpointing), flush=True)


def main() -> None:
    """Prints what the preset that is given costs, or each of them."""
    flags = sys.argv[1:]
    if any(flag.startswith("--preset") for flag in flags):
        show(read_settings(flags))
        return
    for preset, values in PRESETS.items():
        if values.get("arch") != "autoencoder":
            show(read_settings(["--preset", preset, *flags]))


if __name__ == "__main__":
    config.run(main)

"""Speed side by side: python -m experiments.bench.

It times our network against that of the package video-diffusion-pytorch, if that is installed. What is compared
takes turns in one process, A B A B, so that a noisy machine is noisy for all of it.
"""
import copy
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

import config
from diffusion import DiffusionConfig, loss
from experiments.cost import count
from machine import Machine, start
from optimizer import ema_update
from presets import PRESETS
from unet3d import UNet3D, UNetConfig


@dataclass
class BenchConfig:
    """What to time, and how."""
    preset: str = "films"  # the preset whose architecture is ours
    size: int = 32  # [8, 1024] height and width of the clips: 16 frames, one channel
    batch_size: int = 4  # [1, 65536] clips in a training step and in a network call
    rounds: int = 3  # [1, 1000] turns that everything compared takes, after one to warm up
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    precision: Literal["auto", "bf16", "float32"] = "auto"  # bf16 autocast where the hardware has it
    threads: int = 0  # [0, 1024] CPU threads; 0 leaves PyTorch's choice


class Peer(nn.Module):
    """The network of video-diffusion-pytorch, called as ours is; ImportError if it is not installed."""
    def __init__(self, dim: int, dim_mults: tuple[int, ...]):
        super().__init__()
        for name in ("torchvision", "torchvision.transforms", "transformers"):  # imported, not used
            sys.modules.setdefault(name, MagicMock())
        from video_diffusion_pytorch import Unet3D
        self.net = Unet3D(dim=dim, dim_mults=dim_mults, channels=1)

    def forward(self, z: Tensor, logsnr: Tensor, cond: None = None, num_images: int = 0) -> Tensor:
        time = logsnr.float().flatten().expand(len(z))
        return self.net(z, time)


def ours(c: BenchConfig, **changes: Any) -> UNet3D:
    """The preset's network without captions, for clips of one channel."""
    values = PRESETS[c.preset] | changes
    values |= dict(channels=1, cond_dim=0, size=c.size)
    unet, = config.rebuild(values, UNetConfig)
    return UNet3D(unet).to(memory_format=torch.channels_last)


def networks(c: BenchConfig) -> dict[str, nn.Module]:
    """Ours as the preset has it and with the paper's attention; the peer with as many parameters."""
    mults = PRESETS[c.preset]["dim_mults"]
    own = ours(c)
    found = {
        f"ours, preset {c.preset}": own,
        "ours, --patch 1, attention at 32, 16, 8 px": ours(c, patch=1, attention_resolutions=(32, 16, 8))}
    try:
        width = peer_width(count(own), mults)
        found["peer, as many parameters"] = Peer(width, mults)
    except ImportError:
        print("no peer: pip install --no-deps video-diffusion-pytorch einops-exts rotary-embedding-torch\n")
    return found


def peer_width(target: int, mults: tuple[int, ...]) -> int:
    """The width with which the peer has about so many parameters."""
    width = 16
    with torch.device("meta"):
        while count(Peer(width, mults)) < target:
            width += 4
    return width


class Trainer:
    """A network with all of a training step around it: loss, backward pass, fused Adam and EMA."""
    def __init__(self, network: nn.Module, c: BenchConfig, machine: Machine):
        self.machine = machine
        self.network = network.to(machine.device)
        self.ema = copy.deepcopy(self.network)
        self.steps = 0
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
        shape = c.batch_size, 1, 16, c.size, c.size
        self.x = torch.randn(shape, device=machine.device)

    def step(self) -> None:
        """One training step."""
        with self.machine.autocast():
            losses = loss(self.network, self.x, DiffusionConfig())
        losses.mean().backward()
        self.optimizer.step()
        ema_update(self.ema, self.network, self.steps, 0.999)
        self.steps += 1
        self.optimizer.zero_grad()

    @torch.no_grad()
    def call(self) -> None:
        """One call of the network, as a sampler makes it."""
        with self.machine.autocast():
            logsnr = torch.zeros((), device=self.x.device)
            self.network(self.x, logsnr)


def take_turns(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round; each has its turn, and the first round is not kept."""
    seconds = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            begun = time.perf_counter()
            function()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def shown(work: float, seconds: list[float]) -> str:
    """Work per second: the median with the smallest and the largest value."""
    rates = [work / s for s in seconds]
    return f"{statistics.median(rates):.3g} [{min(rates):.3g}, {max(rates):.3g}]"


def peer_table(c: BenchConfig, machine: Machine) -> None:
    """Prints parameters, training clips a second and sampled clips a second of ours and the peer's."""
    torch.manual_seed(0)
    sizes, steps, calls = {}, {}, {}
    for name, network in networks(c).items():
        trainer = Trainer(network, c, machine)
        sizes[name] = count(network) / 1e6
        steps[name] = trainer.step
        calls[name] = trainer.call
    trained = take_turns(steps, c.rounds)
    called = take_turns(calls, c.rounds)
    print("| network | parameters | training, clips/s | network call, clips/s |\n|---|---|---|---|")
    for name, size in sizes.items():
        training = shown(c.batch_size, trained[name])
        calling = shown(c.batch_size, called[name])
        print(f"| {name} | {size:.1f} M | {training} | {calling} |")


def main() -> None:
    """Makes the table."""
    c, = config.parse(BenchConfig)
    machine = start(c.device, c.precision, c.threads)
    print(f"`python -m experiments.bench {shlex.join(sys.argv[1:])}`, {machine}, PyTorch {torch.__version__}, "
          f"{time.strftime('%Y-%m-%d')}, median [min, max] of {c.rounds} rounds\n")
    peer_table(c, machine)


if __name__ == "__main__":
    config.run(main)

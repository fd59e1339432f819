"""Speed and memory side by side: python -m experiments.bench.

--table peer times our network against that of the package video-diffusion-pytorch (if it is installed), parts
times ours alone, growth shows how time and memory grow with the clip, data how fast the films in --data_dir
are read. What is compared takes turns in one
process, A B A B, so that a noisy machine is noisy for all of it.
"""
import dataclasses
import itertools
import multiprocessing
import os
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import config
import cost
from data import DataConfig, batches
from diffusion import DiffusionConfig, denoiser, loss, schedule
from experiments.pack import pack
from guidance import reconstruction_guided
from machine import Machine, start
from sampling import ddim, dpm_solver, sample
from run import ema_update
from unet3d import UNet3D, UNetConfig


@dataclass
class BenchConfig:
    """What to time, and how."""
    table: Literal["peer", "parts", "growth", "data"] = "peer"  # which table to make
    data_dir: str = ""  # folder of films, for the table data
    preset: str = "cpu_wide"  # the preset whose architecture is ours
    sizes: tuple[int, ...] = (32, 64)  # [8, 1024] sizes of the clips of 16 frames, one channel
    batch_size: int = 4  # [1, 65536] clips in a training step and in a network call
    rounds: int = 3  # [1, 1000] turns that everything compared takes, after one to warm up
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    precision: Literal["auto", "bf16", "float32"] = "auto"  # bf16 autocast where the hardware has it
    threads: int = 0  # [0, 1024] CPU threads; 0 leaves PyTorch's choice
    compile: bool = False  # torch.compile both networks


@dataclass
class Entrant:
    """A network that is timed: ours with the preset's flags and some changed, or the peer's of some width."""
    name: str
    preset: str = ""  # "" is the peer
    flags: tuple[tuple[str, Any], ...] = ()

    def build(self) -> nn.Module:
        """The network with random weights, called as network(z, logsnr, cond, num_images)."""
        if not self.preset:
            return Peer(**dict(self.flags))
        values = config.PRESETS[self.preset] | {"channels": 1, "cond_dim": 0} | dict(self.flags)
        return UNet3D(*config.rebuild(values, UNetConfig))


class Peer(nn.Module):
    """The network of video-diffusion-pytorch, called as ours is; ImportError if it is not installed."""
    def __init__(self, dim: int, dim_mults: tuple[int, ...]):
        super().__init__()
        for name in ("torchvision", "torchvision.transforms", "transformers"):  # imported, not used
            sys.modules.setdefault(name, MagicMock())
        from video_diffusion_pytorch import Unet3D
        self.net = Unet3D(dim=dim, dim_mults=dim_mults, channels=1)

    def forward(self, z: Tensor, logsnr: Tensor, cond: None = None, num_images: int = 0) -> Tensor:
        return self.net(z, logsnr.float().flatten().expand(len(z)))


class Trainer:
    """A network with all of a training step around it: loss, backward pass, fused Adam and EMA."""
    def __init__(self, entrant: Entrant, frames: int, size: int, c: BenchConfig, machine: Machine,
                 num_images: int = 0):
        torch.manual_seed(0)
        self.machine, self.num_images = machine, num_images
        self.model = entrant.build().to(machine.device)
        if entrant.preset:
            self.model.to(memory_format=torch.channels_last)  # as train.py does
        self.network = torch.compile(self.model) if c.compile else self.model
        self.ema = AveragedModel(self.model, multi_avg_fn=ema_update(0.999))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.x = torch.randn(c.batch_size, 1, frames + num_images, size, size, device=machine.device)

    def step(self) -> None:
        """One training step; the last num_images frames are independent images."""
        with self.machine.autocast():
            loss(self.network, self.x, DiffusionConfig(), None, self.num_images).mean().backward()
        self.optimizer.step()
        self.ema.update_parameters(self.model)
        self.optimizer.zero_grad()

    @torch.no_grad()
    def call(self) -> None:
        """One call of the network, as a sampler makes it."""
        with self.machine.autocast():
            self.network(self.x, torch.zeros((), device=self.x.device))


def flops(entrant: Entrant, frames: int, size: int) -> int:
    """FLOPs of one clip's forward and backward pass, by PyTorch's counter (no element-wise operations)."""
    # ours without memory; the peer looks at values, so it has to be run
    with torch.device("meta" if entrant.preset else "cpu"):
        model, x = entrant.build(), torch.zeros(1, 1, frames, size, size)
    return cost.flops(lambda: loss(model, x, DiffusionConfig()).backward())


def take_turns(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round; each has its turn, and the first round is not kept."""
    seconds = {name: [] for name in functions}
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    for turn, (name, function) in itertools.product(range(rounds + 1), functions.items()):
        wait()
        begun = time.perf_counter()
        function()
        wait()
        if turn:
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def ceiling(machine: Machine) -> dict[str, tuple[Callable[[], Tensor], int]]:
    """What this machine can do at most: a large matrix product and a large convolution, with their FLOPs."""
    dtype, n = torch.bfloat16 if machine.bf16() else torch.float32, 4096
    a = torch.randn(n, n, device=machine.device, dtype=dtype)
    conv = nn.Conv2d(256, 256, 3, padding=1, device=machine.device, dtype=dtype).requires_grad_(False)
    x = torch.randn(64, 256, 32, 32, device=machine.device, dtype=dtype)
    conv, x = conv.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return {"matrix product": (lambda: a @ a, 2 * n**3),
            "convolution": (lambda: conv(x), 2 * x.numel() * 9 * 256)}


def peak_memory(entrant: Entrant, frames: int, size: int, c: BenchConfig) -> float:
    """GiB that two training steps need, in a process of their own: on a CPU, what it grew by, or nan."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # raises if it was killed
        return pool.submit(_peak_memory, entrant, frames, size, c).result()


def _peak_memory(entrant: Entrant, frames: int, size: int, c: BenchConfig) -> float:
    machine = start(c.device, c.precision, c.threads)
    before = _resident("VmRSS")
    trainer = Trainer(entrant, frames, size, c, machine)
    for _ in range(2):  # Adam's state comes with the first
        trainer.step()
    if machine.device.type == "cuda":
        return torch.cuda.max_memory_allocated(machine.device) / 2**30
    return _resident("VmHWM") - before


def _resident(key: str) -> float:
    """GiB of memory this process holds (VmRSS) or held at most (VmHWM), where the kernel tells."""
    status = Path("/proc/self/status")
    found = status.exists() and re.search(rf"{key}:\s+(\d+) kB", status.read_text())
    return int(found[1]) / 2**20 if found else float("nan")


def shown(values: list[float], digits: int = 3) -> str:
    """The median with the smallest and the largest value."""
    return f"{statistics.median(values):.{digits}g} [{min(values):.{digits}g}, {max(values):.{digits}g}]"


def entrants(c: BenchConfig, size: int) -> list[Entrant]:
    """Ours as the preset has it and with the paper's attention; the peer equally wide and equally large."""
    values, ours = config.PRESETS[c.preset], Entrant(f"ours, preset {c.preset}", c.preset, (("size", size),))
    paper = Entrant("ours, --patch 1, attention at 32, 16, 8 px", c.preset,
                    (("size", size), ("patch", 1), ("attention_resolutions", (32, 16, 8))))
    widths = [Entrant("peer, as many parameters", "", (("dim", dim), ("dim_mults", values["dim_mults"])))
              for dim in range(16, values["dim"] + 64, 4)]
    same = Entrant("peer, same channels", "", (("dim", values["dim"]), ("dim_mults", values["dim_mults"])))
    try:
        return [ours, paper, same, min(widths, key=lambda e: abs(parameters(e) - parameters(ours)))]
    except ImportError:
        print("no peer: pip install --no-deps video-diffusion-pytorch einops-exts rotary-embedding-torch\n")
        return [ours, paper]


def parameters(entrant: Entrant) -> int:
    """The number of parameters of its network, counted without memory."""
    with torch.device("meta"):
        return cost.count(entrant.build())


def peer_table(c: BenchConfig, machine: Machine) -> None:
    """Prints, for each size, ours and the peer's: cost, training step, network call, memory, ceiling."""
    for size in c.sizes:
        rivals = {e.name: e for e in entrants(c, size)}
        peaks = {name: peak_memory(e, 16, size, c) for name, e in rivals.items()}
        trainers = {name: Trainer(e, 16, size, c, machine) for name, e in rivals.items()}
        limits = ceiling(machine)
        timed = take_turns({name: trainer.step for name, trainer in trainers.items()}
                           | {name: function for name, (function, _) in limits.items()}, c.rounds)
        called = take_turns({name: trainer.call for name, trainer in trainers.items()}, c.rounds)
        top = max(work / statistics.median(timed[name]) for name, (_, work) in limits.items())
        print(f"16 x {size} x {size}, batch {c.batch_size}; ceiling {top / 1e9:.0f} GFLOP/s\n")
        print("| network | parameters | GFLOP per clip | training, clips/s | network call, ms per clip "
              "| peak memory | share of the ceiling |\n|---|---|---|---|---|---|---|")
        for name, entrant in rivals.items():
            work, median = flops(entrant, 16, size), statistics.median(timed[name])
            print(f"| {name} | {parameters(entrant) / 1e6:.1f} M | {work / 1e9:.1f} "
                  f"| {shown([c.batch_size / s for s in timed[name]])} "
                  f"| {shown([1000 * s / c.batch_size for s in called[name]])} | {peaks[name]:.2f} GiB "
                  f"| {work * c.batch_size / median / top:.0%} |")
        print(flush=True)


def parts_table(c: BenchConfig, machine: Machine) -> None:
    """Prints what ours costs beside the plain step: guidance, samplers, data, image frames."""
    for size in c.sizes:
        ours = Entrant("ours", c.preset, (("size", size),))
        trainer = Trainer(ours, 16, size, c, machine)
        rows = {f"training step with {images} image frames": Trainer(ours, 16, size, c, machine, images).step
                for images in (0, 4, 8)} | {"drawing its data": data(size, c, machine)}
        _table(f"16 x {size} x {size}, training, batch {c.batch_size}", take_turns(rows, c.rounds))
        trainer.model.requires_grad_(False)
        _table(f"16 x {size} x {size}, sampling, one clip",
               take_turns(samplers(trainer, size, machine), c.rounds))


def data(size: int, c: BenchConfig, machine: Machine) -> Callable[[], Any]:
    """Draws one batch of Moving MNIST with the preset's digits and no image frames."""
    drawn = DataConfig(size=size, digits=config.PRESETS[c.preset].get("digits", 2), num_images=0)
    return batches(drawn, c.batch_size, 0, device=machine.device).__next__


def samplers(trainer: Trainer, size: int, machine: Machine) -> dict[str, Callable]:
    """One call of the denoiser, plain and guided, and whole samplers on one clip of 16 frames."""
    process, z = DiffusionConfig(), trainer.x[:1]
    denoise, first = denoiser(trainer.network, process), torch.arange(16, device=z.device).view(-1, 1, 1) < 8
    guided = reconstruction_guided(denoise, z * first, lambda x: x * first, 2.0)

    def levels(steps: int) -> Tensor:
        return schedule(torch.linspace(1, 0, steps + 1), process).to(z.device)

    runs = {"plain call": lambda: denoise(z, levels(4)[2]),
            "reconstruction-guided call": lambda: guided(z, levels(4)[2]),
            "ancestral, 64 steps": lambda: sample(denoise, z, levels(64)),
            "predictor-corrector, 32 steps": lambda: sample(denoise, z, levels(32), delta=0.1),
            "ddim, 25 steps": lambda: ddim(denoise, z, levels(25)),
            "dpm_solver, 25 steps": lambda: dpm_solver(denoise, z, levels(25))}

    def within(run: Callable) -> Callable:
        def autocast() -> None:
            with torch.no_grad(), machine.autocast():
                run()
        return autocast
    return {name: within(run) for name, run in runs.items()}


def _table(title: str, timed: dict[str, list[float]]) -> None:
    """Prints seconds of each and, round by round, its ratio to the first."""
    print(f"| {title} | ms | over the first row |\n|---|---|---|")
    for name, seconds in timed.items():
        ratios = [one / base for one, base in zip(seconds, next(iter(timed.values())))]
        print(f"| {name} | {shown([1000 * s for s in seconds])} | {shown(ratios)} |")
    print(flush=True)


def growth_table(c: BenchConfig, machine: Machine) -> None:
    """Prints time and memory of a training step against frames, size and batch, with fitted exponents."""
    base = {"frames": 16, "size": 32, "batch_size": 2}
    print("| grows | from | ms per step | exponent | GiB | exponent |\n|---|---|---|---|---|---|")
    for grows, values in (("frames", (8, 16, 32, 64)), ("size", (32, 64, 128)), ("batch_size", (1, 2, 4, 8))):
        points = [base | {grows: value} for value in values]
        seconds = take_turns({str(p[grows]): Trainer(*_point(p, c), machine).step for p in points}, c.rounds)
        medians = [statistics.median(s) for s in seconds.values()]
        peaks = [peak_memory(*_point(p, c)) for p in points]
        print(f"| {grows} | {', '.join(map(str, values))} "
              f"| {', '.join(f'{1000 * s:.0f}' for s in medians)} | {_exponent(values, medians):.2f} "
              f"| {', '.join(f'{g:.2f}' for g in peaks)} | {_exponent(values, peaks):.2f} |", flush=True)


def _point(p: dict[str, int], c: BenchConfig) -> tuple:
    flags = (("size", p["size"]), ("frames", p["frames"]),
             ("attention_resolutions", (p["size"] // 4,)))  # on the same level at every size
    return (Entrant("ours", c.preset, flags), p["frames"], p["size"],
            dataclasses.replace(c, batch_size=p["batch_size"]))


def _exponent(xs: tuple[int, ...], ys: list[float]) -> float:
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def data_table(c: BenchConfig, machine: Machine) -> None:
    """Prints how many clips of 16 x 64 x 64 a second come from films, packed and not, by number of workers,
    what the share of a training step is that waits for them, and what the preset ucf101 would want.
    """
    with tempfile.TemporaryDirectory() as packed:
        pack(Path(c.data_dir), Path(packed), 64, 3, 0)
        films = {"films": DataConfig("video_folder", c.data_dir, channels=3)}
        films["packed"] = dataclasses.replace(films["films"], data_dir=packed)
        print("| source | clips a second |\n|---|---|")
        for name, workers in itertools.product(films, (0, 1, 2)):
            stream = batches(films[name], c.batch_size, 0, workers=workers)
            seconds = take_turns({name: lambda: [next(stream) for _ in range(20)]}, c.rounds)[name]
            print(f"| {name}, {workers} workers | {shown([20 * c.batch_size / s for s in seconds])} |", flush=True)
        trainer = Trainer(Entrant("ours", c.preset, (("size", 64), ("channels", 3))), 16, 64, c, machine)
        for name, data in films.items():
            print(f"\n{name}, 1 worker: {shown(_waits(trainer, data, c), 2)} of a training step waits for data")
    work = flops(Entrant("ours", "ucf101"), 16, 64)
    print(f"\nucf101: {work / 1e12:.1f} TFLOP a clip without images; 8 GPUs that each do 400 TFLOP/s would take "
          f"{8 * 400e12 / work:.0f} clips a second")


def _waits(trainer: Trainer, films: DataConfig, c: BenchConfig) -> list[float]:
    stream, shares = batches(films, c.batch_size, 0, workers=1), []
    next(stream)
    for _ in range(5 * c.rounds):
        begun = time.perf_counter()
        trainer.x = next(stream)[0]
        waited = time.perf_counter() - begun
        shares.append(waited / (trainer.step() or time.perf_counter() - begun))
    return shares


def main() -> None:
    """Makes the table of --table."""
    c, = config.parse(BenchConfig)
    machine = start(c.device, c.precision, c.threads)
    tuned = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    print(f"`python -m experiments.bench {shlex.join(sys.argv[1:])}`, {machine}, "
          f"PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d')}, allocator {tuned or 'as it is by default'}, "
          f"median [min, max] of {c.rounds} rounds\n")
    {"peer": peer_table, "parts": parts_table, "growth": growth_table, "data": data_table}[c.table](c, machine)


if __name__ == "__main__":
    config.run(main)

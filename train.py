"""Training (section 2's loss, section 4.3.1's joint image-video batches): python train.py --dataset moving_mnist.

Everything random in micro-batch i, data, times, noise and dropout, depends on (--seed, i) alone. So a resumed run is
the uninterrupted one, and N processes with torchrun are one process with N times the --accumulate.
"""
import contextlib
import dataclasses
import json
import math
import os
import shlex
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import checkpoint
import config
from data import DataConfig, batches, save_video
from diffusion import DiffusionConfig, denoiser, loss, schedule
from sampling import dpm_solver
from text import TextConfig, embed
from unet3d import UNet3D, UNetConfig


@dataclass
class TrainConfig:
    preset: str = ""  # cpu, cuda, or the paper's ucf101 bair kinetics600 text_small text_large text_9x128; by hardware
    steps: int = 20_000  # [1, 100000000] optimizer steps
    batch_size: int = 4  # [1, 65536] clips in a micro-batch, on each process
    accumulate: int = 1  # [1, 65536] micro-batches in an optimizer step, on each process
    lr: float = 1e-3  # (0, 1] learning rate of Adam after warm-up
    beta2: float = 0.99  # (0, 1) Adam's second decay rate; the first is 0.9
    weight_decay: float = 0.0  # [0, 1] decoupled weight decay
    warmup: int = 150  # [0, 1000000] optimizer steps from learning rate 0 to --lr
    decay: Literal["constant", "cosine"] = "cosine"  # the learning rate after warm-up; the paper's is constant
    clip: float = 1.0  # (0, 1000000] largest norm of the gradient
    ema: float = 0.999  # [0, 1) decay of the averaged weights that are sampled from
    cond_dropout: float = 0.1  # [0, 1] chance to drop a caption, for classifier-free guidance
    seed: int = 0  # [0, 2147483647] of weights, data and noise
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    precision: Literal["auto", "bf16", "float32"] = "auto"  # bf16 autocast where the hardware has it
    threads: int = 0  # [0, 1024] CPU threads; 0 leaves PyTorch's choice
    compile: bool = False  # torch.compile the network: minutes of waiting, then faster, on a GPU
    out: str = ""  # folder of the run; by default runs/<dataset>-<date>
    resume: str = ""  # folder of a run to go on with; its settings hold unless given again
    save_every: int = 1000  # [1, 100000000] steps between checkpoints
    preview_every: int = 1000  # [1, 100000000] steps between sample sheets, of which the first comes after 100
    log_every: int = 50  # [1, 100000000] steps between lines of metrics.jsonl
    dry_run: bool = False  # print parameters, FLOPs and bytes of the model without building it, and stop


@dataclass
class Settings:
    """All settings of a run; stored in its checkpoints as one flat dictionary, which sample.py reads back."""
    data: DataConfig
    unet: UNetConfig
    diffusion: DiffusionConfig
    text: TextConfig
    train: TrainConfig

    def flat(self) -> dict[str, Any]:
        return {name: value for part in vars(self).values() for name, value in dataclasses.asdict(part).items()}


@dataclass
class State:
    """All that training changes, and so all that a checkpoint holds besides the settings."""
    model: nn.Module
    ema: AveragedModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    step: int = 0


@dataclass
class Machine:
    """Where this process runs: its device, precision, and place among the processes that torchrun started."""
    device: torch.device
    bf16: bool
    rank: int = 0
    world: int = 1

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def settings(argv: list[str] | None = None) -> Settings:
    """The settings from the command line, the resumed run, and the preset; without --preset, by hardware."""
    parts = (DataConfig, UNetConfig, DiffusionConfig, TextConfig, TrainConfig)
    train = config.parse(*parts, argv=argv)[-1]
    kind = config.device(train.device).type
    defaults = {"preset": "cuda" if kind == "cuda" else "cpu"}
    if train.resume:
        defaults = checkpoint.load(newest(Path(train.resume)))["settings"] | {"resume": "", "out": train.resume}
    return Settings(*config.parse(*parts, argv=argv, defaults=defaults))


def newest(folder: Path) -> Path:
    """The newest checkpoint in a run's folder. Raises ValueError if there is none."""
    found = sorted(folder.glob("checkpoint_*.pt"))
    if not found:
        raise ValueError(f"there is no checkpoint in {folder}")
    return found[-1]


def start(train: TrainConfig) -> Machine:
    """Sets threads, device, precision and the process group, and says in one line what was chosen."""
    if train.threads:
        torch.set_num_threads(train.threads)
    device, rank, world = config.device(train.device), 0, 1
    if "RANK" in os.environ:  # set by torchrun
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    bf16 = {"auto": has_bf16, "bf16": True, "float32": False}[train.precision]
    if rank == 0:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
        print(f"preset {train.preset} on {name}, {'bf16' if bf16 else 'float32'}, {world} process(es): "
              f"--preset and --device choose another")
    return Machine(device, bf16, rank, world)


def build(s: Settings, device: torch.device) -> State:
    """Network, averaged network, Adam and the learning rate schedule, at step 0 or where --resume left them."""
    torch.manual_seed(s.train.seed)
    model = UNet3D(s.unet).to(device, memory_format=torch.channels_last)
    ema = AveragedModel(model, multi_avg_fn=ema_update(s.train.ema))
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.train.lr, betas=(0.9, s.train.beta2),
                                  weight_decay=s.train.weight_decay, fused=True)
    state = State(model, ema, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(s.train)))
    if s.train.resume:
        restore(state, checkpoint.load(newest(Path(s.train.resume))))
    return state


def ema_update(decay: float):
    """The update rule of the averaged weights: decay, less in the first few thousand steps."""
    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        now = min(decay, (1 + float(count)) / (10 + float(count)))
        torch._foreach_lerp_(averaged, current, 1 - now)
    return update


def lr_factor(train: TrainConfig):
    """step -> learning rate over --lr: linear warm-up, then constant or half a cosine down to 0."""
    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, train.warmup))
        if train.decay == "constant":
            return warm
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / train.steps)))
    return factor


def save(state: State, s: Settings) -> None:
    """Writes checkpoint_<step>.pt into the run's folder and keeps the newest two."""
    folder = Path(s.train.out)
    checkpoint.save(folder / f"checkpoint_{state.step:08d}.pt", {
        "settings": s.flat(), "step": state.step,
        "model": state.model.state_dict(), "ema": checkpoint.plain_keys(state.ema.state_dict()),
        "ema_count": state.ema.n_averaged, "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict()})
    for old in sorted(folder.glob("checkpoint_*.pt"))[:-2]:
        old.unlink()


def restore(state: State, content: dict[str, Any]) -> None:
    """Puts a checkpoint's content into state. There is no random state in it: see the head of this file."""
    state.model.load_state_dict(content["model"])
    state.ema.module.load_state_dict(content["ema"])
    state.ema.n_averaged.copy_(content["ema_count"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.scheduler.load_state_dict(content["scheduler"])
    state.step = content["step"]


def micro_batch_loss(network: nn.Module, batch: tuple, index: int, s: Settings, machine: Machine) -> Tensor:
    """The mean loss of micro-batch number index: video and image frames with their captions, some dropped."""
    x, captions = batch
    torch.manual_seed(s.train.seed << 32 | index)
    cond = condition(captions, s.text)
    if cond is not None:
        cond = (cond * (torch.rand(cond.shape[:2]) >= s.train.cond_dropout)[..., None, None]).to(machine.device)
    with machine.autocast():
        return loss(network, x.to(machine.device), s.diffusion, cond, s.data.num_images).mean()


def condition(captions: list[list[str]], text: TextConfig) -> Tensor | None:
    """Token embeddings (B, 1 + num_images, tokens, cond_dim) of nested captions; None for an unconditional model."""
    if not text.cond_dim:
        return None
    return embed([caption for clip in captions for caption in clip], text).unflatten(0, (len(captions), -1))


def train_step(network: nn.Module, state: State, stream, s: Settings, machine: Machine) -> tuple[Tensor, Tensor]:
    """One optimizer step over --accumulate micro-batches. Returns the mean loss and the gradient's norm."""
    total = torch.zeros((), device=machine.device)
    for part in range(s.train.accumulate):
        index = (state.step * s.train.accumulate + part) * machine.world + machine.rank
        last = part == s.train.accumulate - 1
        with contextlib.nullcontext() if last or machine.world == 1 else network.no_sync():
            part_loss = micro_batch_loss(network, next(stream), index, s, machine) / s.train.accumulate
            part_loss.backward()
        total += part_loss.detach()
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), s.train.clip)
    if not torch.isfinite(norm):
        raise ValueError(f"the gradient of step {state.step + 1} is not finite; the weights are as they were before "
                         f"it: lower --lr, or use --precision float32, and --resume")
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.scheduler.step()
    state.ema.update_parameters(state.model)
    state.step += 1
    return total, norm


def fit(s: Settings, machine: Machine) -> None:
    """The training loop: steps, metrics, previews and checkpoints, until --steps or a signal to stop."""
    state, stop = build(s, machine.device), stop_signal()
    network = torch.compile(state.model) if s.train.compile else state.model
    network = DistributedDataParallel(network) if machine.world > 1 else network
    first = state.step * s.train.accumulate * machine.world + machine.rank
    stream = batches(s.data, s.train.batch_size, s.train.seed, first, machine.world, machine.device)
    clips, losses, begun = s.train.batch_size * s.train.accumulate * machine.world, [], time.time()
    with tqdm(total=s.train.steps * clips, initial=state.step * clips, unit=" clips", smoothing=0.05,
              disable=machine.rank > 0) as bar:
        while state.step < s.train.steps and not any_rank(stop, machine):
            value, norm = train_step(network, state, stream, s, machine)
            losses.append(value)
            bar.update(clips)
            if machine.rank > 0:
                continue
            if state.step % s.train.log_every == 0:
                log(s, bar, step=state.step, loss=torch.stack(losses).mean().item(), grad_norm=norm.item(),
                    lr=state.scheduler.get_last_lr()[0], clips_per_second=clips * len(losses) / (time.time() - begun))
                losses, begun = [], time.time()
            if state.step == min(100, s.train.preview_every) or state.step % s.train.preview_every == 0:
                preview(state, s, machine)
            if state.step % s.train.save_every == 0:
                save(state, s)
    if machine.rank == 0:
        finish(state, s, stop)


def stop_signal() -> list[int]:
    """A list that Ctrl-C or SIGTERM appends its number to, so that the step finishes; a second one ends at once."""
    received = []

    def remember(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, remember)
    return received


def any_rank(stop: list[int], machine: Machine) -> bool:
    """Whether any process was told to stop: all of them must leave the loop after the same step."""
    if machine.world == 1:
        return bool(stop)
    told = torch.tensor(float(bool(stop)), device=machine.device)
    dist.all_reduce(told)
    return told.item() > 0


def log(s: Settings, bar: tqdm, **values: float) -> None:
    """Appends one line to metrics.jsonl, shows the loss in the bar, draws the curve if matplotlib is there."""
    bar.set_postfix(step=values["step"], loss=f"{values['loss']:.4f}")
    path = Path(s.train.out) / "metrics.jsonl"
    with open(path, "a") as file:
        file.write(json.dumps(values) + "\n")


def draw_curve(folder: Path) -> None:
    """Draws loss.png from metrics.jsonl if matplotlib happens to be installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    axes = (figure := Figure()).subplots()
    axes.semilogy([line["step"] for line in lines], [line["loss"] for line in lines])
    axes.set(xlabel="step", ylabel="loss")
    figure.savefig(folder / "loss.png")


@torch.no_grad()
def preview(state: State, s: Settings, machine: Machine) -> None:
    """Writes samples/step_<step>.gif (.webp, .png): captions of the test split, fixed noise, EMA weights, 25 calls."""
    x, captions = next(batches(dataclasses.replace(s.data, split="test", num_images=0), 4, s.train.seed))
    cond = condition(captions, s.text)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(s.train.seed)).to(machine.device)
    logsnrs = schedule(torch.linspace(1, 0, 26), s.diffusion).to(machine.device)
    model = state.ema.module.eval()
    with machine.autocast():
        denoise = denoiser(model, s.diffusion, cond if cond is None else cond.to(machine.device))
        video = dpm_solver(lambda z, logsnr: denoise(z, logsnr).clamp(-1, 1), z, logsnrs)
    folder = Path(s.train.out) / "samples"
    folder.mkdir(exist_ok=True)
    save_video(video.cpu(), folder / f"step_{state.step:08d}")


def finish(state: State, s: Settings, stop: list[int]) -> None:
    """Saves; after a signal, prints the command that goes on and exits with 128 + its number."""
    save(state, s)
    if stop:
        print(f"stopped at step {state.step}; to go on: python train.py --resume {shlex.quote(s.train.out)}")
        raise SystemExit(128 + stop[0])
    print(f"done: python sample.py --checkpoint {shlex.quote(s.train.out)}")


def dry_run(s: Settings) -> None:
    """Prints parameters, FLOPs of a training step and bytes of --preset's model, built without memory."""
    with torch.device("meta"):
        model = UNet3D(s.unet)
        x = torch.empty(1, s.unet.channels, s.data.frames + s.data.num_images, s.unet.size, s.unet.size)
        cond = torch.empty(1, s.text.tokens, s.text.cond_dim) if s.text.cond_dim else None
    with FlopCounterMode(display=False) as counter:
        loss(model, x, s.diffusion, cond, s.data.num_images).mean().backward()
    count = sum(p.numel() for p in model.parameters())
    flops = counter.get_total_flops() * s.train.batch_size * s.train.accumulate
    print(f"{s.train.preset}: {count / 1e6:.1f} M parameters; {flops / 1e12:.2f} TFLOP per training step of "
          f"{s.train.batch_size * s.train.accumulate} clips; float32 bytes: weights {gib(4 * count)}, gradients "
          f"{gib(4 * count)}, optimizer {gib(8 * count)}, EMA {gib(4 * count)}")


def gib(count: int) -> str:
    """Bytes, readable."""
    return f"{count / 2**30:.2f} GiB"


def main() -> None:
    """Trains, as the flags say."""
    s = settings()
    if s.train.dry_run:
        return dry_run(s)
    machine = start(s.train)
    prepare(s, machine)
    try:
        fit(s, machine)
    finally:
        if machine.world > 1:
            dist.destroy_process_group()


def prepare(s: Settings, machine: Machine) -> None:
    """Names and creates the run's folder; refuses one that holds another run."""
    s.train.out = s.train.out or f"runs/{s.data.dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(s.train.out)
    if not s.train.resume and any(folder.glob("checkpoint_*.pt")):
        raise ValueError(f"{folder} holds a run already: go on with it by --resume {folder}, or choose another --out")
    if machine.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(s.flat(), indent=1))


if __name__ == "__main__":
    config.run(main)

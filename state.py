"""A training run: its settings, all that it changes, and how both go into checkpoints and come back.

There is no random state to save. Everything random in micro-batch i, data, times, noise and dropout, depends on
(--seed, i) alone, so that step and weights are all a resumed run needs to be the uninterrupted one.
"""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import checkpoint
import config
from data import DataConfig
from diffusion import DiffusionConfig
from machine import find_device
from magicvideo import NETWORKS
from text import TextConfig
from unet3d import UNetConfig


@dataclass
class TrainConfig:
    """How to train."""
    preset: str = ""  # cpu, cuda, ucf101, bair, kinetics600, text_small, text_large, text_9x128; by hardware
    arch: Literal["unet3d", "magicvideo"] = "unet3d"  # the network: VDM's, or MagicVideo's
    steps: int = 20_000  # [1, 100000000] optimizer steps
    batch_size: int = 4  # [1, 65536] clips in a micro-batch, on each process
    accumulate: int = 1  # [1, 65536] micro-batches in an optimizer step, on each process
    lr: float = 1e-3  # (0, 1] learning rate of Adam after warm-up
    beta2: float = 0.99  # (0, 1) Adam's second decay rate; the first is 0.9
    weight_decay: float = 0.0  # [0, 1] decoupled weight decay
    warmup: int = 150  # [0, 1000000] optimizer steps from learning rate 0 to --lr
    decay: Literal["constant", "cosine"] = "cosine"  # learning rate after warm-up; the paper's is constant
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
    preview_every: int = 1000  # [1, 100000000] steps between sample sheets; one more after 100
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
        """All fields of all parts in one dictionary; a name that parts share has one value."""
        return {name: value for part in vars(self).values() for name, value in vars(part).items()}


@dataclass
class State:
    """All that training changes, and so all that a checkpoint holds besides the settings."""
    model: nn.Module
    ema: AveragedModel
    optimizer: torch.optim.Optimizer
    step: int = 0


def settings(argv: list[str] | None = None) -> Settings:
    """The settings: flags given by hand, else the resumed run's, else the preset's for the hardware."""
    def defaults(given: dict[str, Any]) -> dict[str, Any]:
        if not given.get("resume"):
            return {"preset": find_device(given.get("device", "auto")).type}  # cpu or cuda
        if "preset" in given:
            raise ValueError("--preset chooses what a new run starts from; it cannot be given with --resume")
        path = checkpoint.newest(Path(given["resume"]))
        content = checkpoint.load(path)
        if not isinstance(content, dict) or not {"settings", "optimizer", "step"} <= set(content):
            raise ValueError(f"{path} holds no run that can be resumed")
        return content["settings"] | {"out": given["resume"]}
    parts = (DataConfig, UNetConfig, DiffusionConfig, TextConfig, TrainConfig)
    return Settings(*config.parse(*parts, argv=argv, defaults=defaults))


def build(s: Settings, device: torch.device) -> State:
    """Network, averaged network and Adam, at step 0 or where --resume left them."""
    torch.manual_seed(s.train.seed)
    model = NETWORKS[s.train.arch](s.unet).to(device, memory_format=torch.channels_last)
    ema = AveragedModel(model, multi_avg_fn=ema_update(s.train.ema))
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.train.lr, betas=(0.9, s.train.beta2),
                                  weight_decay=s.train.weight_decay, fused=True)
    state = State(model, ema, optimizer)
    if s.train.resume:
        path = checkpoint.newest(Path(s.train.resume))
        try:
            restore(state, checkpoint.load(path))
        except RuntimeError:
            raise ValueError(f"{path} holds another network; resume without flags that change it") from None
    return state


def ema_update(decay: float) -> Callable:
    """The update rule of the averaged weights: decay, less in the first few thousand steps."""
    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        now = min(decay, (1 + float(count)) / (10 + float(count)))
        torch._foreach_lerp_(averaged, current, 1 - now)
    return update


def save(state: State, s: Settings) -> None:
    """Writes checkpoint_<step>.pt into the run's folder and keeps the newest two."""
    folder = Path(s.train.out)
    checkpoint.save(folder / f"checkpoint_{state.step:08d}.pt", {
        "settings": s.flat(), "step": state.step,
        "model": state.model.state_dict(), "ema": checkpoint.plain_keys(state.ema.state_dict()),
        "ema_count": state.ema.n_averaged, "optimizer": state.optimizer.state_dict()})
    for old in sorted(folder.glob("checkpoint_*.pt"))[:-2]:
        old.unlink()


def restore(state: State, content: dict[str, Any]) -> None:
    """Puts a checkpoint's content into state. There is no random state in it: see the head of this file."""
    state.model.load_state_dict(content["model"])
    state.ema.module.load_state_dict(content["ema"])
    state.ema.n_averaged.copy_(content["ema_count"])
    groups = state.optimizer.state_dict()["param_groups"]  # as the flags say now
    state.optimizer.load_state_dict(content["optimizer"] | {"param_groups": groups})
    state.step = content["step"]

"""A training run: its settings, all that it changes, and how both go into checkpoints and come back.

There is no random state to save. Everything random in micro-batch i, data, times, noise and dropout, depends
on (--seed, i) alone, so that weights, Adam's state and the step make a resumed run the uninterrupted one.
"""
import contextlib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import checkpoint
import config
import magicvideo
from autoencoder import Autoencoder, AutoencoderConfig, frozen, in_latents
from data import DataConfig, batches
from diffusion import DiffusionConfig
from machine import Machine, find_device
from magicvideo import MagicVideoConfig
from text import TextConfig


FIRST = "dataset data_dir preset size frames batch_size steps lr out resume".split()  # in --help


@dataclass
class TrainConfig:
    """How to train."""
    preset: str = ""  # cpu, cuda, ucf101, ...: other defaults than shown here; without it cuda or cpu
    arch: Literal["unet3d", "magicvideo", "autoencoder"] = "unet3d"  # what is trained; see GUIDE.md
    init: str = ""  # run or checkpoint whose averaged weights and network a new run begins with
    latent: str = ""  # run or checkpoint of an autoencoder, in whose latents the network diffuses
    steps: int = 20_000  # [1, 100000000] optimizer steps
    batch_size: int = 4  # [1, 65536] clips in a micro-batch, on each process
    accumulate: int = 1  # [1, 65536] micro-batches in an optimizer step, on each process
    lr: float = 1e-3  # (0, 1] learning rate after warm-up
    optimizer: Literal["adam", "muon"] = "adam"  # the paper's Adam; muon learns faster by the clip, see GUIDE.md
    beta2: float = 0.99  # (0, 1) Adam's second decay rate; the first is 0.9
    weight_decay: float = 0.0  # [0, 1] decoupled weight decay
    warmup: int = 150  # [0, 1000000] optimizer steps from learning rate 0 to --lr
    decay: Literal["constant", "cosine"] = "cosine"  # learning rate after warm-up; the paper's is constant
    clip: float = 1.0  # (0, 1000000] largest norm of the gradient
    ema: float = 0.999  # [0, 1) decay of the averaged weights that are sampled from
    cond_dropout: float = 0.1  # [0, 1] chance to drop a caption, for classifier-free guidance
    seed: int = 0  # [0, 2147483647] of weights, data and noise
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps, ...
    precision: Literal["auto", "bf16", "float32"] = "auto"  # bf16 autocast where the hardware has it
    threads: int = 0  # [0, 1024] CPU threads; 0 leaves PyTorch's choice
    workers: int = -1  # [-1, 256] more processes that read clips ahead; -1: for films, half of the cores
    shard: bool = False  # with torchrun: each process holds a part of weights, EMA and Adam's state (FSDP2)
    compile: bool = False  # torch.compile the network: minutes of waiting, then faster, on a GPU
    out: str = ""  # folder of the run; by default runs/<dataset>-<date>
    resume: str = ""  # folder of a run to go on with; its settings hold unless given again
    save_every: int = 1000  # [1, 100000000] steps between checkpoints
    keep: int = 2  # [1, 1000] newest checkpoints that are kept
    preview_every: int = 1000  # [1, 100000000] steps between sample sheets; also after 30 and 200
    log_every: int = 50  # [1, 100000000] steps between lines of metrics.jsonl
    dry_run: bool = False  # print parameters, FLOPs and bytes of the model without building it, and stop


@dataclass
class Settings:
    """All settings of a run; stored in its checkpoints as one flat dictionary, which sample.py reads back."""
    data: DataConfig
    unet: MagicVideoConfig  # frames as the data have them; network is what is built
    diffusion: DiffusionConfig
    text: TextConfig
    autoencoder: AutoencoderConfig
    train: TrainConfig
    before: dict[str, Any] = field(default_factory=dict)  # flat, what --resume, --init and --latent say

    @property
    def network(self) -> MagicVideoConfig:
        """The architecture: unet, or with --latent the same for latents."""
        return in_latents(self.unet, self.autoencoder) if self.train.latent else self.unet

    def flat(self) -> dict[str, Any]:
        """All fields of all parts in one dictionary; a name that parts share has one value."""
        parts = (self.data, self.unet, self.diffusion, self.text, self.autoencoder, self.train)
        return {name: value for part in parts for name, value in vars(part).items()}

    def changes(self) -> str:
        """The flags that differ from what the run goes on from, each with both values; "" if none does."""
        return ", ".join(f"--{name} {now} (was {was})" for name, was in self.before.items()
                         if (now := self.flat().get(name)) != was and name not in ("out", "resume"))


@dataclass
class State:
    """All that training changes, and so all that a checkpoint holds besides the settings."""
    model: nn.Module
    ema: AveragedModel
    optimizer: torch.optim.Optimizer
    step: int = 0
    autoencoder: Autoencoder | None = None  # with --latent: frozen, it travels in the checkpoint


PARTS = DataConfig, MagicVideoConfig, DiffusionConfig, TextConfig, AutoencoderConfig, TrainConfig


def settings(argv: list[str] | None = None) -> Settings:
    """The settings: flags given by hand, else the run's that is resumed or whose latents are diffused, else
    the preset's for the hardware. Bad ones end the program with one sentence.
    """
    before = {}

    def defaults(given: dict[str, Any]) -> dict[str, Any]:
        if not given.get("resume"):
            before.update(start_of(given.get("init"), given.get("latent")))
            cuda = find_device(given.get("device", "auto")).type == "cuda"
            return {"preset": "cuda" if cuda else "cpu"} | before
        for name in {"preset", "init", "latent", "optimizer"} & set(given):
            raise ValueError(f"--{name} chooses what a new run starts from; it cannot be given with --resume")
        before.update(stored("resume", given["resume"])[2].flat())
        return before | {"out": given["resume"]}

    s = Settings(*config.parse(*PARTS, argv=argv, first=FIRST, defaults=defaults), before)
    if s.train.arch != "autoencoder":
        s.network.heights()
    elif s.train.latent or s.train.dry_run or s.unet.keys:
        raise ValueError("--arch autoencoder goes without --latent, --keys and --dry_run")
    else:
        in_latents(s.unet, s.autoencoder)
    if s.train.latent and s.diffusion.prediction == "eps":
        raise ValueError("--latent needs --prediction v: the error of eps grows where nothing is clipped")
    if s.train.shard and (s.train.optimizer == "muon" or s.train.arch == "autoencoder"):
        raise ValueError("--shard goes with --optimizer adam, since muon needs whole matrices, and is not for "
                         "--arch autoencoder")
    return s


def stored(flag: str, path: str) -> tuple[Path, dict[str, Any], Settings]:
    """The file that --resume, --init or --latent means, what it holds, and its settings. Raises ValueError
    if it is not of the kind that the flag needs.
    """
    file = checkpoint.newest(Path(path)) if flag == "resume" else checkpoint.find(path)
    content = checkpoint.load(file)
    found = content.get("settings")
    coder = isinstance(found, dict) and found.get("arch") == "autoencoder"
    fits, what = {
        "resume": ({"optimizer", "step"} <= set(content), "run that can be resumed"),
        "init": ("ema" in content and not coder, "network that diffuses"),
        "latent": ("ema" in content and coder, "autoencoder; train.py --arch autoencoder trains one")}[flag]
    if not isinstance(found, dict) or not fits:
        raise ValueError(f"--{flag} {file} holds no {what}")
    return file, content, Settings(*config.rebuild(found, *PARTS))


def start_of(init: str | None, latent: str | None) -> dict[str, Any]:
    """What a new run takes over: all of the network whose weights it begins with but how it was trained, and
    the autoencoder whose latents it diffuses.
    """
    taken = {}
    if init:
        s = stored("init", init)[2]
        taken |= vars(s.unet) | vars(s.diffusion) | vars(s.text) | {"arch": s.train.arch}
    if latent:
        taken |= vars(stored("latent", latent)[2].autoencoder)
    return {name: value for name, value in taken.items() if name not in ("dropout", "checkpointing")}


@contextlib.contextmanager
def weights(flag: str, s: Settings) -> Iterator[dict[str, Any]]:
    """What the checkpoint of a flag holds, to be loaded; weights that do not fit are one ValueError."""
    path, content, _ = stored(flag, getattr(s.train, flag))
    try:
        yield content
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"--{flag} {path} holds another network: {s.changes() or 'no flag explains it'}; "
                         f"{'resume' if s.train.resume else 'start'} without flags that change it") from None


def build(s: Settings, device: torch.device) -> State:
    """Network, averaged network and Adam, at step 0 or where --resume left them."""
    torch.manual_seed(s.train.seed)
    coder = s.train.arch == "autoencoder"
    model = Autoencoder(s.autoencoder) if coder else magicvideo.build_network(s.train.arch, s.network)
    if s.train.init and not s.train.resume:
        with weights("init", s) as content:
            model.load_state_dict(content["ema"])
    # What is sharded goes to the device part by part: the whole need not fit there.
    model = model.to("cpu" if s.train.shard else device, memory_format=torch.channels_last)
    ema = AveragedModel(model, multi_avg_fn=ema_update(s.train.ema))
    state = State(model, ema, optimizer(model, s.train))
    if s.train.resume:
        with weights("resume", s) as content:
            restore(state, content)
            if s.train.latent:
                state.autoencoder = frozen(s.autoencoder, content["autoencoder"], device)
    elif s.train.latent:
        with weights("latent", s) as content:
            state.autoencoder = frozen(s.autoencoder, content["ema"], device)
        clips = next(batches(replace(s.data, num_images=0), 64, s.train.seed))[0]
        state.autoencoder.measure(clips.to(device))  # so that latents have unit variance
    if s.train.shard:
        shard(state, s.train)
    return state


def optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that the flags name, of the model as it is now."""
    kind = Muon if train.optimizer == "muon" else torch.optim.AdamW
    return kind(model.parameters(), lr=train.lr, betas=(0.9, train.beta2), weight_decay=train.weight_decay,
                fused=True)


def shard(state: State, train: TrainConfig) -> None:
    """Leaves each of torchrun's processes its part of the weights, their averages and Adam's state, by
    PyTorch's fully_shard: a block has its whole weights only while it runs.
    """
    from torch.distributed.fsdp import fully_shard  # they take a second, and few need them
    from torch.distributed.tensor import distribute_tensor

    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of outputs that are changed in place: none is
    for network in (state.model, state.ema.module):
        network.to(memory_format=torch.contiguous_format)  # it takes no other
        blocks = [part for part in network.modules() if isinstance(part, magicvideo.Block)]
        for part in (*blocks, network):
            fully_shard(part, reshard_after_forward=True)
    whole = state.optimizer
    state.optimizer = optimizer(state.model, train)
    for old, new in zip(whole.param_groups[0]["params"], state.model.parameters()):
        state.optimizer.state[new] = {
            name: distribute_tensor(value, new.device_mesh, new.placements) if value.shape else value
            for name, value in whole.state[old].items()}


def gathered(content: Any) -> Any:
    """The same, with whole tensors where --shard left each process a part; all of them must ask."""
    if isinstance(content, dict):
        return {name: gathered(value) for name, value in content.items()}
    return content.full_tensor().cpu() if hasattr(content, "full_tensor") else content


class Muon(torch.optim.AdamW):
    """AdamW, but matrices and kernels of 8 x 8 and more step along their orthogonalised momentum (Jordan et
    al. 2024), half as long as lr in root mean square. torch.optim.Muon takes no kernels, and computes in bf16.
    """
    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step; takes the gradients of what it has moved."""
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.grad is None or p.ndim < 2 or min(p.shape[:2]) < 8:
                continue
            state = self.state[p]
            if not state:  # AdamW wants everybody to have a step when it is loaded
                state.update(step=torch.tensor(0.0), momentum=torch.zeros_like(p))
            momentum = state["momentum"].lerp_(p.grad, 0.05)
            update = orthogonal(momentum.lerp(p.grad, 0.05).flatten(1))
            lr, decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
            p.mul_(1 - lr * decay).add_(update.view_as(p), alpha=-0.5 * lr * max(update.shape) ** 0.5)
            p.grad = None
        super().step()


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with its singular values brought near 1, by five Newton-Schulz iterations."""
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x if x.shape == matrix.shape else x.T


def ema_update(decay: float) -> Callable:
    """The update rule of the averaged weights: decay, less in the first few thousand steps."""
    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        now = min(decay, (1 + float(count)) / (10 + float(count)))
        torch._foreach_lerp_(averaged, current, 1 - now)
    return update


def save(state: State, s: Settings, machine: Machine) -> Path:
    """Writes checkpoint_<step>.pt into the run's folder, keeps the newest --keep, and returns its path. The
    first process writes; with --shard all of them must ask.
    """
    path = Path(s.train.out) / f"checkpoint_{state.step:08d}.pt"
    content = gathered({
        "settings": s.flat(), "step": state.step,
        "model": state.model.state_dict(), "ema": state.ema.module.state_dict(),
        "ema_count": state.ema.n_averaged, "optimizer": state.optimizer.state_dict(),
        "sampling": config.SAMPLING[s.train.preset],
        **({"autoencoder": state.autoencoder.state_dict()} if state.autoencoder else {})})
    if machine.rank == 0:
        checkpoint.save(path, content)
        for old in sorted(path.parent.glob("checkpoint_*.pt"))[:-s.train.keep]:
            old.unlink()
    return path


def restore(state: State, content: dict[str, Any]) -> None:
    """Puts a checkpoint's content into state. There is no random state in it: see the head of this file."""
    state.model.load_state_dict(content["model"])
    state.ema.module.load_state_dict(content["ema"])
    state.ema.n_averaged.copy_(content["ema_count"])
    groups = state.optimizer.state_dict()["param_groups"]  # as the flags say now
    state.optimizer.load_state_dict(content["optimizer"] | {"param_groups": groups})
    for parameter, values in state.optimizer.state.items():
        for name, value in values.items():
            if value.shape:  # fused Adam goes by the order in memory, which --shard changes
                values[name] = torch.empty_like(parameter).copy_(value)
    state.step = int(content["step"])


# ---- what a run writes down for people: metrics.jsonl, a line every so many steps ------------------------


def log(folder: Path, values: dict[str, float]) -> None:
    """Adds one line, which begins with the step, to the run's metrics.jsonl."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(values) + "\n")


def forget_log(folder: Path, step: int) -> None:
    """Drops lines that a crash left torn from metrics.jsonl, and those after step, which is taken again."""
    path = folder / "metrics.jsonl"
    text = path.read_text(errors="replace") if path.exists() else ""
    lines = re.finditer(r'^\{"step": (\d+)[^{}\n]*\}$', text, re.M)
    kept = [line[0] + "\n" for line in lines if int(line[1]) <= step]
    with checkpoint.replacing(path) as file:
        file.write_text("".join(kept))

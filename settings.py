"""The settings of a training run: flags, a run that is resumed or begun with, and the preset."""
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

import checkpoint
import config
from autoencoder import AutoencoderConfig, in_latents
from data import DataConfig
from diffusion import DiffusionConfig
from machine import find_device
from magicvideo import MagicVideoConfig
from presets import FITS, PRESETS
from text import TextConfig


@dataclass
class TrainConfig:
    """How to train."""
    preset: str = ""  # cpu, cuda, ucf101, ...: values of the flags that are not given; by default one that fits
    arch: Literal["unet3d", "magicvideo", "autoencoder"] = "unet3d"  # what is trained; see GUIDE.md
    init: str = ""  # run or checkpoint whose averaged weights and network a new run begins with
    latent: str = ""  # run or checkpoint of an autoencoder, in whose latents the network diffuses
    steps: int = 20_000  # [1, 100000000] optimizer steps
    batch_size: int = 4  # [1, 65536] clips in a micro-batch, on each process
    accumulate: int = 1  # [1, 65536] micro-batches in an optimizer step, on each process
    lr: float = 1e-3  # (0, 1] learning rate after warm-up
    optimizer: Literal["adam", "muon"] = "adam"  # adam is the paper's; muon learns faster, see GUIDE.md
    beta2: float = 0.99  # (0, 1) Adam's second decay rate; the first is 0.9
    weight_decay: float = 0.0  # [0, 1] decoupled weight decay
    warmup: int = 150  # [0, 1000000] optimizer steps from learning rate 0 to --lr
    decay: Literal["constant", "linear", "cosine"] = "cosine"  # learning rate after warm-up; see lr_factor
    clip: float = 1.0  # (0, 1000000] largest norm of the gradient
    ema: float = 0.999  # [0, 1) decay of the averaged weights that are sampled from
    cond_dropout: float = 0.1  # [0, 1] chance to drop a caption, for classifier-free guidance
    seed: int = 0  # [0, 2147483647] of weights, data and noise
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps, ...
    precision: Literal["auto", "bf16", "fp16", "float32"] = "auto"  # auto: the fastest that the hardware has
    threads: int = 0  # [0, 1024] CPU threads; 0 leaves PyTorch's choice
    workers: int = -1  # [-1, 256] more processes that make clips; -1: half the cores for films, 1 for a GPU
    shard: bool = False  # with torchrun: each process holds a part of weights, EMA and Adam's state (FSDP2)
    compile: bool = False  # torch.compile the network: minutes of waiting, then faster, on a GPU
    out: str = ""  # folder of the run; by default runs/<dataset>-<date>
    resume: str = ""  # folder of a run to go on with; its settings hold unless given again
    save_every: int = 1000  # [1, 100000000] steps between checkpoints
    keep: int = 2  # [1, 1000] newest checkpoints that are kept
    preview_every: int = 1000  # [1, 100000000] steps between sample sheets; also after 30 and 200
    log_every: int = 50  # [1, 100000000] steps between lines of metrics.jsonl


HERE = Path(__file__).parent
FIRST = "dataset data_dir preset size frames batch_size steps lr out resume".split()  # in --help
PARTS = DataConfig, MagicVideoConfig, DiffusionConfig, TextConfig, AutoencoderConfig, TrainConfig


@dataclass
class Settings:
    """All settings of a run; stored in its checkpoints as one flat dictionary, which sample.py reads back."""
    data: DataConfig
    unet: MagicVideoConfig  # for frames in pixels; what is built is network, below
    diffusion: DiffusionConfig
    text: TextConfig
    autoencoder: AutoencoderConfig
    train: TrainConfig
    before: dict[str, Any] = field(default_factory=dict)  # flat, what --resume, --init and --latent say

    @property
    def network(self) -> MagicVideoConfig:
        """The architecture: unet, or with --latent the same for latents."""
        if self.train.latent:
            return in_latents(self.unet, self.autoencoder)
        return self.unet

    def flat(self) -> dict[str, Any]:
        """All fields of all parts in one dictionary; a name that parts share has one value."""
        values = {}
        for part in (self.data, self.unet, self.diffusion, self.text, self.autoencoder, self.train):
            values |= vars(part)
        return values

    def changes(self) -> str:
        """The flags that differ from what the run goes on from, each with both values; "" if none does."""
        changed, now = [], self.flat()
        for name, was in self.before.items():
            if name not in ("out", "resume") and now.get(name) != was:
                changed.append(f"--{name} {now.get(name)} (was {was})")
        return ", ".join(changed)


def read_settings(argv: list[str] | None = None) -> Settings:
    """The settings: flags given by hand, else those of the run that is resumed, begun with, or whose latents
    are diffused, else the preset's for the hardware. Bad ones end the program with one sentence.
    """
    before = {}  # what the run goes on from: filled while flags are parsed, kept in Settings

    def defaults(given: dict[str, Any]) -> dict[str, Any]:
        if "resume" in given:
            before.update(resumed(given))
            return before | {"out": given["resume"]}
        preset = given.get("preset") or suitable_preset(given)
        values = PRESETS.get(preset, {}) | given
        latent = values.get("latent", "")
        if "latent" not in given:
            if "init" in given or values.get("arch") == "autoencoder":
                latent = ""
            elif latent:
                if values.get("dataset", "moving_mnist") != "moving_mnist":
                    raise ValueError(f"--preset {preset} is in latents of digits: give another one, or --latent")
                latent = str(HERE / latent)  # it comes with the project
        before.update(start_of(given.get("init", ""), latent))
        return before | fitting(preset, given) | {"preset": preset, "latent": latent}

    s = Settings(*config.parse(*PARTS, argv=argv, first=FIRST, defaults=defaults), before)
    check_together(s)
    return s


def suitable_preset(given: dict[str, Any]) -> str:
    """The preset for the data and the device: latents for digits, pixels for all else."""
    on_gpu = find_device(given.get("device", "auto")).type == "cuda"
    if given.get("dataset", "moving_mnist") == "moving_mnist":
        return "cuda" if on_gpu else "cpu"
    return "pixels" if on_gpu else "films"


def fitting(preset: str, given: dict[str, Any]) -> dict[str, Any]:
    """How a preset divides its clips of a step so that they fit on the GPU; {} where flags say it, on a CPU,
    and under torchrun, whose processes must agree.
    """
    device = find_device(given.get("device", "auto"))
    by_hand = "batch_size" in given or "accumulate" in given
    if preset not in FITS or device.type != "cuda" or by_hand or "RANK" in os.environ:
        return {}
    free, _ = torch.cuda.mem_get_info(device)
    fast = [fit for fit in FITS[preset] if free >= fit[0] * 2**30]  # the fastest first; the last one needs 0
    _, clips, checkpointing = fast[0]
    whole = PRESETS[preset]["batch_size"] * PRESETS[preset].get("accumulate", 1)
    return {"batch_size": clips, "accumulate": whole // clips, "checkpointing": checkpointing}


def resumed(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run in --resume. Raises ValueError for flags that cannot change on the way."""
    for name in ("preset", "init", "latent", "optimizer"):
        if name in given:
            raise ValueError(f"--{name} chooses what a new run starts from; it cannot be given with --resume")
    if Path(given["resume"]).is_file():
        raise ValueError(f"--resume takes the folder of a run: --resume {Path(given['resume']).parent}")
    _, content, s = read_run("resume", given["resume"])
    if given.get("steps", content["step"]) < content["step"]:
        raise ValueError(f"--steps {given['steps']} counts from the beginning, and the run is at step "
                         f"{content['step']} already: nothing was changed")
    return s.flat()


def start_of(init: str, latent: str) -> dict[str, Any]:
    """What a new run takes over: all of the network whose weights it begins with but how it was trained, and
    the autoencoder whose latents it diffuses.
    """
    taken = {}
    if init:
        _, content, s = read_run("init", init)
        if "autoencoder" in content and not latent:
            raise ValueError(f"--init {init} draws latents: give the autoencoder of its training too, by --latent")
        taken |= vars(s.unet) | vars(s.diffusion) | vars(s.text) | {"arch": s.train.arch}
    if latent:
        _, _, s = read_run("latent", latent)
        taken |= vars(s.autoencoder)
    taken.pop("dropout", None)
    taken.pop("checkpointing", None)
    return taken


def read_run(flag: str, path: str) -> tuple[Path, dict[str, Any], Settings]:
    """The file that --resume, --init or --latent means, what it holds, and its settings. Raises ValueError
    if it is not of the kind that the flag needs.
    """
    file = checkpoint.newest(Path(path)) if flag == "resume" else checkpoint.find(path)
    content = checkpoint.load(file)
    found = content.get("settings")
    if not isinstance(found, dict):
        raise ValueError(f"--{flag} {file} holds no network that train.py made")
    drawing = found.get("arch") != "autoencoder"
    if flag == "resume" and not ("optimizer" in content and isinstance(content.get("step"), int)):
        raise ValueError(f"--resume {file} holds no run that can be resumed")
    if flag == "init" and not ("ema" in content and drawing):
        raise ValueError(f"--init {file} holds no network that diffuses")
    if flag == "latent" and ("ema" not in content or drawing):
        raise ValueError(f"--latent {file} holds no autoencoder; train.py --arch autoencoder trains one")
    return file, content, Settings(*config.rebuild(found, *PARTS))


def check_together(s: Settings) -> None:
    """Raises ValueError for settings that do not fit each other."""
    train = s.train
    if not train.resume and s.data.dataset == "moving_mnist" and (s.data.data_dir or s.data.list):
        raise ValueError("--data_dir and --list are for --dataset video_folder")
    if train.arch == "autoencoder":
        if train.latent:
            raise ValueError("--arch autoencoder goes without --latent")
        if train.shard:
            raise ValueError("--shard is not for --arch autoencoder")
        in_latents(s.unet, s.autoencoder)
    else:
        s.network.heights()
    if train.latent and s.diffusion.prediction == "eps":
        raise ValueError("--latent needs --prediction v: the error of eps grows where nothing is clipped")
    if train.shard and train.optimizer == "muon":
        raise ValueError("--shard goes with --optimizer adam, since muon needs whole matrices")

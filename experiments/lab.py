"""The laboratory of evaluate: a model, the networks that measure, real clips, and drawn ones."""
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import infill
from experiments import metrics
import sample
from data import moving_mnist, stochastic_moving_mnist
from experiments.features import Features, load_features, observe
from infill import Given, Model, SampleConfig, nothing
from machine import Machine, start

HERE = Path(__file__).parents[1]  # the clone
Arm = Callable[[int], dict[str, float]]  # seed -> what was measured
Experiment = Literal["samplers", "joint", "guidance", "extend", "predict", "given", "super_resolve",
                     "positions", "blocks", "speed", "exchange"]


@dataclass
class EvaluateConfig:
    """Which experiment, on which model, how large."""
    experiment: Experiment = "samplers"  # which one
    checkpoint: str = "pretrained/moving_mnist_32.pt"  # a checkpoint or a run's folder
    features: str = "pretrained/features_32.pt"  # the networks that measure, trained by features.py
    clips: int = 32  # [2, 100000] clips of each arm and seed
    reference: int = 256  # [2, 100000] real clips that every Frechet distance is taken to
    batch_size: int = 8  # [1, 1024] clips drawn at once
    seeds: int = 3  # [1, 100] seeds of each arm
    calls: int = 64  # [2, 10000] network calls per clip or block, where they are not what is compared
    delta: float = 0.0  # [0, 2] step size of the corrector; 0 is 0.1 in samplers and extend, else none
    w_t: float = 0.0  # [0, 100] weight of temporal guidance
    w_t_from: float = -2.0  # [-40, 40] log-SNR at which temporal guidance begins
    w_r_power: float = 1.0  # [-1, 1] power of alpha beside the weight of reconstruction guidance
    overlap: int = 0  # [0, 1024] extend: frames that blocks share; 0 is half the model's length
    frames: int = 64  # [17, 1000] extend: frames of the result
    w: float = 1.0  # [0, 100] extend, joint, positions, blocks: weight of classifier-free guidance
    only: str = ""  # a regular expression: arms in whose name it is found; by default all
    train_steps: int = 2000  # [1, 100000000] joint, positions: optimizer steps of their small models
    train_minutes: float = 4.0  # (0, 10000] blocks: minutes of training of each of its models
    autoencoder: str = "pretrained/autoencoder_32.pt"  # blocks: whose latents its models draw
    interpolator: str = "pretrained/interpolate_32.pt"  # speed: fills between key frames (--keys)
    quick: bool = False  # few clips, one seed, few calls: minutes, and only to see that it works
    i3d: str = ""  # a TorchScript I3D file that you trust: adds FVD
    out: str = "experiments/results"  # folder of NAME.md and NAME.json
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    precision: Literal["auto", "bf16", "float32"] = "auto"  # bf16 autocast where the hardware has it
    threads: int = 0  # [0, 1024] CPU threads; 0 leaves PyTorch's choice


@dataclass
class Lab:
    """What every experiment needs."""
    c: EvaluateConfig
    path: Path  # of the model's checkpoint
    model: Model
    features: Features
    machine: Machine
    stride: int  # every so many frames of the generator's are shown (the paper's frameskip)

    def real(self, seed: int, frames: int = 0, clips: int = 0, stride: int = 0) -> tuple[Tensor, list, dict]:
        """Clips of the test split (clips, C, frames, H, W) with captions and truth; another seed, others."""
        data = dataclasses.replace(self.model.data, split="test", num_images=0, short_captions=0.0,
                                   frames=frames or self.model.network.config.frames,
                                   frame_stride=(stride or self.stride,))
        draw = stochastic_moving_mnist if data.dataset == "stochastic_moving_mnist" else moving_mnist
        return draw(data, clips or self.c.clips, (7, seed))

    def draw(self, seed: int, given: Callable[[SampleConfig, slice], Given] | None = None, frames: int = 0,
             texts: list[str] | None = None, model: Model | None = None, **flags: Any) -> Tensor:
        """--clips clips, by flags of SampleConfig or its defaults; given(settings, which clips) is known."""
        model, parts = model or self.model, []
        frames = frames or model.network.config.frames
        for first in range(0, self.c.clips, self.c.batch_size):
            which = slice(first, min(first + self.c.batch_size, self.c.clips))
            s = SampleConfig(num=which.stop - first, seed=100_000 * seed + first, w_r_power=self.c.w_r_power,
                             text="|".join(texts[which]) if texts else "",
                             **{"w_t": self.c.w_t, "w_t_from": self.c.w_t_from} | flags)
            with self.machine.autocast():
                parts.append(infill.fill(model, s, given(s, which) if given else nothing(model, s, frames)))
        return torch.cat(parts).float().cpu()

    def steps(self) -> dict[str, Any]:
        """Flags for --calls network calls, every second one of them the corrector's if --delta is given."""
        c = self.c
        return {"steps": c.calls // 2, "delta": c.delta} if c.delta else {"steps": c.calls}

    def measure(self, x: Tensor) -> dict[str, float]:
        """metrics.measure on clips of the model's length (longer ones in pieces), against real ones."""
        length = self.model.network.config.frames
        pieces = torch.cat([piece for piece in x.split(length, 2) if piece.shape[2] == length])
        found = metrics.measure(pieces, self.features, self.model.data.digits, self.reference[1:],
                                self.stride)
        return found | ({"FVD": metrics.fvd(self.reference[0], pieces, self.c.i3d)} if self.c.i3d else {})

    def digit_named(self, x: Tensor, truth: dict) -> float:
        """Share of the frames that show the digits of the truth."""
        return metrics.identity_true(self.observe(x)[0], truth["labels"])

    def observe(self, x: Tensor) -> tuple[Tensor, ...]:
        """features.observe on clips x: linked classes, linked places, ..."""
        return observe(x, self.features, self.model.data.digits)

    @cached_property
    def reference(self) -> tuple[Tensor, Tensor, Tensor]:
        """Real clips that Frechet distances are taken to, features of their frames and of them."""
        x = self.real(10_000, clips=self.c.reference)[0]
        return x, *self.observe(x)[3:]

    def bounds(self, more: Callable[[Tensor, int], dict] = lambda x, seed: {},
               frames: int = 0) -> dict[str, Arm]:
        """The two rows of real clips: the floor, and chance, whose frames come each from another clip."""
        def arm(exchange: int, seed: int) -> dict[str, float]:
            x = self.real(seed, frames)[0]
            if exchange:
                pool = self.real(20_000 + seed, frames, self.c.clips + x.shape[2])[0]
                x = torch.stack([pool[f:][:len(x), :, f] for f in range(x.shape[2])], 2)
            return self.measure(x) | more(x, seed)
        return {"real clips (floor)": partial(arm, 0), "their frames exchanged (chance)": partial(arm, 1)}


def build(c: EvaluateConfig) -> Lab:
    """The model and the networks that measure, from their files; ValueError where they do not fit."""
    machine = start(c.device, c.precision, c.threads)
    path = sample.find(str(HERE / c.checkpoint))  # an absolute path stays what it is
    model = infill.load_model(path, machine.device)
    features = load_features(HERE / c.features)
    drawn = (model.data.size, model.data.digits)
    if model.data.dataset != "moving_mnist" and (model.data.dataset, c.experiment) != (
            "stochastic_moving_mnist", "predict"):
        raise ValueError(f"{path} draws {model.data.dataset}, and {c.experiment} measures moving_mnist alone")
    if c.experiment in ("guidance", "speed") and not model.text.cond_dim:
        raise ValueError(f"{path} was trained without captions, and --experiment {c.experiment} needs them")
    if (learnt := (features.settings["size"], features.settings["digits"])) != drawn:
        raise ValueError(f"--features {c.features} was trained on {learnt[1]} digits at {learnt[0]} px, and "
                         f"{path} draws {drawn[1]} at {drawn[0]} px: train others with experiments.features")
    if model.network.config.keys:
        raise ValueError(f"{path} draws between key frames: --experiment {c.experiment} cannot")
    return Lab(c, path, model, features, machine, min(model.data.frame_stride))

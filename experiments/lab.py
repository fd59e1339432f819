"""The laboratory of evaluate: a model, the networks that measure, real clips, and drawn ones."""
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import checkpoint
import infill
from data import moving_mnist
from experiments import metrics
from experiments.features import Features, Seen, load_features, observe
from infill import Given, Model, SampleConfig, nothing, show, show_small, smaller
from machine import Machine, start

HERE = Path(__file__).parents[1]  # the clone
Numbers = dict[str, float]  # what was measured
Arms = dict[str, Callable[[int], Numbers]]  # by name, and each by seed
Known = Callable[[SampleConfig, slice], Given]  # what is known of the clips of a slice
Experiment = Literal["modes", "samplers", "joint", "guidance", "extend", "exchange", "benchmark", "reader"]


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
    calls: int = 64  # [2, 10000] steps of the sampler, where they are not what is compared
    frames: int = 64  # [17, 1000] extend and modes: frames of a long video
    only: str = ""  # a regular expression: arms in whose name it is found; by default all
    samples: int = 10  # [2, 1000] benchmark: what is drawn of each clip
    test_file: str = ""  # benchmark: the public mnist_test_seq.npy; by default test clips as in the training
    train_steps: int = 2000  # [1, 100000000] joint: optimizer steps of its small models
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

    @property
    def length(self) -> int:
        """Frames of the model's clips."""
        return self.model.network.config.frames

    @property
    def stride(self) -> int:
        """Every so many frames of the generator's are shown (the paper's frameskip)."""
        return min(self.model.data.frame_stride)

    def real(self, seed: int, frames: int = 0, clips: int = 0) -> tuple[Tensor, list[str], dict]:
        """Clips of the test split (clips, C, frames, H, W) with captions and truth; another seed, others."""
        data = dataclasses.replace(
            self.model.data,
            split="test",
            num_images=0,
            short_captions=0.0,
            frames=frames or self.length,
            frame_stride=(self.stride,))
        return moving_mnist(data, clips or self.c.clips, (7, seed))

    def blank(self, frames: int) -> Known:
        """Nothing is known of so many frames."""
        return lambda s, which: nothing(self.model, s, frames)

    def draw(
            self,
            seed: int,
            known: Known | None = None,
            texts: Sequence[str] = (),
            **flags: Any) -> Tensor:
        """--clips clips, by flags of SampleConfig; by default nothing is known of them. The caption is that of
        the flags, or each clip has one of the texts, where they are given.
        """
        known = known or self.blank(self.length)
        parts = []
        for first in range(0, self.c.clips, self.c.batch_size):
            which = slice(first, min(first + self.c.batch_size, self.c.clips))
            values = flags | dict(num=which.stop - first, seed=100_000 * seed + first)
            if texts:
                values["text"] = "|".join(texts[which])
            s = SampleConfig(**values)
            with self.machine.autocast():
                parts.append(infill.fill(self.model, s, known(s, which)))
        return torch.cat(parts).float().cpu()

    def measure(self, x: Tensor) -> Numbers:
        """metrics.measure on clips of the model's length (longer ones in pieces), against real ones."""
        pieces = x.split(self.length, 2)
        x = torch.cat([piece for piece in pieces if piece.shape[2] == self.length])
        digits = self.model.data.digits
        return metrics.measure(x, self.features, digits, self.reference, self.stride)

    def digit_named(self, x: Tensor, truth: dict) -> float:
        """Share of the frames that show the digits of the truth."""
        return metrics.identity_true(self.observe(x).classes, truth["labels"])

    def observe(self, x: Tensor) -> Seen:
        """features.observe on clips x."""
        return observe(x, self.features, self.model.data.digits)

    @cached_property
    def reference(self) -> tuple[Tensor, Tensor]:
        """Features of the frames and of the clips that Frechet distances are taken to."""
        x, _, _ = self.real(10_000, clips=self.c.reference)
        seen = self.observe(x)
        return seen.frames, seen.clips

    def bounds(
            self,
            judge: Callable[[Tensor, int], Numbers] | None = None,
            frames: int = 0) -> Arms:
        """The two rows of real clips: the floor, and chance, whose frames come each from another clip. Judged
        by measure, or a function of the clips and the seed whose captions they have.
        """
        judge = judge or (lambda x, seed: self.measure(x))
        frames = frames or self.length

        def floor(seed: int) -> Numbers:
            x, _, _ = self.real(seed, frames)
            return judge(x, seed)

        def chance(seed: int) -> Numbers:
            pool, _, _ = self.real(20_000 + seed, frames, self.c.clips + frames)
            mixed = [pool[f:f + self.c.clips, :, f] for f in range(frames)]
            return judge(torch.stack(mixed, 2), seed)

        return {
            "real clips (floor)": floor,
            "their frames exchanged (chance)": chance}


def open_lab(c: EvaluateConfig) -> Lab:
    """The model and the networks that measure, from their files; ValueError where they do not fit."""
    machine = start(c.device, c.precision, c.threads)
    path = checkpoint.find(str(HERE / c.checkpoint))  # an absolute path stays what it is
    model = infill.load_model(path, machine.device)
    features = load_features(HERE / c.features)
    size, digits = model.data.size, model.data.digits
    trained = features.settings
    if model.data.dataset != "moving_mnist":
        raise ValueError(f"{path} draws {model.data.dataset}, and --experiment measures moving_mnist alone")
    if c.experiment == "guidance" and not model.text.cond_dim:
        raise ValueError(f"{path} was trained without captions, and --experiment guidance needs them")
    if c.experiment == "exchange" and digits != 1:
        raise ValueError(f"--experiment exchange exchanges one digit, and {path} draws {digits}")
    if (trained["size"], trained["digits"]) != (size, digits):
        raise ValueError(f"--features {c.features} was trained on {trained['digits']} digits at {trained['size']} "
                         f"px, and {path} draws {digits} at {size} px: train others with experiments.features")
    return Lab(c, path, model, features, machine)


# ---- what is known, and arms of values ---------------------------------------------------------------------


def known(lab: Lab, x: Tensor, where: slice) -> Known:
    """What is known when the frames of clips x are that lie at where."""
    def given(s: SampleConfig, which: slice) -> Given:
        frames = lab.model.latents(x[which][:, :, where])
        blank = nothing(lab.model, s, x.shape[2])
        return show(blank, where, frames)
    return given


def made_small(lab: Lab, x: Tensor, scale: int) -> Known:
    """What is known when clips x are seen small."""
    def given(s: SampleConfig, which: slice) -> Given:
        blank = nothing(lab.model, s, x.shape[2])
        return show_small(blank, 1, smaller(x[which], scale))
    return given


def each(arm: Callable[[Any, int], Numbers], values: dict[str, Any]) -> Arms:
    """An arm for each of the values."""
    return {name: partial(arm, value) for name, value in values.items()}

"""The experiments behind the tables of section 4, on Moving MNIST: python evaluate.py --experiment NAME.

Every experiment compares ways of drawing clips, each with --seeds seeds, and writes a Markdown table with the
raw numbers beside it. What is drawn stands beside two real rows: as many clips of the test split (the floor),
and as many whose every frame is from another clip (chance: good frames, no video). All but guidance and
extend draw without captions.
"""
import dataclasses
import inspect
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor

import checkpoint
import config
import metrics
import sample
from data import DIRECTIONS, moving_mnist, stochastic_moving_mnist
from machine import Machine, start
from sample import Given, Model, SampleConfig, nothing, show, show_small, smaller

HERE = Path(__file__).parent
Arm = Callable[[int], dict[str, float]]  # seed -> what was measured
Experiment = Literal["samplers", "joint", "guidance", "extend", "predict", "super_resolve", "positions"]


@dataclass
class EvaluateConfig:
    """Which experiment, on which model, how large."""
    experiment: Experiment = "samplers"  # which of the paper's tables
    checkpoint: str = "pretrained/moving_mnist_32.pt"  # a checkpoint or a run's folder
    features: str = "pretrained/features_32.pt"  # the networks that measure, trained by metrics.py
    clips: int = 32  # [2, 100000] clips of each arm and seed
    reference: int = 256  # [2, 100000] real clips that every Frechet distance is taken to
    batch_size: int = 8  # [1, 1024] clips drawn at once
    seeds: int = 3  # [1, 100] seeds of each arm
    calls: int = 64  # [2, 10000] network calls per clip or block, where they are not what is compared
    frames: int = 64  # [17, 1000] extend: frames of the result
    train_steps: int = 2000  # [1, 100000000] joint, positions: optimizer steps of their small models
    quick: bool = False  # few clips, one seed, few calls: minutes, and only to see that it works
    i3d: str = ""  # a TorchScript I3D file that you trust: adds FVD
    out: str = "results"  # folder of NAME.md and NAME.json
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    precision: Literal["auto", "bf16", "float32"] = "auto"  # bf16 autocast where the hardware has it
    threads: int = 0  # [0, 1024] CPU threads; 0 leaves PyTorch's choice


@dataclass
class Lab:
    """What every experiment needs."""
    c: EvaluateConfig
    path: Path  # of the model's checkpoint
    model: Model
    features: metrics.Features
    machine: Machine

    def real(self, seed: int, frames: int = 0, clips: int = 0) -> tuple[Tensor, list[str], dict]:
        """Clips of the test split (clips, C, frames, H, W) with captions and truth; another seed, others."""
        data = dataclasses.replace(self.model.data, split="test", num_images=0,
                                   frames=frames or self.model.network.config.frames)
        draw = stochastic_moving_mnist if data.dataset == "stochastic_moving_mnist" else moving_mnist
        return draw(data, clips or self.c.clips, (7, seed))

    def draw(self, seed: int, given: Callable[[SampleConfig, slice], Given] | None = None, frames: int = 0,
             texts: list[str] | None = None, model: Model | None = None, **flags: Any) -> Tensor:
        """--clips clips as sample.py draws them, with its flags; given(settings, which clips) is known."""
        model, parts = model or self.model, []
        frames = frames or model.network.config.frames
        for first in range(0, self.c.clips, self.c.batch_size):
            which = slice(first, min(first + self.c.batch_size, self.c.clips))
            s = SampleConfig(num=which.stop - first, seed=100_000 * seed + first, **flags,
                             text="|".join(texts[which]) if texts else "")
            with self.machine.autocast():
                parts.append(sample.fill(model, s, given(s, which) if given else nothing(model, s, frames)))
        return torch.cat(parts).float().cpu()

    def measure(self, x: Tensor) -> dict[str, float]:
        """metrics.measure on clips of the model's length (longer ones in pieces), against real ones."""
        length = self.model.network.config.frames
        pieces = torch.cat([piece for piece in x.split(length, 2) if piece.shape[2] == length])
        found = metrics.measure(pieces, self.features, self.model.data.digits, self.reference[1:])
        return found | ({"FVD": metrics.fvd(self.reference[0], pieces, self.c.i3d)} if self.c.i3d else {})

    @cached_property
    def reference(self) -> tuple[Tensor, Tensor, Tensor]:
        """Real clips that Frechet distances are taken to, features of their frames and of them."""
        x = self.real(10_000, clips=self.c.reference)[0]
        return x, *metrics.observe(x, self.features, self.model.data.digits)[3:]

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


# ---- the experiments: name -> arms -----------------------------------------------------------------------


def samplers(lab: Lab) -> dict[str, Arm]:
    """Tables 2 and 3: ancestral against predictor-corrector at equal calls, gamma, ddim, dpm_solver.

    The paper, on other data: BAIR FVD, ancestral 512 steps 68.19, Langevin 256 steps 66.92; Kinetics-600 18.6
    and 16.2.
    """
    n = lab.c.calls
    flags = {f"ancestral, {n} steps": dict(steps=n),
             f"predictor-corrector, {n // 2} steps": dict(steps=n // 2, delta=0.1)}
    flags |= {f"ancestral, {n} steps, γ {gamma}": dict(steps=n, gamma=gamma) for gamma in (0.1, 0.3, 1.0)}
    flags |= {f"{name}, {steps} steps": dict(sampler=name, steps=steps)
              for name in ("ddim", "dpm_solver") for steps in ((4,) if lab.c.quick else (10, 25, 50, 100))}

    def arm(values: dict[str, Any], seed: int) -> dict[str, float]:
        begun = time.perf_counter()
        x = lab.draw(seed, **values)
        return {"seconds_per_clip": (time.perf_counter() - begun) / lab.c.clips} | lab.measure(x)
    return lab.bounds() | {name: partial(arm, values) for name, values in flags.items()}


def guidance(lab: Lab) -> dict[str, Arm]:
    """Table 5: the weight of classifier-free guidance; does the caption come true?

    The paper, on other data: weight 1.0, 2.0, 5.0: FVD 41.65, 50.19, 163.74, FID-avg 12.49, 10.53, 13.54,
    IS-avg 10.80, 13.22, 14.80; frameskip 4: FVD 56.71, 54.28, 185.89.
    """
    def judged(x: Tensor, seed: int) -> dict[str, float]:
        _, captions, truth = lab.real(seed)
        classes, places, *_ = metrics.observe(x, lab.features, lab.model.data.digits)
        return {"digit_named": metrics.identity_true(classes, truth["labels"])} | (
            {"direction_named": heading(places, captions)} if places.shape[2] == 1 else {})

    def arm(w: float, seed: int) -> dict[str, float]:
        x = lab.draw(seed, texts=lab.real(seed)[1], w=w, steps=lab.c.calls)
        return lab.measure(x) | judged(x, seed)
    return lab.bounds(judged) | {f"w = {w} ({w + 1}.0 in Table 5)": partial(arm, w) for w in (0, 1, 4)}


def heading(places: Tensor, captions: list[str]) -> float:
    """Share of clips whose digit, at places (B, F, 1, 2), goes within 45 degrees of where its caption says.

    That is the way it goes in three steps, of which one may end in a bounce; by chance it is right in 1 of 4.
    """
    step = (places[:, 3] - places[:, 0]).flatten(1)  # (B, 2) as (y, x)
    angle = torch.atan2(-step[:, 0], step[:, 1])
    said = [DIRECTIONS.index(caption.split(" moving ")[1]) * torch.pi / 4 for caption in captions]
    return ((angle.cpu() - torch.tensor(said)).cos() > 0.5**0.5).float().mean().item()


def extend(lab: Lab) -> dict[str, Arm]:
    """Table 6: long videos block by block, reconstruction guidance against replacement; the seams.

    The caption names the digit alone, with w = 1. A reconstruction-guided call takes about twice as long.
    Columns that do not say "whole" or name a seam are of pieces of the model's length. The paper, on other
    data: FVD of 64 frames, guidance weight 2.0: reconstruction 136.22, replacement 451.45, ratio 3.3.
    """
    frames, length = lab.c.frames, lab.model.network.config.frames
    plain, corrected = dict(steps=lab.c.calls), dict(steps=lab.c.calls // 2, delta=0.1)
    methods = {"replacement": dict(method="replacement")}
    methods |= {f"reconstruction, w_r {w_r}": dict(w_r=w_r) for w_r in (1, 2, 5, 10, 50)}
    flags = {name: method | plain for name, method in methods.items()}
    flags |= {f"{name}, corrector": method | corrected for name, method in methods.items()}
    blocks = sample.block_starts(torch.zeros(frames, dtype=torch.bool), length, length // 2)

    low, high = metrics.walls(lab.model.data.size)

    def judged(x: Tensor, seed: int) -> dict[str, float]:
        classes, places, *_ = metrics.observe(x, lab.features, lab.model.data.digits)
        path = metrics.trajectory_residual(places, low, high, 0.2 * (high - low)).mean().item()
        return {"identity_kept_whole": metrics.identity_kept(classes), "residual_whole": path,
                **metrics.seam(places, classes, [start + length for start in blocks[:-1]])}

    def arm(values: dict[str, Any], seed: int) -> dict[str, float]:
        # the digit alone: a direction holds for the first frames, and each block is drawn with the caption
        texts = [caption.split(" moving ")[0] for caption in lab.real(seed)[1]]
        x = lab.draw(seed, frames=frames, texts=texts, w=1.0, **values)
        return lab.measure(x) | judged(x, seed)
    return lab.bounds(judged, frames) | {name: partial(arm, values) for name, values in flags.items()}


def predict(lab: Lab) -> dict[str, Arm]:
    """The benchmarks: 10 -> 10 frames, or 5 -> 10 for a model of stochastic digits; error, PSNR and SSIM.

    Published squared errors, for two digits at 64x64: ConvLSTM 29.80, PredRNN 23.97, SimVP 32.15, TAU 24.60
    (200 epochs), PredRNN++ 14.07 (2,000 epochs).
    The error of one sample is up to twice that of the mean of all futures: it pays for its own guess as well.
    """
    draws, k = 2 if lab.c.quick else 10, 5 if "stochastic" in lab.model.data.dataset else 10

    @cache
    def futures(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        x, flags = lab.real(seed, k + 10)[0], dict(overlap=k, steps=lab.c.calls)
        drawn = [lab.draw(100 * seed + i, first(lab, x, k), **flags) for i in range(draws)]
        return x[:, :, k - 1:k], x[:, :, k:], torch.stack(drawn)[:, :, :, k:]

    def arm(guess: Callable[[Tensor, Tensor, Tensor], Tensor], seed: int) -> dict[str, float]:
        x, y = futures(seed)[1], guess(*futures(seed))
        return {"mse_per_frame": metrics.mse_per_frame(x, y), "psnr": metrics.psnr(x, y),
                "ssim": metrics.ssim(x, y)}
    guesses = {"one sample": lambda last, x, drawn: drawn[0],
               f"best of {draws}": lambda last, x, drawn: closest(x, drawn),
               f"mean of {draws}": lambda last, x, drawn: drawn.mean(0),
               "last frame repeated": lambda last, x, drawn: last.expand_as(x),
               "black frames": lambda last, x, drawn: torch.full_like(x, -1)}
    return {f"{k} → 10, {name}": partial(arm, guess) for name, guess in guesses.items()}


def first(lab: Lab, x: Tensor, k: int) -> Callable[[SampleConfig, slice], Given]:
    """What is known when the first k frames of clips x are."""
    return lambda s, which: show(nothing(lab.model, s, x.shape[2]), slice(0, k), x[which, :, :k])


def closest(x: Tensor, drawn: Tensor) -> Tensor:
    """For each clip of x (B, C, F, H, W), the nearest of drawn (N, B, C, F, H, W)."""
    best = (drawn - x).square().flatten(2).sum(2).argmin(0)
    return drawn[best, torch.arange(len(x))]


def super_resolve(lab: Lab) -> dict[str, Arm]:
    """Section 3.1 in space: Eq. 8 against bicubic interpolation of the same small frames."""
    def arm(enlarge: Callable[..., Tensor], seed: int) -> dict[str, float]:
        x = lab.real(seed)[0]
        y = enlarge(lab, x, seed)
        return {"psnr": metrics.psnr(x, y), "ssim": metrics.ssim(x, y)} | lab.measure(y)
    return (lab.bounds() | {f"{scale}x, bicubic": partial(arm, partial(bicubic, scale)) for scale in (2, 4)}
            | {f"{scale}x, Eq. 8, w_r {w_r}": partial(arm, partial(equation_8, scale, w_r))
               for scale in (2, 4) for w_r in (0.5, 1.0, 1.5)})


def bicubic(scale: int, lab: Lab, x: Tensor, seed: int) -> Tensor:
    """Clips x made small, and large again by interpolation alone."""
    frames = rearrange(smaller(x, scale), "b c f h w -> (b f) c h w")
    large = nnf.interpolate(frames, scale_factor=scale, mode="bicubic").clamp(-1, 1)
    return rearrange(large, "(b f) c h w -> b c f h w", b=len(x))


def equation_8(scale: int, w_r: float, lab: Lab, x: Tensor, seed: int) -> Tensor:
    """Clips x made small, and drawn anew at full size so that they agree."""
    def given(s: SampleConfig, which: slice) -> Given:
        return show_small(nothing(lab.model, s, x.shape[2]), 1, smaller(x[which], scale))
    return lab.draw(seed, given, scale=scale, w_r=w_r, steps=lab.c.calls)


def joint(lab: Lab) -> dict[str, Arm]:
    """Table 4: image frames in training, at equal steps and at equal compute, which is the frames' number.

    The paper, on other data: FVD with 0, 4, 8 image frames 202.28, 68.11, 57.84; FID-avg 37.52, 18.62, 15.57.
    """
    n, length = lab.c.train_steps, lab.model.network.config.frames
    flags = {f"{k} image frames, {n} steps": dict(num_images=k, steps=n) for k in (0, 4, 8)}
    flags |= {f"{k} image frames, compute of 8": dict(num_images=k, steps=n * (length + 8) // (length + k))
              for k in (0, 4)}
    return lab.bounds() | {name: partial(small_model, lab, flags[name], length) for name in flags}


def positions(lab: Lab) -> dict[str, Arm]:
    """Section 3: relative positions against none, at the trained length and at twice as many frames.

    Twice as many frames are measured as twice as many clips, which lowers Frechet distances by itself.
    """
    length, common = lab.model.network.config.frames, dict(steps=lab.c.train_steps, num_images=0)
    flags = {name: dict(relative_positions=name == "Shaw") | common for name in ("Shaw", "none")}
    return lab.bounds() | {f"{name}, {frames} frames": partial(small_model, lab, flags[name], frames)
                           for name in flags for frames in (length, 2 * length)}


def small_model(lab: Lab, flags: dict[str, Any], frames: int, seed: int) -> dict[str, float]:
    """Trains a narrow unconditional model with flags, or finds it in --out, and measures its clips."""
    flags = flags | dict(size=lab.model.data.size, digits=lab.model.data.digits, seed=seed)
    folder = Path(lab.c.out) / "runs" / "-".join(f"{key}_{value}" for key, value in flags.items())
    done = folder / f"checkpoint_{flags['steps']:08d}.pt"
    if not done.exists():
        values = flags | dict(preset="cpu", dim=24, head_dim=16, cond_dim=0, device=lab.c.device, out=folder,
                              precision=lab.c.precision, threads=lab.c.threads, preview_every=100_000_000)
        if list(folder.glob("checkpoint_*.pt")):
            values = {"resume": folder}  # it was interrupted
        words = [[f"--no-{k}"] if v is False else [f"--{k}"] if v is True else [f"--{k}", str(v)]
                 for k, v in values.items()]
        if subprocess.run([sys.executable, str(HERE / "train.py"), *sum(words, [])]).returncode:
            raise ValueError(f"the training into {folder} did not end well; the same command goes on with it")
    model, _ = sample.load_model(done, lab.machine.device)
    model.network.config.frames = frames  # all in one block; the tables keep their reach
    return lab.measure(lab.draw(seed, model=model, steps=lab.c.calls))


# ---- the table -------------------------------------------------------------------------------------------

def table(arms: dict[str, Arm], seeds: int) -> tuple[str, dict[str, list[dict[str, float]]]]:
    """Runs every arm with seeds 0, 1, ...: a table of means ± standard deviations, and the raw numbers."""
    raw = {name: [arm(seed) for seed in range(seeds)] for name, arm in arms.items()}
    columns = list(dict.fromkeys(key for runs in raw.values() for run in runs for key in run))
    lines = ["| | " + " | ".join(column.replace("_", " ") for column in columns) + " |",
             "|---|" + "---|" * len(columns)]
    for name, runs in raw.items():
        cells = [[run[column] for run in runs if column in run] for column in columns]
        lines.append(f"| {name} | " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines), raw


def _cell(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3g}" if values else ""
    return f"{statistics.fmean(values):.3g} ± {torch.tensor(values).std():.1g}"  # stdev() fails on nan


def build(c: EvaluateConfig) -> Lab:
    """The model and the networks that measure, from their files; ValueError where they do not fit."""
    machine = start(c.device, c.precision, c.threads)
    path = sample.find(str(HERE / c.checkpoint))  # an absolute path stays what it is
    model, _ = sample.load_model(path, machine.device)
    features = metrics.load_features(HERE / c.features)
    drawn = (model.network.config.size, model.data.digits)
    if model.data.dataset != "moving_mnist" and (model.data.dataset, c.experiment) != (
            "stochastic_moving_mnist", "predict"):
        raise ValueError(f"{path} draws {model.data.dataset}, and {c.experiment} measures moving_mnist alone")
    if c.experiment in ("guidance", "extend") and not model.text.cond_dim:
        raise ValueError(f"{path} was trained without captions, and --experiment {c.experiment} needs them")
    if (learnt := (features.settings["size"], features.settings["digits"])) != drawn:
        raise ValueError(f"--features {c.features} was trained on {learnt[1]} digits at {learnt[0]} px, and "
                         f"{path} draws {drawn[1]} at {drawn[0]} px: train others with python metrics.py")
    return Lab(c, path, model, features, machine)


def write(lab: Lab, about: str, text: str, raw: dict[str, Any], minutes: float) -> str:
    """Writes NAME.md and NAME.json into --out and returns the page."""
    c, folder = lab.c, Path(lab.c.out)
    facts = {"command": shlex.join(["python", "evaluate.py", *sys.argv[1:]]), "machine": str(lab.machine),
             "PyTorch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "minutes": round(minutes, 1),
             "checkpoint": checkpoint.checksum(checkpoint.load(lab.path)), "features": lab.features.sha256}
    page = (f"# {c.experiment}\n\n{about}\n\n{text}\n\nMean ± standard deviation over {c.seeds} seeds, "
            f"{c.clips} clips each.\n\n"
            + "\n".join(f"- {key}: {value}" for key, value in facts.items()) + "\n")
    (folder / f"{c.experiment}.md").write_text(page)
    everything = facts | {"settings": vars(c), "raw": raw}
    (folder / f"{c.experiment}.json").write_text(json.dumps(everything, indent=1))
    return page


def main() -> None:
    """Runs one experiment and writes its table."""
    c, = config.parse(EvaluateConfig)
    if c.quick:
        c = dataclasses.replace(c, clips=2, reference=8, seeds=1, calls=4, frames=24, train_steps=2,
                                out=f"{c.out}/quick")  # beside the results that were meant
    lab, begun = build(c), time.time()
    Path(c.out).mkdir(parents=True, exist_ok=True)  # a bad --out ends here, not after all the work
    experiment = {"samplers": samplers, "joint": joint, "guidance": guidance, "extend": extend,
                  "predict": predict, "super_resolve": super_resolve, "positions": positions}[c.experiment]
    text, raw = table(experiment(lab), c.seeds)
    print(write(lab, inspect.getdoc(experiment), text, raw, (time.time() - begun) / 60))


if __name__ == "__main__":
    config.run(main)

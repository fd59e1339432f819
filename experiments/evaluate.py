"""The experiments behind the tables of section 4: python -m experiments.evaluate --experiment NAME.

Every experiment compares ways of drawing clips, each with --seeds seeds, and writes a Markdown table with the
raw numbers beside it. But for predict, speed and exchange, what is drawn stands beside two real rows: as many
clips of the test split (the floor), and as many whose every frame is from another clip (chance: good frames,
no video). samplers, predict and super_resolve draw without captions. Those that train models of their own are
in ablations.py.
"""
import dataclasses
import inspect
import json
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor

import config
import infill
from experiments import metrics
import sample
from experiments.ablations import blocks, joint, positions
from data import DIRECTIONS
from diffusion import denoiser
from experiments.features import checksum, walls
from experiments.lab import HERE, Arm, EvaluateConfig, Lab, build
from infill import Given, SampleConfig, nothing, show, show_small, smaller


# ---- the experiments: name -> arms -----------------------------------------------------------------------


def samplers(lab: Lab) -> dict[str, Arm]:
    """Tables 2 and 3: ancestral against predictor-corrector at equal calls, gamma, ddim, dpm_solver.

    The paper, on other data: BAIR FVD, ancestral 512 steps 68.19, Langevin 256 steps 66.92; Kinetics-600 18.6
    and 16.2.
    """
    n = lab.c.calls
    flags = {f"ancestral, {n} steps": dict(steps=n),
             f"predictor-corrector, {n // 2} steps": dict(steps=n // 2, delta=lab.c.delta or 0.1)}
    flags |= {f"ancestral, {n} steps, γ {gamma}": dict(steps=n, gamma=gamma) for gamma in (0.1, 0.3, 1.0)}
    flags |= {f"{name}, {steps} steps": dict(sampler=name, steps=steps)
              for name in ("ddim", "dpm_solver") for steps in ((4,) if lab.c.quick else (10, 25, 50, 100))}

    def arm(values: dict[str, Any], seed: int) -> dict[str, float]:
        begun = time.perf_counter()
        x = lab.draw(seed, **values)
        return {"seconds_per_clip": (time.perf_counter() - begun) / lab.c.clips} | lab.measure(x)
    if lab.model.data.num_images:  # temporal guidance calls the network twice in each step after its log-SNR
        flags |= {f"ancestral, {n} steps, w_t {w_t:g} from λ {at:g}": dict(steps=n, w_t=w_t, w_t_from=at)
                  for w_t, at in ((1.0, -4.0), (1.0, -3.0), (1.0, -2.0), (4.0, -2.0))}
        flags[f"corrector, {n} steps, w_t 1 from λ -3"] = dict(steps=n, delta=0.3, w_t=1.0, w_t_from=-3.0)
    return lab.bounds() | {name: partial(arm, values) for name, values in flags.items()}


def guidance(lab: Lab) -> dict[str, Arm]:
    """Table 5: the weight of classifier-free guidance; does the caption come true?

    The paper, on other data: weight 1.0, 2.0, 5.0: FVD 41.65, 50.19, 163.74, FID-avg 12.49, 10.53, 13.54,
    IS-avg 10.80, 13.22, 14.80; frameskip 4: FVD 56.71, 54.28, 185.89.
    """
    def judged(x: Tensor, seed: int) -> dict[str, float]:
        _, captions, truth = lab.real(seed)
        places = lab.observe(x)[1]
        return {"digit_named": lab.digit_named(x, truth)} | (
            {"direction_named": heading(places, captions, lab.stride)} if places.shape[2] == 1 else {})

    def arm(w: float, seed: int) -> dict[str, float]:
        x = lab.draw(seed, texts=lab.real(seed)[1], w=w, steps=lab.c.calls)
        return lab.measure(x) | judged(x, seed)
    return lab.bounds(judged) | {f"w = {w} ({w + 1}.0 in Table 5)": partial(arm, w) for w in (0, 1, 4)}


def heading(places: Tensor, captions: list[str], stride: int = 1) -> float:
    """Share of clips whose digit, at places (B, F, 1, 2), goes within 45 degrees of where its caption says.

    That is the way it goes in three steps, of which one may end in a bounce; by chance it is right in 1 of 4.
    Steps of stride 2 or more are so long that it is the way of the first alone.
    """
    step = (places[:, 3 if stride == 1 else 1] - places[:, 0]).flatten(1)  # (B, 2) as (y, x)
    angle = torch.atan2(-step[:, 0], step[:, 1])
    said = [DIRECTIONS.index(caption.split(" moving ")[1]) * torch.pi / 4 for caption in captions]
    return ((angle.cpu() - torch.tensor(said)).cos() > 0.5**0.5).float().mean().item()


def extend(lab: Lab) -> dict[str, Arm]:
    """Table 6: long videos block by block, reconstruction guidance against replacement; the seams.

    The caption names the digit alone, with --w; a model without captions has none, and digit_named is chance.
    A reconstruction-guided call takes about twice as long.
    Columns that say neither whole, seam nor inside are of pieces of the model's length. The paper, on other
    data: FVD of 64 frames, guidance weight 2.0: reconstruction 136.22, replacement 451.45, ratio 3.3.
    """
    frames, length = lab.c.frames, lab.model.network.config.frames
    overlap = lab.c.overlap or length // 2
    ways = {"": dict(steps=lab.c.calls), ", corrector": dict(steps=lab.c.calls // 2, delta=lab.c.delta or 0.1)}
    methods = {"replacement": dict(method="replacement")}
    methods |= {f"reconstruction, w_r {w_r}": dict(w_r=w_r) for w_r in (0.3, 1, 2, 3, 5, 10, 50)}
    flags = {name + after: method | way for after, way in ways.items() for name, method in methods.items()}
    blocks = infill.block_starts(torch.zeros(frames, dtype=torch.bool), length, overlap)

    low, high = walls(lab.model.data.size)

    def judged(x: Tensor, seed: int) -> dict[str, float]:
        classes, places, *_ = lab.observe(x)
        path = metrics.trajectory_residual(places, low, high, 0.2 * (high - low)).mean().item()
        return {"identity_kept_whole": metrics.identity_kept(classes), "residual_whole": path,
                "digit_named": metrics.identity_true(classes, lab.real(seed)[2]["labels"]),
                "largest_step": places.diff(dim=1).norm(dim=3).amax(1).mean().item(),
                **metrics.seam(places, classes, [start + length for start in blocks[:-1]])}

    def arm(values: dict[str, Any], seed: int) -> dict[str, float]:
        # the digit alone: a direction holds for the first frames, and each block is drawn with the caption
        texts = [caption.split(" moving ")[0] for caption in lab.real(seed)[1]]
        said = dict(texts=texts, w=lab.c.w) if lab.model.text.cond_dim else {}
        x = lab.draw(seed, frames=frames, overlap=overlap, **said, **values)
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
    def drawn(seed: int, i: int = 0, **flags: Any) -> Tensor:
        x = lab.real(seed, k + 10)[0]
        return lab.draw(100 * seed + i, known(lab, x, slice(0, k)), overlap=k, **lab.steps(), **flags)

    def several(seed: int) -> Tensor:
        return torch.stack([drawn(seed, i) for i in range(draws)])

    def arm(guess: Callable[[Tensor, int], Tensor], seed: int) -> dict[str, float]:
        x = lab.real(seed, k + 10)[0]
        return errors(lab, x[:, :, k:], guess(x, seed)[:, :, k:], seed)
    methods = {"replacement": dict(method="replacement")} | {f"w_r {w}": dict(w_r=w) for w in (1, 5, 20)}
    guesses = {"one sample": lambda x, seed: drawn(seed),
               f"best of {draws}": lambda x, seed: closest(x, several(seed)),
               f"mean of {draws}": lambda x, seed: several(seed).mean(0),
               "last frame repeated": lambda x, seed: x[:, :, k - 1:k].expand_as(x),
               "black frames": lambda x, seed: torch.full_like(x, -1)}
    guesses |= {f"one sample, {name}": lambda x, seed, flags=flags: drawn(seed, **flags)
                for name, flags in methods.items()}
    return {f"{k} → 10, {name}": partial(arm, guess) for name, guess in guesses.items()}


def given(lab: Lab) -> dict[str, Arm]:
    """Section 3.1 in time: of clips of the model's length the first six frames are given, or every third; the
    other ones are drawn, by replacement and by reconstruction guidance, and compared with the true ones.
    """
    def arm(where: slice, flags: dict[str, Any], seed: int) -> dict[str, float]:
        x, new = lab.real(seed)[0], torch.ones(lab.model.network.config.frames, dtype=torch.bool)
        new[where] = False
        y = lab.draw(seed, known(lab, x, where), **lab.steps(), **flags)
        return errors(lab, x[:, :, new], y[:, :, new], seed) | lab.measure(y)
    methods = {"replacement": dict(method="replacement")} | {f"w_r {w}": dict(w_r=w) for w in (3, 5, 10)}
    return lab.bounds() | {f"{what}, {name}": partial(arm, where, flags) for name, flags in methods.items()
                           for what, where in (("first 6", slice(0, 6)), ("every third", slice(0, None, 3)))}


def known(lab: Lab, x: Tensor, where: slice) -> Callable[[SampleConfig, slice], Given]:
    """What is known when the frames of clips x are that lie at where."""
    return lambda s, which: show(nothing(lab.model, s, x.shape[2]), where,
                                 sample.inside(lab.model, x[which][:, :, where]))


def errors(lab: Lab, x: Tensor, y: Tensor, seed: int) -> dict[str, float]:
    """How far drawn frames y are from the true ones x, and the share of them that show the true digits."""
    return {"mse_per_frame": metrics.mse_per_frame(x, y), "psnr": metrics.psnr(x, y),
            "ssim": metrics.ssim(x, y), "digit_kept": lab.digit_named(y, lab.real(seed)[2])}


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
               for scale in (2, 4) for w_r in ((1.5, 4.0, 10.0) if lab.model.autoencoder else (0.5, 1.0, 1.5))})


def bicubic(scale: int, lab: Lab, x: Tensor, seed: int) -> Tensor:
    """Clips x made small, and large again by interpolation alone."""
    frames = rearrange(smaller(x, scale), "b c f h w -> (b f) c h w")
    large = nnf.interpolate(frames, scale_factor=scale, mode="bicubic").clamp(-1, 1)
    return rearrange(large, "(b f) c h w -> b c f h w", b=len(x))


def equation_8(scale: int, w_r: float, lab: Lab, x: Tensor, seed: int) -> Tensor:
    """Clips x made small, and drawn anew at full size so that they agree."""
    def given(s: SampleConfig, which: slice) -> Given:
        return show_small(nothing(lab.model, s, x.shape[2]), 1, smaller(x[which], scale))
    return lab.draw(seed, given, scale=scale, w_r=w_r, **lab.steps())


def speed(lab: Lab) -> dict[str, Arm]:
    """MagicVideo: frames per second are chosen when sampling, and a second network fills between key frames.

    The model was trained with several strides (--frame_stride 1,2,4); captions, w = 1. "step" is the way of a
    digit from frame to frame in pixels, and should be the real one's of the same speed.
    """
    def seen(x: Tensor, truth: dict) -> dict[str, float]:
        classes, places, *_ = lab.observe(x)
        return {"step": places.diff(dim=1).norm(dim=3).mean().item(),
                "digit_named": lab.digit_named(x, truth), "identity_kept": metrics.identity_kept(classes)}

    def drawn(stride: int, seed: int) -> tuple[Tensor, dict]:
        _, texts, truth = lab.real(seed, stride=stride)
        return lab.draw(seed, texts=texts, w=1.0, fps=8 / stride, steps=lab.c.calls), truth

    def both(seed: int) -> dict[str, float]:
        x, truth = drawn(gap, seed)
        videos = []
        for i, part in enumerate(x.split(lab.c.batch_size)):
            s = SampleConfig(num=len(part), seed=100_000 * seed + 50_000 + i, steps=lab.c.calls)
            with lab.machine.autocast():
                filled = infill.fill(second, s, sample.gaps(second, s, sample.inside(second, part)))
            videos.append(sample.joined(filled, len(part))[:, :, :x.shape[2]])  # as long as the others
        return seen(torch.cat(videos), truth)

    second = infill.load_model(sample.find(str(HERE / lab.c.interpolator)), lab.machine.device)
    strides, gap = sorted(lab.model.data.frame_stride), second.network.config.frames - 1
    fits = second.data.frame_stride == (1,) and second.data.size == lab.model.data.size
    if len(strides) < 2 or gap not in strides or not second.network.config.keys or not fits:
        raise ValueError("--experiment speed needs a --checkpoint trained with --frame_stride 1,2,4, and an "
                         "--interpolator of its size trained with --keys, --frame_stride 1 and --frames that "
                         "are one more than a stride")
    return ({f"real clips, {8 / stride:g} fps": lambda seed, stride=stride: seen(
                *lab.real(seed, stride=stride)[::2]) for stride in strides}
            | {f"drawn with --fps {8 / stride:g}": lambda seed, stride=stride: seen(*drawn(stride, seed))
               for stride in strides}
            | {"key frames, then the frames between them": both})


def exchange(lab: Lab) -> dict[str, Arm]:
    """Does the network use other frames for a digit's shape? At six log-SNRs, without captions or sampling.

    Every fourth frame shows one digit, the others another one on the same path: the error on the former over
    that in clips of one digit. 1 means that other frames are not used.
    """
    def arm(seed: int) -> dict[str, float]:
        data = dataclasses.replace(lab.model.data, split="test", num_images=0, frame_stride=(lab.stride,))
        pairs = metrics.same_paths(data, lab.c.clips, (8, seed))
        x, other = (sample.inside(lab.model, clips) for clips in pairs)
        denoise = denoiser(lab.model.network, lab.model.diffusion)
        with torch.no_grad(), lab.machine.autocast():
            return {f"λ = {level}": metrics.exchange(
                denoise, x, other, torch.tensor(float(level), device=x.device),
                torch.Generator().manual_seed(seed)) for level in range(-5, 1)}
    return {"the model": arm}


EXPERIMENTS = {experiment.__name__: experiment for experiment in (
    samplers, joint, guidance, extend, predict, given, super_resolve, positions, blocks, speed, exchange)}

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


def write(lab: Lab, about: str, text: str, raw: dict[str, Any], minutes: float) -> str:
    """Writes NAME.md and NAME.json into --out and returns the page."""
    c, folder = lab.c, Path(lab.c.out)
    command = shlex.join(["python", "-m", "experiments.evaluate", *sys.argv[1:]])
    facts = {"command": command, "machine": str(lab.machine), "PyTorch": torch.__version__,
             "date": time.strftime("%Y-%m-%d"), "minutes": round(minutes, 1),
             "checkpoint": checksum(lab.path), "features": lab.features.sha256}
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
                                train_minutes=0.005, out=f"{c.out}/quick")  # not over results
    lab, begun = build(c), time.time()
    Path(c.out).mkdir(parents=True, exist_ok=True)  # a bad --out ends here, not after all the work
    experiment = EXPERIMENTS[c.experiment]
    try:
        arms = {name: arm for name, arm in experiment(lab).items() if re.search(c.only, name)}
    except re.error as error:
        raise ValueError(f"--only {c.only} is not a regular expression: {error}") from None
    if not arms:
        raise ValueError(f"--only {c.only} leaves no arm of --experiment {c.experiment}")
    text, raw = table(arms, c.seeds)
    print(write(lab, inspect.getdoc(experiment), text, raw, (time.time() - begun) / 60))


if __name__ == "__main__":
    config.run(main)

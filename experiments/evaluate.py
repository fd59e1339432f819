"""The experiments behind the tables of section 4: python -m experiments.evaluate --experiment NAME.

Every experiment compares ways of drawing clips, each with --seeds seeds, and writes a Markdown table with the
raw numbers beside it. In samplers, joint, guidance and extend what is drawn stands beside two real rows: as
many clips of the test split (the floor), and as many whose every frame is from another clip (chance: good
frames, no video).
All but guidance draw without captions. joint, which trains models of its own, is in ablations.py; benchmark,
ten frames after ten, and reader, how well digits are read, are in benchmark.py.
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
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor

import config
import infill
import sample
from diffusion import denoiser
from experiments import metrics
from experiments.ablations import joint
from experiments.benchmark import benchmark, reader
from experiments.features import checksum
from experiments.lab import Arms, EvaluateConfig, Known, Lab, Numbers, each, known, made_small, open_lab

CALLS = (16, 64, 256)  # of the network in samplers: few, as many as sample.py, and the paper's

# ---- the experiments: name -> arms -----------------------------------------------------------------------


def modes(lab: Lab) -> Arms:
    """Every mode with the settings that the checkpoint carries: what sample.py draws.

    digit: share of the drawn frames that show the digits of what was given, or, where nothing was, those that
    most frames of their clip show. Chance for one digit is 0.10, 0.28 where nothing was given, and 0.19 there
    over 64 frames.
    """
    def free(case: tuple[str, int], seed: int) -> Numbers:
        mode, frames = case
        seen = lab.observe(as_carried(lab, mode, lab.blank(frames), seed))
        steps = metrics.steps(seen.places)
        return {
            "digit": metrics.identity_kept(seen.classes),
            "step": steps.mean().item(),
            "largest_step": steps.amax(1).mean().item()}

    def continued(case: tuple[str, slice, dict], seed: int) -> Numbers:
        mode, where, flags = case
        x, _, truth = lab.real(seed)
        y = as_carried(lab, mode, known(lab, x, where), seed, **flags)
        new = torch.ones(lab.length, dtype=torch.bool)
        new[where] = False
        return {"digit": lab.digit_named(y[:, :, new], truth)}

    def enlarged(scale: int, seed: int) -> Numbers:
        x, _, truth = lab.real(seed)
        y = as_carried(lab, "super_resolve", made_small(lab, x, scale), seed, scale=scale)
        return {"digit": lab.digit_named(y, truth), "psnr": metrics.psnr(x, y)}

    given = {
        "predict, 6 given": ("predict", slice(0, 6), {}),
        "predict by replacement": ("predict", slice(0, 6), {"w_r": 0.0}),
        "interpolate": ("interpolate", slice(0, None, 3), {})}
    return {
        **each(free, {"generate": ("generate", lab.length)}),
        **each(continued, given),
        **each(enlarged, {"super_resolve 2": 2, "super_resolve 4": 4}),
        **each(free, {f"extend to {lab.c.frames}": ("extend", lab.c.frames)}),
        **undrawn(lab)}


def undrawn(lab: Lab) -> Arms:
    """What modes are compared to: real clips, enlarged or decoded without any drawing."""
    def arm(change: Callable[[Tensor], Tensor], seed: int) -> Numbers:
        x, _, truth = lab.real(seed)
        y = change(x).float().cpu()
        return {"digit": lab.digit_named(y, truth), "psnr": metrics.psnr(x, y)}

    def coded(x: Tensor) -> Tensor:
        return lab.model.coder.video(lab.model.latents(x))

    return each(arm, {
        "bicubic 2": partial(bicubic, scale=2),
        "bicubic 4": partial(bicubic, scale=4),
        "real clips": Tensor.clone,
        "real clips, encoded and decoded": coded})


def bicubic(x: Tensor, scale: int) -> Tensor:
    """The clips made small and enlarged again, without any network."""
    small = rearrange(infill.smaller(x, scale), "b c f h w -> (b f) c h w")
    large = nnf.interpolate(small, scale_factor=scale, mode="bicubic").clamp(-1, 1)
    return rearrange(large, "(b f) c h w -> b c f h w", b=len(x))


def as_carried(lab: Lab, mode: str, what: Known, seed: int, **flags: Any) -> Tensor:
    """What sample.py draws of what is known in a mode: with the settings that the checkpoint carries."""
    carried = sample.decide(lab.model, {"mode": mode})
    return lab.draw(seed, what, mode=mode, **carried | flags)


def samplers(lab: Lab) -> Arms:
    """Tables 2 and 3: ancestral against predictor-corrector, ddim and dpm_solver, at equal calls.

    The paper, on other data: BAIR FVD, ancestral 512 steps 68.19, Langevin 256 steps 66.92; Kinetics-600 18.6
    and 16.2. Temporal guidance calls the network twice in each step after its log-SNR.
    """
    flags = {}
    for n in CALLS:
        flags[f"ancestral, {n} calls"] = dict(steps=n)
        flags[f"predictor-corrector, {n} calls"] = dict(steps=n // 2, delta=0.1)
        flags[f"ddim, {n} calls"] = dict(steps=n, sampler="ddim")
        flags[f"dpm_solver, {n} calls"] = dict(steps=n, sampler="dpm_solver")
    if lab.model.data.num_images:
        for at in (-4.0, -3.0, -2.0):
            flags[f"50 steps, w_t 1 from λ {at:g}"] = dict(steps=50, w_t=1.0, w_t_from=at)
        flags["50 steps, w_t 1 from λ -3, corrector"] = dict(steps=50, delta=0.3, w_t=1.0, w_t_from=-3.0)

    def arm(values: dict[str, Any], seed: int) -> Numbers:
        begun = time.perf_counter()
        x = lab.draw(seed, **values)
        seconds = time.perf_counter() - begun
        return {"seconds_per_clip": seconds / lab.c.clips} | lab.measure(x)

    return lab.bounds() | each(arm, flags)


def guidance(lab: Lab) -> Arms:
    """Table 5: the weight of classifier-free guidance; does the caption come true?

    The paper, on other data: weight 1.0, 2.0, 5.0: FVD 41.65, 50.19, 163.74, FID-avg 12.49, 10.53, 13.54,
    IS-avg 10.80, 13.22, 14.80; frameskip 4: FVD 56.71, 54.28, 185.89.
    """
    def judged(x: Tensor, seed: int) -> Numbers:
        _, _, truth = lab.real(seed)
        return lab.measure(x) | {"digit_named": lab.digit_named(x, truth)}

    def arm(w: int, seed: int) -> Numbers:
        _, texts, _ = lab.real(seed)
        x = lab.draw(seed, texts=texts, w=float(w), steps=lab.c.calls)
        return judged(x, seed)

    weights = {f"w = {w} ({w + 1}.0 in Table 5)": w for w in (0, 1, 4)}
    return lab.bounds(judged) | each(arm, weights)


def extend(lab: Lab) -> Arms:
    """Table 6: long videos block by block, reconstruction guidance against replacement; the seams.

    Without captions, which would tell each block its digit. A reconstruction-guided call takes about twice as
    long. Columns are of pieces of the model's length, but for the largest step and what says whole, seam or
    inside; identity at those is the share of digits that change. The paper, on other
    data: FVD of 64 frames, guidance weight 2.0: reconstruction 136.22, replacement 451.45, ratio 3.3.
    """
    frames = lab.c.frames
    blocks = infill.block_starts(torch.zeros(frames, dtype=torch.bool), lab.length, lab.length // 2)
    seams = [start + lab.length for start in blocks[:-1]]
    methods = {"replacement": dict(w_r=0.0)}
    for w_r in (1, 3, 10):
        methods[f"reconstruction, w_r {w_r}"] = dict(w_r=float(w_r))
    if lab.model.data.num_images:
        for name in ("replacement", "reconstruction, w_r 3"):
            methods[f"{name}, w_t 1"] = methods[name] | dict(w_t=1.0, w_t_from=-3.0)

    def judged(x: Tensor, seed: int) -> Numbers:
        seen = lab.observe(x)
        return {
            **lab.measure(x),
            "identity_kept_whole": metrics.identity_kept(seen.classes),
            "residual_whole": metrics.path_off(seen.places, x.shape[-1], lab.stride),
            "largest_step": metrics.steps(seen.places).amax(1).mean().item(),
            **metrics.seam(seen.places, seen.classes, seams)}

    def arm(method: dict[str, Any], seed: int) -> Numbers:
        x = lab.draw(seed, lab.blank(frames), steps=lab.c.calls, **method)
        return judged(x, seed)

    return lab.bounds(judged, frames) | each(arm, methods)


def exchange(lab: Lab) -> Arms:
    """Does the network use other frames for a digit's shape? At six log-SNRs, without captions or sampling.

    Every fourth frame shows one digit, the others another one on the same path: the error on the former over
    that in clips of one digit. 1 means that other frames are not used.
    """
    def arm(seed: int) -> Numbers:
        data = dataclasses.replace(
            lab.model.data,
            split="test",
            num_images=0,
            frame_stride=(lab.stride,))
        x, other = metrics.same_paths(data, lab.c.clips, (8, seed))
        x = lab.model.latents(x)
        other = lab.model.latents(other)
        found = {}
        denoise = denoiser(lab.model.network, lab.model.diffusion)
        with torch.no_grad(), lab.machine.autocast():
            for level in range(-5, 1):
                logsnr = torch.tensor(float(level), device=x.device)
                noise = torch.Generator().manual_seed(seed)
                found[f"λ = {level}"] = metrics.exchange(denoise, x, other, logsnr, noise)
        return found

    return {"the model": arm}


EXPERIMENTS = {experiment.__name__: experiment for experiment in (
    modes, samplers, joint, guidance, extend, exchange, benchmark, reader)}

# ---- the table -------------------------------------------------------------------------------------------


def table(arms: Arms, seeds: int) -> tuple[str, dict[str, list[Numbers]]]:
    """Runs every arm with seeds 0, 1, ...: a table of means ± standard deviations, and the raw numbers."""
    raw = {}
    columns = []
    for name, arm in arms.items():
        raw[name] = [arm(seed) for seed in range(seeds)]
        columns += [column for column in raw[name][0] if column not in columns]
    head = [column.replace("_", " ") for column in columns]
    lines = [
        "| | " + " | ".join(head) + " |",
        "|---|" + "---|" * len(columns)]
    for name, runs in raw.items():
        cells = [_cell(runs, column) for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines), raw


def _cell(runs: list[Numbers], column: str) -> str:
    values = [run[column] for run in runs if column in run]
    if not values:
        return ""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.3g}"
    spread = torch.tensor(values).std().item()  # stdev() fails on nan
    return f"{mean:.3g} ± {spread:.0f}" if spread >= 10 else f"{mean:.3g} ± {spread:.1g}"


def write(
        lab: Lab,
        about: str,
        text: str,
        raw: dict[str, Any],
        minutes: float) -> str:
    """Writes NAME.md and NAME.json into --out and returns the page."""
    c = lab.c
    facts = {
        "command": f"python -m experiments.evaluate {shlex.join(sys.argv[1:])}",
        "machine": str(lab.machine),
        "PyTorch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "minutes": round(minutes, 1),
        "checkpoint": checksum(lab.path),
        "features": lab.features.sha256}
    page = f"# {c.experiment}\n\n{about}\n\n{text}\n\n"
    page += f"Mean ± standard deviation over {c.seeds} seeds, {c.clips} clips each.\n\n"
    for key, value in facts.items():
        page += f"- {key}: {value}\n"
    everything = facts | {"settings": vars(c), "raw": raw}
    file = Path(c.out) / c.experiment
    file.with_suffix(".md").write_text(page)
    file.with_suffix(".json").write_text(json.dumps(everything, indent=1))
    return page


def chosen(lab: Lab, experiment: Callable[[Lab], Arms]) -> Arms:
    """The arms of an experiment that --only leaves. Raises ValueError if there is none."""
    try:
        pattern = re.compile(lab.c.only)
    except re.error as error:
        raise ValueError(f"--only {lab.c.only} is not a regular expression: {error}") from None
    arms = {}
    for name, arm in experiment(lab).items():
        if pattern.search(name):
            arms[name] = arm
    if not arms:
        raise ValueError(f"--only {lab.c.only} leaves no arm of --experiment {lab.c.experiment}")
    return arms


def main() -> None:
    """Runs one experiment and writes its table."""
    c, = config.parse(EvaluateConfig)
    lab = open_lab(c)
    begun = time.time()
    Path(c.out).mkdir(parents=True, exist_ok=True)  # a bad --out ends here, not after all the work
    experiment = EXPERIMENTS[c.experiment]
    text, raw = table(chosen(lab, experiment), c.seeds)
    minutes = (time.time() - begun) / 60
    print(write(lab, inspect.getdoc(experiment), text, raw, minutes))


if __name__ == "__main__":
    config.run(main)

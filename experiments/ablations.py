"""Experiments of evaluate.py that train small models of their own, by train.py, and compare those."""
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import cost
from autoencoder import Autoencoder
from diffusion import loss
from infill import Model, load_model
from experiments.lab import HERE, Arm, Lab
from run import Settings, settings
from text import embed

# what all models here are trained with, but for their flags
NARROW: dict[str, Any] = dict(preset="cpu", dim=24, head_dim=16, batch_size=4)


def joint(lab: Lab) -> dict[str, Arm]:
    """Table 4: image frames in training, at equal steps; then with 0 and 4 for more steps, whose compute, all
    frames counted, is that of 8. Captions, with --w.

    "loss" is that of --reference clips of the test split, without image frames. The paper, on other data: FVD
    with 0, 4, 8 image frames 202.28, 68.11, 57.84; FID-avg 37.52, 18.62, 15.57.
    """
    n, length = lab.c.train_steps, lab.model.network.config.frames
    arms = [(k, n) for k in (0, 4, 8)] + [(k, n * (length + 8) // (length + k)) for k in (0, 4)]
    return lab.bounds() | {f"{k} image frames, {steps} steps": partial(small_model, lab, dict(
        num_images=k, steps=steps), length) for k, steps in arms}


def positions(lab: Lab) -> dict[str, Arm]:
    """Section 3: relative positions against none, at the trained length and at twice as many frames.

    Captions, with --w. Twice as many frames are measured as twice as many clips, which lowers Frechet
    distances by itself.
    """
    length, common = lab.model.network.config.frames, dict(num_images=0, steps=lab.c.train_steps)
    flags = {"Shaw": common, "none": common | dict(relative_positions=False)}  # "Shaw" is one of joint's
    return lab.bounds() | {f"{name}, {frames} frames": partial(small_model, lab, flags[name], frames)
                           for name in flags for frames in (length, 2 * length)}


def small_model(lab: Lab, flags: dict[str, Any], frames: int, seed: int) -> dict[str, float]:
    """Trains a narrow model with flags, or finds it in --out, and measures its clips."""
    model = load_model(trained(lab, flags, seed), lab.machine.device)
    model.network.config.frames = frames  # all in one block; the tables keep their reach
    return measured(lab, model, seed) | {"loss": loss_of_real(lab, model, frames)}


def loss_of_real(lab: Lab, model: Model, frames: int) -> float:
    """The loss on --reference clips of the test split, with the same times and noise for every model."""
    x, texts, _ = lab.real(10_000, frames, lab.c.reference)
    with torch.no_grad(), lab.machine.autocast():
        return loss(model.network, x.to(model.device), model.diffusion, embed(texts, model.text).to(
            model.device), generator=torch.Generator().manual_seed(0)).mean().item()


def measured(lab: Lab, model: Model, seed: int) -> dict[str, float]:
    """What the model draws for the captions of the real clips of seed, with --w, and how long that takes."""
    _, texts, truth = lab.real(seed)
    begun = time.perf_counter()
    x = lab.draw(seed, model=model, texts=texts, w=lab.c.w, steps=lab.c.calls)
    seconds = (time.perf_counter() - begun) / lab.c.clips
    return lab.measure(x) | {"digit_named": lab.digit_named(x, truth), "seconds_per_sample": seconds}


def trained(lab: Lab, flags: dict[str, Any], seed: int) -> Path:
    """The checkpoint of a narrow model trained with flags and seed, or found in --out."""
    flags = flags | dict(size=lab.model.data.size, digits=lab.model.data.digits, seed=seed)
    name = "-".join(f"{key}_{Path(str(value)).name}" for key, value in flags.items())
    folder = Path(lab.c.out) / "runs" / name
    done = folder / f"checkpoint_{flags['steps']:08d}.pt"
    if not done.exists():
        values = NARROW | flags | dict(out=folder, device=lab.c.device, precision=lab.c.precision,
                                       threads=lab.c.threads, preview_every=100_000_000)
        if list(folder.glob("checkpoint_*.pt")):
            values = {"resume": folder}  # it was interrupted
        if subprocess.run([sys.executable, str(HERE / "train.py"), *words(values)]).returncode:
            raise ValueError(f"the training into {folder} did not end well; the same command goes on with it")
    return done


def words(flags: dict[str, Any]) -> list[str]:
    """The command line that gives these flags."""
    return sum(([f"--no-{k}"] if v is False else [f"--{k}"] if v is True else [f"--{k}", str(v)]
                for k, v in flags.items()), [])


def blocks(lab: Lab) -> dict[str, Arm]:
    """MagicVideo: its block against VDM's, in pixels and in latents, with as many parameters (the blocks of a
    space within 8%, all within 13%) and as long a training; captions, with --w.

    FLOPs are of a clip's forward and backward pass, with its encoding; the autoencoder's parameters and its
    own training are not counted. The paper, on other data: 64 times fewer FLOPs than VDM; UCF101, zero shot:
    FVD 699 and 655.
    """
    latents = dict(latent=HERE / lab.c.autoencoder, patch=1, dim_mults="1,2,4", attention_resolutions="8,4,2")
    arms = {f"{name} block, {space}": {"arch": arch, "num_images": 4} | where
            for space, where in (("pixels", {}), ("latents", latents))
            for name, arch in (("VDM", "unet3d"), ("MagicVideo", "magicvideo"))}
    target = parameters(lab, next(iter(arms.values())))
    for flags in arms.values():
        flags["dim"] = min(range(8, 129, 2),
                           key=lambda dim: abs(parameters(lab, flags | {"dim": dim}) - target))
    steps = {name: steps_in_time(lab, flags) for name, flags in arms.items()}  # one after the other, at once

    def arm(name: str, seed: int) -> dict[str, float]:
        flags = arms[name] | {"steps": steps[name], "log_every": max(1, min(50, steps[name] // 4))}
        done = trained(lab, flags, seed)
        return bill(lab, flags, done.parent) | measured(lab, load_model(done, lab.machine.device), seed)
    return lab.bounds() | {name: partial(arm, name) for name in arms}


def all_settings(lab: Lab, flags: dict[str, Any]) -> Settings:
    """The settings of a model with flags, for clips like the laboratory's."""
    return settings(words(NARROW | flags | dict(size=lab.model.data.size, digits=lab.model.data.digits)))


def parameters(lab: Lab, flags: dict[str, Any]) -> int:
    """The number of parameters of the network that flags make."""
    s = all_settings(lab, flags)
    return cost.count(cost.network(s.network, s.train.arch))


def steps_in_time(lab: Lab, flags: dict[str, Any]) -> int:
    """The optimizer steps that fit into --train_minutes, by a short run of the same model."""
    here = dict(steps=(n := min(240, lab.c.train_steps)), log_every=max(1, n // 6))
    rate = speed_of(trained(lab, flags | here, 0).parent)
    return max(2, round(60 * lab.c.train_minutes * rate / NARROW["batch_size"]))


def speed_of(run: Path) -> float:
    """The median of a run's training clips per second."""
    lines = (run / "metrics.jsonl").read_text().splitlines()[1:]
    return statistics.median(json.loads(line)["clips_per_second"] for line in lines)


def bill(lab: Lab, flags: dict[str, Any], run: Path) -> dict[str, float]:
    """What training costs: parameters in millions, GFLOP per clip, clips per second, minutes of the run."""
    s = all_settings(lab, flags)
    count, flops = cost.step_cost(s.network, s.diffusion, s.data.num_images, s.text.tokens, s.train.arch)
    if s.train.latent:
        with torch.device("meta"):
            x = torch.empty(1, s.data.channels, s.data.frames + s.data.num_images, s.data.size, s.data.size)
            flops += cost.flops(lambda: Autoencoder(s.autoencoder).encode(x))
    minutes = s.train.batch_size * s.train.steps / (rate := speed_of(run)) / 60
    return {"million_parameters": count / 1e6, "gflop_per_clip": flops / 1e9, "clips_per_second": rate,
            "training_minutes": minutes}

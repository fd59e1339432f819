"""Experiments of evaluate.py that train small models of their own, by train.py, and compare those."""
import dataclasses
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

import checkpoint
from diffusion import loss
from experiments.lab import HERE, Arms, Lab, Numbers
from infill import load_model
from text import condition

RECIPE: dict[str, Any] = dict(preset="cpu")  # of all models here, but for their flags


def joint(lab: Lab) -> Arms:
    """Table 4: 0, 4 or 8 image frames in training of the cpu preset, at equal steps.

    "loss" is that of --reference clips of the test split, without image frames. The paper, on other data: FVD
    with 0, 4, 8 image frames 202.28, 68.11, 57.84; FID-avg 37.52, 18.62, 15.57.
    """
    arms = lab.bounds()
    for k in (0, 4, 8):
        flags = dict(num_images=k, steps=lab.c.train_steps)
        arms[f"{k} image frames"] = partial(small_model, lab, flags)
    return arms


def small_model(lab: Lab, flags: dict[str, Any], seed: int) -> Numbers:
    """Trains a model with flags, or finds it in --out, and measures what it draws."""
    model = load_model(trained(lab, flags, seed), lab.machine.device)
    small = dataclasses.replace(lab, model=model)
    x = small.draw(seed, steps=lab.c.calls)
    return lab.measure(x) | {"loss": loss_of_real(small)}


def loss_of_real(lab: Lab) -> float:
    """The loss on --reference clips of the test split, with the same times and noise for every model."""
    model = lab.model
    x, texts, _ = lab.real(10_000, clips=lab.c.reference)
    captions = [[text] for text in texts]
    cond = condition(captions, model.text, model.device)
    noise = torch.Generator().manual_seed(0)
    x = lab.model.latents(x)
    with torch.no_grad(), lab.machine.autocast():
        losses = loss(model.network, x, model.diffusion, cond, generator=noise)
    return losses.mean().item()


def trained(lab: Lab, flags: dict[str, Any], seed: int) -> Path:
    """The checkpoint of a model trained with flags and seed, or found in --out."""
    c = lab.c
    data = lab.model.data
    flags = flags | dict(size=data.size, digits=data.digits, seed=seed)
    name = "-".join(f"{key}_{value}" for key, value in flags.items())
    folder = Path(c.out) / "runs" / name
    done = folder / f"checkpoint_{flags['steps']:08d}.pt"
    if done.exists():
        return done
    machine = dict(device=c.device, threads=c.threads)
    if c.precision != "auto":  # the preset has one of its own
        machine["precision"] = c.precision
    line = words(RECIPE | flags | machine | dict(out=folder, preview_every=100_000_000))
    if any(folder.glob(checkpoint.NAMES)):  # it was interrupted
        line = words(dict(resume=folder))
    ended = subprocess.run([sys.executable, str(HERE / "train.py"), *line])
    if ended.returncode:
        raise ValueError(f"the training into {folder} did not end well; the same command goes on with it")
    return done


def words(flags: dict[str, Any]) -> list[str]:
    """The command line that gives these flags."""
    line = []
    for name, value in flags.items():
        line += [f"--{name}", str(value)]
    return line

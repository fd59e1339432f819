"""Section 3.1 and figure 2 as a program: python sample.py --mode MODE draws clips and writes them.

Every mode is one question: given some frames, whole or made small, draw the rest. So a mode only makes a
Given, which infill.py answers.
"""
import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

import checkpoint
import config
from autoencoder import Autoencoder
from data import batches
from files import ARRAYS, load_video, save_clips, save_video
from infill import (SLOW, SMALL, Given, Model, SampleConfig, fill, load_model, nothing, overlap, show,
                    show_small, smaller)
from machine import Machine, start
from magicvideo import MagicVideo

FIRST = "mode checkpoint text w num seed steps w_r input out".split()  # in --help

# ---- the modes: what is given ----------------------------------------------------------------------------


def generate(model: Model, s: SampleConfig) -> Given:
    """Nothing."""
    return nothing(model, s, s.frames or model.network.config.frames)


def predict(model: Model, s: SampleConfig) -> Given:
    """The first --overlap frames (Eq. 7)."""
    k, frames = overlap(model, s), s.frames or model.network.config.frames
    if not 0 < k < frames:
        raise ValueError(f"--mode predict draws what follows {k} of {frames} frames: give other --frames")
    return show(nothing(model, s, frames), slice(0, k), model.latents(source(model, s, k)))


def extend(model: Model, s: SampleConfig) -> Given:
    """Nothing, or the whole --input; four times the model's length is drawn block after block (Table 6)."""
    given = nothing(model, s, s.frames or 4 * model.network.config.frames)
    if not s.input:
        return given
    x = source(model, s, 0)
    if x.shape[2] >= len(given.known):
        raise ValueError(f"--input {s.input} has {x.shape[2]} frames already; --frames must be more")
    return show(given, slice(0, x.shape[2]), model.latents(x))


def interpolate(model: Model, s: SampleConfig) -> Given:
    """Every --stride-th frame, from a slow clip (Eq. 7)."""
    x, frames = slow_clip(model, s)
    return show(nothing(model, s, frames), slice(None, None, s.stride), model.latents(x))


def super_resolve(model: Model, s: SampleConfig) -> Given:
    """All frames, --scale times smaller (Eq. 8)."""
    frames = s.frames
    if not frames and not s.input:
        frames = model.network.config.frames
    x = source(model, s, frames)
    return show_small(nothing(model, s, x.shape[2]), 1, small(s, x))


def cascade(model: Model, s: SampleConfig) -> Given:
    """Every --stride-th frame, --scale times smaller: both observations at once (figure 2)."""
    x, frames = slow_clip(model, s)
    return show_small(nothing(model, s, frames), s.stride, small(s, x))


MODES = {mode.__name__: mode for mode in (
    generate, predict, extend, interpolate, super_resolve, cascade)}

# ---- what they are made of -------------------------------------------------------------------------------


def small(s: SampleConfig, x: Tensor) -> Tensor:
    """x made --scale times smaller; an --input is so small already."""
    if s.input:
        return x
    return smaller(x, s.scale)


def slow_clip(model: Model, s: SampleConfig) -> tuple[Tensor, int]:
    """One frame in --stride of a video (B, C, n, H, W), and the frames of the whole. An --input is such a slow
    clip already.
    """
    if not s.input:
        frames = s.frames or model.network.config.frames
        return held_out_clips(model, s, frames)[:, :, ::s.stride], frames
    if s.frames:
        return source(model, s, (s.frames - 1) // s.stride + 1), s.frames
    x = source(model, s, 0)
    return x, (x.shape[2] - 1) * s.stride + 1


def source(model: Model, s: SampleConfig, frames: int) -> Tensor:
    """The first frames (0: all) of --input, or else of clips of the test split; (B, C, frames, H, W). A slow
    clip and an array are taken frame by frame, all else at the model's speed.
    """
    if not s.input:
        return held_out_clips(model, s, frames)
    data, size = model.data, model.data.size
    stride, fps = stride_of(model, s), data.fps
    if s.mode in SMALL:
        size //= s.scale
    if s.mode in SLOW or Path(s.input).suffix.lower() in ARRAYS:
        stride, fps = 1, 0.0
    x = load_video(s.input, size, data.channels, frames, stride, fps)
    return x.expand(s.num, -1, -1, -1, -1)


def held_out_clips(model: Model, s: SampleConfig, frames: int) -> Tensor:
    """Clips of the test split (B, C, frames, H, W); clip i is the same whatever --num is."""
    stride = (stride_of(model, s),)
    data = replace(model.data, split="test", frames=frames, num_images=0, frame_stride=stride)
    stream = batches(data, 1, s.seed)
    clips = [next(stream)[0] for _ in range(s.num)]
    return torch.cat(clips)


def stride_of(model: Model, s: SampleConfig) -> int:
    """Every so many frames of a clip one is taken: by --fps, or else the smallest number of the training."""
    if s.fps:
        return max(1, round(model.data.rate / s.fps))
    return min(model.data.frame_stride)


# ---- which model, and with which settings ----------------------------------------------------------------


def choose_checkpoint(path: str, text: str = "") -> tuple[Path, str]:
    """The checkpoint that --checkpoint means, and why: without the flag the newest run that can draw what is
    asked for and has done half of its --steps, else the shipped weights.
    """
    if path:
        return checkpoint.find(path), "as given"
    fair, early = [], []
    for folder in Path("runs").glob("*"):
        done = progress_of(folder, bool(text))
        if done >= 0.5:
            fair.append(folder)
        elif done > 0:
            early.append(folder)
    if fair:
        return checkpoint.newest(*fair), "your newest run"
    shipped = Path(__file__).parent / "pretrained/moving_mnist_32.pt"
    if not shipped.exists():
        raise ValueError("there is no checkpoint in runs/ or pretrained/: train one or give --checkpoint")
    reason = "shipped weights"
    if early:
        file = checkpoint.newest(*early)
        young = file.parent
        reason += f", since {young} has not done half of its --steps: --checkpoint {young} takes it"
    return shipped, reason


def progress_of(run: Path, text: bool) -> float:
    """Which part of its --steps a run's newest checkpoint has done; 0 if it cannot draw what is asked for."""
    try:
        made = json.loads((run / "config.json").read_text())
        newest = checkpoint.newest(run)
        deaf = text and not made["cond_dim"]
        if made["arch"] == "autoencoder" or deaf:
            return 0.0
        return int(newest.stem.removeprefix("checkpoint_")) / made["steps"]
    except (OSError, ValueError, TypeError, KeyError):
        return 0.0


CARRIED = "sampler steps gamma delta w w_t w_t_from w_r w_r_power overlap".split()  # what a checkpoint may say


def decide(model: Model, given: dict[str, Any]) -> dict[str, Any]:
    """The settings for flags that were not given by hand: what the mode needs, then what the checkpoint
    carries. A flag changes what it names, and what else has to change with it is printed.
    """
    mode = given.get("mode", "generate")
    chosen = {}
    if mode in SMALL:
        chosen["w_r"] = 4.0 if isinstance(model.coder, Autoencoder) else 1.5
    for name, value in (model.sampling.get("all", {}) | model.sampling.get(mode, {})).items():
        if name in CARRIED:
            chosen[name] = value
    if model.data.num_images == 0:
        chosen.pop("w_t", None)  # no images to be away from
    if mode in ("generate", "predict", "extend") and directed(model):
        if given.get("w_r"):
            raise ValueError(f"--w_r steers nothing that --mode {mode} draws here: it must be 0")
        chosen["w_r"] = 0.0
    for name, value in forced(chosen, given).items():
        print(f"{name} {config.typed(chosen[name])} → {config.typed(value)}, which goes with your flags")
        chosen[name] = value
    return chosen


def directed(model: Model) -> bool:
    """Whether a frame hears nothing of those after it, so that no gradient leads from them to it."""
    return isinstance(model.network, MagicVideo) and model.network.config.mask == "before"


def forced(chosen: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The chosen settings that contradict a flag given by hand, each with the value that replaces it."""
    now = chosen | given  # a flag given by hand wins
    changes = {}
    if now.get("sampler", "ancestral") != "ancestral":
        if given.get("delta") or given.get("gamma"):
            changes["sampler"] = "ancestral"
        else:
            changes |= {"delta": 0.0, "gamma": 0.0}
    if not given.get("text"):
        changes["w"] = 0.0
    needed = {}
    for name, value in changes.items():
        if name in chosen and name not in given and chosen[name] != value:
            needed[name] = value
    return needed


def model_and_settings() -> tuple[Model, SampleConfig, Machine]:
    """The model of --checkpoint and the settings: flags given by hand, else those that it carries."""
    found = {}

    def defaults(given: dict[str, Any]) -> dict[str, Any]:
        asked = vars(SampleConfig()) | given
        machine = start(asked["device"], asked["precision"], asked["threads"])
        path, reason = choose_checkpoint(asked["checkpoint"], asked["text"])
        model = load_model(path, machine.device)
        chosen = decide(model, given)
        print(f"{path} ({reason}), step {model.step}: {model.data.dataset}, "
              f"{model.network.config.frames} frames of {model.data.size} px")
        listed = [f"--{name} {config.typed(chosen[name])}" for name in chosen if name not in given]
        if listed:
            print(f"chosen with it: {' '.join(listed)}")
        found.update(model=model, machine=machine)
        return chosen

    s, = config.parse(SampleConfig, first=FIRST, defaults=defaults)
    overlap(found["model"], s)  # called for its error: one that is too long ends here
    return found["model"], s, found["machine"]


# ---- the program -----------------------------------------------------------------------------------------


def draw_mode(model: Model, s: SampleConfig) -> tuple[Given, Tensor]:
    """What --mode was given, and the video (B, C, T, H, W). ValueError: --scale does not divide its size."""
    if s.mode in SMALL and model.data.size % s.scale:
        raise ValueError(f"--scale {s.scale} does not divide the model's {model.data.size} pixels")
    given = MODES[s.mode](model, s)
    Path(s.out).mkdir(parents=True, exist_ok=True)  # a bad --out ends here, not after all the work
    if not os.access(s.out, os.W_OK):
        raise ValueError(f"--out {s.out} cannot be written to")
    return given, fill(model, s, given)


def sheet(model: Model, s: SampleConfig, given: Given, video: Tensor) -> tuple[Tensor, Tensor, int]:
    """For modes that are given small frames: of each clip what was given, what was drawn and, of test clips,
    the truth, (n B, C, T, H, W); which frames were given (n B, T); and how many of these clips lie in a row.
    """
    low = given.low.flatten(1, 2)  # (B, C T, h, w)
    rows = [nnf.interpolate(low, scale_factor=s.scale).view(video.shape), video]
    if not s.input:
        rows.append(held_out_clips(model, s, video.shape[2]).to(video.device))
    marks = torch.zeros(len(video), len(rows), video.shape[2], dtype=torch.bool)
    marks[:, 0] = given.low_known
    columns = len(rows) * math.ceil(len(video) / 32)  # or many clips become higher than a WebP may be
    return torch.stack(rows, 1).flatten(0, 1), marks.flatten(0, 1), columns


def frames_per_second(model: Model, s: SampleConfig) -> float:
    """How fast the model's clips play."""
    return s.fps or model.speed


def main() -> None:
    """Loads, draws, writes."""
    model, s, machine = model_and_settings()
    with machine.autocast():
        given, video = draw_mode(model, s)
    path, marks, columns = free_name(Path(s.out), s.mode), given.known, 0
    save_clips(video, path)
    print(f"clips alone, for training: {path}, and one for --input: {path / '1.npy'}")
    if s.mode in SMALL:
        video, marks, columns = sheet(model, s, given, video)
    for written in save_video(video, path, marks, frames_per_second(model, s), columns):
        print(written)


def free_name(folder: Path, mode: str) -> Path:
    """folder/mode_001, or the first number that no file has: nothing is overwritten."""
    for number in itertools.count(1):
        path = folder / f"{mode}_{number:03d}"
        if not any(folder.glob(f"{path.name}*")):
            return path


if __name__ == "__main__":
    config.run(main)

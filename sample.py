"""Section 3.1 and figure 2 as a program: python sample.py --mode MODE draws clips and writes them.

Every mode is one question, given some frames, or some frames made small, draw the rest: so a mode only makes
a Given, which infill.py answers.
"""
import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

import checkpoint
import config
from data import batches
from files import load_video, save_video
from infill import Given, Model, SampleConfig, fill, load_model, nothing, overlap, show, show_small, smaller
from machine import Machine, start
from magicvideo import MagicVideo

FIRST = "mode checkpoint text w num seed steps w_r input out".split()  # in --help

# ---- the modes: what is given ----------------------------------------------------------------------------


def generate(model: Model, s: SampleConfig) -> Given:
    """Nothing."""
    return nothing(model, s, s.frames or model.network.config.frames)


def predict(model: Model, s: SampleConfig) -> Given:
    """The first --overlap frames (Eq. 7)."""
    k = steered(model, s)
    if not 0 < k < (frames := s.frames or model.network.config.frames):
        raise ValueError(f"--mode predict draws what follows {k} of {frames} frames: give other --frames")
    return show(nothing(model, s, frames), slice(0, k), inside(model, source(model, s, k)))


def extend(model: Model, s: SampleConfig) -> Given:
    """Nothing, or the whole --input; four times the model's length is drawn block after block (Table 6)."""
    steered(model, s)
    given = nothing(model, s, s.frames or 4 * model.network.config.frames)
    if not s.input:
        return given
    x = source(model, s, 0)
    if x.shape[2] >= len(given.known):
        raise ValueError(f"--input {s.input} has {x.shape[2]} frames already; --frames must be more")
    return show(given, slice(0, x.shape[2]), inside(model, x))


def steered(model: Model, s: SampleConfig) -> int:
    """The frames that predict is given and blocks share; ValueError: --w_r cannot steer those after them."""
    directed = isinstance(model.network, MagicVideo) and model.network.config.mask == "before"
    if s.w_r and s.method == "reconstruction" and directed:
        raise ValueError(f"--w_r steers no frame that --mode {s.mode} draws here: give --method replacement")
    return overlap(model, s)


def interpolate(model: Model, s: SampleConfig) -> Given:
    """Every --stride-th frame, from a slow clip (Eq. 7)."""
    x, frames = slow_clip(model, s)
    return show(nothing(model, s, frames), slice(None, None, s.stride), inside(model, x))


def super_resolve(model: Model, s: SampleConfig) -> Given:
    """All frames, --scale times smaller (Eq. 8)."""
    x = source(model, s, s.frames or (0 if s.input else model.network.config.frames))
    return show_small(nothing(model, s, x.shape[2]), 1, small(s, x))


def cascade(model: Model, s: SampleConfig) -> Given:
    """Every --stride-th frame, --scale times smaller: both observations at once (figure 2)."""
    x, frames = slow_clip(model, s)
    return show_small(nothing(model, s, frames), s.stride, small(s, x))


def small(s: SampleConfig, x: Tensor) -> Tensor:
    """x made --scale times smaller, or as --base drew it. Raises ValueError if its size cannot be divided."""
    if not s.base and x.shape[-1] % s.scale:
        raise ValueError(f"--scale {s.scale} does not divide the model's {x.shape[-1]} pixels")
    return x if s.base else smaller(x, s.scale)


def drawn_by_base(model: Model, s: SampleConfig, frames: int) -> Tensor:
    """The clips that --base draws of as many frames (0: its length), for cascade --scale times smaller."""
    base, fps, needed = load_model(find(s.base), model.device), s.fps, model.data
    given, strides, scale = base.data, base.data.frame_stride, s.scale if s.mode == "cascade" else 1
    if s.mode == "key_frames":
        step = (model.network.config.frames - 1) * min(needed.frame_stride)
        if step not in strides or len(strides) > 1 and not s.text:
            raise ValueError(f"--base must know --frame_stride {step}, and if it knows others too, --text")
        fps = 8 / step * (len(strides) > 1)
    expect(base, s := replace(s, mode="generate", base="", fps=fps))
    if (given.size * scale, given.channels) != (needed.size, needed.channels):
        raise ValueError(f"--base draws {given.channels} x {given.size} px, not the {needed.channels} x "
                         f"{needed.size // scale} px that are needed")
    return fill(base, s, nothing(base, s, frames or base.network.config.frames))


def key_frames(model: Model, s: SampleConfig) -> Given:
    """The gaps between neighbouring key frames (MagicVideo), which --base draws or a slow clip has."""
    gap = model.network.config.frames - 1
    if s.frames and (s.frames - 1) % gap:
        raise ValueError(f"--frames {s.frames} must be 1 more than a multiple of {gap}, from key to key")
    frames = s.frames or (0 if s.input or s.base else 4 * gap + 1)
    return gaps(model, s, inside(model, source(model, s, (frames - 1) // gap + 1, gap)))


def gaps(model: Model, s: SampleConfig, keys: Tensor) -> Given:
    """Both ends of each gap of the key frames (B, C, n + 1, H, W): every clip's first gap, then every clip's
    second, ..., (n B, C, gap + 1, H, W)."""
    if keys.shape[2] < 2:
        raise ValueError("one key frame has no neighbour: --frames must be more, or --input longer")
    pairs = rearrange([keys[:, :, :-1], keys[:, :, 1:]], "two b c n h w -> (n b) c two h w")
    whole = nothing(model, replace(s, num=len(pairs)), length := model.network.config.frames)
    return show(whole, slice(None, None, length - 1), pairs)


def joined(gaps: Tensor, clips: int) -> Tensor:
    """The videos (clips, C, n * gap + 1, H, W) of their gaps (n * clips, C, gap + 1, H, W)."""
    video = rearrange(gaps[:, :, :-1], "(n b) c f h w -> b c (n f) h w", b=clips)
    return torch.cat([video, gaps[-clips:, :, -1:]], 2)


def slow_clip(model: Model, s: SampleConfig) -> tuple[Tensor, int]:
    """One frame in --stride of a video, from source (B, C, n, H, W), and the frames of the whole."""
    frames = s.frames or (0 if s.input or s.base else model.network.config.frames)
    x = source(model, s, (frames - 1) // s.stride + 1, s.stride)  # 0 of 0: all of them
    return x, frames or (x.shape[2] - 1) * s.stride + 1


def source(model: Model, s: SampleConfig, frames: int, stride: int = 1) -> Tensor:
    """The first frames (0: all) of what --base draws, of --input, or else of clips of the test split, at
    stride; (B, C, frames, H, W).
    """
    if s.base:
        return drawn_by_base(model, s, frames)
    if not s.input:
        stride *= max(1, round(8 / s.fps)) if s.fps else min(model.data.frame_stride)
        data = replace(model.data, split="test", frames=frames, num_images=0, frame_stride=(stride,))
        return next(batches(data, s.num, s.seed))[0]
    x = load_video(s.input, model.data.size, model.data.channels)
    if x.shape[1] < frames:
        raise ValueError(f"--input {s.input} has {x.shape[1]} frames, {frames} are needed")
    return x[None, :, :frames or None].expand(s.num, -1, -1, -1, -1)


def inside(model: Model, x: Tensor) -> Tensor:
    """The frames as the network knows them: its autoencoder's latents, if it draws those."""
    return model.autoencoder.latents(x.to(model.device)) if model.autoencoder else x.to(model.device)


# ---- the program -----------------------------------------------------------------------------------------


MODES = {mode.__name__: mode for mode in (
    generate, predict, extend, interpolate, super_resolve, cascade, key_frames)}


def find(path: str, keys: bool = False, text: str = "") -> Path:
    """The checkpoint that a file, a run's folder or "" means: the newest run's, else what is in pretrained/."""
    if path:
        return checkpoint.find(path)
    weights = "interpolate*.pt" if keys else "moving_mnist*.pt" if text else "uncaptioned*.pt"
    shipped = sorted((Path(__file__).parent / "pretrained").glob(weights))
    runs = [folder for folder in Path("runs").glob("*") if draws(folder, keys)]
    if not runs and not shipped:
        raise ValueError("there is no checkpoint in runs/ or pretrained/: train one or give --checkpoint")
    return checkpoint.newest(*runs) if runs else shipped[0]


def draws(run: Path, keys: bool) -> bool:
    """Whether a run's folder has a checkpoint that can draw, between key frames or without them."""
    try:
        made = json.loads((run / "config.json").read_text())
        kind = made["arch"] != "autoencoder" and made["keys"] == keys
    except (OSError, ValueError, TypeError, KeyError):
        kind = not keys
    return kind and any(run.glob("checkpoint_*.pt"))


def expect(model: Model, s: SampleConfig) -> None:
    """Raises ValueError if the model is not of the kind that --mode needs."""
    if (s.mode == "key_frames") != model.network.config.keys:
        raise ValueError("--mode key_frames needs a model trained with --keys, which knows no other mode")


TOGETHER = (("sampler", "gamma", "delta", "steps"), ("text", "w", "fps", "input"), ("method", "w_r", "w_r_power"),
            ("w_t", "w_t_from"), ("overlap",), ("num",), ("frames",))


def carried(sampling: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What the model's maker chose for the mode (config.SAMPLING), but where flags given by hand say another.

    What belongs together is taken together or not at all: --text "a 3" drops the carried text and its w, but
    leaves sampler and steps. --steps alone leaves the sampler as it is.
    """
    mode = given.get("mode", "generate")
    chosen = sampling.get("all", {}) | sampling.get(mode, {})
    free = {name for group in TOGETHER if not set(group) & (set(given) - {"steps"}) for name in group}
    return {name: value for name, value in chosen.items() if name in free - {"input", *given}}


def load() -> tuple[Model, SampleConfig, Machine]:
    """The model of --checkpoint and the settings: flags given by hand, else those that it carries."""
    typed, = config.parse(SampleConfig, first=FIRST)
    machine = start(typed.device, typed.precision, typed.threads)
    model = load_model(path := find(typed.checkpoint, typed.mode == "key_frames", typed.text), machine.device)
    s, = config.parse(SampleConfig, first=FIRST, defaults=partial(carried, model.sampling))
    expect(model, s)
    taken = [f"--{name} {value}" for name, value in vars(s).items() if value != getattr(typed, name)]
    print(f"{path}, step {model.step}: {model.data.dataset}, {model.network.config.frames} frames of "
          f"{model.data.size} px" + f"; chosen with it: {' '.join(taken)}" * bool(taken))
    return model, s, machine


def draw(model: Model, s: SampleConfig) -> tuple[Tensor, Tensor]:
    """The video (B, C, T, H, W) of --mode, and which of its frames were given (T,)."""
    given = MODES[s.mode](model, s)
    Path(s.out).mkdir(parents=True, exist_ok=True)  # a bad --out ends here, not after all the work
    if s.base:  # which drew with this seed already, and what the text says
        silent = {} if model.text.cond_dim else {"text": "", "w": 0.0}
        s = replace(s, seed=s.seed + 1, **silent)
    video, marks = fill(model, s, given), given.known
    if s.mode == "key_frames":
        video = joined(video, s.num)
        return video, torch.arange(video.shape[2]) % (len(marks) - 1) == 0
    return video, marks if given.low is None else marks | given.low_known


def main() -> None:
    """Loads, draws, writes."""
    model, s, machine = load()
    with machine.autocast():
        video, marks = draw(model, s)
    for written in save_video(video, free_name(Path(s.out), s.mode), known=marks):
        print(written)


def free_name(folder: Path, mode: str) -> Path:
    """folder/mode_001, or the first number that is not taken: no sample is overwritten."""
    names = (folder / f"{mode}_{number:03d}" for number in itertools.count(1))
    return next(name for name in names if not name.with_suffix(".gif").exists())


if __name__ == "__main__":
    config.run(main)

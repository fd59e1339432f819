"""Section 3.1 and figure 2 as a program: python sample.py --mode MODE draws clips and writes them.

Every mode is one question, given some frames, or some frames made small, draw the rest: so a mode only makes
a Given, which infill.py answers.
"""
import dataclasses
import itertools
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
from machine import start
from magicvideo import MagicVideo

SMALL = ("super_resolve", "cascade")  # the modes that are given small frames

# ---- the modes: what is given ----------------------------------------------------------------------------


def generate(model: Model, s: SampleConfig) -> Given:
    """Nothing."""
    return nothing(model, s, s.frames or model.network.config.frames)


def predict(model: Model, s: SampleConfig) -> Given:
    """The first --overlap frames (Eq. 7)."""
    k = overlap(model, s)
    return show(generate(model, s), slice(0, k), source(model, s, k))


def extend(model: Model, s: SampleConfig) -> Given:
    """Nothing, or the whole --input; four times the model's length is drawn block after block (Table 6)."""
    given = nothing(model, s, s.frames or 4 * model.network.config.frames)
    if not s.input:
        return given
    x = source(model, s, 0)
    if x.shape[2] >= len(given.known):
        raise ValueError(f"--input {s.input} has {x.shape[2]} frames already; --frames must be more")
    return show(given, slice(0, x.shape[2]), x)


def interpolate(model: Model, s: SampleConfig) -> Given:
    """Every --stride-th frame, from a slow clip (Eq. 7)."""
    x, frames = slow_clip(model, s)
    return show(nothing(model, s, frames), slice(None, None, s.stride), x)


def super_resolve(model: Model, s: SampleConfig) -> Given:
    """All frames, --scale times smaller (Eq. 8)."""
    x = source(model, s, s.frames or (0 if s.input else model.network.config.frames))
    return show_small(nothing(model, s, x.shape[2]), 1, smaller(x, s.scale))


def cascade(model: Model, s: SampleConfig) -> Given:
    """Every --stride-th frame, --scale times smaller: both observations at once (figure 2)."""
    if not s.base:
        x, frames = slow_clip(model, s)
        return show_small(nothing(model, s, frames), s.stride, smaller(x, s.scale))
    x = drawn_by_base(model, s, s.scale, (s.frames - 1) // s.stride + 1)
    return show_small(nothing(model, s, s.frames or (x.shape[2] - 1) * s.stride + 1), s.stride, x)


def drawn_by_base(model: Model, s: SampleConfig, scale: int, frames: int) -> Tensor:
    """The clips that --base draws of as many frames (0: its own length), scale times smaller than model's."""
    base, _ = load_model(find(s.base), model.device)
    if s.mode == "key_frames":
        step = (model.network.config.frames - 1) * min(model.data.frame_stride)
        if step not in (strides := base.data.frame_stride) or len(strides) > 1 and not s.text:
            raise ValueError(f"--base must know --frame_stride {step}, and if it knows others too, --text")
        s = dataclasses.replace(s, fps=8 / step * (len(strides) > 1))
    check(base, dataclasses.replace(s, mode="generate", base="", input=""))
    small, large = base.data, model.data
    if (small.size * scale, small.channels) != (large.size, large.channels):
        raise ValueError(f"--base draws frames of {small.channels} x {small.size} px, but "
                         f"{large.channels} x {large.size // scale} px are needed")
    return fill(base, s, nothing(base, s, frames or base.network.config.frames))


def key_frames(model: Model, s: SampleConfig) -> Given:
    """The gaps between neighbouring key frames (MagicVideo), which --base draws or a slow clip has."""
    gap = model.network.config.frames - 1
    if s.base:
        x = drawn_by_base(model, s, 1, s.frames and (s.frames - 1) // gap + 1)
        return gaps(model, s, inside(model, x))
    frames = s.frames or (0 if s.input else 4 * gap + 1)
    return gaps(model, s, slow_clip(model, dataclasses.replace(s, stride=gap, frames=frames))[0])


def gaps(model: Model, s: SampleConfig, keys: Tensor) -> Given:
    """Both ends of each gap of the key frames (B, C, n + 1, H, W): every clip's first gap, then every clip's
    second, ..., (n B, C, gap + 1, H, W)."""
    if keys.shape[2] < 2:
        raise ValueError("one key frame has no neighbour: --frames must be more, or --input longer")
    pairs = rearrange([keys[:, :, :-1], keys[:, :, 1:]], "two b c n h w -> (n b) c two h w")
    whole = nothing(model, dataclasses.replace(s, num=len(pairs)), length := model.network.config.frames)
    return show(whole, slice(None, None, length - 1), pairs)


def joined(gaps: Tensor, clips: int) -> Tensor:
    """The videos (clips, C, n * gap + 1, H, W) of their gaps (n * clips, C, gap + 1, H, W)."""
    video = rearrange(gaps[:, :, :-1], "(n b) c f h w -> b c (n f) h w", b=clips)
    return torch.cat([video, gaps[-clips:, :, -1:]], 2)


def slow_clip(model: Model, s: SampleConfig) -> tuple[Tensor, int]:
    """One frame in --stride of the input or test split (B, C, n, H, W), and the whole video's frames."""
    frames = s.frames or (0 if s.input else model.network.config.frames)
    x = source(model, s, (frames - 1) // s.stride + 1 if frames else 0, s.stride)
    return x, frames or (x.shape[2] - 1) * s.stride + 1


def source(model: Model, s: SampleConfig, frames: int, stride: int = 1) -> Tensor:
    """The first frames (0: all) of --input, or of clips of the test split at stride; (B, C, frames, H, W)."""
    if not s.input:
        own = round(8 / s.fps) if s.fps else min(model.data.frame_stride)
        data = dataclasses.replace(model.data, split="test", frames=frames, num_images=0,
                                   frame_stride=(max(1, own) * stride,))
        return inside(model, next(batches(data, s.num, s.seed))[0])
    x = load_video(s.input, model.data.size, model.data.channels)
    if x.shape[1] < frames:
        raise ValueError(f"--input {s.input} has {x.shape[1]} frames, {frames} are needed")
    return inside(model, x[None, :, :frames or None].expand(s.num, -1, -1, -1, -1))


def inside(model: Model, x: Tensor) -> Tensor:
    """The frames as the network knows them: its autoencoder's latents, if it draws those."""
    return model.autoencoder.latents(x.to(model.device)) if model.autoencoder else x.to(model.device)


# ---- the program -----------------------------------------------------------------------------------------


def find(path: str) -> Path:
    """The checkpoint that a file, a run's folder or "" means: the newest run's, else pretrained/'s first."""
    if path:
        return checkpoint.newest(Path(path)) if Path(path).is_dir() else Path(path)
    shipped = sorted((Path(__file__).parent / "pretrained").glob("moving_mnist*.pt"))
    runs = [folder for folder in Path("runs").glob("*") if any(folder.glob("checkpoint_*.pt"))]
    if not runs and not shipped:
        raise ValueError("there is no checkpoint in runs/ or pretrained/; train one with "
                         "python train.py --dataset moving_mnist, or name one with --checkpoint")
    return checkpoint.newest(*runs) if runs else shipped[0]


def check(model: Model, s: SampleConfig) -> None:
    """Raises ValueError, in one sentence, for settings that do not fit the model or each other."""
    length, size, k = model.network.config.frames, model.network.config.size, overlap(model, s)
    small, strides = s.mode in SMALL, model.data.frame_stride
    wrong = {
        f"--overlap {k} must be less than the model's {length} frames": k >= length,
        f"--frames {s.frames} must be more than --overlap {k}": s.mode == "predict" and 0 < s.frames <= k,
        "--text needs a model trained with captions, and this one is unconditional":
            s.text and not model.text.cond_dim and not (s.mode == "key_frames" and s.base),
        "--mode key_frames needs a model trained with --keys, and a model trained so knows no other mode":
            (s.mode == "key_frames") != model.network.config.keys,
        "--fps is said after a caption: it needs --text": s.fps and not s.text,
        "--fps needs a model trained with several --frame_stride, and key frames have their own speed":
            s.fps and (s.mode == "key_frames" or len(strides) == 1 and model.data.dataset != "video_folder"),
        f"--w_r steers no frame that --mode {s.mode} draws with this network: give --method replacement":
            s.w_r and s.method == "reconstruction" and s.mode in ("predict", "extend")
            and isinstance(model.network, MagicVideo) and model.network.config.mask == "before",
        "--method and --w_r steer towards given frames, and a model trained with --keys sees them":
            s.mode == "key_frames" and (s.method == "replacement" or s.w_r),
        f"--frames {s.frames} must be 1 more than a multiple of {length - 1}, the way from key to key":
            s.mode == "key_frames" and s.frames and (s.frames - 1) % (length - 1),
        "--w guides towards a caption: it needs --text and a model trained with captions": s.w and not s.text,
        f"--delta and --gamma belong to --sampler ancestral, not {s.sampler}":
            (s.delta or s.gamma) and s.sampler != "ancestral",
        f"--scale {s.scale} does not divide the model's {size} pixels": small and size % s.scale,
        f"--method replacement replaces whole frames, and --mode {s.mode} is given small ones":
            s.method == "replacement" and small,
        f"--mode predict needs a model of two frames or more, and this one has {length}":
            s.mode == "predict" and k == 0,
        f"--mode {s.mode} is given small frames, and this model draws latents": small and model.autoencoder,
        f"--base belongs to --mode cascade and key_frames, not {s.mode}":
            s.base and s.mode not in ("cascade", "key_frames"),
        "--input is for modes that are given frames: not generate, nor with --base":
            s.input and (s.mode == "generate" or s.base),
    }
    for sentence, holds in wrong.items():
        if holds:
            raise ValueError(sentence)


def main() -> None:
    """Loads, draws, writes."""
    s, = config.parse(SampleConfig)
    machine, path = start(s.device, s.precision, s.threads), find(s.checkpoint)
    model, trained = load_model(path, machine.device)
    s, = config.parse(SampleConfig, defaults=lambda given: (
        for_digits(model, trained, given) | papers_numbers(trained.get("preset"), given)))
    check(model, s)
    print(f"{path}: {model.data.dataset}, {model.network.config.frames} frames of {model.data.size} px")
    mode = {"generate": generate, "predict": predict, "extend": extend, "interpolate": interpolate,
            "super_resolve": super_resolve, "cascade": cascade, "key_frames": key_frames}[s.mode]
    with machine.autocast():
        given = mode(model, s)
        Path(s.out).mkdir(parents=True, exist_ok=True)  # a bad --out ends here, not after all the work
        if s.base:  # which drew with this seed already
            s.seed += 1
        video = fill(model, s, given)
    marks = given.known if given.low is None else given.known | given.low_known
    if s.mode == "key_frames":
        video = joined(video, s.num)
        marks = torch.arange(video.shape[2]) % (len(marks) - 1) == 0
    for written in save_video(video, free_name(Path(s.out), s.mode), known=marks):
        print(written)


def for_digits(model: Model, trained: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What we chose for our presets' models of moving digits, where nothing else is said: dpm_solver to
    generate, else the corrector; replacement to extend; digits for captions, with --w 3, where nothing is
    given and training showed such captions.
    """
    if trained.get("dataset") != "moving_mnist" or trained.get("preset") not in ("cpu", "cpu_wide", "cuda"):
        return {}
    mode, chosen = given.get("mode", "generate"), {}
    free = mode in ("generate", "extend") and "input" not in given
    if not {"sampler", "gamma", "delta"} & set(given):
        chosen = dict(steps=32, delta=0.1) if mode != "generate" else dict(sampler="dpm_solver", steps=25)
    if mode == "extend" and "w_r" not in given:
        chosen |= {"method": "replacement"}
    known = model.text.cond_dim and model.data.short_captions
    if not free or not known or {"text", "w", "fps"} & set(given):
        return chosen
    texts = [" and ".join(f"a {(first + 3 * k) % 10}" for k in range(model.data.digits))
             for first in range(10)]
    return chosen | {"text": "|".join(texts), "w": 3.0}


def papers_numbers(preset: str, given: dict[str, Any]) -> dict[str, Any]:
    """The paper's flags for a preset: its sampler's unless another is given, w_r where frames are whole."""
    drop = {"w_r"} if given.get("mode") in SMALL else set()
    if given.get("sampler", "ancestral") != "ancestral":
        drop |= {"sampler", "steps", "gamma", "delta"}
    return {name: value for name, value in config.SAMPLING.get(preset, {}).items() if name not in drop}


def free_name(folder: Path, mode: str) -> Path:
    """folder/mode_001, or the first number that is not taken: no sample is overwritten."""
    names = (folder / f"{mode}_{number:03d}" for number in itertools.count(1))
    return next(name for name in names if not name.with_suffix(".gif").exists())


if __name__ == "__main__":
    config.run(main)

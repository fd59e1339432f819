"""Videos to train on and to look at (section 4, experiments; joint training on images, section 4.3.1).

Bouncing digits made on the fly from the MNIST files beside this module, or clips read from a folder. Videos
are (B, C, F, H, W) floats in [-1, 1] everywhere.
"""

import gzip
import hashlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from clips import folder_clips, video_folder
from files import to_float

Device = str | torch.device

@dataclass(frozen=True)  # and so hashable: a folder is scanned once for each config
class DataConfig:
    """What to train on."""
    dataset: Literal["moving_mnist", "stochastic_moving_mnist", "video_folder"] = "moving_mnist"  # the videos
    data_dir: str = ""  # folder of clips, for video_folder alone
    list: str = ""  # file that lists clips of data_dir: a path and a caption or class number a line
    fps: float = 0.0  # [0, 1000] frames a second that films are sampled at; 0 takes each film's own
    split: Literal["train", "test"] = "train"  # half of the data: no test digit or clip is ever trained on
    frames: int = 16  # [1, 1024] frames per clip
    size: int = 64  # [8, 1024] height and width in pixels
    channels: int = 1  # [1, 64] colour channels: 1 is grey, 3 is RGB
    frame_stride: tuple[int, ...] = (1,)  # [1, 64] every n-th frame is used; of several n each clip draws one
    num_images: int = 0  # [0, 64] independent image frames appended to each clip (joint training)
    digits: int = 2  # [1, 8] digits per clip of the MNIST sets
    short_captions: float = 0.0  # [0, 1] chance that a caption of moving_mnist names its digits alone
    flip: bool = False  # mirror half of the video_folder clips left to right

    def __post_init__(self):  # older checkpoints hold a single number
        object.__setattr__(self, "frame_stride", tuple(np.atleast_1d(self.frame_stride).tolist()))


# ---- the public stream -----------------------------------------------------------------------------------


def batches(config: DataConfig, batch_size: int, seed: int, start: int = 0, stride: int = 1,
            device: Device = "cpu", workers: int = 0) -> Iterator[tuple[Tensor, list[list[str]]]]:
    """Batches start, start + stride, ... on the device: x (B, C, F+K, H, W), and B lists of 1+K captions.

    A run resumes with start=i; rank r of n takes start=r, stride=n. workers are processes that make batches
    ahead. ValueError: bad config, or no usable clip. RuntimeError or ConnectionError: a worker died.
    """
    dataset = Batches(config, batch_size, seed, "cpu" if workers else device)
    pin = config.dataset == "video_folder" and torch.device(device).type == "cuda"
    loader = DataLoader(dataset, None, sampler=count(start, stride), num_workers=workers, pin_memory=pin,
                        worker_init_fn=_ignore_signals, generator=torch.Generator())  # or it draws a number
    return _delivered(loader, device)


class Batches(Dataset):
    """Batch i by its index: uint8 or float x, captions, and what could not be read. It depends on (config,
    batch_size, seed, i) alone.
    """
    def __init__(self, config: DataConfig, batch_size: int, seed: int, device: Device = "cpu"):
        if config.channels not in (1, 3):
            raise ValueError(f"channels is {config.channels}, but only 1 (grey) and 3 (RGB) are possible")
        self.config, self.batch_size, self.seed, self.device = config, batch_size, seed, device
        films = config.dataset == "video_folder"
        draw = partial(folder_clips, video_folder(config)) if films else _digit_clips
        # With a single stride no random number is drawn for it, and captions are silent on the speed.
        self.images, self.clips = draw, draw if len(config.frame_stride) == 1 else partial(_at_speeds, draw)

    def __getitem__(self, i: int) -> tuple[Tensor, list[list[str]], list[str]]:
        b, k = self.batch_size, self.config.num_images
        x, captions, truth = self.clips(self.config, b, _rng((self.seed, i, 0)), self.device)
        if k == 0:
            return x, [[caption] for caption in captions], truth.get("faults", [])
        # A stream of random numbers of their own: the clips do not depend on the images.
        images, more, others = self.images(self.config, b * k, _rng((self.seed, i, 1)), self.device, truth)
        x = torch.cat([x, rearrange(images, "(b k) c 1 h w -> b c k h w", b=b)], 2)
        captions = [[own, *more[j * k : (j + 1) * k]] for j, own in enumerate(captions)]
        return x, captions, truth.get("faults", []) + others.get("faults", [])


def _delivered(loader: DataLoader, device: Device) -> Iterator[tuple[Tensor, list[list[str]]]]:
    told, read = set(), iter(loader)
    try:
        for x, captions, faults in read:
            for fault in dict.fromkeys(faults):
                if fault not in told:
                    told.add(fault)
                    print(f"skipped, {len(told)} so far: {fault}", file=sys.stderr)
            x = x.to(device, non_blocking=True)
            yield to_float(x) if x.dtype == torch.uint8 else x, captions
    except ValueError as error:  # a worker's comes with its traceback
        raise ValueError(str(error).splitlines()[-1].removeprefix("ValueError: ")) from None
    finally:
        if loader.num_workers:  # an error's traceback would keep them, and they ignore the signal to end
            read._shutdown_workers()


def _ignore_signals(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # train.py finishes its step, for which it needs batches
        signal.signal(number, signal.SIG_IGN)


def _at_speeds(draw: Callable, config: DataConfig, b: int, rng: np.random.Generator, device) -> tuple:
    strides = rng.choice(config.frame_stride, b).tolist()
    xs, captions, truths = zip(*(draw(replace(config, frame_stride=(s,)), 1, rng, device) for s in strides))
    truth = {name: [one for truth in truths for one in truth.get(name, [])] for name in ("clips", "faults")}
    return torch.cat(xs), [f"{c} at {8 / s:g} fps" for s, (c,) in zip(strides, captions)], truth


def _rng(seed: int | tuple[int, ...]) -> np.random.Generator:
    # A spawn key, unlike a sum, cannot make (seed 1, batch 0) the same stream as (seed 0, batch 1). The
    # numbers are drawn on the CPU on every machine, so that a GPU run sees the same videos.
    first, *rest = seed if isinstance(seed, tuple) else (seed,)
    return np.random.default_rng(np.random.SeedSequence(first, spawn_key=tuple(rest)))


# ---- bouncing digits -------------------------------------------------------------------------------------

MNIST = Path(__file__).resolve().parent / "mnist"
SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"}
DIRECTIONS = ("right", "up right", "up", "up left", "left", "down left", "down", "down right")


def moving_mnist(config: DataConfig, n: int, seed: int | tuple, device: Device = "cpu") -> tuple:
    """n clips (n, C, F, H, W) of digits at constant speed between walls (Srivastava et al. 2015), captions,
    and the truth on the CPU: labels (n, digits) int64; positions (n, digits, F, 2), top-left (y, x) in
    pixels, floats truncated when pasted. seed: int or tuple of ints. FileNotFoundError: no intact MNIST file.
    """
    return _digit_clips(replace(config, dataset="moving_mnist"), n, _rng(seed), device)


def stochastic_moving_mnist(config: DataConfig, n: int, seed: int | tuple, device: Device = "cpu") -> tuple:
    """As moving_mnist, but digits add up and leave walls at random velocities (SVG, Denton & Fergus 2018)."""
    return _digit_clips(replace(config, dataset="stochastic_moving_mnist"), n, _rng(seed), device)


def _digit_clips(config: DataConfig, n: int, rng: np.random.Generator, device, beside=None) -> tuple:
    stochastic = config.dataset == "stochastic_moving_mnist"
    motion, combine = (_random, _add_saturating) if stochastic else (_straight, torch.maximum)
    side = round(config.size * (32 if stochastic else 28) / 64)
    half = {"train": "train", "test": "t10k"}[config.split]
    images, labels = _read_idx(f"{half}-images-idx3-ubyte.gz"), _read_idx(f"{half}-labels-idx1-ubyte.gz")
    chosen = rng.integers(0, len(images), (n, config.digits))
    positions, captions = motion(config, labels[chosen], config.size - side, rng)
    if beside is not None:  # single frames, to go beside other clips
        positions = np.take_along_axis(positions, rng.integers(0, config.frames, (n, 1, 1, 1)), axis=2)
    patches = torch.from_numpy(images[chosen]).float()
    patches = interpolate(patches, side, mode="area" if side <= 28 else "bilinear").round().byte()
    pixels = _paste(patches.to(device), torch.from_numpy(positions).long().to(device), config.size, combine)
    truth = {"labels": torch.from_numpy(labels[chosen]).long(), "positions": torch.from_numpy(positions)}
    return repeat(to_float(pixels), "n f h w -> n c f h w", c=config.channels), captions, truth


def _straight(config: DataConfig, labels: np.ndarray, room: int, rng: np.random.Generator) -> tuple:
    start, angle = rng.random((*labels.shape, 1, 2)), rng.random((*labels.shape, 1)) * 2 * np.pi
    steps = config.frame_stride[0] * np.arange(config.frames)[:, None]
    way = start + 0.1 * np.stack([-np.sin(angle), np.cos(angle)], -1) * steps  # the walls are at 0 and 1
    sector = np.rint(angle[..., 0] / (np.pi / 4)).astype(int) % 8
    # A chance of 0 draws no numbers.
    short = rng.random(len(labels)) < c if (c := config.short_captions) else [False] * len(labels)
    # Always "a", so that a prompt differs by its digit alone.
    phrases = [[f"a {d}" + f" moving {DIRECTIONS[s]}" * (not brief) for d, s in zip(*clip)]
               for *clip, brief in zip(labels, sector, short)]
    # A bounce folds the straight way. (The original code clamps to the wall in the frame of a bounce instead;
    # folded, the speed never changes, and a frame_stride of s shows exactly every s-th frame.)
    return (1 - abs(way % 2 - 1)) * room, [" and ".join(clip) for clip in phrases]


def _random(config: DataConfig, labels: np.ndarray, room: int, rng: np.random.Generator) -> tuple:
    # Integers on the original's 64-pixel canvas, scaled at the end. Its last position is 31, not 32.
    position = rng.integers(0, 32, (*labels.shape, 2))
    velocity, path = rng.integers(-4, 5, (*labels.shape, 2)), []
    for _ in range((config.frames - 1) * config.frame_stride[0] + 1):
        for axis in (0, 1):  # y before x, as in the original: at a corner the x wall has the last word
            low, high = position[..., axis] < 0, position[..., axis] > 31
            inward, along = rng.integers(1, 5, labels.shape), rng.integers(-4, 5, labels.shape)
            velocity[..., axis] = np.select([low, high], [inward, -inward], velocity[..., axis])
            velocity[..., 1 - axis] = np.where(low | high, along, velocity[..., 1 - axis])
        path.append(position.clip(0, 31))
        position = path[-1] + velocity
    positions = np.stack(path[:: config.frame_stride[0]], axis=2) * (config.size / 64)
    return positions, [" and ".join(f"a {d}" for d in clip) + " bouncing at random" for clip in labels]


def _paste(patches: Tensor, corners: Tensor, size: int, combine: Callable) -> Tensor:
    (n, digits, frames, _), side = corners.shape, patches.shape[-1]
    canvas = patches.new_zeros(n * frames, size, size)
    windows = canvas.unfold(1, side, 1).unfold(2, side, 1)  # (n f) y x h w, a view of the canvas to write to
    every = torch.arange(n * frames, device=canvas.device)
    for d in range(digits):
        y, x = rearrange(corners[:, d], "n f yx -> yx (n f)")
        patch = repeat(patches[:, d], "n h w -> (n f) h w", f=frames)
        windows[every, y, x] = combine(windows[every, y, x], patch)
    return rearrange(canvas, "(n f) h w -> n f h w", n=n)


def _add_saturating(a: Tensor, b: Tensor) -> Tensor:
    return a + torch.minimum(b, 255 - a)  # uint8 would wrap


@cache
def _read_idx(name: str) -> np.ndarray:
    path = MNIST / name
    packed = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(packed).hexdigest() != SHA256[name]:
        remedy = "restore it with `git checkout mnist/`, or put the original file there"
        raise FileNotFoundError(f"{path} is missing, or is not the original MNIST file: {remedy}")
    raw = gzip.decompress(packed)
    assert raw[:3] == b"\0\0\x08", f"{name} starts with {raw[:3]}, not with the header of an array of bytes"
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(np.frombuffer(raw, ">i4", raw[3], 4))

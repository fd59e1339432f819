"""Videos to train on and to look at (section 4, experiments; joint training on images, section 4.3.1).

Bouncing digits made on the fly from the MNIST files beside this module, or clips read from a folder. A data
set of your own is one more function and one more entry in SOURCES: see source_of.
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

Seed = int | tuple | np.random.Generator


@dataclass(frozen=True)  # and so hashable: a folder is scanned once for each config
class DataConfig:
    """What to train on."""
    dataset: str = "moving_mnist"  # moving_mnist, video_folder, or your own
    data_dir: str = ""  # folder of clips, for video_folder alone
    list: str = ""  # file that lists clips of data_dir: a path and a caption or class number a line
    fps: float = 0.0  # [0, 1000] frames a second that films are sampled at; 0 takes each film's own
    # No flag: train.py never sees a digit or clip of the other half, and sample.py starts from those alone.
    split: Literal["train", "test"] = "train"
    frames: int = 16  # [1, 1024] frames per clip
    size: int = 64  # [8, 1024] height and width in pixels
    channels: int = 1  # [1, 64] colour channels: 1 is grey, 3 is RGB; clips have no others
    frame_stride: tuple[int, ...] = (1,)  # [1, 64] every n-th frame is used; of several n each clip draws one
    num_images: int = 0  # [0, 64] independent image frames appended to each clip (joint training)
    digits: int = 2  # [1, 8] digits per clip of the MNIST sets
    walls: Literal["bounce", "clamp"] = "bounce"  # clamp: a digit past a wall is put at it
    short_captions: float = 0.0  # [0, 1] chance that a caption of moving_mnist names its digits alone
    flip: bool = False  # mirror half of the video_folder clips left to right

    @property
    def rate(self) -> float:
        """Frames a second at --frame_stride 1: 8 for digits, and by our count for films without --fps."""
        return self.fps or 8.0


# ---- the public stream -----------------------------------------------------------------------------------


def batches(config: DataConfig, batch_size: int, seed: int, start: int = 0, stride: int = 1,
            device: str | torch.device = "cpu", workers: int = 0) -> Iterator[tuple[Tensor, list[list[str]]]]:
    """Batches start, start + stride, ... on the device: x (B, C, F+K, H, W), and B lists of 1+K captions.

    A run resumes with start=i; rank r of n takes start=r, stride=n. workers are processes that make batches
    ahead. ValueError: bad config, or no usable clip. RuntimeError or ConnectionError: a worker died.
    """
    if config.channels not in (1, 3):
        raise ValueError(f"channels is {config.channels}, but only 1 (grey) and 3 (RGB) are possible")
    dataset = Batches(config, batch_size, seed, source_of(config))
    pin = torch.device(device).type == "cuda"  # so that a batch is sent while the GPU works
    loader = DataLoader(dataset, None, sampler=count(start, stride), num_workers=workers, pin_memory=pin,
                        worker_init_fn=_ignore_signals, generator=torch.Generator())  # or it draws a number
    return _delivered(loader, device)


def source_of(config: DataConfig) -> Callable[..., tuple]:
    """The function that makes the clips of config.dataset. ValueError: there is none, or no usable clip.

    Called with (config, n, rng) it returns n clips (n, C, F, H, W), floats in [-1, 1] or uint8, as config's
    channels, frames and size say; n captions, "" where there is none; and the truth: a dictionary of what else
    is known of the clips, such as labels, or {}. All that is random comes from rng, a NumPy Generator. A
    config.split of "test" wants clips that are never trained on, a frame_stride of (s,) every s-th frame. The
    images of joint training are frames of more such clips.
    """
    if config.dataset == "video_folder":
        found = video_folder(replace(config, num_images=0))  # so that a folder is looked at once for both
        return partial(folder_clips, found)
    if config.dataset not in SOURCES:
        raise ValueError(f"--dataset {config.dataset} is not one of {', '.join(SOURCES)}, video_folder")
    return SOURCES[config.dataset]


@dataclass
class Batches(Dataset):
    """Batch i by its index, on the CPU: uint8 or float x, captions, and what could not be read. It depends on
    (config, batch_size, seed, i) alone.
    """
    config: DataConfig
    batch_size: int
    seed: int
    source: Callable

    def __getitem__(self, i: int) -> tuple[Tensor, list[list[str]], list[tuple]]:
        b, k = self.batch_size, self.config.num_images
        x, captions, truth = self.clips(b, _rng((self.seed, i, 0)))
        faults = truth.get("faults", [])
        captions = [[caption] for caption in captions]
        if k > 0:  # a stream of random numbers of their own: the clips do not depend on the images
            images, others, more = self.images(b * k, _rng((self.seed, i, 1)), truth)
            images = rearrange(images, "(b k) c 1 h w -> b c k h w", b=b)
            x = torch.cat([x, images], 2)
            for j, caption in enumerate(others):
                captions[j // k].append(caption)
            faults = faults + more.get("faults", [])
        return x, captions, faults

    def clips(self, n: int, rng: np.random.Generator) -> tuple:
        """n clips from source. Of several strides each clip draws one, and its caption says the speed."""
        if len(self.config.frame_stride) == 1:
            return self.source(self.config, n, rng)
        xs, captions = [], []
        truth = {"clips": [], "faults": []}
        for stride in rng.choice(self.config.frame_stride, n).tolist():
            config = replace(self.config, frame_stride=(stride,))
            x, (caption,), known = self.source(config, 1, rng)
            xs.append(x)
            captions.append(f"{caption} at {config.rate / stride:g} fps")
            for name in truth:
                truth[name].extend(known.get(name, []))
        return torch.cat(xs), captions, truth

    def images(self, n: int, rng: np.random.Generator, beside: dict) -> tuple:
        """n single frames (n, C, 1, H, W), of more clips a frame each, with captions that say no speed.

        beside is the truth of the clips that they go beside. video_folder gets it: it need not read whole
        clips then, and takes none of those.
        """
        if self.config.dataset == "video_folder":
            return self.source(self.config, n, rng, beside)
        x, captions, truth = self.source(self.config, n, rng)
        shown = rng.integers(0, self.config.frames, n)
        frames = x[np.arange(n), :, shown]  # (n, C, H, W)
        return frames[:, :, None], captions, truth


def _delivered(loader, device):
    told = set()
    read = iter(loader)
    try:
        for x, captions, faults in read:
            for clip, reason in faults:
                if clip not in told:
                    told.add(clip)
                    print(f"skipped, {len(told)} so far: {reason}", file=sys.stderr)
            x = x.to(device, non_blocking=loader.pin_memory)
            if x.dtype == torch.uint8:
                x = to_float(x)
            yield x, captions
    except ValueError as error:  # a worker's comes with its traceback
        raise ValueError(str(error).splitlines()[-1].removeprefix("ValueError: ")) from None
    finally:
        if loader.num_workers:  # an error's traceback would keep them, and they ignore the signal to end
            read._shutdown_workers()


def _ignore_signals(worker):
    for number in (signal.SIGINT, signal.SIGTERM):  # train.py finishes its step, for which it needs batches
        signal.signal(number, signal.SIG_IGN)


def _rng(seed):
    # A spawn key, unlike a sum, cannot make (seed 1, batch 0) the same stream as (seed 0, batch 1). The
    # numbers are drawn on the CPU on every machine, so that a GPU run sees the same videos.
    if isinstance(seed, np.random.Generator):
        return seed
    first, *rest = np.atleast_1d(seed).tolist()
    return np.random.default_rng(np.random.SeedSequence(first, spawn_key=rest))


# ---- bouncing digits -------------------------------------------------------------------------------------

MNIST = Path(__file__).resolve().parent / "mnist"
SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"}
DIRECTIONS = ("right", "up right", "up", "up left", "left", "down left", "down", "down right")


def moving_mnist(config: DataConfig, n: int, seed: Seed) -> tuple:
    """n clips (n, C, F, H, W) of digits at constant speed between walls (Srivastava et al. 2015), captions,
    and the truth: labels (n, digits) int64; positions (n, digits, F, 2), top-left (y, x) in
    pixels, floats truncated when pasted. FileNotFoundError: no intact MNIST file.
    """
    rng = _rng(seed)
    patches, labels = _choose(config, n, rng)
    room = config.size - patches.shape[-1]
    positions, sectors = _straight(config, labels.shape, room, rng)
    captions = _captions(config, labels, sectors, rng)
    x = _paste(config, patches, positions)
    return x, captions, {"labels": labels, "positions": positions}


def _choose(config, n, rng):
    """Digits (n, digits, side, side) uint8, where side is 28 at size 64, and their labels (n, digits)."""
    half = "t10k" if config.split == "test" else "train"
    images = _read_idx(f"{half}-images-idx3-ubyte.gz")
    labels = _read_idx(f"{half}-labels-idx1-ubyte.gz")
    chosen = rng.integers(0, len(images), (n, config.digits))
    patches = torch.from_numpy(images[chosen]).float()
    side = round(config.size * 28 / 64)
    mode = "area" if side <= 28 else "bilinear"
    patches = interpolate(patches, side, mode=mode).round().byte()
    return patches, torch.from_numpy(labels[chosen]).long()


def _straight(config, shape, room, rng):
    """Positions (n, digits, F, 2), and the eighth of the circle (n, digits) that each digit sets out into."""
    start = rng.random((*shape, 1, 2))  # the walls are at 0 and 1
    angle = rng.random((*shape, 1)) * 2 * np.pi
    velocity = 0.1 * np.stack([-np.sin(angle), np.cos(angle)], -1)
    steps = config.frame_stride[0] * np.arange(config.frames)
    if config.walls == "clamp":
        places = _clamped(start, velocity, steps[-1] + 1)[..., steps, :]
    else:
        # A bounce folds the straight way: the speed never changes
        places = 1 - abs((start + velocity * steps[:, None]) % 2 - 1)
    positions = places * room
    sectors = np.rint(angle[..., 0] / (np.pi / 4)).astype(int) % 8
    return torch.from_numpy(positions), sectors


def _clamped(place, velocity, frames):
    """As in the code of Srivastava et al.: in each frame, the first included, a digit makes a step. One that
    passes a wall is put at the wall and turns.
    """
    places = []
    for _ in range(frames):
        place = place + velocity
        passed = (place <= 0) | (place >= 1)
        velocity = np.where(passed, -velocity, velocity)
        place = place.clip(0, 1)
        places.append(place)
    return np.concatenate(places, -2)


def _captions(config, labels, sectors, rng):
    short = np.zeros(len(labels), bool)
    if config.short_captions > 0:  # a chance of 0 draws no numbers
        short = rng.random(len(labels)) < config.short_captions
    captions = []
    for digits, ways, brief in zip(labels.tolist(), sectors, short):
        if brief:
            captions.append(_names(digits))
        else:
            captions.append(" and ".join(map(_phrase, digits, ways)))
    return captions


def _phrase(digit, sector):
    return f"a {digit} moving {DIRECTIONS[sector]}"  # always "a", so that a prompt differs by its digit alone


def _names(digits):
    return " and ".join(f"a {digit}" for digit in digits)


def _paste(config, patches, positions):
    """Clips of patches (n, digits, side, side) uint8, with their top-left corners at positions."""
    corners = positions.long()
    n, digits, frames, _ = corners.shape
    side = patches.shape[-1]
    canvas = patches.new_zeros(n * frames, config.size, config.size)
    windows = canvas.unfold(1, side, 1).unfold(2, side, 1)  # (n f) y x h w, a view of the canvas to write to
    every = torch.arange(n * frames)
    for d in range(digits):
        y, x = rearrange(corners[:, d], "n f yx -> yx (n f)")
        patch = repeat(patches[:, d], "n h w -> (n f) h w", f=frames)
        windows[every, y, x] = torch.maximum(windows[every, y, x], patch)
    return repeat(to_float(canvas), "(n f) h w -> n c f h w", n=n, c=config.channels)


@cache
def _read_idx(name):
    path = MNIST / name
    packed = b""
    if path.is_file():
        packed = path.read_bytes()
    if hashlib.sha256(packed).hexdigest() != SHA256[name]:
        remedy = "restore it with `git checkout mnist/`, or put the original file there"
        raise FileNotFoundError(f"{path} is missing, or is not the original MNIST file: {remedy}")
    content = np.frombuffer(gzip.decompress(packed), np.uint8)
    if "labels" in name:
        return content[8:]  # what comes before says how many there are
    return content[16:].reshape(-1, 28, 28)


SOURCES = {  # the functions of clips by name; see source_of
    "moving_mnist": moving_mnist,
}

"""Videos as files: clips in any usual format to train on, and GIF, WebP and film strip to look at.

Tensors are (C, F, H, W) or (B, C, F, H, W) floats in [-1, 1]. Whatever is wrong with a file is a ValueError.
"""
import contextlib
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import ceil, sqrt
from pathlib import Path
from statistics import multimode

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image, ImageOps, ImageSequence
from torch import Tensor

from films import FILMS, MAX_FRAME, pictures, timeline

STILLS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
ARRAYS = (".npy", ".npz")
CLIPS = (".gif", ".webp", ".apng", *ARRAYS, *FILMS)
IMAGES = ("GIF", "WEBP", "PNG", "JPEG", "BMP", "TIFF", "PPM")  # Pillow's readers that only decode pixels


def load_video(path: str | Path, size: int, channels: int, frames: int = 0, stride: int = 1,
               fps: float = 0) -> Tensor:
    """The first frames (0: all) of every stride-th one of a clip, (C, F, size, size) in [-1, 1]: short side
    fitted to size, centre cropped. fps: see decode. Nothing behind them is decoded.

    A clip is a film, GIF, WebP, (A)PNG, npy or npz file, or a folder of stills. ValueError: not readable, or
    too short.
    """
    cut = slice(0, None, stride)
    if frames:
        cut = slice(0, (frames - 1) * stride + 1, stride)
    return to_float(decode(Path(path), size, channels, cut, fps))


def to_float(pixels: Tensor) -> Tensor:
    """uint8 as floats in [-1, 1]."""
    return pixels.div(127.5).sub_(1)  # 0 and 255 become -1 and 1 exactly


def natural(path: Path) -> list[str | int]:
    """A key that sorts frame 10 after frame 9."""
    parts = re.split(r"(\d+)", str(path))
    parts[1::2] = map(int, parts[1::2])
    return parts


def stamp(path: Path) -> tuple[int, ...]:
    """What is another when a file is another: its size and time of change."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    return ()


def ticks(seconds: float, fps: float) -> int:
    """How many frames a clip has when it is shown at fps frames a second."""
    return int((seconds + 1e-3) * fps)  # containers round times to a millisecond


def probe(path: Path) -> tuple[int, float, int]:
    """How many frames a clip has, in how many seconds (0: arrays and folders of stills know no time), and
    where the range of an array of floats begins, at -1 or 0 (1: all others). Of a film only packets are read.
    Raises ValueError as decode does.
    """
    with _readable(path):
        low = 1
        if path.suffix.lower() in ARRAYS:
            low = _low(_array(path))
        order, seconds = _shown(path)
        return len(order), seconds, low


def decode(path: Path, size: int, channels: int, cut: slice = slice(None), fps: float = 0,
           low: int = 1) -> Tensor:
    """The frames of a cut, range(start, stop, step), of a clip as uint8 (C, F, size, size).

    The cut counts frames as they are shown: a film's own; those of an animation, some of them again since
    they last longer; or with fps what is on display so many times a second. low: where floats begin in all
    clips of the folder (1: in this one). Raises ValueError: broken, oversized, of no known kind, or shorter
    than the cut.
    """
    with _readable(path):
        order, _ = _shown(path, fps)
        needed = cut.stop or 1
        if len(order) < needed:
            raise ValueError(f"{len(order)} frames, {needed} needed")
        numbers, again = np.unique(order[cut], return_inverse=True)
        frames = []
        for image in _images(path, numbers, size, low):
            frames.append(_fit(image, size, channels))
        if len(frames) < len(numbers):
            raise ValueError("not all of it can be decoded")
        return rearrange(torch.stack(frames)[again], "f h w c -> c f h w").contiguous()


# ---- the four kinds of clips -----------------------------------------------------------------------------


def _shown(path, fps=0):
    """The numbers of a clip's frames in the order in which they are shown, and the seconds it takes."""
    if path.suffix.lower() in ARRAYS:
        return range(len(_array(path))), 0.0
    if path.is_dir():
        return range(len(_stills(path))), 0.0
    if path.suffix.lower() in FILMS:
        times = timeline(path, stamp(path))
        times, order = times - times[0], np.arange(len(times) - 1)
    else:
        times, order = _animation(path, stamp(path))
    if fps:
        moments = np.arange(ticks(times[-1], fps)) / fps
        order = np.searchsorted(times[:-1], moments + 1e-3, side="right") - 1
    return order, float(times[-1])


def _images(path, numbers, size, low):
    """The frames of these numbers, which rise."""
    if path.suffix.lower() in ARRAYS:
        yield from map(Image.fromarray, _as_bytes(_array(path), numbers, low))
    elif path.is_dir():
        stills = _stills(path)
        for number in numbers:
            image = Image.open(stills[number], formats=IMAGES)
            if image.format == "TIFF" and image.n_frames > 1:
                raise ValueError(f"{stills[number].name} holds several pictures")
            yield image
    elif path.suffix.lower() in FILMS:
        yield from pictures(path, timeline(path, stamp(path))[numbers], size)
    else:
        image = Image.open(path, formats=IMAGES)  # Pillow goes by content, not by name
        for number in numbers:
            image.seek(number)
            yield image


@lru_cache(256)
def _animation(path, stamp):
    """When each frame begins and the last one ends, in seconds; and the order in which frames are shown."""
    delays = []
    for frame in ImageSequence.Iterator(Image.open(path, formats=IMAGES)):
        frame.load()  # only then a WebP knows its delay
        delay = frame.info.get("duration", 0)
        if delay <= 10:
            delay = 100  # milliseconds, as browsers take it
        delays.append(delay)
    # Writers merge equal neighbours: what lasts twice as long as most frames do was two.
    times = np.ceil(np.array(delays) / min(multimode(delays)) - 0.5).clip(1).astype(int)
    return np.cumsum([0, *delays]) / 1000, np.repeat(np.arange(len(delays)), times)


def _stills(folder):
    stills = [path for path in folder.glob("[!.]*") if path.suffix.lower() in STILLS]
    return sorted(stills, key=natural)


def _array(path):
    array = np.load(path, mmap_mode="r", allow_pickle=False)  # a pickle could run code
    if path.suffix.lower() == ".npz":
        clips = [part for part in map(array.get, array.files) if _is_clip(part)]
        if len(clips) != 1:
            raise ValueError(f"arrays {', '.join(array.files)}: one alone must have the shape of a clip")
        array = clips[0]
    if not _is_clip(array):
        raise ValueError(f"shape {array.shape}, but (F, H, W) or (F, H, W, C) with C 1, 3 or 4 is needed. A "
                         "picture is no clip: stack the frames. Of many clips in one array save each as a file: "
                         "array[i], or array[:, i] where frames come first, as in Moving MNIST's test file")
    return array


def _is_clip(array):
    if array.ndim == 3:
        return array.shape[2] > 4  # or it is a picture (H, W, C)
    return array.shape[3:] in ((1,), (3,), (4,))


def _low(array):
    if array.dtype == np.uint8:
        return 1
    low = array.min()
    if array.dtype.kind != "f" or not (low >= -1 and array.max() <= 1):
        raise ValueError("values that are neither uint8 nor floats in [0, 1] or [-1, 1]")
    return int(np.floor(low))  # 1 if all are 1


def _as_bytes(array, numbers, low):
    frames = array[numbers]
    if array.dtype != np.uint8:
        if low == 1:  # nobody has looked
            low = min(0, _low(array))
        frames = np.rint((frames - low) / (1 - low) * 255).astype(np.uint8)
    if frames.shape[3:] == (1,):
        frames = frames[..., 0]
    return frames


def _fit(image, size, channels):
    if image.width * image.height > MAX_FRAME:
        raise ValueError(f"oversized: over {MAX_FRAME} pixels a frame")
    with contextlib.suppress(Exception):  # what a telephone says of where up is may be broken
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floats in a picture, whose range nobody knows")
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would cut off at 255 instead of scaling
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() >= 2**16:
            raise ValueError("a picture with values beyond 16 bits")
        image = Image.fromarray(np.rint(pixels / 257).astype(np.uint8))
    image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    image = image.convert("L" if channels == 1 else "RGB")
    image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).reshape(size, size, channels)


@contextlib.contextmanager
def _readable(path):
    try:
        yield
    except Exception as error:  # a broken file makes decoders raise nearly anything, SyntaxError included
        reason = getattr(error, "strerror", None) or str(error) or repr(error)  # av's carry its path again
        if isinstance(error, ImportError):
            reason = "needs `pip install av`"
        raise ValueError(f"{path}: broken or unusable, {' '.join(reason.split())}") from error


# ---- files to look at ------------------------------------------------------------------------------------

ORANGE, GREY = (255, 140, 0), (64, 64, 64)  # the margin of a frame that was given, and of all others


def save_video(x: Tensor, path: str | Path, known: Tensor | Sequence | None = None, fps: float = 8,
               columns: int = 0) -> list[Path]:
    """Write x (B, C, F, H, W) in [-1, 1] as a grid of clips, .gif and lossless .webp, and a film strip, .png.

    Frames marked in known, F or (B, F) booleans, get an orange margin. columns: clips in a row of the grid; 0
    makes it a square. Returns the paths; such a suffix is cut off.
    """
    stem = re.sub(r"\.(gif|webp|png)$", "", str(path))
    Path(stem).parent.mkdir(parents=True, exist_ok=True)
    cells = _cells(_pixels(x), known)
    if columns == 0:
        columns = ceil(sqrt(len(cells)))
    blank = np.full_like(cells, GREY)[: -len(cells) % columns]
    grid = rearrange(np.concatenate([cells, blank]), "(r c) f h w d -> f (r h) (c w) d", c=columns)
    frames = list(map(Image.fromarray, grid))
    strip = Image.fromarray(rearrange(cells, "b f h w d -> (b h) (f w) d"))
    # One palette for all frames, or still parts flicker. It is exact up to 256 colours: grey without marks.
    tall = Image.fromarray(rearrange(grid, "f h w d -> (f h) w d")).quantize(256)
    _, height, width, _ = grid.shape
    indexed = []
    for top in range(0, tall.height, height):
        indexed.append(tall.crop((0, top, width, top + height)))
    milliseconds = min(round(1000 / fps), 655_350)  # a GIF has no more
    timing = {"save_all": True, "duration": milliseconds, "loop": 0}
    gif = _write(Path(f"{stem}.gif"), indexed, optimize=False, **timing)
    webp = _write(Path(f"{stem}.webp"), frames, lossless=True, **timing)
    return [gif, webp, _write(Path(f"{stem}.png"), [strip])]


def save_clips(x: Tensor, folder: str | Path) -> list[Path]:
    """Write each clip of x (B, C, F, H, W) in [-1, 1] alone, with no margin, as a uint8 array (F, H, W, C):
    1.npy, 2.npy, ... in the folder. load_video and training read them exactly. Returns the paths.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = []
    for number, clip in enumerate(_pixels(x), 1):
        paths.append(Path(folder, f"{number}.npy"))
        np.save(paths[-1], clip)
    return paths


def _pixels(x):
    assert x.ndim == 5 and x.shape[1] in (1, 3), f"expected (B, 1 or 3, F, H, W), got {tuple(x.shape)}"
    x = x.detach().float().cpu().nan_to_num(nan=-1.0).clamp(-1, 1)
    pixels = x.add(1).mul(127.5).round().byte()  # a cast alone truncates, and wraps beyond 255
    return rearrange(pixels, "b c f h w -> b f h w c").numpy()


def _cells(pixels, known):
    zoom = ceil(64 / min(pixels.shape[2:4]))  # smaller clips are hard to see
    colours = 3 // pixels.shape[4]
    pixels = repeat(pixels, "b f h w c -> b f (h i) (w j) (c n)", i=zoom, j=zoom, n=colours)
    b, f, h, w, _ = pixels.shape
    cells = np.full((b, f, h + 4, w + 4, 3), GREY, np.uint8)
    if known is not None:
        cells[torch.as_tensor(known).cpu().expand(b, f).numpy()] = ORANGE
    cells[:, :, 2:-2, 2:-2] = pixels
    return cells


def _write(path, images, **options):
    temporary = path.with_name("." + path.name)  # so that nobody sees half a file
    images[0].save(temporary, append_images=images[1:], **options)
    return temporary.replace(path)

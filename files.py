"""Videos as files: clips in any usual format to train on, and GIF, WebP and film strip to look at.

Tensors are (C, F, H, W) or (B, C, F, H, W) floats in [-1, 1]. Whatever is wrong with a file is a ValueError.
"""
import contextlib
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image, ImageOps, ImageSequence
from torch import Tensor

STILLS, FILMS = (".png", ".jpg", ".jpeg", ".bmp"), (".mp4", ".avi", ".mov", ".mkv", ".webm")
ARRAYS, IMAGES = (".npy", ".npz"), ("GIF", "WEBP", "PNG", "JPEG", "BMP")
CLIPS = (".gif", ".webp", ".apng", *ARRAYS, *FILMS)
MAX_FRAME, MAX_CLIP = 2**26, 2**31  # pixels of a frame as it is in the file, and of all that are kept
WHOLE = slice(0, None, 1)


def load_video(path: str | Path, size: int, channels: int) -> Tensor:
    """All frames of a clip, (C, F, size, size) in [-1, 1]: short side fitted to size, centre cropped.

    A clip is a GIF, WebP, (A)PNG, npy, npz or film file, or a folder of stills. ValueError: not readable.
    """
    return to_float(decode(Path(path), size, channels))


def to_float(pixels: Tensor) -> Tensor:
    """uint8 as floats in [-1, 1]."""
    return pixels.div(127.5).sub_(1)  # 0 and 255 become -1 and 1 exactly


def natural(path: Path) -> list:
    """A key that sorts frame 10 after frame 9."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", str(path)))]


def probe(path: Path) -> tuple[int, float]:
    """How many frames a clip has, and how many a second (0 if it is no film), by its header: nothing is
    decoded. Raises ValueError as decode does.
    """
    with _readable(path):
        if path.suffix.lower() in FILMS:
            with _opened(path) as (film, stream, rate):
                frames = stream.frames or round((film.duration or 0) / 1_000_000 * rate)
                return frames or sum(packet.size > 0 for packet in film.demux(stream)), rate
        if path.is_dir():
            return len(_stills(path)), 0.0
        if path.suffix.lower() in ARRAYS:
            return len(_array(path)), 0.0
        with Image.open(path, formats=IMAGES) as image:
            return getattr(image, "n_frames", 1), 0.0


def decode(path: Path, size: int, channels: int, cut: slice = WHOLE, fps: float = 0) -> Tensor:
    """The frames of a cut, range(start, stop, step), of a clip as uint8 (C, F, size, size).

    A film is decoded from the key frame before the cut on. The cut starts at a time, start over the film's
    mean rate; with fps the film is resampled, and the cut counts the new frames. Raises ValueError: broken,
    oversized, of no known kind, or shorter than the cut.
    """
    frames, wanted = [], len(range(cut.start, cut.stop, cut.step)) if cut.stop else None
    with _readable(path):
        for image in islice(_frames(path, size, cut, fps), wanted):
            _bound(image.width * image.height, (len(frames) + 1) * size * size)
            frames.append(_fit(image, size, channels))
        if cut.start and len(frames) < wanted:  # where the rate changes, or a header promises too much
            return decode(path, size, channels, slice(0, cut.stop - cut.start, cut.step), fps)
        if len(frames) < (wanted or 1):
            raise ValueError(f"{len(frames)} frames, {wanted or 1} needed")
        return rearrange(torch.stack(frames), "f h w c -> c f h w").contiguous()


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a broken file makes decoders raise nearly anything, SyntaxError included
        reason = getattr(error, "strerror", None) or str(error) or repr(error)  # av's carry its path again
        reason = "needs `pip install av`" if isinstance(error, ImportError) else reason
        said = f"{path}: broken or unusable, "
        raise ValueError(said + " ".join(reason.removeprefix(said).split())) from error


def _bound(frame: int, kept: int = 0) -> None:
    if frame > MAX_FRAME or kept > MAX_CLIP:
        raise ValueError(f"oversized: over {MAX_FRAME} pixels a frame or {MAX_CLIP} in all")


def _frames(path: Path, size: int, cut: slice, fps: float) -> Iterator[Image.Image]:
    if path.suffix.lower() in FILMS:
        yield from _film(path, size, cut, fps)
    elif path.is_dir():
        for still in _stills(path)[cut]:
            yield from _frames(still, size, slice(0, 1, 1), fps)
    elif path.suffix.lower() in ARRAYS:
        yield from map(Image.fromarray, _array(path)[cut])
    else:
        # Pillow goes by content, not by name: only these readers, none that does more than decode pixels.
        with Image.open(path, formats=IMAGES) as image:
            yield from islice(ImageSequence.Iterator(image), cut.start, cut.stop, cut.step)


def _stills(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("[!.]*") if p.suffix.lower() in STILLS), key=natural)


def _array(path: Path) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)  # a pickle could run code
    array = array if path.suffix.lower() == ".npy" else array["video" if array.files[1:] else array.files[0]]
    if array.ndim != 3 and array.shape[3:] not in ((1,), (3,), (4,)):
        raise ValueError(f"shape {array.shape}, but (F, H, W) or (F, H, W, C) with C 1, 3 or 4 is needed")
    if array.dtype != np.uint8:
        if array.dtype.kind != "f" or not (array.min() >= -1 and array.max() <= 1):
            raise ValueError("values that are neither uint8 nor floats in [0, 1] or [-1, 1]")
        array = np.rint(array * 255 if array.min() >= 0 else (array + 1) * 127.5).astype(np.uint8)
    return array[..., 0] if array.shape[3:] == (1,) else array


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple]:
    import av  # optional, and only for this

    with av.open(str(path), container_options={"protocol_whitelist": "file"}) as film:
        stream = next(iter(film.streams.video), None)
        rate = stream and (stream.average_rate or stream.guessed_rate)
        if not rate:
            raise ValueError("no moving pictures in it")
        stream.codec_context.thread_count = 1  # data.py has other processes for the other cores
        yield film, stream, float(rate)


def _film(path: Path, size: int, cut: slice, fps: float) -> Iterator[Image.Image]:
    with _opened(path) as (film, stream, rate):
        begin = float((stream.start_time or 0) * stream.time_base) + cut.start / (fps or rate)
        frames = _from(begin, film, stream, rate)
        frames = _on_display(frames, begin, fps, rate) if fps else (
            frame for time, frame in frames if time > begin - 0.5 / rate)
        for frame in islice(frames, 0, None, cut.step):
            _bound(frame.width * frame.height)
            zoom = size / min(frame.width, frame.height)
            small = frame.reformat(round(frame.width * zoom), round(frame.height * zoom), "rgb24",
                                   interpolation="BILINEAR", threads=1)  # 5 to 30 times faster than Pillow
            yield small.to_image().rotate(frame.rotation, expand=True)


def _from(begin: float, film, stream, rate: float) -> Iterator[tuple]:
    """(seconds, frame) from a key frame on that is shown at begin or before; an AVI knows no times."""
    if film.format.name == "avi":
        yield from ((i / rate, frame) for i, frame in enumerate(film.decode(stream)))
        return
    for back in (0, 5, begin):  # seconds: what is shown before a key frame may follow it in the file
        film.seek(max(0, int((begin - back) / stream.time_base)), stream=stream)
        frames = ((frame.time, frame) for frame in film.decode(stream))
        first = next(frames, None)
        if first is None or first[0] <= begin:
            break
    yield from chain([first] if first else [], frames)


def _on_display(frames: Iterator[tuple], clock: float, fps: float, rate: float) -> Iterator:
    for (time, frame), after in pairwise(chain(frames, [None])):
        until = after[0] if after else time + 1 / rate
        while clock < until - 1e-3:  # containers round times to a millisecond
            yield frame
            clock += 1 / fps


def _fit(image: Image.Image, size: int, channels: int) -> Tensor:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would cut off at 255 instead of scaling
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    image = image.convert("L" if channels == 1 else "RGB")
    image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).reshape(size, size, channels)


# ---- files to look at ------------------------------------------------------------------------------------

ORANGE, GREY = (255, 140, 0), (64, 64, 64)  # the margin of a frame that was given, and of all others


def save_video(x: Tensor, path: str | Path, known: Sequence | None = None, fps: float = 8,
               columns: int = 0) -> list[Path]:
    """Write x (B, C, F, H, W) in [-1, 1] as a grid of clips, .gif and lossless .webp, and a film strip, .png.

    Frames marked in known, F booleans or for each clip its own (B, F), get an orange margin. Returns the paths;
    such a suffix is cut off.
    """
    stem = re.sub(r"\.(gif|webp|png)$", "", str(path))
    Path(stem).parent.mkdir(parents=True, exist_ok=True)
    cells = _cells(x, known)
    columns = columns or int(np.ceil(np.sqrt(len(cells))))
    blank = np.full_like(cells, GREY)[: -len(cells) % columns]
    grid = rearrange(np.concatenate([cells, blank]), "(r c) f h w d -> f (r h) (c w) d", c=columns)
    frames, strip = [Image.fromarray(frame) for frame in grid], rearrange(cells, "b f h w d -> (b h) (f w) d")
    # One palette for all frames, or still parts flicker. It is exact up to 256 colours: grey without marks.
    tall, height = Image.fromarray(rearrange(grid, "f h w d -> (f h) w d")).quantize(256), grid.shape[1]
    indexed = [tall.crop((0, y, tall.width, y + height)) for y in range(0, tall.height, height)]
    timing = {"save_all": True, "duration": round(1000 / fps), "loop": 0}
    gif = _write(Path(f"{stem}.gif"), indexed, optimize=False, **timing)
    webp = _write(Path(f"{stem}.webp"), frames, lossless=True, **timing)
    return [gif, webp, _write(Path(f"{stem}.png"), [Image.fromarray(strip)])]


def _cells(x: Tensor, known: Sequence | None) -> np.ndarray:
    assert x.ndim == 5 and x.shape[1] in (1, 3), f"expected (B, 1 or 3, F, H, W), got {tuple(x.shape)}"
    # a cast alone truncates, and wraps beyond 255
    pixels = x.detach().float().cpu().nan_to_num(nan=-1.0).clamp(-1, 1).add(1).mul(127.5).round().byte()
    zoom = -(-64 // min(x.shape[3:]))  # smaller clips are hard to see
    pixels = repeat(pixels, "b c f h w -> b f (h i) (w j) (c n)", i=zoom, j=zoom, n=3 // x.shape[1]).numpy()
    b, f, h, w, _ = pixels.shape
    cells = np.full((b, f, h + 4, w + 4, 3), GREY, np.uint8)
    if known is not None:
        marked = torch.as_tensor(known).cpu().expand(b, f)
        cells[marked.numpy()] = ORANGE
    cells[:, :, 2:-2, 2:-2] = pixels
    return cells


def _write(path: Path, images: list[Image.Image], **options) -> Path:
    temporary = path.with_name("." + path.name)  # so that nobody sees half a file
    images[0].save(temporary, append_images=images[1:], **options)
    return temporary.replace(path)

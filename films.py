"""Films, read by PyAV: when each frame is shown, and the pictures of those that are asked for.

Headers are not believed: they count frames that an edit list hides, and know one rate where there are many.
Each packet says when its frame is shown, and reading them all takes a hundredth of the time of decoding.
"""
import contextlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, dropwhile
from pathlib import Path

import numpy as np
from PIL import Image

FILMS = (".mp4", ".m4v", ".mov", ".3gp", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts",
         ".wmv", ".flv", ".ogv")
COUNTED = ("avi", "mpeg")  # an AVI knows no times, and those of an MPEG are wrong after a seek
MAX_FRAME = 2**26  # pixels


@lru_cache(256)  # of a film of two hours it is a megabyte
def timeline(path: Path, stamp: tuple) -> np.ndarray:
    """When the frames of a film are shown, in order, and when the last one ends, (frames + 1,) in seconds.

    Nothing is decoded. It is kept until stamp is another. Raises ValueError or av's errors: no film, broken.
    """
    with _opened(path) as (film, stream):
        times, hidden = [], set()
        for time, packet in _timed(film, stream, _packets(film, stream)):
            times.append(time)
            if packet.is_discard:
                hidden.add(time)
        if not times:
            raise ValueError("no moving pictures in it")
        # What is shown before the first key frame cannot be decoded: the film was cut there.
        shown = sorted(time for time in set(times) - hidden if time >= times[0])
        return np.array([*shown, shown[-1] + 1 / float(stream.guessed_rate)])


def pictures(path: Path, times: Sequence[float], size: int) -> Iterator[Image.Image]:
    """The frames shown at these times, which rise, upright and fitted to size by their short side. One that
    cannot be decoded is left out.
    """
    with _opened(path) as (film, stream):
        for time, frame in _from(film, stream, times[0]):
            if time in times:
                yield _upright(frame, stream.sample_aspect_ratio or 1, size)
            if time >= times[-1]:
                return


@contextlib.contextmanager
def _opened(path):
    import av  # optional, and only for films

    with av.open(f"file:{path}", container_options={"protocol_whitelist": "file"}) as film:
        stream = film.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            raise ValueError("no moving pictures in it")
        stream.codec_context.thread_count = 1  # data.py has other processes for the other cores
        yield film, stream


def _packets(film, stream):
    packets = dropwhile(lambda packet: not packet.is_keyframe, film.demux(stream))
    return (packet for packet in packets if packet.size)


def _frames(film, stream):
    for packet in _packets(film, stream):
        yield from packet.decode()
    yield from stream.decode(None)


def _timed(film, stream, items):
    """(seconds, item) of packets or frames."""
    for number, item in enumerate(items):
        if film.format.name in COUNTED:
            yield float(number / stream.guessed_rate), item
        elif item.pts is None:
            raise ValueError("frames that say no time, as when each field of a frame is stored by itself")
        else:
            yield float(item.pts * stream.time_base), item


def _from(film, stream, begin):
    """(seconds, frame) from a key frame on that is shown at begin or before."""
    places = (begin, begin - 5, 0)  # what is shown before a key frame may follow it in the file
    if film.format.name in COUNTED:
        places = (0,)
    for place in places:
        film.seek(max(0, round(place / stream.time_base)), stream=stream)
        frames = _timed(film, stream, _frames(film, stream))
        first = next(frames, None)
        if first and first[0] <= begin:
            return chain([first], frames)
    return ()


def _upright(frame, ratio, size):
    wide = frame.width * ratio  # its pixels need not be squares
    zoom = size / min(wide, frame.height)
    width, height = round(wide * zoom), round(frame.height * zoom)
    if max(frame.width * frame.height, width * height) > MAX_FRAME:
        raise ValueError(f"oversized: over {MAX_FRAME} pixels a frame")
    # 5 to 30 times faster than Pillow
    small = frame.reformat(width, height, "rgb24", interpolation="BILINEAR", threads=1)
    return small.to_image().rotate(frame.rotation, expand=True)

"""Clips to train on: which there are in a folder or a list, what is known of each, and cuts drawn from them.

Before a run starts the packets of films are read, which takes some milliseconds each. An index keeps what
they say.
"""
import contextlib
import csv
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import replacing
from files import CLIPS, STILLS, decode, natural, probe, stamp, ticks

Named = list[tuple[Path, str]]  # clips and their captions


class VideoFile(NamedTuple):
    """A clip that is long enough."""
    path: Path
    caption: str
    frames: int  # as many as it has at --fps
    low: int  # where floats begin, in all clips of its folder


# ---- which there are -------------------------------------------------------------------------------------


def list_videos(data_dir: str, listing: str, split: str) -> tuple[Named, int]:
    """The clips of a split with their captions, in the list's order or by their names; and how many
    are held out for the other split.

    Without a listing all clips in data_dir. The test clips are those in a subfolder test, or else val, beside
    train, or in a list named test where listing says train, or else one in ten (a single clip is both). Raises
    ValueError: no such folder, no such list, or a caption in an unknown encoding.
    """
    root = Path(data_dir)
    if not (data_dir or listing) or not root.is_dir():
        raise ValueError(f"data_dir is {data_dir!r}, but video_folder needs a folder of clips")
    if listing:
        file = Path(listing)
        other = file.with_name(file.name.replace("train", "test"))
        apart = other != file and other.is_file()
        if apart and split == "test":
            file = other
        clips = _listed(file, root)
    else:
        apart = _splits(root)
        clips = _found(apart.get(split, root))
    if apart or len({path for path, _ in clips}) == 1:
        return clips, 0
    test, train = _divided(clips, root)
    if split == "test":
        return test, len(train)
    return train, len(test)


def _splits(root):
    """The folders of the splits, where there are any."""
    for name in ("test", "val"):
        if (root / "train").is_dir() and (root / name).is_dir():
            return {"train": root / "train", "test": root / name}
    return {}


def _divided(clips, root):
    """Clips to test and clips to train. A clip's path alone decides: not the others, nor the frames needed."""
    names = [os.path.relpath(path, root) for path, _ in clips]
    held = {name for name in names if zlib.crc32(os.fsencode(name)) % 10 == 0}
    if not held or held == set(names):
        held = set(names[:1])
    test = [clip for clip, name in zip(clips, names) if name in held]
    train = [clip for clip, name in zip(clips, names) if name not in held]
    return test, train


def _found(root):
    def tell(error):
        _say(f"left out, {error.filename}: {error.strerror}", sys.stderr)

    clips, left, seen = [], set(), set()
    for folder, inside, names in os.walk(root, onerror=tell, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # by a link
            inside.clear()
            continue
        seen.add(real)
        inside[:] = sorted(name for name in inside if name[0] != ".")
        paths = {Path(folder, name) for name in names if name[0] != "."}
        here = set(filter(_is_clip_file, paths))
        stills = {path for path in paths if path.suffix.lower() in STILLS}
        if stills and not here:
            here = {Path(folder)}  # a folder of frames
            paths -= stills
        clips += here
        left |= paths - here
    left -= set(map(_caption_file, clips))
    if left:
        counts = Counter(path.suffix.lower() or "without suffix" for path in left)
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        _say(f"left out of {root}: {kinds}", sys.stderr)
    clips = sorted(sorted(clips), key=natural)  # 1.mp4 and 01.mp4 are equal in the second order
    return [(clip, _caption(clip, root)) for clip in clips]


def _say(text, file=None):
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one speaks
        print(text, file=file or sys.stdout)


def holds(data_dir: str, path: Path) -> bool:
    """Whether a clip at path would be one of the folder's."""
    root, path = Path(data_dir).resolve(), path.resolve()
    roots = _splits(root).values() or [root]
    hidden = any(part[0] == "." for part in path.parts[len(root.parts):])
    return not hidden and any(folder in path.parents for folder in roots)


def _is_clip_file(path):
    kind = path.suffix.lower()
    if kind not in (".png", ".webp"):
        return kind in CLIPS
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(2**16).partition(b"IDAT")[0]
        return b"acTL" in head or b"ANIM" in head  # an animated one says so before its first pixels
    return False


def _caption(clip, root):
    clip, root = clip.absolute(), root.absolute()  # "." has no name
    file = _caption_file(clip)
    if file.is_file():
        return " ".join(_text(file).split())
    if root in (clip, clip.parent):
        return ""
    return clip.parent.name


def _caption_file(clip):
    name = clip.name if clip.is_dir() else clip.stem
    return clip.parent / f"{name}.txt"


def _text(file):
    try:
        content, encoding = file.read_bytes(), "utf-8-sig"
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            encoding = "utf-16"
        text = content.decode(encoding)
        if "\0" in text:
            raise UnicodeError("it holds zeros")
        return text
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{file} cannot be read as UTF-8 or marked UTF-16: {error}") from None


def _listed(listing, root):
    """A row is a path, and a caption or a class number (UCF-101), or it is one of Kinetics' csv files."""
    lines = _text(listing).splitlines(keepends=True)
    named = []
    try:
        if lines and "youtube_id" in lines[0]:
            return _kinetics(csv.DictReader(lines), root)
        for row in csv.reader(lines, skipinitialspace=True, strict=True):
            if row:
                named.append(_row(row, root))
    except KeyError as error:
        raise ValueError(f"--list {listing}: it has no column {error}") from None
    except (csv.Error, ValueError) as error:
        raise ValueError(f"--list {listing}: {error}") from None
    return named


def _kinetics(rows, root):
    films, named = {}, []
    for film, _ in _found(root):
        films[film.name.partition(".")[0]] = film
    for row in rows:
        begin, end = row["time_start"], row["time_end"]
        if end is None:
            raise ValueError("a row of it ends too soon")
        name = f"{row['youtube_id']}_{int(begin):06}_{int(end):06}"
        named.append((films.get(name, root / f"{name}.mp4"), row.get("label") or ""))
    return named


def _row(row, root):
    name, text = row[0].strip(), "".join(row[1:2])
    if not name.lower().endswith(CLIPS) and not os.path.exists(root / name):
        endings = "|".join(map(re.escape, CLIPS))
        # It is no csv but a path, a blank and a caption.
        pattern = rf"(.+?(?:{endings})|[^\s,]+)(?:[\s,]+(.*))?"
        name, text = re.fullmatch(pattern, ", ".join(row).strip(), re.I | re.S).groups("")
    path = root / name
    if re.fullmatch(r"[\d\s]*", text):  # none, or numbers of frames and classes
        text = _caption(path, root)
    return path, " ".join(text.split())


# ---- what is known of each -------------------------------------------------------------------------------


def look(paths: Sequence[Path], root: Path) -> list[Sequence | str]:
    """What probe finds of each clip, or the reason why it is unusable. It is kept in an index, .clips.json in
    root, if that can be written to.
    """
    index, known = root / ".clips.json", {}
    with contextlib.suppress(OSError, ValueError, TypeError):  # what is lost is made anew
        known = dict(json.loads(index.read_text()))
    keys = [f"{os.path.relpath(path, root)} {stamp(path)} 2" for path in paths]  # 2: probe's second version
    new = {key: path for key, path in zip(keys, paths) if key not in known}
    try:
        with ThreadPoolExecutor() as pool:
            answers = pool.map(_answer, new.values())
            known.update(zip(new, tqdm(answers, "looking at clips", len(new), disable=len(new) < 100)))
    finally:
        if new:
            _keep(known, index)
    return [known[key] for key in keys]


def lowest(answers: Sequence[Sequence | str]) -> int:
    """Where floats begin in all clips of a folder: at -1 if they do so in one of them."""
    return min((answer[2] for answer in answers if not isinstance(answer, str)), default=1)


def _answer(path):
    try:
        return probe(path)
    except ValueError as error:
        return str(error)


def _keep(known, index):
    whole = {key: answer for key, answer in known.items() if not isinstance(answer, str)}
    with contextlib.suppress(OSError), replacing(index) as file:
        file.write_text(json.dumps(whole))


# ---- cuts ------------------------------------------------------------------------------------------------


@cache
def video_folder(config: Any) -> list[VideoFile]:
    """The usable clips of the split in data_dir of a DataConfig; others are skipped, and named on stderr.

    ValueError: no such folder or list, or no usable clip in it.
    """
    named, held = list_videos(config.data_dir, config.list, config.split)
    answers = look([path for path, _ in named], Path(config.data_dir))
    needed = (config.frames - 1) * max(config.frame_stride) + 1
    low, usable, bad, rates = lowest(answers), [], [], []
    for (path, caption), answer in zip(named, answers):
        if isinstance(answer, str):
            bad.append(answer)
            continue
        frames, seconds, _ = answer
        if seconds:
            rates.append(frames / seconds)
        if seconds and config.fps:
            frames = ticks(seconds, config.fps)
        if frames < needed:
            bad.append(f"{path}: {frames} frames, {needed} needed")
        else:
            usable.append(VideoFile(path, caption, frames, low))
    report = f"skipped {len(bad)} of {len(named)} clips: {'; '.join(bad[:20])}"
    if not usable:
        where = config.list or config.data_dir
        raise ValueError(f"no usable clip for the {config.split} split in {where}: {report}")
    if bad:
        _say(report, sys.stderr)
    _say(f"{len(usable)} clips to {config.split}, {held} held out; {_read_as(config, rates, low)}")
    longest = max((clip.caption for clip in usable), key=len)
    if longest:
        _say(f"captions of up to {len(longest.split())} words: “{longest[:200]}”; --tokens cuts them")
    return usable


def _read_as(config, rates, low):
    """How the clips of a folder become tensors, for people."""
    said = f"the middle of each, {config.size} x {config.size} px"
    if config.channels == 1:
        said += ", grey (--channels 3 keeps colours)"
    if config.fps and rates:
        said += f", at {config.fps:g} frames a second"
    elif rates:
        said += f", at its own rate, {min(rates):.4g} to {max(rates):.4g} frames a second"
    if low < 1:
        said += f"; floats are from {low} to 1"
    return said


def folder_clips(found: list[VideoFile], config: Any, n: int, rng: np.random.Generator,
                 beside: dict | None = None) -> tuple:
    """n cuts of clips (n, C, F, S, S) as uint8, their captions, and the truth: which clips, and as faults the
    path of each that could not be read and a sentence. beside: the truth of clips beside which single frames
    are to go.
    """
    if beside is None:
        frames, chosen = config.frames, rng.integers(0, len(found), n)
    else:  # frames of any clip but the one they go beside, unless there is no other
        frames, own = 1, np.repeat(beside["clips"], n // len(beside["clips"]))
        chosen = (own + rng.integers(1, max(len(found), 2), n)) % len(found)
    places, mirrored = rng.random(n), rng.random(n) < 0.5
    cuts, captions, numbers, faults = [], [], [], []
    for i, place, mirror in zip(chosen, places, mirrored):
        cut, number = _cut(found, i, frames, place, config, faults)
        if config.flip and mirror:
            cut = cut.flip(-1)
        cuts.append(cut)
        captions.append(found[number].caption)
        numbers.append(number)
    return torch.stack(cuts), captions, {"clips": numbers, "faults": faults}


def _cut(found, i, frames, place, config, faults):
    """A cut of clip i, or of the next one that can be decoded, and that one's number."""
    step = config.frame_stride[0]
    span = (frames - 1) * step + 1
    for number in range(i, i + len(found) + 9):
        clip = found[number % len(found)]
        start = int(place * (clip.frames - span + 1))
        cut = slice(start, start + span, step)
        try:
            pixels = decode(clip.path, config.size, config.channels, cut, config.fps, clip.low)
            return pixels, number % len(found)
        except ValueError as error:
            faults.append((clip.path, str(error)))
        place = (place + 0.618) % 1  # of a single clip, another part
    raise ValueError(f"none of {len(found)} clips can be decoded: {faults[0][1]}")

"""Clips to train on: which there are in a folder or a list, and what their headers say, kept in an index.

Films are looked at, not decoded: a header takes about a millisecond, and only files that are new or changed
are looked at again.
"""
import contextlib
import csv
import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import replacing
from files import CLIPS, STILLS, decode, natural, probe

Named = list[tuple[Path, str]]  # clips and their captions


def list_videos(data_dir: str, listing: str, split: str) -> Named:
    """The clips of a split with their captions, in an order that depends on their names alone.

    Without a listing all clips in data_dir. The test clips are those in a subfolder test beside train, or in
    a list named test where listing says train, or else every tenth one (a single clip is both). Raises
    ValueError: no such folder, no such list.
    """
    root = Path(data_dir)
    if not (data_dir or listing) or not root.is_dir():
        raise ValueError(f"data_dir is {data_dir!r}, but video_folder needs a folder of clips")
    if listing:
        file, parts = Path(listing), Path(listing).with_name(Path(listing).name.replace("train", "test"))
        apart = file != parts and parts.is_file()
        clips = _listed(parts if apart and split == "test" else file, root)
    else:
        apart = (root / "train").is_dir() and (root / "test").is_dir()
        clips = _found(root / split if apart else root)
    # Divided before any is looked at: which one is for testing must not depend on the length asked for.
    return [clip for i, clip in enumerate(clips)
            if apart or len(clips) == 1 or (i % 10 == 0) == (split == "test")]


def _found(root: Path) -> Named:
    clips = []
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name[0] != "."]
        here = [Path(folder, name) for name in names if name[0] != "." and _is_clip(folder, name)]
        if not here and any(name[0] != "." and name.lower().endswith(STILLS) for name in names):
            here = [Path(folder)]  # a folder of frames
        clips += here
    return [(clip, _caption(clip, root)) for clip in sorted(clips, key=natural)]


def _is_clip(folder: str, name: str) -> bool:
    if name.lower().endswith(".png"):  # an animated one says so before its first pixels
        with contextlib.suppress(OSError), open(Path(folder, name), "rb") as file:
            return b"acTL" in file.read(2**16).partition(b"IDAT")[0]
    return name.lower().endswith(CLIPS)


def _caption(clip: Path, root: Path) -> str:
    text = clip.parent / f"{clip.name if clip.is_dir() else clip.stem}.txt"
    label = "" if root in (clip, clip.parent) else clip.parent.name
    return " ".join(text.read_text("utf-8-sig", "replace").split()) if text.is_file() else label


def _listed(listing: Path, root: Path) -> Named:
    """A line is a path, and a caption or a class number (UCF-101), or it is one of Kinetics' csv files. Where
    the clip has been packed, that is taken.
    """
    try:
        lines = listing.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--list {listing} cannot be read: {error}") from None
    if lines and "youtube_id" in lines[0]:
        films = {clip.name.partition(".")[0]: clip for clip, _ in _found(root)}
        names = [(f"{row['youtube_id']}_{int(row['time_start']):06}_{int(row['time_end']):06}", row["label"])
                 for row in csv.DictReader(lines)]
        return [(films.get(name, root / f"{name}.mp4"), label) for name, label in names]
    ending = "|".join(map(re.escape, CLIPS))
    pattern = re.compile(rf'"?(.+?(?:{ending})|[^\s,]+)"?(?:[\s,]+"?(.*?)"?)?\s*', re.IGNORECASE)
    pairs = [pattern.fullmatch(line).groups() for line in lines if line.strip()]
    named = []
    for name, text in pairs:
        path = packed if (packed := root / f"{name}.npy").exists() else root / name  # see experiments/pack.py
        named.append((path, _caption(path, root) if (text or "0").isdecimal() else text))
    return named


def look(clips: Sequence[Path], root: Path) -> list[tuple[int, float] | str]:
    """Frames and rate of each clip as probe finds them, or the reason why it is unusable.

    What is found is kept in an index, .clips.json in root, or in runs where root cannot be written to. A clip
    whose size or time of change is not the one noted there is looked at again.
    """
    name = hashlib.sha256(str(root.resolve()).encode(errors="surrogateescape")).hexdigest()[:16]
    indexes = root / ".clips.json", Path("runs", f"clips-{name}.json")
    known = {name: entry for index in indexes for name, entry in _read(index).items()}
    names, stamps = [os.path.relpath(clip, root) for clip in clips], [_stamp(clip) for clip in clips]
    new = {name: clip for name, clip, stamp in zip(names, clips, stamps) if known.get(name, [0])[0] != stamp}
    reasons = {}
    try:
        with ThreadPoolExecutor() as pool:  # FFmpeg lets go of Python's lock while it reads
            answers = tqdm(pool.map(_answer, new.values()), "looking at clips", len(new), disable=len(new) < 100)
            for name, answer in zip(new, answers):
                if isinstance(answer, str):
                    reasons[name] = answer  # not kept: the file may be whole, and av missing
                else:
                    known[name] = [_stamp(new[name]), *answer]
    finally:
        if new:
            _write(known, indexes)
    return [reasons.get(name) or tuple(known[name][1:]) for name in names]


def _answer(clip: Path) -> tuple[int, float] | str:
    try:
        return probe(clip)
    except ValueError as error:
        return str(error)


def _stamp(clip: Path) -> list[int]:
    with contextlib.suppress(OSError):
        return [(stat := clip.stat()).st_size, stat.st_mtime_ns]
    return []


def _read(index: Path) -> dict[str, list]:
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):  # what is lost is made anew
        return {name: [stamp, int(frames), float(rate)]
                for name, (stamp, frames, rate) in json.loads(index.read_text()).items()}
    return {}


def _write(known: dict[str, list], indexes: Sequence[Path]) -> None:
    for index in indexes:
        with contextlib.suppress(OSError):
            index.parent.mkdir(exist_ok=True)
            with replacing(index) as file:
                file.write_text(json.dumps(known))
            return


# ---- cuts ------------------------------------------------------------------------------------------------

class VideoFile(NamedTuple):
    """A clip that is long enough, as many frames as it has at --fps."""
    path: Path
    caption: str
    frames: int


@cache
def video_folder(config: Any) -> list[VideoFile]:
    """The usable clips of the split in data_dir, by their headers; others are skipped, and named on stderr.

    ValueError: no such folder or list, or no usable clip in it.
    """
    named, root = list_videos(config.data_dir, config.list, config.split), Path(config.data_dir)
    needed, usable, bad = (config.frames - 1) * max(config.frame_stride) + 1, [], []
    for (path, caption), seen in zip(named, look([path for path, _ in named], root)):
        if isinstance(seen, str):
            bad.append(seen)
            continue
        frames, rate = seen
        frames = int(frames * config.fps / rate + 1e-6) if config.fps and rate else frames
        if frames < needed:
            bad.append(f"{path}: {frames} frames, {needed} needed")
        else:
            usable.append(VideoFile(path, caption, frames))
    more = f"; and {len(bad) - 20} more" * (len(bad) > 20)
    report = f"skipped {len(bad)} of {len(named)} clips: {'; '.join(bad[:20])}{more}" if bad else "there is none"
    if not usable:
        raise ValueError(f"no usable clip for the {config.split} split in {config.list or root}: {report}")
    if bad:
        print(report, file=sys.stderr)
    return usable


def folder_clips(found: list[VideoFile], config: Any, n: int, rng: np.random.Generator,
                 device: Any = None, beside: dict | None = None) -> tuple:
    """n cuts (n, C, F, S, S) as uint8, drawn by rng: a clip, a start and whether it is mirrored; captions, and
    the truth: clips, and faults. beside: the truth of clips beside which single frames go.
    """
    if beside is None:
        frames, chosen = config.frames, rng.integers(0, len(found), n)
    else:  # single frames, each from any clip but the one it goes beside, unless there is no other
        frames, chosen = 1, np.repeat(beside["clips"], n // len(beside["clips"]))
        chosen = (chosen + rng.integers(1, max(len(found), 2), n)) % len(found)
    where, mirrored, faults = rng.random(n), rng.random(n) < 0.5, []
    cuts, chosen = zip(*(_cut(found, i, frames, u, config, faults) for i, u in zip(chosen, where)))
    cuts = [cut.flip(-1) if config.flip and mirror else cut for cut, mirror in zip(cuts, mirrored)]
    truth = {"clips": chosen, "faults": faults}
    return torch.stack(cuts), [found[i].caption for i in chosen], truth


def _cut(found: list[VideoFile], i: int, frames: int, where: float, config: Any, faults: list) -> tuple:
    """Frames of clip i, or of the next one that can be decoded."""
    step = config.frame_stride[0]
    span = (frames - 1) * step + 1
    for j in range(i, i + len(found)):
        clip = found[j % len(found)]
        start = int(where * (clip.frames - span + 1))
        try:
            cut = slice(start, start + span, step)
            return decode(clip.path, config.size, config.channels, cut, config.fps), j % len(found)
        except ValueError as error:
            faults.append(str(error))
    raise ValueError(f"none of {len(found)} clips can be decoded: {faults[0]}")

"""Films decoded once: python -m experiments.pack FOLDER OUT makes a uint8 .npy file of each, for --data_dir.

A .npy of the training size is mapped into memory and never decoded again. At 64 x 64 in colour, UCF-101 takes
30 GB so, BAIR 16.
"""
import argparse
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from einops import rearrange
from tqdm import tqdm

import clips
import config
from checkpoint import replacing
from files import decode

TFRECORDS = ("TFRecords are not read: save the frames of each episode as a uint8 .npy of shape (frames, height, "
             "width, 3), which needs TensorFlow once")


def pack(folder: Path, out: Path, size: int, channels: int, fps: float) -> list[str]:
    """Writes OUT/.../NAME.npy, (F, size, size, channels), for each clip of the folder, and its caption if it
    is not its folder's name. What is there already is kept. Returns what could not be read, one sentence each.
    """
    found = {}
    for split in ("train", "test"):
        named, _ = clips.list_videos(str(folder), "", split)
        found |= dict(named)
    if not found:
        if any(folder.rglob("*tfrecord*")):
            raise ValueError(TFRECORDS)
        raise ValueError(f"no clip in {folder}")
    low = clips.lowest(clips.look(list(found), folder))
    one = partial(_pack, folder, out, partial(decode, size=size, channels=channels, fps=fps, low=low))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        answers = tqdm(pool.map(one, found.items()), "packing", len(found))
        return [answer for answer in answers if answer]


def _pack(folder: Path, out: Path, read: Callable, clip: tuple[Path, str]) -> str:
    source, caption = clip
    path = out / source.relative_to(folder).parent / f"{source.name}.npy"  # a.mp4 and a.avi are two
    if path.exists():
        return ""
    try:
        pixels = read(source)
    except ValueError as error:
        return str(error)
    path.parent.mkdir(parents=True, exist_ok=True)
    if caption and caption != path.parent.name:
        path.with_suffix(".txt").write_text(caption, "utf-8")
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, rearrange(pixels, "c f h w -> f h w c").numpy())
    return ""


def main() -> None:
    """Packs, as the arguments say, and names what it could not read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = config.fail
    parser.add_argument("folder", type=Path, help="clips of any kind that train.py reads")
    parser.add_argument("out", type=Path, help="folder for the .npy files, in the same subfolders")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels (64)")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="1 is grey, 3 is colour (3)")
    parser.add_argument("--fps", type=float, default=0.0, help="frames a second; 0 takes each film's own (0)")
    args = parser.parse_args()
    if not 8 <= args.size <= 1024 or args.fps < 0:
        raise ValueError("--size must be in [8, 1024], and --fps at least 0")
    for fault in pack(**vars(args)):
        print(f"skipped: {fault}")
    print(f"to use it: python train.py --dataset video_folder --data_dir {args.out} --size {args.size} "
          f"--channels {args.channels}")


if __name__ == "__main__":
    config.run(main)

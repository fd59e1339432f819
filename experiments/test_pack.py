"""Tests of pack.py: what is packed is what train.py would have decoded."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import config
from data import DataConfig, video_folder
from experiments import pack
from files import decode

NOISE = np.random.default_rng(0).integers(0, 256, (10, 24, 32, 3), dtype=np.uint8)


def program(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["pack", *map(str, args)])
    config.run(pack.main)


def test_packed_clips_are_the_decoded_ones_with_their_captions(tmp_path, monkeypatch, capsys):
    for name in ("walk/a.npy", "walk/b.npy", "run/c.npy"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "in" / name, np.roll(NOISE, ord(name[-5]), 1))
    (tmp_path / "in/walk/b.txt").write_text("two dogs")
    (tmp_path / "in/walk/broken.gif").write_bytes(b"GIF89a")
    program(monkeypatch, tmp_path / "in", tmp_path / "out", "--size", 16)
    assert "skipped: " in (said := capsys.readouterr().out) and "broken.gif" in said
    def found(folder):
        return {clip.path.name.split(".")[0]: clip for split in ("train", "test") for clip in video_folder(
            DataConfig("video_folder", str(tmp_path / folder), split=split, frames=4, size=16, channels=3))}
    before, after = found("in"), found("out")
    assert {k: c.caption for k, c in after.items()} == {"a": "walk", "b": "two dogs", "c": "run"}
    for name in before:
        assert torch.equal(decode(before[name].path, 16, 3), decode(after[name].path, 16, 3))
        assert np.load(after[name].path).dtype == np.uint8
    times = {name: clip.path.stat().st_mtime_ns for name, clip in after.items()}
    program(monkeypatch, tmp_path / "in", tmp_path / "out", "--size", 16)
    assert times == {name: clip.path.stat().st_mtime_ns for name, clip in after.items()}


@pytest.mark.parametrize("name, sentence", [("x.tfrecords", "TFRecords are not read"), ("x.txt", "no clip in")])
def test_a_folder_without_clips_is_one_sentence(tmp_path, monkeypatch, capsys, name, sentence):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(SystemExit):
        program(monkeypatch, tmp_path, tmp_path / "out")
    assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_packing_in_a_poor_terminal_writes_utf8_and_one_range_for_all_floats(tmp_path):
    (tmp_path / "in/a").mkdir(parents=True)
    np.save(tmp_path / "in/a/0.npy", np.full((4, 16, 16), 0.5, np.float32))
    np.save(tmp_path / "in/a/1.npy", np.full((4, 16, 16), -0.5, np.float32))
    (tmp_path / "in/a/0.txt").write_text("größer 球", "utf-8")
    command = [sys.executable, "-m", "experiments.pack", tmp_path / "in", tmp_path / "out", "--size", "16"]
    poor = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run(command, env=os.environ | poor, check=True, capture_output=True, cwd=Path(pack.__file__).parents[1])
    assert (tmp_path / "out/a/0.npy.txt").read_text("utf-8") == "größer 球"
    assert [np.load(tmp_path / f"out/a/{i}.npy.npy").max() for i in (0, 1)] == [191, 64]

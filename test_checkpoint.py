"""Checkpoints come back as they were written, or as one sentence, whatever happened to the file between."""
import os
import pickle
import random
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import checkpoint

CONTENT = {"model": {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor(1.5)},
           "settings": {"lr": 1e-3, "name": "é", "dim_mults": (1, 2), "flip": True, "none": None}, "step": 3}


def equal(a, b) -> bool:
    """Equal in types, shapes and bits, all the way down."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def loaded(path: Path) -> dict | None:
    """The content, or None where loading raises the one sentence; anything but a plain ValueError goes through."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return checkpoint.load(path)
        except ValueError as error:
            assert type(error) is ValueError and str(path) in str(error) and "\n" not in str(error)
            return None


def refused(path: Path) -> bool:
    """Whether loading raises the one sentence."""
    return loaded(path) is None


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "checkpoint_00000003.pt"
    checkpoint.save(path, CONTENT)
    return path


# ---- there and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [
    CONTENT, {}, {"deep": {"list": [1, (2.5, {"x": [torch.ones(2)]})], "empty": [{}, [], ()]}},
    {"scalar": torch.tensor(3), "empty": torch.zeros(0), "flat": torch.zeros(8, 0)},
    {"bf16": torch.randn(5).bfloat16(), "half": torch.randn(5).half(), "double": torch.randn(5).double()},
    {"bool": torch.tensor([True, False]), "bytes": torch.arange(9).byte(), "long": torch.tensor([2**62])},
    {"slice": torch.arange(9.0)[2:4], "turned": torch.arange(6.0).view(2, 3).T,
     "one row": torch.ones(1, 3).expand(4, 3)},
    {"channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)},
    {0: {1: "int keys"}, "big": 2**80, "tiny": 5e-324, "inf": float("inf"), "text": "a\nb"}])
def test_what_was_saved_is_loaded(content, tmp_path):
    checkpoint.save(tmp_path / "x.pt", content)
    assert equal(checkpoint.load(tmp_path / "x.pt"), content)


def test_a_trained_network_and_its_optimizer_are_loaded(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 1, 4, 4)).square().sum().backward()
    optimizer.step()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint.save(tmp_path / "x.pt", content)
    loaded = checkpoint.load(tmp_path / "x.pt")
    assert (equal(loaded["optimizer"], content["optimizer"])
            and equal(dict(loaded["model"]), dict(content["model"])))
    optimizer.load_state_dict(loaded["optimizer"])


def test_parameters_are_saved_without_their_graph(tmp_path):
    checkpoint.save(tmp_path / "x.pt", {"w": nn.Parameter(torch.ones(3))})
    assert torch.equal(checkpoint.load(tmp_path / "x.pt")["w"], torch.ones(3))


def test_a_path_may_be_a_string(tmp_path):
    checkpoint.save(str(tmp_path / "x.pt"), CONTENT)
    assert equal(checkpoint.load(str(tmp_path / "x.pt")), CONTENT)


# ---- written whole or not at all ---------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_saving_leaves_the_old_file_and_nothing_else(where, error, saved, monkeypatch):
    def fails(*args):
        if where == "torch.save":
            args[1].write(b"half of it")
        raise error
    monkeypatch.setattr(where, fails)
    with pytest.raises(type(error)):
        checkpoint.save(saved, {"step": 4})
    monkeypatch.undo()
    assert os.listdir(saved.parent) == [saved.name] and equal(checkpoint.load(saved), CONTENT)


def test_the_file_is_complete_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda file: (events.append("fsync"), fsync(file)))
    monkeypatch.setattr("os.replace", lambda a, b: (events.append(Path(b).exists()), replace(a, b)))
    checkpoint.save(tmp_path / "x.pt", CONTENT)
    assert events == ["fsync", False, "fsync"] and os.listdir(tmp_path) == ["x.pt"]  # the folder's comes last


def test_a_file_that_is_being_written_is_not_taken_for_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda file: seen.append(list(tmp_path.glob("checkpoint_*.pt"))))
    seen = []
    checkpoint.save(tmp_path / "checkpoint_1.pt", CONTENT)
    assert seen == [[], [tmp_path / "checkpoint_1.pt"]]  # at the sync of the file, and of the folder


def test_saving_again_replaces_the_file(saved):
    checkpoint.save(saved, {"step": 4})
    assert checkpoint.load(saved) == {"step": 4}


# ---- damaged, foreign and hostile files --------------------------------------------------------------------


def test_a_file_that_is_not_there_is_one_sentence(tmp_path):
    assert refused(tmp_path / "nothing.pt") and refused(tmp_path)


@pytest.mark.parametrize("data", [
    b"", b"\0" * 4096, b"<!DOCTYPE html><html>Not found</html>", b"version https://git-lfs", b"PK\x03\x04",
    b"PK\x05\x06" + b"\0" * 18, b"\x1f\x8b\x08\x00", b"GIF89a", b"{}", b"N.", b"\x80\x04\x95",
    b"\x80\x02}q\x00.", b"(", b"S", b"M", b"QK\x03\x04", b"a", b"]."])
def test_a_file_of_another_kind_is_one_sentence(data, tmp_path):
    (tmp_path / "x.pt").write_bytes(data)
    assert refused(tmp_path / "x.pt")


def test_random_bytes_are_one_sentence(tmp_path):
    generator = random.Random(0)
    for number in range(100):
        head = generator.choice([b"", b"\x80\x02", b"PK\x03\x04"])
        (tmp_path / "x.pt").write_bytes(head + generator.randbytes(number))
        assert refused(tmp_path / "x.pt")


def test_a_truncated_checkpoint_is_one_sentence(saved):
    whole = saved.read_bytes()
    for length in range(0, len(whole), len(whole) // 40):
        saved.write_bytes(whole[:length])
        assert refused(saved)


def test_a_flipped_byte_is_harmless_or_one_sentence(saved):
    whole, found = saved.read_bytes(), 0
    for position in [*range(0, len(whole), len(whole) // 60), *range(200, 220)]:  # latter: the pickle's head
        for flip in (0x01, 0xFF):
            damaged = bytearray(whole)
            damaged[position] ^= flip
            saved.write_bytes(damaged)
            content = loaded(saved)  # once: PyTorch reads the version of some from memory that nobody wrote
            if content is None:
                found += 1
            else:  # padding, or a field of the archive that nothing reads
                assert equal(content, CONTENT)
    assert found > 20


def test_a_changed_weight_is_caught_by_the_checksum(saved):
    whole = saved.read_bytes()
    weight = CONTENT["model"]["weight"].numpy().tobytes()
    assert whole.count(weight) == 1
    saved.write_bytes(whole.replace(weight, weight[:-1] + b"\x41"))
    with pytest.raises(ValueError, match="or it is damaged"):
        checkpoint.load(saved)


@pytest.mark.parametrize("stored", [[1, 2], torch.ones(3), "text", None, 3, {"content": None}])
def test_a_file_by_torch_save_that_is_no_checkpoint_is_one_sentence(stored, tmp_path):
    torch.save(stored, tmp_path / "x.pt")
    assert refused(tmp_path / "x.pt")


class Hostile:
    """Makes a file when it is unpickled."""
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_not_run(zipped, tmp_path):
    hostile, path = {"content": Hostile(tmp_path / "harm"), "sha256": "0"}, tmp_path / "x.pt"
    pickle.loads(pickle.dumps(hostile))
    assert (tmp_path / "harm").exists()  # it is hostile
    (tmp_path / "harm").unlink()
    torch.save(hostile, path) if zipped else path.write_bytes(pickle.dumps(hostile))
    assert refused(path) and not (tmp_path / "harm").exists()


# ---- the newest --------------------------------------------------------------------------------------------


def test_the_newest_checkpoint_is_the_one_written_last(tmp_path):
    for age, name in enumerate(["a/checkpoint_00000002.pt", "b/checkpoint_00000001.pt", "b/other.pt"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (age, age))
    assert checkpoint.newest(tmp_path / "a", tmp_path / "b") == tmp_path / "b/checkpoint_00000001.pt"
    assert checkpoint.newest(tmp_path / "a") == tmp_path / "a/checkpoint_00000002.pt"


@pytest.mark.parametrize("name", ["checkpoint_best.pt", "checkpoint_00000001 (copy).pt", "checkpoint_00000001_2.pt"])
def test_a_copy_that_somebody_made_is_none_of_the_runs(tmp_path, name):
    for own in ("checkpoint_00000001.pt", name):
        (tmp_path / own).touch()
    assert checkpoint.newest(tmp_path).name == "checkpoint_00000001.pt"


def test_too_little_memory_is_not_a_damaged_file(saved, monkeypatch):
    def full(*given, **more):
        raise RuntimeError("unable to mmap 99 bytes from file: Cannot allocate memory (12)")

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(RuntimeError, match="Cannot allocate memory"):
        checkpoint.load(saved)


def test_a_folder_without_a_checkpoint_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        checkpoint.newest(tmp_path)
    with pytest.raises(ValueError):
        checkpoint.newest(tmp_path / "missing")


# ---- a checkpoint to give away ------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    content = {"settings": {"dim": 8, "out": "/home/me/runs/x", "resume": "/home/me/runs/x", "data_dir": "/home/me"}, "step": 7,
               "model": {"w": torch.zeros(3)}, "ema": {"w": torch.tensor([1.0, 2.5, -3.0])}, "optimizer": {}}
    checkpoint.save(tmp_path / "checkpoint_00000007.pt", content)
    return tmp_path


def test_what_is_published_is_the_averaged_weights_in_bf16_and_no_path(run_folder, tmp_path):
    checkpoint.publish(run_folder, tmp_path / "small.pt")
    content = checkpoint.load(tmp_path / "small.pt")
    assert set(content) == {"settings", "step", "ema", "sampling"} and content["step"] == 7
    assert content["ema"]["w"].dtype == torch.bfloat16 and content["ema"]["w"].tolist() == [1.0, 2.5, -3.0]
    assert content["settings"] == {"dim": 8, "out": "", "resume": "", "data_dir": ""}
    checkpoint.publish(run_folder, tmp_path / "small.pt", '{"all": {"steps": 9}}')
    assert checkpoint.load(tmp_path / "small.pt")["sampling"] == {"all": {"steps": 9}} != content["sampling"]


@pytest.mark.slow
def test_publishing_is_a_command_and_a_folder_without_a_run_one_sentence(run_folder, tmp_path, monkeypatch):
    command = [sys.executable, checkpoint.__file__, str(run_folder), str(tmp_path / "out.pt")]
    assert subprocess.run(command).returncode == 0
    assert checkpoint.load(tmp_path / "out.pt")["step"] == 7
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", str(tmp_path / "empty"), str(tmp_path / "other.pt")])
    with pytest.raises(SystemExit, match="there is no checkpoint") as stop:
        runpy.run_path(checkpoint.__file__, run_name="__main__")
    assert "\n" not in stop.value.code and not (tmp_path / "other.pt").exists()


def test_where_folders_cannot_be_locked_training_goes_on_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with checkpoint.locked(tmp_path), checkpoint.locked(tmp_path):
        assert capsys.readouterr().out.count(f"{tmp_path} cannot be locked on this system") == 2

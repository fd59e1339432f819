"""Checkpoints: plain dicts of tensors and numbers, written whole or not at all, read without running code."""
import argparse
import contextlib
import json
import os
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

NAMES = f"checkpoint_{'[0-9]' * 8}.pt"  # by step; a copy that somebody made has another name


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write to, which takes the place of path once it is whole; if it fails, path is as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Saves content (tensors, numbers, strings in dicts, lists, tuples) to path atomically.

    Raises OSError with one sentence if that fails, on a full disk say; what was at path is then intact.
    """
    path = Path(path)
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # some network drives refuse
            handle = os.open(path.parent, os.O_RDONLY)  # its new name is on the disk only when the folder is
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except (OSError, RuntimeError) as error:  # torch.save hides what the disk said behind a RuntimeError
        reason = error
        if isinstance(error, RuntimeError):
            reason = error.__context__
        if not isinstance(reason, OSError):
            raise
        raise OSError(f"{path} cannot be saved ({reason.strerror or reason}); older checkpoints are "
                      "intact") from None


def load(path: str | Path) -> dict[str, Any]:
    """The content that save() wrote, on the CPU. No code in it is run.

    Raises ValueError with one sentence if it is not there or damaged.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        with warnings.catch_warnings(action="ignore"):  # about the pickle protocol of files that are none
            shared = str(path).isascii()  # one copy for all processes; other names not every terminal can map
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=shared)
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # PyTorch itself compares no checksums
                raise ValueError
        content = content.get("content", content)  # three of the shipped files have it one level down
        if not isinstance(content, dict):
            raise ValueError
        return content
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damaged files make torch.load raise nearly anything
        if "allocate memory" in str(error):
            raise
        raise ValueError(f"{path} is no checkpoint of this project, or it is damaged; where older ones lie "
                         "beside it, delete it and the newest of them is used") from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps folder for this process alone. Raises ValueError if another process has it.

    The system takes the lock back when the process ends, however it ends, so none is ever left behind.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        print(f"{folder} cannot be locked on this system: train into it with one command at a time")
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"{folder} is in use by another training process: give another --out") from None
    try:
        yield
    finally:
        os.close(handle)


def newest(*folders: Path) -> Path:
    """The newest checkpoint in the folders. Raises ValueError if there is none."""
    found = []
    for folder in folders:
        found += sorted(folder.glob(NAMES))[-1:]
    if not found:
        raise ValueError(f"there is no checkpoint in {' or '.join(map(str, folders))}")
    return max(found, key=lambda path: path.stat().st_mtime)


def find(path: str) -> Path:
    """The checkpoint that a user's path means: the file, or the newest in a run's folder, else ValueError."""
    if Path(path).is_dir():
        return newest(Path(path))
    return Path(path)


def publish(run: str | Path, out: str | Path, sampling: str = "") -> None:
    """Writes what sampling needs of a run's newest checkpoint to out: averaged weights in bf16, and settings.

    sampling: JSON of the settings that sample.py starts from with these weights, {"all": {...}, MODE: {...}};
    by default the preset's. Raises ValueError if run holds no checkpoint.
    """
    content = load(newest(Path(run)))
    public = {"settings": dict(content["settings"]), "step": content["step"],
              "sampling": content.get("sampling", {})}
    for private in ("out", "resume", "data_dir", "list", "init", "latent"):  # paths
        if private in public["settings"]:
            public["settings"][private] = ""
    for part in ("ema", "autoencoder"):
        if part in content:
            public[part] = {name: value.bfloat16() for name, value in content[part].items()}
    if sampling:
        public["sampling"] = json.loads(sampling)
    save(out, public)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Strips a run's newest checkpoint to what sampling needs.")
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("out", help="the file to write, such as pretrained/NAME.pt")
    parser.add_argument("--sampling", default="", help='sampling settings, as JSON: {"all": {"steps": 32}}')
    try:
        publish(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        raise SystemExit(f"checkpoint.py: error: {error}") from None

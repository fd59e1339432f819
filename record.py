"""What a run writes down for people: metrics.jsonl, a line every so many steps."""
import contextlib
import json
import os
from pathlib import Path


def replace(path: Path, text: str) -> None:
    """Writes text to path whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append(folder: Path, values: dict[str, float]) -> None:
    """Adds one line to the run's metrics.jsonl."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(values) + "\n")


def read(folder: Path) -> list[dict[str, float]]:
    """The lines of the run's metrics.jsonl, without any that a crash left torn."""
    path, lines = folder / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            if isinstance(values := json.loads(line), dict) and "step" in values:
                lines.append(values)
    return lines


def forget(folder: Path, step: int) -> None:
    """Drops the lines after step from metrics.jsonl: a resumed run takes those steps again."""
    kept = [values for values in read(folder) if values["step"] <= step]
    replace(folder / "metrics.jsonl", "".join(json.dumps(values) + "\n" for values in kept))

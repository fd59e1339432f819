"""Clips as rows of frames and arrays as images: what figures.py and plots.py draw with."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

ORANGE, GREY, BLUE = "#ff8c00", "#404040", "#1f77b4"


def panels(layout: list[list[str]], size: tuple[float, float], **options: Any) -> tuple:
    """A figure of a size in inches, and its axes by name, as matplotlib's subplot_mosaic lays them out."""
    try:
        from matplotlib import pyplot  # optional, and only for pictures
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
    pyplot.switch_backend("Agg")
    pyplot.rcParams.update({
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "savefig.dpi": 110,
        "savefig.bbox": "tight"})
    return pyplot.subplot_mosaic(layout, figsize=size, layout="constrained", **options)


def save(figure: Any, path: Path) -> None:
    """Writes a figure, and prints where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(path)


def image(axis: Any, pixels: Any, label: str = "", **options: Any) -> None:
    """An array as an image, with a label on its left."""
    axis.imshow(pixels, interpolation="nearest", **options)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_ylabel(label, rotation=0, ha="right", va="center")


def strip(axis: Any, x: Tensor, label: str = "", known: Sequence[int] = ()) -> None:
    """A clip (1, F, H, W) in [-1, 1] as a row of frames; those in known have an orange margin."""
    x = x[0].float().clamp(-1, 1)
    frames, height, width = x.shape
    framed = torch.full((frames, height + 2, width + 2, 3), 0.25)
    framed[list(known)] = torch.tensor([1.0, 0.55, 0.0])
    framed[:, 1:-1, 1:-1] = x[..., None] / 2 + 0.5
    image(axis, rearrange(framed, "f h w c -> h (f w) c"), label)


def strips(
        rows: dict[str, Tensor],
        known: Sequence[int] = (),
        below: Sequence[str] = (),
        inches: float = 0.0,
        width: float = 9.0) -> tuple:
    """A row for each clip, under its name, and below them other axes beside each other, so many inches high."""
    layout, heights = [], []
    for name, x in rows.items():
        layout.append([name] * max(1, len(below)))
        heights.append(width / x.shape[1])
    if below:
        layout.append(list(below))
        heights.append(inches)
    size = width, sum(heights) + 0.3
    figure, axes = panels(layout, size, height_ratios=heights)
    for name, x in rows.items():
        strip(axes[name], x, name, known)
    return figure, axes


def matrix(axis: Any, values: Tensor, title: str, **options: Any) -> None:
    """A map of frame against frame."""
    image(axis, values, **options)
    axis.set_title(title)
    axis.set_xlabel("frame that is seen")
    axis.set_ylabel("frame that looks", rotation=90, ha="center")

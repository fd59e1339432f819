"""The plots of the pages, from the numbers in results/: python -m experiments.plots.

python -m experiments.plots --run RUN draws the loss curve of a run into its folder instead.
"""
import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import config
import progress
from experiments.evaluate import CALLS
from experiments.lab import HERE
from experiments.panels import panels, save

RESULTS = HERE / "experiments/results"
Numbers = dict[str, float]  # what one seed of an arm measured


def raw(name: str) -> dict[str, list[Numbers]]:
    """What each arm of an experiment measured, seed by seed."""
    return json.loads((RESULTS / f"{name}.json").read_text())["raw"]


def line(axis: Any, points: dict[float, list[float]], label: str) -> None:
    """A mean at each x, with the standard deviation over seeds; points holds the values of the seeds by x."""
    means = [np.mean(values) for values in points.values()]
    spreads = [np.std(values, ddof=1) for values in points.values()]
    axis.errorbar(list(points), means, spreads, fmt="o-", ms=3, capsize=2, label=label)


def calls() -> Any:
    """Tables 2 and 3: how near drawn frames and clips are to real ones, by calls of each sampler."""
    arms = raw("samplers")
    figure, axes = panels([["frechet_frame", "frechet_clip"]], (8, 2.8))
    for name, axis in axes.items():
        for sampler in ("ancestral", "predictor-corrector", "ddim", "dpm_solver"):
            points = {}
            for n in CALLS:
                points[n] = [run[name] for run in arms[f"{sampler}, {n} calls"]]
            line(axis, points, sampler)
        floor = [run[name] for run in arms["real clips (floor)"]]
        axis.axhline(np.mean(floor), color="k", ls="--", lw=1, label="real clips")
        axis.set(
            xscale="log",
            xlabel="calls of the network",
            ylabel=name.replace("_", " "))
        axis.set_xticks(CALLS, CALLS)
        axis.minorticks_off()
    axis.legend(fontsize=6)
    return figure


def exchange() -> Any:
    """Whether a network uses the other frames for the shape of a digit, by log-SNR; 1: it does not."""
    figure, axes = panels([["ratio"]], (5, 2.8))
    folders = {"VDM": ".", "MagicVideo": "magicvideo"}
    for name, folder in folders.items():
        runs = raw(f"{folder}/exchange")["the model"]
        points = {}
        for level in range(-5, 1):
            points[level] = [run[f"λ = {level}"] for run in runs]
        line(axes["ratio"], points, name)
    axes["ratio"].set(xlabel="λ", ylabel="error with exchanged frames\nover error with own")
    axes["ratio"].legend()
    return figure


PLOTS = {plot.__name__: plot for plot in (calls, exchange)}


def main() -> None:
    """Draws all of them into --out, or the loss of --run."""
    parser = argparse.ArgumentParser(description="Draws the plots of experiments/README.md and GUIDE.md.")
    parser.add_argument("--out", default=str(HERE / "assets/plots"), help="folder of the plots")
    parser.add_argument("--run", default="", help="folder of a training run, whose loss is drawn instead")
    given = parser.parse_args()
    if given.run:
        print(progress.plot_loss(Path(given.run)))
        return
    for name, plot in PLOTS.items():
        save(plot(), Path(given.out) / f"{name}.png")


if __name__ == "__main__":
    config.run(main)

"""The plots of README.md beside this file, from the numbers in results/: python -m experiments.plots."""
import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

import config
from experiments.lab import HERE
from experiments.panels import BLUE, ORANGE, panels

RESULTS = HERE / "experiments/results"


def raw(name: str) -> dict[str, list[dict[str, float]]]:
    """What each seed of each arm measured: arm -> a dict for each seed."""
    return json.loads((RESULTS / f"{name}.json").read_text())["raw"]


def line(axis: Any, runs: dict[float, list[dict[str, float]]], column: str, label: str = "") -> None:
    """The mean of a column over the keys of runs, with the standard deviation over seeds."""
    values = [[run[column] for run in seeds] for seeds in runs.values()]
    mean, spread = list(map(np.mean, values)), list(map(np.std, values))
    axis.errorbar(list(runs), mean, spread, fmt="o-", ms=3, capsize=2, label=label)
    axis.set_ylabel(column.replace("_", " "))


def floor(axis: Any, runs: list[dict[str, float]], column: str) -> None:
    """The same of real clips, as a broken line."""
    axis.axhline(np.mean([run[column] for run in runs]), color="k", ls="--", lw=1, label="real clips")


def guidance() -> Any:
    """Table 5: what a larger weight of classifier-free guidance gives and takes."""
    arms = raw("guidance")
    weights = {float(arm.split()[2]): runs for arm, runs in arms.items() if arm.startswith("w = ")}
    columns = ["digit_named", "frechet_frame", "frechet_clip", "inception_score"]
    figure, axes = panels([columns], (9, 2.4))
    for name, axis in axes.items():
        line(axis, weights, name)
        floor(axis, arms["real clips (floor)"], name)
        axis.set_xlabel("w")
    return figure


def calls() -> Any:
    """Tables 2 and 3: how near drawn frames and clips are to real ones, by calls of each sampler."""
    figure, axes = panels([["frechet_frame", "frechet_clip"]], (8, 2.8))
    arms = raw("samplers") | {f"{arm}, 256": runs for arm, runs in raw("calls256/samplers").items()}
    for name, axis in axes.items():
        for sampler, each in (("ancestral", 1), ("predictor-corrector", 2), ("ddim", 1), ("dpm_solver", 1)):
            line(axis, {int(arm.split()[1]) * each: runs for arm, runs in arms.items()
                        if arm.startswith(f"{sampler}, ") and not set(arm) & set("γδ")}, name, sampler)
        floor(axis, arms["real clips (floor)"], name)
        axis.set(xscale="log", xlabel="calls of the network")
    axis.legend(fontsize=6)
    return figure


def seams() -> Any:
    """Table 6: what happens where a block of a long video begins, and elsewhere, by weight."""
    figure, axes = panels([["step", "identity", "velocity"]], (9, 2.4))
    arms = {float(arm.partition("w_r ")[2] or 0): runs for arm, runs in raw("extend").items()
            if arm[:3] == "rec" and "corrector" not in arm or arm == "replacement"}
    for name, axis in axes.items():
        for place in ("seam", "inside"):
            line(axis, arms, f"{name}_{place}", place)
        axis.set_xscale("symlog")
        axis.set(xlabel="w_r (0: replacement)", ylabel={"step": "step, px", "identity": "digits that change",
                                                        "velocity": "change of speed, px"}[name])
    axis.legend()
    return figure


def exchange() -> Any:
    """Whether a network uses the other frames for the shape of a digit, by log-SNR; 1: it does not."""
    figure, axes = panels([["ratio"]], (5, 2.8))
    for name, folder in (("pixels, captions", ""), ("MagicVideo, captions", "magicvideo/"),
                         ("latents, no captions", "uncaptioned/")):
        arm, = raw(f"{folder}exchange").values()
        line(axes["ratio"], {float(level[4:]): [{"ratio": run[level]} for run in arm] for level in arm[0]},
             "ratio", name)
    axes["ratio"].set(xlabel="λ", ylabel="error with exchanged frames\nover error with own")
    axes["ratio"].legend()
    return figure


def loss() -> Any:
    """The training loss of the weights without captions."""
    figure, axes = panels([["loss"]], (5, 2.8))
    lines = [json.loads(line) for line in (RESULTS / "uncaptioned/metrics.jsonl").read_text().splitlines()]
    axes["loss"].loglog([line["step"] for line in lines], [line["loss"] for line in lines], color=BLUE)
    axes["loss"].set(xlabel="step", ylabel="loss")
    return figure


def speed() -> Any:
    """Training speed and memory beside the other package, as the table of README.md has them."""
    figure, axes = panels([["clips a second", "GiB"]], (8, 2.6))
    page = (HERE / "experiments/README.md").read_text()
    table = re.findall(r"^\| (16×\d+×\d+: .*?) \|(.*)\|$", page, re.M)[::-1]
    names, cells = [name for name, _ in table], [row.split("|") for _, row in table]
    for (name, axis), column in zip(axes.items(), (1, 3)):
        colours = [ORANGE if "ours" in name else BLUE for name in names]
        axis.scatter([float(row[column]) for row in cells], names, c=colours)
        axis.grid(axis="x")
        axis.set(xscale="log", xlabel={"GiB": "peak memory, GiB"}.get(name, f"training, {name}"))
    axis.set_yticklabels([])
    return figure


PLOTS = {plot.__name__: plot for plot in (guidance, calls, seams, exchange, loss, speed)}


def main() -> None:
    """Draws all of them into --out."""
    parser = argparse.ArgumentParser(description="Draws the plots of experiments/README.md.")
    parser.add_argument("--out", default=str(HERE / "assets/plots"), help="folder of the plots")
    out = Path(parser.parse_args().out)
    out.mkdir(parents=True, exist_ok=True)
    for name, plot in PLOTS.items():
        plot().savefig(path := out / f"{name}.png")
        print(path)


if __name__ == "__main__":
    config.run(main)

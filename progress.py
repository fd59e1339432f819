"""What a run shows to people: metrics.jsonl, a loss curve, and previews in samples/."""
import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from data import batches
from diffusion import denoiser, noise_like, schedule
from files import save_video
from machine import Machine
from sampling import sample
from settings import Settings
from state import State
from text import condition


def log(folder: Path, values: dict[str, float]) -> None:
    """Adds one line, which has the step, to the run's metrics.jsonl."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(values) + "\n")


def read_log(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl by step. Of a step that was taken again after a crash the last one counts,
    and a line that the crash left torn does not.
    """
    lines = {}
    for line in (folder / "metrics.jsonl").read_text(errors="replace").splitlines():
        try:
            values = json.loads(line)
            lines[values["step"]] = values
        except (ValueError, KeyError, TypeError):
            continue
    return [lines[step] for step in sorted(lines)]


def plot_loss(folder: Path) -> Path:
    """Draws loss.png in the run's folder: the loss of each logged step, and its running mean over ten."""
    import matplotlib  # optional: an ImportError is for the caller

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_log(folder)
    steps = [line["step"] for line in lines]
    losses = torch.tensor([line["loss"] for line in lines])
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.loglog(steps, losses, color="0.8", label="loss")
    if len(lines) >= 10:
        axes.loglog(steps[9:], losses.unfold(0, 10, 1).mean(1), label="mean of ten lines")
    axes.set(xlabel="optimizer steps", ylabel="loss", title=folder.name)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)
    return folder / "loss.png"


@torch.no_grad()
def preview(state: State, s: Settings, machine: Machine) -> None:
    """Writes samples/step_<step>.gif (.webp, .png): EMA weights, captions of the data, 25 calls. All
    processes must ask; the first one writes.

    An autoencoder shows four clips and then their reconstructions.
    """
    data = dataclasses.replace(s.data, num_images=0)
    x, captions = next(batches(data, 4, s.train.seed, device=machine.device))
    with machine.autocast():
        if s.train.arch == "autoencoder":
            coder = state.ema.eval()
            video = torch.cat([x, coder.video(coder.latents(x))])
        else:
            video = state.coder.video(drawn(state, state.coder.latents(x), captions, s))
    if machine.rank == 0:
        save_video(video, Path(s.train.out) / "samples" / f"step_{state.step:08d}")


def drawn(state: State, x: Tensor, captions: list[list[str]], s: Settings) -> Tensor:
    """What the network draws for each caption, shaped like x, pixels or latents."""
    network = state.ema.eval()
    denoise = denoiser(network, s.diffusion, condition(captions, s.text, x.device))
    generator = torch.Generator().manual_seed(s.train.seed)  # always the same noise
    z = noise_like(x, generator)
    logsnrs = schedule(torch.linspace(1, 0, 26), s.diffusion)

    def bounded(z: Tensor, logsnr: Tensor) -> Tensor:
        x_hat = denoise(z, logsnr)
        if state.coder.bounded:
            x_hat = x_hat.clamp(-1, 1)
        return x_hat
    return sample(bounded, z, logsnrs, generator=generator)

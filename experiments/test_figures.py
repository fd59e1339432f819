"""Tests of figures.py, plots.py and panels.py: pictures are files of some size, and what they compute is right."""
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import progress
from data import batches
from diffusion import DiffusionConfig
from experiments import figures, plots
from experiments.lab import HERE
from sampling import sample
from unet3d import TemporalMix


def draw(monkeypatch, module, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *words])
    module.main()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["block", "weights", "denoising"])
def test_a_figure_is_a_picture(name: str, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    draw(monkeypatch, figures, name, "--steps", "3", "--out", str(tmp_path))
    with Image.open(tmp_path / f"{name}.png") as picture:
        assert picture.width > 400 and len(picture.convert("L").getcolors()) > 20


def test_every_plot_is_drawn_from_the_results(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    draw(monkeypatch, plots, "--out", str(tmp_path))
    assert {path.stem for path in tmp_path.glob("*.png")} == set(plots.PLOTS)


def test_the_loss_of_a_run_is_drawn_where_the_run_is(monkeypatch, capsys) -> None:
    seen = []
    monkeypatch.setattr(progress, "plot_loss", lambda folder: seen.append(folder) or folder / "loss.png")
    draw(monkeypatch, plots, "--run", "runs/digits")
    assert seen == [Path("runs/digits")] and capsys.readouterr().out == "runs/digits/loss.png\n"


def test_without_matplotlib_there_is_a_hint(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        figures.weights(2)


def test_the_pictures_are_those_of_the_pages_and_small() -> None:
    text = (HERE / "GUIDE.md").read_text() + (HERE / "experiments/README.md").read_text()
    for folder, functions in {"guide": figures.FIGURES, "plots": plots.PLOTS}.items():
        there = {path.stem for path in (HERE / "assets" / folder).glob("*.png")}
        assert there == set(functions) and all(f"{folder}/{name}.png" in text for name in there)
    assert max(path.stat().st_size for path in (HERE / "assets").glob("*/*.png")) < 300_000


@pytest.mark.parametrize("num_images", [0, 4])
def test_the_map_of_frames_is_a_softmax_of_q_k_and_the_table(num_images: int) -> None:
    x, caught = figures.latents(num_images), []
    seen, mix = figures.attention(x, -3.0, num_images)
    network = figures.model().network
    layers = [part for part in network.modules() if isinstance(part, TemporalMix)]
    layer = layers[len(layers) // 2]
    hook = layer.register_forward_hook(lambda mix, inputs, out: caught.append(inputs))
    network(*figures.noised(x, -3.0), None, num_images)
    hook.remove()
    q, k, _, mask = caught[0]
    every = torch.zeros_like(seen)
    for place in range(q.shape[1]):
        for head in range(q.shape[2]):
            for i in range(len(mask)):
                scores = torch.full((len(mask),), -torch.inf)
                for j in mask[i].nonzero().flatten().tolist():
                    offset = max(-layer.reach, min(j - i, layer.reach)) + layer.reach
                    scores[j] = q[i, place, head] @ (k[j, place, head] + layer.key_table[offset])
                every[i] += (scores / q.shape[-1] ** 0.5).softmax(0)
    assert torch.allclose(every / (q.shape[1] * q.shape[2]), seen, atol=1e-5)
    assert torch.equal(mix.key_table, layer.key_table) and layer.value_table.any()


def test_two_gaussian_frames_are_drawn_exactly_with_guidance_and_corrector() -> None:
    drawn = figures.two_frames(1.0, figures.levels(128, DiffusionConfig()), 1.0)
    assert abs(drawn.mean() - 0.9) < 0.03 and abs(drawn.std() - 0.19**0.5) < 0.03
    alone = figures.two_frames(0.0, figures.levels(128, DiffusionConfig()))
    assert alone.mean() < 0.7  # what the picture of section 3.1 shows


def test_a_watched_denoiser_is_the_same_and_notes_every_call() -> None:
    z, logsnrs, seen = torch.randn(1, 1, 2, 4, 4), figures.levels(5, DiffusionConfig()), []

    def denoise(z, logsnr):
        return 0.5 * z
    drawn = [sample(one, z, logsnrs, generator=figures.seeded())
             for one in (denoise, figures.watched(denoise, seen))]
    assert torch.equal(*drawn) and len(seen) == 5 and torch.equal(seen[0][1], 0.5 * z)


def test_the_caption_of_the_clip_is_its_digit() -> None:
    data = dataclasses.replace(figures.model().data, split="test", num_images=0)
    _, captions = next(batches(data, 1, 3))
    assert captions[0][0].startswith(figures.DIGIT + " moving")

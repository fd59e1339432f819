"""The pictures of GUIDE.md, drawn by this code from the shipped weights: python -m experiments.figures NAME.

NAME is all, or a function in the second half of this file. All random numbers have seed 0.
"""
import argparse
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor

import config
import sample
from data import batches
from diffusion import Denoiser, alpha_sigma, cosine_logsnr, denoiser, diffuse, noise_like, schedule
from experiments.features import load_features, observe
from experiments.lab import HERE
from experiments.panels import BLUE, GREY, ORANGE, image, matrix, panels, strip, strips
from guidance import classifier_free, clipped, reconstruction_guided, replacement
from infill import Model, SampleConfig, fill, load_model, nothing, show_small, smaller
from sampling import langevin, sample as ancestral
from text import embed
from unet3d import TemporalMix, isolate

PIXELS, UNCAPTIONED, CALLS = "moving_mnist_32", "uncaptioned_32", (8, 16, 32, 64, 128, 256)
BELIEVED = (-10.0, -7.0, -5.0, -4.0, -3.0, -2.0, 0.0, 3.0)


# ---- what is looked at -----------------------------------------------------------------------------------


@cache
def model(name: str) -> Model:
    """Shipped weights, on the CPU."""
    return load_model(HERE / f"pretrained/{name}.pt", torch.device("cpu"))


def real(frames: int = 16, num_images: int = 0) -> tuple[Tensor, str]:
    """A test clip (1, 1, frames + num_images, 32, 32) in [-1, 1], and what caption names its digit."""
    settings = model(PIXELS).data
    x, captions = next(batches(replace(settings, split="test", frames=frames, num_images=num_images), 1, 3))
    return x, captions[0][0].split(" moving")[0]


def seeded() -> torch.Generator:
    """Seed 0."""
    return torch.Generator().manual_seed(0)


def noised(x: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """z and log-SNR of x at a level, always with the same noise."""
    return diffuse(x, torch.tensor(level), noise_like(x, seeded())), torch.tensor(level)


def pixels(text: str = "", w: float = 0.0) -> Denoiser:
    """The pixel model's denoiser for a caption, guided with weight w; without one for ""."""
    m = model(PIXELS)
    plain, cond = denoiser(m.network, m.diffusion), embed([text], m.text)
    return classifier_free(denoiser(m.network, m.diffusion, cond), plain, w) if text else plain


def watched(denoise: Denoiser, seen: list[tuple[Tensor, Tensor, Tensor]]) -> Denoiser:
    """The denoiser, which notes down z, log-SNR and x_hat of each call."""
    def call(z: Tensor, logsnr: Tensor) -> Tensor:
        x_hat = denoise(z, logsnr)
        seen.append((z.detach(), logsnr, x_hat.detach()))
        return x_hat
    return call


def levels(steps: int, shift: float = 3.0) -> Tensor:
    """The log-SNRs of a sampler, from noise to data."""
    process = replace(model(PIXELS).diffusion, noise_shift=shift)
    return schedule(torch.linspace(1, 0, steps + 1, dtype=torch.float64), process).float()


def first(x: Tensor, k: int) -> Tensor:
    """Which frames of x are the first k, (F, 1, 1)."""
    return (torch.arange(x.shape[2]) < k)[:, None, None]


def continued(denoise: Denoiser, x: Tensor, k: int, w_r: float, logsnrs: Tensor, delta: float = 0) -> Tensor:
    """What is drawn from the first k frames of x: by replacement, for w_r > 0 with guidance too."""
    known, g = first(x, k), seeded()
    guided = reconstruction_guided(denoise, x * known, lambda y: y * known, w_r) if w_r else denoise
    return ancestral(guided, noise_like(x, g), logsnrs, 0.0, delta, replacement(x, known, g), g)


def two_frames(w_r: float, logsnrs: Tensor, delta: float = 0.0) -> Tensor:
    """The second of two Gaussian frames of correlation 0.9, where the first is 1; the denoiser is exact."""
    covariance = torch.tensor([[1, 0.9], [0.9, 1]])

    def denoise(z: Tensor, logsnr: Tensor) -> Tensor:
        alpha, sigma = alpha_sigma(logsnr)
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2))
        return torch.einsum("i j, b c j h w -> b c i h w", gain, z)
    return continued(denoise, torch.ones(4000, 1, 2, 1, 1), 1, w_r, logsnrs, delta)[:, 0, 1, 0, 0]


def drawn(name: str, **flags: Any) -> Tensor:
    """A clip (1, 16, 32, 32) of shipped weights, by flags of SampleConfig."""
    s = SampleConfig(num=1, **flags)
    return fill(model(name), s, nothing(model(name), s, 16))[0]


def attention(name: str, x: Tensor, level: float, num_images: int = 0) -> tuple[Tensor, torch.nn.Module]:
    """Which frame looks at which (F, F) in the middle layer over time, mean over places and heads."""
    maps, network = [], model(name).network

    def note(mix: torch.nn.Module, inputs: tuple, out: Tensor) -> None:
        mask, offset = inputs[3], torch.arange(len(inputs[3]))
        q, k = (rearrange(y, "(b f) n h d -> b f (n h) d", f=len(mask)) for y in inputs[:2])
        scores = torch.einsum("b i n d, b j n d -> b n i j", q, k)
        if isinstance(mix, TemporalMix):
            table = mix.key_table[(offset - offset[:, None]).clamp(-mix.reach, mix.reach) + mix.reach]
            scores = scores + torch.einsum("b i n d, i j d -> b n i j", q, table)
        seen = mask if isinstance(mix, TemporalMix) else mask.tril()
        maps.append((scores / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf).softmax(-1).mean((0, 1)))
    mixes = [part for part in network.modules() if type(part).__name__ in ("TemporalMix", "DirectedMix")]
    hook = (mix := mixes[len(mixes) // 2]).register_forward_hook(note)
    network(*noised(x, level), None, num_images)
    hook.remove()
    return maps[0], mix


# ---- section 2 -------------------------------------------------------------------------------------------


def noise(steps: int) -> Any:
    """One clip at six log-SNRs; below, the curves of the log-SNR, alpha and sigma, the paper's and ours."""
    rows = {f"λ = {at:g}": noised(real()[0], at)[0][0, :, ::2] for at in (6.0, 3.0, 0.0, -2.0, -4.0, -7.0)}
    figure, axes = strips(rows, (), [["λ", "α and σ"]], 2.5, 7)
    t = torch.linspace(0, 1, 201)
    for shift, line, name in ((1, "-", "the paper's"), (3, "--", "ours: σ/α times 3")):
        curve = cosine_logsnr(t) - 2 * np.log(shift)
        axes["λ"].plot(t, curve, line, color=GREY, label=name)
        for values, letter, colour in zip(alpha_sigma(curve), "ασ", (BLUE, ORANGE)):
            axes["α and σ"].plot(t, values, line, color=colour, label=letter if shift == 1 else None)
    for name in ("λ", "α and σ"):
        axes[name].set(xlabel="t", title=name)
        axes[name].legend()
    return figure


def belief(steps: int) -> Any:
    """What the model believes of one frame at eight log-SNRs, and what each prediction weighs there."""
    (x, text), rows = real(), {"z": [], "x̂, no caption": [], f"x̂, “{real()[1]}”": []}
    for z, level in (noised(x, at) for at in BELIEVED):
        for row, clip in zip(rows.values(), (z, pixels()(z, level), pixels(text)(z, level))):
            row.append(clip[0, :, 8:9])
    figure, axes = strips({name: torch.cat(row, 1) for name, row in rows.items()}, (), [["weight"]], 2.5, 7)
    axes["z"].set_xticks([34 * i + 17 for i in range(8)], [f"λ = {at:g}" for at in BELIEVED])
    axes["z"].xaxis.tick_top()
    level = torch.linspace(-10, 6, 200)
    axes["weight"].semilogy(level, level.exp(), color=ORANGE, label="ε-prediction: e^λ")
    axes["weight"].semilogy(level, 1 + level.exp(), color=BLUE, label="v-prediction: 1 + e^λ")
    axes["weight"].set(xlabel="λ", ylabel="weight on ‖x̂ − x‖²")
    axes["weight"].legend()
    return figure


def gamma(steps: int) -> Any:
    """z and x_hat of one frame along eight steps, by gamma, from one seed."""
    rows = {}
    for value in (0.0, 0.3, 1.0):
        g, seen = seeded(), []
        denoise = watched(clipped(pixels("a 3", 1.0)), seen)
        ancestral(denoise, noise_like(real()[0], g), levels(steps), value, generator=g)
        for name, part in (("z", 0), ("x̂", 2)):
            some = [seen[i][part][0, :, 8:9] for i in np.linspace(0, steps - 1, 8).round().astype(int)]
            rows[f"γ = {value:g}: {name}"] = torch.cat(some, 1)
    return strips(rows, width=7)[0]


def corrector(steps: int) -> Any:
    """A clip whose middle frame was wiped out, after so many Langevin steps; below, two Gaussian frames, the
    first given, with and without such steps at equal calls.
    """
    (x, text), rows, g = real(), {}, torch.Generator().manual_seed(1)  # not the noise that is in z
    denoise, (z, level) = pixels(text, 1.0), noised(x.index_fill(2, torch.tensor(8), -1), 0.0)
    for i in range(41):
        if i in (0, 1, 10, 40):
            rows[f"x̂ after {i}"] = denoise(z, level)[0][:, 4:13]
        z = langevin(denoise, z, level, 0.3, g)
    figure, axes = strips(rows, (), [["replacement", "w_r = 1"]], 2.4, 7)
    for name, w_r in (("replacement", 0.0), ("w_r = 1", 1.0)):
        for delta in (0.0, 0.1, 0.3, 1.0):
            means = {n: two_frames(w_r, levels(n // 2 if delta else n, 1.0), delta).mean() for n in CALLS}
            axes[name].semilogx(*zip(*means.items()), label=f"corrector, δ = {delta:g}" if delta else "none")
        axes[name].axhline(0.9, color="k", ls="--", label="exact")
        axes[name].set(title=f"two frames, {name}", xlabel="calls", ylabel="mean of the second", ylim=(0.5, 1))
    axes["w_r = 1"].legend(fontsize=6, loc="lower right")
    return figure


def weights(steps: int) -> Any:
    """One seed, one caption, four weights of classifier-free guidance."""
    said = dict(text="a 7 moving left", steps=steps)
    return strips({f"w = {w:g}": drawn(PIXELS, w=w, **said) for w in (0.0, 1.0, 2.0, 4.0)})[0]


# ---- sections 3 and 4.3.1 --------------------------------------------------------------------------------


def block(steps: int) -> Any:
    """The block with its shapes; a trained map of frame against frame; Shaw's table of the same layer."""
    figure, axes = panels([["boxes"] * 2, ["map", "table"]], (8, 4.4), height_ratios=(1, 2.2))
    shapes = {"residual block": "(b f) c h w", "attention over space": "(b f) (h w) c",
              "attention over time": "(b h w) f c"}
    for i, (name, shape) in enumerate(shapes.items()):
        axes["boxes"].text(i, 0.7, name, ha="center", va="center", bbox=dict(boxstyle="round", fc="#f2f2f2"))
        axes["boxes"].text(i, 0.15, shape, ha="center", family="monospace")
        axes["boxes"].annotate("", (i + 0.7, 0.7), (i + 0.3, 0.7), arrowprops=dict(arrowstyle="->"))
    axes["boxes"].set(xlim=(-0.5, 2.8), ylim=(0, 1.1))
    axes["boxes"].axis("off")
    seen, mix = attention(PIXELS, real()[0], -3.0)
    matrix(axes["map"], seen, "attention over time at λ = −3", cmap="magma")
    axes["table"].imshow(mix.key_table.T, cmap="RdBu", aspect="auto", extent=(-15.5, 15.5, 0, 32))
    axes["table"].set(title="Shaw's table of its keys", xlabel="frame seen − frame that looks")
    return figure


def mask(steps: int) -> Any:
    """Clips of one seed by weights of temporal guidance; which frame may see which in joint training; and a
    trained attention under it.
    """
    rows = {name: drawn(UNCAPTIONED, seed=10, steps=steps, w_t=w_t, w_t_from=at) for name, w_t, at in
            (("w_t = 0", 0.0, 0.0), ("w_t = 1, λ > −3", 1.0, -3.0), ("w_t = 1, λ > −8", 1.0, -8.0))}
    figure, axes = strips(rows, (), [["may", "does"]], 3.4, 7)
    matrix(axes["may"], isolate(20, 4, torch.device("cpu")), "16 frames, 4 images; white: may", cmap="gray")
    seen, _ = attention(PIXELS, real(num_images=4)[0], -3.0, 4)
    matrix(axes["does"], seen, "attention of trained weights", cmap="magma", vmax=0.3)
    for name in ("may", "does"):
        axes[name].axhline(15.5, color=ORANGE)
        axes[name].axvline(15.5, color=ORANGE)
    return figure


# ---- section 3.1 -----------------------------------------------------------------------------------------


def conditional(steps: int) -> Any:
    """Six given frames continued by replacement and by reconstruction guidance, in latents, uncaptioned; how
    far x_hat is from them on the way; and two Gaussian frames, whose exact answer is known.
    """
    m, x = model(UNCAPTIONED), real()[0]
    y, rows, far, plain = m.autoencoder.latents(x), {"truth": x[0]}, {}, denoiser(m.network, m.diffusion)
    for name, w_r in {"replacement": 0.0, "w_r = 3": 3.0, "w_r = 10": 10.0, "w_r = 20": 20.0}.items():
        seen = []
        rows[name] = m.autoencoder.video(continued(watched(plain, seen), y, 6, w_r, levels(steps), 0.3))[0]
        far[name] = [((y - x_hat) * first(y, 6)).square().sum() for _, _, x_hat in seen[::2]]
    figure, axes = strips(rows, range(6), [["residual", "two frames"]], 2.5)
    for name, values in far.items():
        axes["residual"].semilogy(levels(steps)[:-1], values, label=name)
    axes["residual"].set(xlabel="λ, from noise to data", ylabel="‖xᵃ − x̂ᵃ‖²", xlim=(-9, 4))
    for name, w_r in (("replacement", 0.0), ("w_r = 1", 1.0), ("w_r = 2", 2.0)):
        axes["two frames"].hist(two_frames(w_r, levels(8 * steps, 1.0)), 60, range=(-1, 2.5), density=True,
                                histtype="step", label=name)
    at, law = torch.linspace(-1, 2.5, 200), torch.distributions.Normal(0.9, 0.436)
    axes["two frames"].plot(at, law.log_prob(at).exp(), "k--", label="exact")
    axes["two frames"].set(xlabel="second of two Gaussian frames, the first is 1", ylabel="density")
    axes["residual"].legend()
    axes["two frames"].legend()
    return figure


def gradient(steps: int) -> Any:
    """The gradient of the residual on the first eight frames with respect to z, at three log-SNRs."""
    x, rows = real()[0], [f"λ = {at}" for at in (-1, -3, -5)]
    figure, axes = strips({"x": x[0]}, range(8), [[row] for row in rows], 9 / 16)
    for row in rows:
        z, level = noised(x, float(row[4:]))
        error = ((x - pixels()(z.requires_grad_(), level)) * first(x, 8)).square().sum()
        grad = rearrange(nnf.pad(torch.autograd.grad(error, z)[0][0, 0], (1, 1, 1, 1)), "f h w -> h (f w)")
        image(axes[row], grad, row, cmap="RdBu", vmin=-(top := grad.abs().quantile(0.999)), vmax=top)
    return figure


def space(steps: int) -> Any:
    """Super-resolution with w_r too small, right and too large; below, the boxes of the cascade."""
    (x, text), m, rows = real(), model(PIXELS), {"truth": real()[0][0]}
    rows["given"] = nnf.interpolate(smaller(x, 4), scale_factor=(1, 4, 4))[0]

    def drawn(small: Tensor, stride: int, **flags: Any) -> Tensor:
        s = SampleConfig(num=1, text=text, w=2.0, steps=3 * steps // 4, delta=0.1, **flags)
        return fill(m, s, show_small(nothing(m, s, 16), stride, small))[0]
    for w_r in (0.1, 1.5, 6.0):
        rows[f"w_r = {w_r:g}"] = drawn(smaller(x, 4), 1, scale=4, w_r=w_r)
    slow = smaller(x, 2)[:, :, ::3]
    figure, axes = strips(rows, (), [["stairs"]], 2.2)
    axes["stairs"].set(xlim=(0, 17), ylim=(0, 3), xlabel="frames", ylabel="pixels", yticks=(0.6, 2),
                       xticks=(6, 16), yticklabels=(16, 32), title="the cascade: given and drawn")
    for clip, place in ((slow[0], (0.1, 0.3, 6, 0.6)), (drawn(slow, 3, scale=2), (0.1, 1.5, 16, 1))):
        strip(box := axes["stairs"].inset_axes(place, transform=axes["stairs"].transData), clip)
        box.set_anchor("W")
    axes["stairs"].annotate("", (11, 1.4), (6.5, 0.6), arrowprops=dict(arrowstyle="->", color=ORANGE))
    return figure


def drift(steps: int) -> Any:
    """64 frames by both methods, seams marked, and the share of ten clips that show the digit of their first
    block, which both methods share, by frame.
    """
    m, rows, shares = model(UNCAPTIONED), {}, {}
    for name, flags in (("replacement", dict(method="replacement")), ("w_r = 3", dict(w_r=3.0))):
        s = SampleConfig(mode="extend", num=10, steps=3 * steps // 4, **flags)
        video = fill(m, s, nothing(m, s, 64))
        rows[name], rows[f"{name}, on"] = video[6].split(32, 1)
        digits = observe(video, load_features(HERE / "pretrained/features_32.pt"), 1)[0][:, :, 0]
        shares[name] = (digits == digits[:, :16].mode(1, keepdim=True).values).float().mean(0)
    figure, axes = strips(rows, (0, 8, 16, 24), [["share"]], 2)
    for name, share in shares.items():
        strip(axes[name], rows[name], name, (16, 24))  # the first block has 16 frames, those after it add 8
        axes["share"].plot(share, label=name)
    for seam in range(16, 64, 8):
        axes["share"].axvline(seam, color=ORANGE, lw=0.5)
    axes["share"].set(xlabel="frame", ylabel="clips that show their digit", ylim=(0, 1.05))
    axes["share"].legend()
    return figure


# ---- MagicVideo ------------------------------------------------------------------------------------------


def magic(steps: int) -> Any:
    """Its directed map beside VDM's, a latent as images, and key frames with what is drawn between them."""
    x, second = real()[0], model("interpolate_32")
    latents = model("magicvideo_32").autoencoder.latents(x)
    s, slow = SampleConfig(mode="key_frames", num=1, steps=steps), real(13)[0][:, :, ::4]
    filled = sample.joined(fill(second, s, sample.gaps(second, s, sample.inside(second, slow))), 1)
    rows = {f"latent {c + 1}": latents[0, c:c + 1] / 2.5 for c in range(4)}
    figure, axes = strips({"clip": x[0], **rows, "key frames": filled[0]}, (), [["VDM", "MagicVideo"]], 2.2)
    strip(axes["key frames"], filled[0], "key frames", range(0, 13, 4))
    for title, name, clip, at in (("VDM", PIXELS, x, -3.0), ("MagicVideo", "magicvideo_32", latents, -1.0)):
        matrix(axes[title], attention(name, clip, at)[0], title, cmap="magma", vmax=0.4)
    return figure


FIGURES = {figure.__name__: figure for figure in (
    noise, belief, gamma, corrector, weights, block, mask, conditional, gradient, space, drift, magic)}


def main() -> None:
    """Draws what is named into --out."""
    parser = argparse.ArgumentParser(description="Draws the pictures of GUIDE.md.")
    parser.add_argument("name", choices=[*FIGURES, "all"])
    parser.add_argument("--out", default=str(HERE / "assets/guide"), help="folder of the pictures")
    parser.add_argument("--steps", type=int, default=32, help="steps from noise to video")
    given = parser.parse_args()
    Path(given.out).mkdir(parents=True, exist_ok=True)
    for name in FIGURES if given.name == "all" else [given.name]:
        FIGURES[name](given.steps).savefig(path := Path(given.out) / f"{name}.png")
        print(path)


if __name__ == "__main__":
    config.run(main)

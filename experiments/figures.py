"""The pictures of GUIDE.md, drawn by this code from the shipped weights: python -m experiments.figures NAME.

NAME is all, or a function in the second half of this file.
"""
import argparse
import copy
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
from data import batches
from diffusion import Denoiser, DiffusionConfig, alpha_sigma, denoiser, diffuse, noise_like, schedule
from experiments.features import load_features, observe
from experiments.lab import HERE
from experiments.panels import BLUE, GREY, ORANGE, image, matrix, panels, save, strip, strips
from guidance import classifier_free, reconstruction_guided, replacement
from infill import Model, SampleConfig, fill, load_model, nothing, show_small, smaller
from sampling import langevin, sample
from text import embed
from unet3d import TemporalMix, isolate

DIGIT = "a 9"  # of the clip that is looked at

# ---- what is looked at -----------------------------------------------------------------------------------


@cache
def model(name: str = "moving_mnist_32") -> Model:
    """Shipped weights, on the CPU."""
    return load_model(HERE / f"pretrained/{name}.pt", torch.device("cpu"))


def real(num_images: int = 0) -> Tensor:
    """A test clip (1, 1, 16 + num_images, 32, 32) in [-1, 1]."""
    data = replace(model().data, split="test", num_images=num_images)
    x, _ = next(batches(data, 1, 3))
    return x


def latents(num_images: int = 0) -> Tensor:
    """The same clip as the network knows it."""
    return model().latents(real(num_images))


def decoded(z: Tensor) -> Tensor:
    """A clip of latents (B, 16, F, 4, 4) to look at."""
    return model().coder.video(z)


def seeded() -> torch.Generator:
    """Seed 0."""
    return torch.Generator().manual_seed(0)


def noised(x: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """z and log-SNR of x at a level, always with the same noise."""
    logsnr = torch.tensor(level)
    return diffuse(x, logsnr, noise_like(x, seeded())), logsnr


def unguided() -> Denoiser:
    """The denoiser without a caption."""
    return denoiser(model().network, model().diffusion)


def captioned(text: str, w: float = 0.0) -> Denoiser:
    """The denoiser for a caption, guided with weight w."""
    m = model()
    cond = embed([text], m.text)
    conditional = denoiser(m.network, m.diffusion, cond)
    return classifier_free(conditional, unguided(), w)


def watched(denoise: Denoiser, seen: list[tuple[Tensor, Tensor]]) -> Denoiser:
    """The denoiser, which notes down z and x_hat of each call."""
    def call(z: Tensor, logsnr: Tensor) -> Tensor:
        x_hat = denoise(z, logsnr)
        seen.append((z, x_hat))
        return x_hat
    return call


def frame_8(clips: list[Tensor]) -> Tensor:
    """The middle frame of each clip of latents, decoded, as a clip (1, F, H, W)."""
    return decoded(torch.cat(clips))[:, :, 8].transpose(0, 1)


def levels(steps: int, process: DiffusionConfig) -> Tensor:
    """The log-SNRs of a sampler, from noise to data."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return schedule(times, process).float()


def continued(
        denoise: Denoiser,
        x: Tensor,
        k: int,
        w_r: float,
        logsnrs: Tensor,
        delta: float = 0.0) -> Tensor:
    """What is drawn from the first k frames of x: by replacement, for w_r > 0 with guidance too."""
    known = torch.arange(x.shape[2]) < k
    known = known[:, None, None]
    if w_r > 0:
        denoise = reconstruction_guided(denoise, x * known, lambda y: y * known, w_r)
    g = seeded()
    z = noise_like(x, g)
    constrain = replacement(x, known, g)
    return sample(denoise, z, logsnrs, 0.0, delta, constrain, g)


def two_frames(w_r: float, logsnrs: Tensor, delta: float = 0.0) -> Tensor:
    """The second of two Gaussian frames of correlation 0.9, where the first is 1; the denoiser is exact."""
    covariance = torch.tensor([[1, 0.9], [0.9, 1]])

    def denoise(z: Tensor, logsnr: Tensor) -> Tensor:
        alpha, sigma = alpha_sigma(logsnr)
        noisy = alpha**2 * covariance + sigma**2 * torch.eye(2)
        gain = alpha * covariance @ torch.linalg.inv(noisy)
        return torch.einsum("i j, b c j h w -> b c i h w", gain, z)

    ones = torch.ones(4000, 1, 2, 1, 1)
    frames = continued(denoise, ones, 1, w_r, logsnrs, delta)
    return frames[:, 0, 1, 0, 0]


def drawn(**flags: Any) -> Tensor:
    """A clip (1, 16, 32, 32), by flags of SampleConfig."""
    m = model()
    s = SampleConfig(num=1, **flags)
    x = fill(m, s, nothing(m, s, 16))
    return x[0]


def attention(x: Tensor, level: float, num_images: int = 0) -> tuple[Tensor, TemporalMix]:
    """Which frame looks at which (F, F) in the network's middle layer over time, the mean over places and
    heads, and a copy of that layer without its table of values: it is asked for the mean of values that say
    their frame.
    """
    network = model().network
    mixes = [part for part in network.modules() if isinstance(part, TemporalMix)]
    mix = mixes[len(mixes) // 2]
    given = []
    hook = mix.register_forward_pre_hook(lambda mix, inputs: given.extend(inputs))
    network(*noised(x, level), None, num_images)
    hook.remove()
    q, k, v, mask = given
    frames = torch.eye(len(mask), v.shape[-1])
    mix = copy.deepcopy(mix)
    mix.value_table.zero_()
    seen = mix(q, k, frames[:, None, None].expand_as(v), mask)
    return seen[..., :len(mask)].mean((1, 2)), mix


# ---- section 2 -------------------------------------------------------------------------------------------


def noise(steps: int) -> Any:
    """One clip at six log-SNRs; below, the curves of the log-SNR, alpha and sigma, the paper's and ours."""
    x = real()
    rows = {}
    for level in (6.0, 3.0, 0.0, -2.0, -4.0, -7.0):
        z, _ = noised(x, level)
        rows[f"λ = {level:g}"] = z[0, :, ::2]
    figure, axes = strips(rows, (), ["λ", "α and σ"], 2.5, 7)
    t = torch.linspace(0, 1, 201)
    processes = [
        ("the paper's", DiffusionConfig(), "-"),
        ("ours: σ/α times 3", model().diffusion, "--")]
    for name, process, line in processes:
        curve = schedule(t, process)
        alpha, sigma = alpha_sigma(curve)
        axes["λ"].plot(t, curve, line, color=GREY, label=name)
        axes["α and σ"].plot(t, alpha, line, color=BLUE, label=f"α, {name}")
        axes["α and σ"].plot(t, sigma, line, color=ORANGE, label=f"σ, {name}")
    for name in ("λ", "α and σ"):
        axes[name].set(xlabel="t", title=name)
        axes[name].legend()
    return figure


def belief(steps: int) -> Any:
    """What the model believes of one frame at eight log-SNRs."""
    x = latents()
    believed = (-10.0, -7.0, -5.0, -4.0, -3.0, -2.0, 0.0, 3.0)
    noisy, plain, named = [], [], []
    for level in believed:
        z, logsnr = noised(x, level)
        noisy.append(z)
        plain.append(unguided()(z, logsnr))
        named.append(captioned(DIGIT)(z, logsnr))
    rows = {
        "z, decoded": frame_8(noisy),
        "x̂, no caption": frame_8(plain),
        f"x̂, “{DIGIT}”": frame_8(named)}
    figure, axes = strips(rows, width=7)
    names = [f"λ = {level:g}" for level in believed]
    top = axes["z, decoded"]
    top.set_xticks(17 + 34 * np.arange(8), names)
    top.xaxis.tick_top()
    return figure


def denoising(steps: int) -> Any:
    """z and x_hat of one frame along eight steps of the sampler; gamma is 0."""
    g, seen = seeded(), []
    denoise = watched(captioned("a 3", 1.0), seen)
    z = noise_like(latents(), g)
    sample(denoise, z, levels(steps, model().diffusion), generator=g)
    numbers = np.linspace(0, steps - 1, 8)
    shown = [seen[round(number)] for number in numbers]
    rows = {
        "z, decoded": frame_8([z for z, _ in shown]),
        "x̂": frame_8([x_hat for _, x_hat in shown])}
    figure, _ = strips(rows, width=7)
    return figure


def corrector(steps: int) -> Any:
    """A clip whose middle frame was wiped out, after so many Langevin steps."""
    x = real()
    denoise = captioned(DIGIT, 1.0)
    x[:, :, 8] = -1
    z, logsnr = noised(model().latents(x), 0.0)
    g = torch.Generator().manual_seed(1)  # not the noise that is in z
    rows = {}
    for i in range(41):
        if i in (0, 1, 10, 40):
            rows[f"x̂ after {i}"] = decoded(denoise(z, logsnr))[0, :, 4:13]
        z = langevin(denoise, z, logsnr, 0.3, g)
    figure, _ = strips(rows, width=7)
    return figure


def weights(steps: int) -> Any:
    """One seed, one caption, four weights of classifier-free guidance."""
    rows = {}
    text = "a 7 moving left"
    for w in (0.0, 1.0, 2.0, 4.0):
        rows[f"w = {w:g}"] = drawn(w=w, text=text, steps=steps)
    figure, _ = strips(rows)
    return figure


# ---- sections 3 and 4.3.1 --------------------------------------------------------------------------------


def block(steps: int) -> Any:
    """A trained map of frame against frame; Shaw's table of the same layer."""
    seen, mix = attention(latents(), -3.0)
    figure, axes = panels([["map", "table"]], (8, 3.2))
    matrix(axes["map"], seen, "attention over time at λ = −3", cmap="magma")
    extent = -15.5, 15.5, 0, 32
    axes["table"].imshow(mix.key_table.T, cmap="RdBu", aspect="auto", extent=extent)
    axes["table"].set(
        title="Shaw's table of its keys",
        xlabel="frame seen − frame that looks")
    return figure


def mask(steps: int) -> Any:
    """Clips of one seed by weights of temporal guidance; which frame may see which in joint training; and a
    trained attention under it.
    """
    rows = {}
    weights = [
        ("w_t = 0", 0.0, 0.0),
        ("w_t = 1, λ > −3", 1.0, -3.0),
        ("w_t = 1, λ > −8", 1.0, -8.0)]
    for name, w_t, at in weights:
        rows[name] = drawn(seed=3, steps=steps, w_t=w_t, w_t_from=at)
    figure, axes = strips(rows, (), ["may", "does"], 3.4, 7)
    may = isolate(20, 4, torch.device("cpu"))
    matrix(axes["may"], may, "16 frames, 4 images; white: may", cmap="gray")
    does, _ = attention(latents(4), -3.0, 4)
    matrix(axes["does"], does, "attention of trained weights", cmap="magma", vmax=0.3)
    for name in ("may", "does"):
        axes[name].axhline(15.5, color=ORANGE)
        axes[name].axvline(15.5, color=ORANGE)
    return figure


# ---- section 3.1 -----------------------------------------------------------------------------------------


def conditional(steps: int) -> Any:
    """Six given frames continued by replacement and by reconstruction guidance, without a caption; and
    two Gaussian frames, whose exact answer is known.
    """
    rows = {"truth": real()[0]}
    for w_r in (0.0, 3.0, 10.0, 20.0):
        z = continued(unguided(), latents(), 6, w_r, levels(steps, model().diffusion), 0.3)
        rows[method(w_r)] = decoded(z)[0]
    figure, axes = strips(rows, range(6), ["two frames"], 2.5)
    axis = axes["two frames"]
    bars = dict(bins=60, range=(-1, 2.5), density=True, histtype="step")
    for w_r in (0.0, 1.0, 2.0):
        values = two_frames(w_r, levels(8 * steps, DiffusionConfig()))
        axis.hist(values, label=method(w_r), **bars)
    at = torch.linspace(-1, 2.5, 200)
    law = torch.distributions.Normal(0.9, 0.436)
    axis.plot(at, law.log_prob(at).exp(), "k--", label="exact")
    axis.set(
        xlabel="second of two Gaussian frames, the first is 1",
        ylabel="density")
    axis.legend()
    return figure


def method(w_r: float) -> str:
    """What a picture calls it."""
    if w_r == 0:
        return "replacement"
    return f"w_r = {w_r:g}"


def gradient(steps: int) -> Any:
    """How strong the gradient of the residual on the first eight frames is, in each cell of z, at three
    log-SNRs.
    """
    x = latents()
    layout = [["x"], ["λ = -1"], ["λ = -3"], ["λ = -5"]]
    figure, axes = panels(layout, (9, 4 * 9 / 16 + 0.3))
    strip(axes.pop("x"), real()[0], "x", range(8))
    for name, axis in axes.items():
        z, logsnr = noised(x, float(name[4:]))
        z.requires_grad_()
        wrong = x - unguided()(z, logsnr)
        error = wrong[:, :, :8].square().sum()
        grad, = torch.autograd.grad(error, z)
        strength = grad[0].norm(dim=0)
        framed = nnf.pad(strength, (1, 1, 1, 1))
        row = rearrange(framed, "f h w -> h (f w)")
        image(axis, row, name, cmap="magma")
    return figure


def space(steps: int) -> Any:
    """Super-resolution with w_r too small, right and too large."""
    x = real()
    m = model()
    small = smaller(x, 4)
    large = nnf.interpolate(small, scale_factor=(1, 4, 4))
    rows = {"truth": x[0], "given": large[0]}
    flags = dict(num=1, text=DIGIT, w=2.0, steps=3 * steps // 4, delta=0.1, scale=4)
    for w_r in (0.1, 1.5, 6.0):
        s = SampleConfig(w_r=w_r, **flags)
        given = show_small(nothing(m, s, 16), 1, small)
        rows[f"w_r = {w_r:g}"] = fill(m, s, given)[0]
    figure, _ = strips(rows)
    return figure


def drift(steps: int) -> Any:
    """64 frames by both methods, seams marked, and the share of ten clips that show the digit of their first
    block, which both methods share, by frame.
    """
    m = model()
    features = load_features(HERE / "pretrained/features_32.pt")
    methods = {
        "replacement": dict(w_r=0.0),
        "w_r = 3": dict(w_r=3.0)}
    rows, shares = {}, {}
    for name, flags in methods.items():
        s = SampleConfig(mode="extend", num=10, steps=3 * steps // 4, **flags)
        video = fill(m, s, nothing(m, s, 64))
        rows[name], rows[f"{name}, on"] = video[6].split(32, 1)
        digits = observe(video, features, 1).classes[:, :, 0]
        own = digits[:, :16].mode(1, keepdim=True).values
        shares[name] = (digits == own).float().mean(0)
    figure, axes = strips(rows, (0, 8, 16, 24), ["share"], 2)
    axis = axes["share"]
    for name, share in shares.items():
        strip(axes[name], rows[name], name, (16, 24))  # the first block has 16 frames, those after it add 8
        axis.plot(share, label=name)
    for seam in range(16, 64, 8):
        axis.axvline(seam, color=ORANGE, lw=0.5)
    axis.set(
        xlabel="frame",
        ylabel="clips that show their digit",
        ylim=(0, 1.05))
    axis.legend()
    return figure


# ---- MagicVideo ------------------------------------------------------------------------------------------


def magic(steps: int) -> Any:
    """A clip and the four channels of its latents."""
    x = real()
    rows = {"clip": x[0]}
    latents = model("magicvideo_32").coder.latents(x)[0]
    for channel in range(4):
        rows[f"latent {channel + 1}"] = latents[channel, None] / 2.5
    figure, _ = strips(rows)
    return figure


FIGURES = {figure.__name__: figure for figure in (
    noise, belief, denoising, corrector, weights, block,
    mask, conditional, gradient, space, drift, magic)}


def main() -> None:
    """Draws what is named into --out."""
    parser = argparse.ArgumentParser(description="Draws the pictures of GUIDE.md.")
    parser.add_argument("name", choices=[*FIGURES, "all"])
    parser.add_argument("--out", default=str(HERE / "assets/guide"), help="folder of the pictures")
    parser.add_argument("--steps", type=int, default=32, help="steps from noise to video")
    given = parser.parse_args()
    out = Path(given.out)
    names = [given.name]
    if given.name == "all":
        names = FIGURES
    for name in names:
        save(FIGURES[name](given.steps), out / f"{name}.png")


if __name__ == "__main__":
    config.run(main)

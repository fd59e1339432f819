"""What is measured of generated clips (section 4's tables), on digits whose truth the generator knows.

The paper's FID and FVD rest on networks trained on photographs and films; ours are Frechet distances as well,
but of the features of features.py, so their numbers compare with each other alone.
"""
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import conv2d, one_hot

from data import DataConfig, moving_mnist
from diffusion import Denoiser, diffuse, noise_like
from experiments.features import Features, batched, observe, walls

# ---- numbers of a set of clips ---------------------------------------------------------------------------


def measure(x: Tensor, features: Features, digits: int,
            real: tuple[Tensor, Tensor] | None = None, stride: int = 1) -> dict[str, float]:
    """All that can be said of clips x (B, C, F, H, W) alone and, beside what observe() returned last of real
    ones, features of frames and of clips, both Frechet distances.

    Only beside the same of other real clips, as many as x has, does a number say how far x is from real.
    """
    classes, positions, probabilities, *seen = observe(x, features, digits)
    low, high = walls(x.shape[-1])
    fastest = 0.2 * (high - low) * stride  # twice the generator's speed
    residual = trajectory_residual(positions, low, high, fastest)
    result = {"identity_kept": identity_kept(classes), "trajectory_residual": residual.mean().item(),
              "step": positions.diff(dim=1).norm(dim=3).mean().item(),  # a frozen path has no residual
              "inception_score": inception_score(probabilities)}
    names = ("frechet_frame", "frechet_clip")
    return result | ({name: frechet(*pair) for name, *pair in zip(names, seen, real)} if real else {})


def frechet(a: Tensor, b: Tensor) -> float:
    """Of the Gaussians fitted to features (N, D) and (M, D): |mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2))."""
    a, b = a.double(), b.double()
    s, t = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(s)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # S S' has the eigenvalues of the symmetric S^(1/2) S' S^(1/2)
    cross = torch.linalg.eigvalsh(root @ t @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + s.trace() + t.trace() - 2 * cross).item()


def inception_score(probabilities: Tensor) -> float:
    """exp of the mean KL(p(y|x) || p(y)), of class probabilities (N, K): from 1 to K."""
    p = probabilities.double()
    return (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1).mean().exp().item()


def identity_kept(classes: Tensor) -> float:
    """Share of frames that show the digits, in any order, that most frames of their clip show; classes
    (B, F, digits)."""
    shown = one_hot(classes, 10).sum(2)
    same = (shown[:, :, None] == shown[:, None]).all(3)  # (B, F, F)
    return same.float().mean(2).amax(1).mean().item()


def identity_true(classes: Tensor, labels: Tensor) -> float:
    """Share of frames that show, in any order, their clip's labels (B, digits); classes (B, F, digits)."""
    return (one_hot(classes, 10).sum(2) == one_hot(labels, 10).sum(1)[:, None]).all(2).float().mean().item()


def trajectory_residual(positions: Tensor, low: float, high: float, max_speed: float) -> Tensor:
    """RMS distance (B, digits) in pixels of linked positions (B, F, digits, 2) to the best path of constant
    speed, at most max_speed on an axis, that bounces at low and high; found on a grid, then on finer ones."""
    x, last = rearrange(positions, "b f d yx -> (b d yx) f"), positions.shape[1] - 1
    starts = torch.linspace(low, high, math.ceil(2 * (high - low)) + 1, device=x.device)
    speeds = torch.linspace(-max_speed, max_speed, math.ceil(4 * max_speed * last) + 1, device=x.device)
    lines = torch.cartesian_prod(starts, speeds)  # neighbours are half a pixel apart, in some frame
    paths = _bounce(lines, last, low, high)
    best = lines[torch.cat([torch.cdist(part, paths).argmin(1) for part in x.split(64)])]
    around = torch.linspace(-0.5, 0.5, 11, device=x.device)
    for finer in (1, 0.2, 0.04):
        near = best[:, None] + finer * torch.cartesian_prod(around, around / last)
        error, i = (_bounce(near, last, low, high) - x[:, None]).square().mean(2).min(1)
        best = near[torch.arange(len(x), device=x.device), i]
    return rearrange(error, "(b d yx) -> b d yx", b=len(positions), yx=2).sum(2).sqrt()


def _bounce(lines: Tensor, last: int, low: float, high: float) -> Tensor:
    way = lines[..., :1] + lines[..., 1:] * torch.arange(last + 1, device=lines.device)
    return high - ((way - low) % (2 * (high - low)) - (high - low)).abs()


def seam(positions: Tensor, classes: Tensor, starts: Iterable[int]) -> dict[str, float]:
    """Linked digits where a block starts (at frames `starts`) and inside: the step in pixels from t-1 to
    t, the change of |velocity|, mean of both axes, from t-2..t-1 to t..t+1, so that no turn and not that
    step counts, and the share of digits whose class changes from t-1 to t. Inside: no start in t-1..t+1."""
    step, t = positions.diff(dim=1), torch.arange(2, positions.shape[1] - 1)
    away = (t[:, None] - torch.tensor(list(starts))).abs()
    changes = {"step": step[:, 1:-1].norm(dim=3), "identity": (classes[:, 2:-1] != classes[:, 1:-2]).float(),
               "velocity": (step[:, 2:].abs() - step[:, :-2].abs()).abs().mean(3)}
    return {f"{name}_{place}": change[:, chosen].mean().item() for name, change in changes.items()
            for place, chosen in (("seam", (away == 0).any(1)), ("inside", (away > 1).all(1)))}


# ---- whether a denoiser uses the other frames ------------------------------------------------------------


def exchange(denoise: Denoiser, x: Tensor, other: Tensor, logsnr: Tensor,
             generator: torch.Generator | None = None) -> float:
    """Squared error of x_hat on every fourth frame of x (B, C, F, H, W) where the frames between are other's,
    over that where they are x's own; log-SNR 0-d, the same noise in both, ratio of sums over the clips.

    1: no other frame is used for what differs between x and other, as the digit does on same_paths. Needs no
    sampling, and no network that judges (ours; the paper has nothing like it).
    """
    shown, eps = (torch.arange(x.shape[2], device=x.device) % 4 == 0)[:, None, None], noise_like(x, generator)

    def error(clips: Tensor) -> float:
        parts = zip(*(one.split(32) for one in (diffuse(clips, logsnr, eps), x)))
        return sum((denoise(z, logsnr) - true)[:, :, ::4].square().sum().item() for z, true in parts)
    return error(torch.where(shown, x, other)) / error(x)


def same_paths(data: DataConfig, n: int, seed: int | tuple) -> tuple[Tensor, Tensor]:
    """n clips (n, C, F, H, W) of one digit, and n of digits with other labels on the same paths."""
    x, _, truth = moving_mnist(data, 2 * n, seed)
    labels, corners = truth["labels"][:, 0], truth["positions"][:, 0].long()  # (2n,), (2n, F, 2)
    here = (labels != labels.roll(1)).nonzero()[:n, 0]
    assert len(here) == n, f"seed {seed} has not {n} neighbours of different digits"
    still = x.roll(1, 0)[here, :, 0]  # the neighbour's first frame, moved by whole pixels
    moves = corners[here] - corners.roll(1, 0)[here, :1]
    other = [[frame.roll(move, (1, 2)) for move in path] for frame, path in zip(still, moves.tolist())]
    return x[here], torch.stack([torch.stack(clip, 1) for clip in other])


# ---- predicted frames against the true ones, and FVD -----------------------------------------------------


def mse_per_frame(real: Tensor, fake: Tensor) -> float:
    """Squared error of videos (B, C, F, H, W) in [-1, 1], on a scale of [0, 1]: summed over the pixels of a
    frame, then the mean over frames and clips, as the Moving MNIST benchmarks report it."""
    return ((real - fake) / 2).square().sum((1, 3, 4)).mean().item()


def psnr(real: Tensor, fake: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of each frame, then the mean; videos (B, C, F, H, W) in [-1, 1]."""
    mse = ((real - fake) / 2).square().mean((1, 3, 4))
    return (-10 * mse.clamp(min=1e-10).log10()).mean().item()  # an exact frame is 100 dB, not infinity


def ssim(real: Tensor, fake: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) of videos (B, C, F, H, W) in [-1, 1], on a scale of [0, 1]: a
    Gaussian window of 11 x 11 pixels, sigma 1.5, where it fits; mean over places, frames and channels."""
    a, b = (rearrange((x.double() + 1) / 2, "b c f h w -> (b c f) 1 h w") for x in (real, fake))
    bell = torch.exp(-torch.arange(-5, 6, device=a.device, dtype=a.dtype).square() / (2 * 1.5**2))
    window = torch.outer(bell, bell)[None, None] / bell.sum() ** 2
    mean_a, mean_b, aa, bb, ab = (conv2d(one, window) for one in (a, b, a * a, b * b, a * b))
    light = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    contrast = (2 * (ab - mean_a * mean_b) + 0.03**2) / (aa - mean_a**2 + bb - mean_b**2 + 0.03**2)
    return (light * contrast).mean().item()


@torch.no_grad()
def fvd(real: Tensor, fake: Tensor, path: str | Path) -> float:
    """FVD of videos (B, C, F, H, W) in [-1, 1] by the I3D network of a TorchScript file, i3d_torchscript.pt.

    Loading it executes what is in it: give only a file you trust. ValueError: it is missing or not that.
    """
    try:
        network = torch.jit.load(str(path), map_location=real.device).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is missing, or is not the TorchScript file of an I3D network") from error

    def look(x: Tensor) -> tuple[Tensor]:  # it scales [0, 255] and makes 224 x 224 itself
        colour = (x.expand(-1, 3, -1, -1, -1) + 1) * 127.5
        return network(colour, rescale=True, resize=True, return_features=True),
    return frechet(*(batched(look, x, 8)[0] for x in (real, fake)))

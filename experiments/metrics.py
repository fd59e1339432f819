"""What is measured of generated clips (section 4's tables), on digits whose truth the generator knows.

The paper's FID and FVD rest on networks trained on photographs and films; ours are Frechet distances as well,
but of the features of features.py, so their numbers compare with each other alone.
"""
import itertools
import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import avg_pool2d, one_hot

from data import DataConfig, moving_mnist
from diffusion import Denoiser, diffuse, noise_like
from experiments.features import Features, Seen, centres, observe, walls

# ---- numbers of a set of clips ---------------------------------------------------------------------------


def measure(
        x: Tensor,
        features: Features,
        digits: int,
        real: tuple[Tensor, Tensor],
        stride: int = 1) -> dict[str, float]:
    """All that is said of clips x (B, C, F, H, W), on the CPU; real are features of the frames and of the
    clips of real ones.

    A number means something only beside that of equally many real clips.
    """
    real_frames, real_clips = real
    seen = observe(x, features, digits)
    return {
        "identity_kept": identity_kept(seen.classes),
        "trajectory_residual": path_off(seen.places, x.shape[-1], stride),
        "step": steps(seen.places).mean().item(),  # a frozen path has no residual
        "inception_score": inception_score(seen.kinds),
        "frechet_frame": frechet(seen.frames, real_frames),
        "frechet_clip": frechet(seen.clips, real_clips)}


def frechet(a: Tensor, b: Tensor) -> float:
    """Of the Gaussians fitted to features (N, D) and (M, D): |mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2))."""
    a = a.double()
    b = b.double()
    s = torch.cov(a.T)
    t = torch.cov(b.T)
    values, vectors = torch.linalg.eigh(s)
    scale = values.clamp(min=0).sqrt()
    root = vectors * scale @ vectors.T
    # S S' has the eigenvalues of the symmetric S^(1/2) S' S^(1/2)
    squares = torch.linalg.eigvalsh(root @ t @ root)
    cross = squares.clamp(min=0).sqrt().sum()
    apart = a.mean(0) - b.mean(0)
    spread = s.trace() + t.trace() - 2 * cross
    return (apart.square().sum() + spread).item()


def inception_score(probabilities: Tensor) -> float:
    """exp of the mean KL(p(y|x) || p(y)), of class probabilities (N, K): from 1 to K, where one class is seen."""
    p = probabilities.double()
    kl = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))
    kl = kl.sum(1)
    return kl.mean().exp().item()


def identity_kept(classes: Tensor) -> float:
    """Share of frames that show the digits, in any order, that most frames of their clip show; classes
    (B, F, digits)."""
    shown = one_hot(classes, 10).sum(2)
    same = (shown[:, :, None] == shown[:, None]).all(3)  # (B, F, F)
    share = same.float().mean(2)
    return share.amax(1).mean().item()


def identity_true(classes: Tensor, labels: Tensor) -> float:
    """Share of frames that show, in any order, their clip's labels (B, digits); classes (B, F, digits)."""
    shown = one_hot(classes, 10).sum(2)
    true = one_hot(labels, 10).sum(1)
    same = (shown == true[:, None]).all(2)
    return same.float().mean().item()


def steps(positions: Tensor) -> Tensor:
    """How far each digit of positions (B, F, digits, 2) goes from frame to frame (B, F - 1, digits)."""
    return positions.diff(dim=1).norm(dim=3)


def path_off(positions: Tensor, size: int, stride: int = 1) -> float:
    """The mean trajectory_residual of linked positions in frames of size pixels."""
    low, high = walls(size)
    fastest = 0.2 * (high - low) * stride  # twice the generator's speed
    return trajectory_residual(positions, low, high, fastest).mean().item()


def trajectory_residual(
        positions: Tensor,
        low: float,
        high: float,
        max_speed: float) -> Tensor:
    """RMS distance (B, digits) in pixels of linked positions (B, F, digits, 2) to the best path of constant
    speed, at most max_speed on an axis, that bounces at low and high; found on a grid, then on finer ones."""
    x = rearrange(positions, "b f d yx -> (b d yx) f")
    last = x.shape[1] - 1
    # neighbours are half a pixel apart, in some frame
    count = math.ceil(2 * (high - low)) + 1
    starts = torch.linspace(low, high, count)
    count = math.ceil(4 * max_speed * last) + 1
    speeds = torch.linspace(-max_speed, max_speed, count)
    lines = torch.cartesian_prod(starts, speeds)
    paths = _bounce(lines, last, low, high)
    nearest = [torch.cdist(part, paths).argmin(1) for part in x.split(64)]
    best = lines[torch.cat(nearest)]
    around = torch.linspace(-0.5, 0.5, 11)
    offsets = torch.cartesian_prod(around, around / last)
    for finer in (1, 0.2, 0.04):
        near = best[:, None] + finer * offsets
        wrong = _bounce(near, last, low, high) - x[:, None]
        error, i = wrong.square().mean(2).min(1)
        best = near[torch.arange(len(x)), i]
    squares = rearrange(error, "(b d yx) -> b d yx", b=len(positions), yx=2)
    return squares.sum(2).sqrt()


def _bounce(lines: Tensor, last: int, low: float, high: float) -> Tensor:
    start = lines[..., :1]
    speed = lines[..., 1:]
    way = start + speed * torch.arange(last + 1)
    room = high - low
    folded = (way - low) % (2 * room) - room
    return high - folded.abs()


def seam(positions: Tensor, classes: Tensor, starts: list[int]) -> dict[str, float]:
    """Linked digits where a block starts (at frames `starts`) and inside: the step in pixels from t-1 to t,
    and the share of digits whose class changes from t-1 to t. Inside: no start in t-1..t+1."""
    other = classes[:, 2:-1] != classes[:, 1:-2]
    changes = {
        "step": steps(positions)[:, 1:-1],
        "identity": other.float()}
    t = torch.arange(2, positions.shape[1] - 1)
    away = (t[:, None] - torch.tensor(starts)).abs()
    at_seam = (away == 0).any(1)
    inside = (away > 1).all(1)
    found = {}
    for name, change in changes.items():
        found[f"{name}_seam"] = change[:, at_seam].mean().item()
        found[f"{name}_inside"] = change[:, inside].mean().item()
    return found


# ---- how well the networks that measure read ---------------------------------------------------------------


def read_right(seen: Seen, truth: dict, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each frame (B, F) whether all digits are read right, and how far their centres are off in pixels, by
    the order that fits best; of each clip (B,) whether that order is the same in its first and last frame.
    """
    labels, digits = truth["labels"], seen.classes.shape[2]
    shown = one_hot(seen.classes, 10).sum(2)
    right = (shown == one_hot(labels, 10).sum(1)[:, None]).all(2)
    orders = torch.tensor(list(itertools.permutations(range(digits))))
    away = torch.cdist(seen.places, true_centres(truth, size))  # (B, F, digits, digits)
    means = away[:, :, torch.arange(digits), orders].mean(3)  # (B, F, digits!)
    off, order = means.min(2)
    return right, off, order[:, 0] == order[:, -1]


def distance(truth: dict, size: int) -> Tensor:
    """How far the two nearest digits of each frame are apart (B, F), in pixels; infinity for one digit."""
    at = true_centres(truth, size)
    away = torch.cdist(at, at) + torch.diag(torch.full(at.shape[2:3], math.inf))
    return away.amin((2, 3))


def true_centres(truth: dict, size: int) -> Tensor:
    """The centres (B, F, digits, 2) of the generator's digits, in pixels."""
    return rearrange(centres(truth["positions"].float(), size), "b d f yx -> b f d yx")


# ---- whether a denoiser uses the other frames ------------------------------------------------------------


def exchange(
        denoise: Denoiser,
        x: Tensor,
        other: Tensor,
        logsnr: Tensor,
        generator: torch.Generator | None = None) -> float:
    """Squared error of x_hat on every fourth frame of x (B, C, F, H, W) where the frames between are other's,
    over that where they are x's own; log-SNR 0-d, the same noise in both, ratio of sums over the clips.

    1: no other frame is used for what differs between x and other, as the digit does on same_paths. Needs no
    sampling, and no network that judges (ours; the paper has nothing like it).
    """
    eps = noise_like(x, generator)

    def error(clips: Tensor) -> float:
        noisy = diffuse(clips, logsnr, eps)
        total = 0.0
        for z, true in zip(noisy.split(32), x.split(32)):
            wrong = denoise(z, logsnr) - true
            wrong = wrong[:, :, ::4]
            total += wrong.square().sum().item()
        return total

    mixed = other.clone()
    mixed[:, :, ::4] = x[:, :, ::4]
    return error(mixed) / error(x)


def same_paths(data: DataConfig, n: int, seed: int | tuple) -> tuple[Tensor, Tensor]:
    """n clips (n, C, F, H, W) of one digit, and n of digits with other labels on the same paths."""
    x, _, truth = moving_mnist(data, 2 * n, seed)
    labels = truth["labels"][:, 0]  # (2n,)
    corners = truth["positions"][:, 0].long()  # (2n, F, 2)
    differ = labels != labels.roll(1)
    here = differ.nonzero()[:n, 0]
    assert len(here) == n, f"seed {seed} has not {n} neighbours of different digits"
    still = x.roll(1, 0)[here, :, 0]  # the neighbour's first frame, moved by whole pixels
    moves = corners[here] - corners.roll(1, 0)[here, :1]
    other = torch.empty_like(x[here])
    for i in range(n):
        for f, move in enumerate(moves[i].tolist()):
            other[i, :, f] = still[i].roll(move, (1, 2))
    return x[here], other


# ---- drawn frames against the true ones ------------------------------------------------------------------


def squared_error(real: Tensor, fake: Tensor) -> Tensor:
    """Squared errors (B,) of videos (B, C, F, H, W) in [-1, 1], on a scale of [0, 1]: summed over the pixels of
    a frame, then the mean over frames, as the Moving MNIST benchmarks report it."""
    wrong = (real - fake) / 2
    return wrong.square().sum((1, 3, 4)).mean(1)


def ssim(real: Tensor, fake: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) of videos (B, C, F, H, W) in [-1, 1], on a scale of [0, 1]: the
    mean over all whole windows of 7 x 7 pixels, with sample variances, as scikit-image has it.
    """
    window, c1, c2 = 7, 0.01**2, 0.03**2

    def mean(x: Tensor) -> Tensor:
        return avg_pool2d(x, window, stride=1)

    a = rearrange(real.double() / 2 + 0.5, "b c f h w -> (b f) c h w")
    b = rearrange(fake.double() / 2 + 0.5, "b c f h w -> (b f) c h w")
    mean_a = mean(a)
    mean_b = mean(b)
    sample = window**2 / (window**2 - 1)
    var_a = sample * (mean(a * a) - mean_a**2)
    var_b = sample * (mean(b * b) - mean_b**2)
    both = sample * (mean(a * b) - mean_a * mean_b)
    brightness = 2 * mean_a * mean_b + c1
    brightness /= mean_a**2 + mean_b**2 + c1
    structure = (2 * both + c2) / (var_a + var_b + c2)
    return (brightness * structure).mean().item()


def psnr(real: Tensor, fake: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of each frame, then the mean; videos (B, C, F, H, W) in [-1, 1]."""
    wrong = (real - fake) / 2
    mse = wrong.square().mean((1, 3, 4))
    mse = mse.clamp(min=1e-10)  # an exact frame is 100 dB, not infinity
    return (-10 * mse.log10()).mean().item()

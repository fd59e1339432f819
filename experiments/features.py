"""The two small networks that measure: which digit is where in a frame, and how a clip moves.

They are trained here on the labels that the generator of Moving MNIST knows: python -m experiments.features.
"""
import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, cross_entropy, interpolate, one_hot
from tqdm import trange

import checkpoint
import config
from data import DataConfig, moving_mnist
from machine import find_device

STRIDE = 2  # pixels per cell


@dataclass
class FeatureConfig:
    """What the two networks are trained on, and how long."""
    size: int = 32  # [16, 1024] height and width of the clips
    digits: int = 1  # [1, 8] digits per clip
    steps: int = 2000  # [1, 1000000] steps of training
    batch_size: int = 32  # [1, 4096] clips per step
    seed: int = 0  # [0, 2147483647] of weights, clips and noise
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    out: str = "features.pt"  # the file to write


# ---- the networks ----------------------------------------------------------------------------------------


def _block(conv: type, c_in: int, c_out: int, kernel: tuple, stride=1, dilation=1) -> nn.Sequential:
    norm = {nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}[conv]
    pad = tuple(dilation * (k // 2) for k in kernel)
    return nn.Sequential(conv(c_in, c_out, kernel, stride, pad, dilation, bias=False), norm(c_out), nn.ReLU())


class FrameNet(nn.Module):
    """Which digit is where in a frame: one softmax over 10 classes x (H/2, W/2) cells. It sees grey alone."""

    def __init__(self):
        super().__init__()
        self.fine = _block(nn.Conv2d, 1, 24, (5, 5), STRIDE)
        self.coarse = nn.Sequential(_block(nn.Conv2d, 24, 48, (3, 3), 2), _block(nn.Conv2d, 48, 48, (3, 3)),
                                    _block(nn.Conv2d, 48, 48, (3, 3), dilation=2))  # sees 33 x 33 pixels
        self.skip = nn.Conv2d(24, 48, 1)
        self.last = _block(nn.Conv2d, 48, 64, (3, 3))
        self.head = nn.Conv2d(64, 10, 1)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (N, C, H, W) in [-1, 1] -> log-probabilities (N, 10, H/2, W/2), features (N, 64)."""
        fine = self.fine(frames.mean(1, keepdim=True))
        hidden = self.last(interpolate(self.coarse(fine), fine.shape[-2:]) + self.skip(fine))
        logits = self.head(hidden)
        return logits.flatten(1).log_softmax(1).view_as(logits), hidden.mean((2, 3))


class VideoNet(nn.Module):
    """Which digits are in a clip, and how each of them starts to move. It sees grey alone."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            _block(nn.Conv3d, 1, 16, (3, 5, 5), (1, 2, 2)), _block(nn.Conv3d, 16, 32, (3, 3, 3), 2),
            _block(nn.Conv3d, 32, 48, (3, 3, 3), 2), _block(nn.Conv3d, 48, 64, (3, 3, 3)))
        self.head = nn.Linear(64, 30)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, C, F, H, W) in [-1, 1] -> logits (B, 10), the velocity (y, x) of each class from the first
        frame to the second (B, 10, 2) in pixels, features (B, 64)."""
        features = self.body(x.mean(1, keepdim=True)).mean((2, 3, 4))
        out = rearrange(self.head(features), "b (k n) -> b k n", n=3)
        return out[..., 0], out[..., 1:], features


def strongest(p: Tensor, digits: int) -> tuple[Tensor, Tensor]:
    """The strongest cells of p (N, 10, h, w), as classes (N, digits) and centres (N, digits, 2) in pixels.

    A centre is the mean over the 3 x 3 cells about the strongest; these count no more for the next digit.
    """
    cells, every, found = _cells(*p.shape[2:], p.device), torch.arange(len(p), device=p.device), []
    for _ in range(digits):
        best = p.flatten(1).argmax(1)
        kind, cell = best // len(cells), cells[best % len(cells)]
        near = ((cells - cell[:, None]).abs() <= 1).all(2)  # (N, h w)
        weight = p.flatten(2)[every, kind] * near
        found.append((kind, weight @ cells / weight.sum(1, keepdim=True).clamp(min=1e-30)))
        p = p * ~near.view(-1, 1, *p.shape[2:])
    classes, at = (torch.stack(one, 1) for one in zip(*found))
    return classes, (at + 0.5) * STRIDE


def _cells(h: int, w: int, device: torch.device) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(float(n), device=device) for n in (h, w)))


# ---- their training, on what the generator knows ---------------------------------------------------------


def centres(positions: Tensor, size: int) -> Tensor:
    """The generator's corners (..., 2) -> the centres (y, x) that can be seen; pixel i covers [i, i + 1)."""
    return positions.floor() + _side(size) / 2


def walls(size: int) -> tuple[float, float]:
    """Between which pixels a visible centre moves, on either axis."""
    low = _side(size) / 2 - 0.5  # digits are drawn at whole pixels, half a pixel before their path on average
    return low, low + size - _side(size)


def _side(size: int) -> int:
    return round(size * 28 / 64)  # of a digit, as in data.py


def splat(labels: Tensor, centres: Tensor, size: int) -> Tensor:
    """The target (N, 10, h, w) of labels (N, digits) at centres (N, digits, 2): each digit has an equal share
    of the probability, divided bilinearly among the four nearest cells."""
    cells = _cells(size // STRIDE, size // STRIDE, labels.device)
    away = (cells - (centres / STRIDE - 0.5)[:, :, None]).abs()  # (N, digits, h w, 2)
    shares = (1 - away).clamp(min=0).prod(3) / labels.shape[1]
    p = torch.einsum("n d k, n d c -> n k c", one_hot(labels, 10).float(), shares)
    return rearrange(p, "n k (h w) -> n k h w", h=size // STRIDE)


def _clips(cfg: FeatureConfig, split: str, n: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    data = DataConfig(split=split, size=cfg.size, digits=cfg.digits)
    x, _, truth = moving_mnist(data, n, (cfg.seed, step))
    return tuple(one.to(find_device(cfg.device)) for one in (x, truth["labels"], truth["positions"].float()))


def _softened(x: Tensor) -> Tensor:
    # Generated strokes are softer and noisier than the generator's: the networks should not mind.
    blur, noise = torch.rand(2, len(x), 1, 1, 1, 1, device=x.device)
    soft = avg_pool3d(x, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
    return x + 0.8 * blur * (soft - x) + 0.2 * noise * torch.randn_like(x)


def _velocities(labels: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    kinds = one_hot(labels, 10).float()  # (B, digits, 10)
    total = torch.einsum("b d k, b d a -> b k a", kinds, positions[:, :, 1] - positions[:, :, 0])
    count = kinds.sum(1)[:, :, None]
    return total / count.clamp(min=1), count[:, :, 0] > 0  # two equal digits: their mean


def _loss(frame_net: FrameNet, video_net: VideoNet, x: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
    some = torch.randint(x.shape[2], (4,))  # four frames of each clip
    seen = rearrange(centres(positions[:, :, some], x.shape[-1]), "b d f yx -> (b f) d yx")
    target = splat(repeat(labels, "b d -> (b f) d", f=len(some)), seen, x.shape[-1])
    log_p, _ = frame_net(rearrange(x[:, :, some], "b c f h w -> (b f) c h w"))
    logits, velocity, _ = video_net(x)
    true_velocity, present = _velocities(labels, positions)
    return (-(target * log_p).sum((1, 2, 3)).mean()
            + cross_entropy(logits, one_hot(labels, 10).float().mean(1))
            + (velocity - true_velocity)[present].square().mean())


def train(cfg: FeatureConfig) -> nn.ModuleList:
    """[FrameNet, VideoNet], trained on softened clips of the training split."""
    torch.manual_seed(cfg.seed)
    nets = nn.ModuleList([FrameNet(), VideoNet()]).to(find_device(cfg.device))
    optimizer = torch.optim.AdamW(nets.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, cfg.steps + 1)
    for step in trange(cfg.steps):
        x, labels, positions = _clips(cfg, "train", cfg.batch_size, step)
        optimizer.zero_grad()
        _loss(*nets, _softened(x), labels, positions).backward()
        optimizer.step()
        schedule.step()
    return nets.eval()


# ---- what the networks see in clips ----------------------------------------------------------------------


@dataclass
class Features:
    """Both networks, how they were trained, and the checksum of their file, which belongs to every number."""
    frame: FrameNet
    video: VideoNet
    settings: dict
    sha256: str


def checksum(path: str | Path) -> str:
    """SHA-256 of a file, as sha256sum prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_features(path: str | Path, device: str | torch.device = "cpu") -> Features:
    """The networks that `python -m experiments.features` wrote to path. ValueError: it is no such file."""
    saved = checkpoint.load(path)
    if "features" not in saved:
        raise ValueError(f"{path} is a checkpoint, but not one that features.py wrote")
    nets = nn.ModuleList([FrameNet(), VideoNet()])
    nets.load_state_dict(saved["features"])
    nets.eval().requires_grad_(False).to(device)
    return Features(*nets, saved["settings"], checksum(path))


@torch.no_grad()
def observe(x: Tensor, features: Features, digits: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """In x (B, C, F, H, W) in [-1, 1]: linked classes (B, F, digits) and centres (B, F, digits, 2) in pixels,
    the class probabilities of frames (B F, 10), their features (B F, 64), and those of clips (B, 64)."""
    assert x.shape[-1] == (size := features.settings["size"]), f"{tuple(x.shape)} is not of size {size}"

    def look(frames: Tensor) -> tuple[Tensor, ...]:
        log_p, pooled = features.frame(frames)
        return *strongest(log_p.exp(), digits), log_p.exp().sum((2, 3)), pooled
    x = x.to(next(features.frame.parameters()).device)
    classes, positions, *more = batched(look, rearrange(x, "b c f h w -> (b f) c h w"))
    classes, positions = (rearrange(one, "(b f) ... -> b f ...", b=len(x)) for one in (classes, positions))
    return *link(classes, positions), *more, batched(features.video, x)[2]


def batched(net: Callable, x: Tensor, size: int = 128) -> tuple[Tensor, ...]:
    """What net, a function to a tuple of tensors, makes of x, of size clips at a time."""
    return tuple(map(torch.cat, zip(*(net(part) for part in x.split(size)))))


def link(classes: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Orders the digits (B, F, digits) and (B, F, digits, 2) of each frame like those of the first: each in
    turn is the nearest one left to where its last two frames lead. The place alone decides, not the class."""
    every = torch.arange(len(classes), device=classes.device)
    kinds, track = [classes[:, 0]], [positions[:, 0]]
    for f in range(1, positions.shape[1]):
        away = torch.cdist(2 * track[-1] - track[max(f - 2, 0)], positions[:, f])
        order = torch.zeros_like(classes[:, f])
        for d in range(order.shape[1]):
            order[:, d] = away[:, d].argmin(1)
            away[every, :, order[:, d]] = math.inf
        kinds.append(classes[:, f].gather(1, order))
        track.append(positions[:, f].take_along_dim(order[:, :, None], 1))
    return torch.stack(kinds, 1), torch.stack(track, 1)


@torch.no_grad()
def accuracy(features: Features, cfg: FeatureConfig) -> dict[str, float]:
    """On clips of the test split: share of digits recognised, errors of position and velocity in pixels."""
    x, labels, positions = _clips(cfg, "test", 512, 0)
    classes, seen, *_ = observe(x, features, cfg.digits)
    away = torch.cdist(rearrange(centres(positions, cfg.size), "b d f yx -> b f d yx"), seen)
    error, nearest = away.min(3)
    right = classes.gather(2, nearest) == labels[:, None]
    true_velocity, present = _velocities(labels, positions)
    wrong = (batched(features.video, x)[1] - true_velocity)[present].norm(dim=1)
    return {"digit_accuracy": right.float().mean().item(), "position_error": error.mean().item(),
            "velocity_error": wrong.mean().item()}


def main() -> None:
    """Trains the networks that measure, with --steps 2500 --out features_32.pt as the shipped ones were."""
    cfg, = config.parse(FeatureConfig)
    nets = train(cfg)
    result = accuracy(Features(*nets, asdict(cfg), ""), cfg)
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(cfg.out, {"features": nets.state_dict(), "settings": asdict(cfg), "accuracy": result})
    print(cfg.out, *(f"{name} {value:.4f}" for name, value in result.items()))


if __name__ == "__main__":
    config.run(main)

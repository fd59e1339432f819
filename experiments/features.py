"""The two small networks that measure: which digit is where in a frame, and how a clip moves.

They are trained here on the labels that the generator of Moving MNIST knows: python -m experiments.features.
"""
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, cross_entropy, interpolate, one_hot
from tqdm import trange

import checkpoint
import config
from data import DataConfig, moving_mnist

STRIDE = 2  # pixels per cell
FAR = 8.0  # pixels: a digit that is read further than that from where it should be was misread


@dataclass
class FeatureConfig:
    """What the two networks are trained on, and how long."""
    size: int = 32  # [16, 1024] height and width of the clips
    digits: int = 1  # [1, 8] digits per clip
    steps: int = 2000  # [1, 1000000] steps of training
    batch_size: int = 32  # [1, 4096] clips per step
    seed: int = 0  # [0, 2147483647] of weights, clips and noise
    out: str = "features.pt"  # the file to write


# ---- the networks ----------------------------------------------------------------------------------------


def _block2d(
        c_in: int,
        c_out: int,
        kernel: int,
        stride: int = 1,
        dilation: int = 1) -> nn.Sequential:
    pad = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, pad, dilation, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU())


def _block3d(c_in: int, c_out: int, kernel: int, stride: int | tuple) -> nn.Sequential:
    pad = (1, kernel // 2, kernel // 2)
    return nn.Sequential(
        nn.Conv3d(c_in, c_out, (3, kernel, kernel), stride, pad, bias=False),
        nn.BatchNorm3d(c_out),
        nn.ReLU())


class FrameNet(nn.Module):
    """Which digit is where in a frame: one softmax over 10 classes x (H/2, W/2) cells. It sees grey alone."""

    def __init__(self):
        super().__init__()
        self.fine = _block2d(1, 24, 5, STRIDE)
        self.coarse = nn.Sequential(
            _block2d(24, 48, 3, stride=2),
            _block2d(48, 48, 3),
            _block2d(48, 48, 3, dilation=2))  # sees 33 x 33 pixels
        self.skip = nn.Conv2d(24, 48, 1)
        self.last = _block2d(48, 64, 3)
        self.head = nn.Conv2d(64, 10, 1)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (N, C, H, W) in [-1, 1] -> log-probabilities (N, 10, H/2, W/2), features (N, 64)."""
        fine = self.fine(frames.mean(1, keepdim=True))
        coarse = interpolate(self.coarse(fine), fine.shape[-2:])
        hidden = self.last(coarse + self.skip(fine))
        logits = self.head(hidden)
        log_p = logits.flatten(1).log_softmax(1)
        return log_p.view_as(logits), hidden.mean((2, 3))


class VideoNet(nn.Module):
    """Which digits are in a clip, and how each of them starts to move. It sees grey alone."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            _block3d(1, 16, 5, (1, 2, 2)),
            _block3d(16, 32, 3, 2),
            _block3d(32, 48, 3, 2),
            _block3d(48, 64, 3, 1))
        self.head = nn.Linear(64, 30)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, C, F, H, W) in [-1, 1] -> logits (B, 10), the velocity (y, x) of each class from the first
        frame to the second (B, 10, 2) in pixels, features (B, 64)."""
        grey = x.mean(1, keepdim=True)
        features = self.body(grey).mean((2, 3, 4))
        out = rearrange(self.head(features), "b (k n) -> b k n", n=3)
        return out[..., 0], out[..., 1:], features


def strongest(p: Tensor, digits: int) -> tuple[Tensor, Tensor]:
    """The strongest cells of p (N, 10, h, w), as classes (N, digits) and centres (N, digits, 2) in pixels.

    A centre is the mean over the 3 x 3 cells about the strongest; these count no more for the next digit. So
    of two digits nearer than 3 pixels on both axes one is not seen.
    """
    cells = _cells(p.shape[-1])
    every = torch.arange(len(p))
    classes = []
    places = []
    for _ in range(digits):
        best = p.flatten(1).argmax(1)
        kind = best // len(cells)
        cell = cells[best % len(cells)]
        away = (cells - cell[:, None]).abs()
        near = (away <= 1).all(2)  # (N, h w)
        weight = p.flatten(2)[every, kind] * near
        total = weight.sum(1, keepdim=True).clamp(min=1e-30)
        classes.append(kind)
        places.append(weight @ cells / total)
        p = p * ~near.view(-1, 1, *p.shape[2:])
    centres = torch.stack(places, 1) + 0.5
    return torch.stack(classes, 1), centres * STRIDE


def _cells(side: int) -> Tensor:
    line = torch.arange(float(side))
    return torch.cartesian_prod(line, line)


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
    side = size // STRIDE
    at = centres / STRIDE - 0.5
    away = (_cells(side) - at[:, :, None]).abs()  # (N, digits, h w, 2)
    shares = (1 - away).clamp(min=0).prod(3) / labels.shape[1]
    kinds = one_hot(labels, 10).float()
    p = torch.einsum("n d k, n d c -> n k c", kinds, shares)
    return rearrange(p, "n k (h w) -> n k h w", h=side)


def _softened(x: Tensor) -> Tensor:
    # Generated strokes are softer and noisier than the generator's: the networks should not mind.
    blur, noise = torch.rand(2, len(x), 1, 1, 1, 1)
    soft = avg_pool3d(x, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
    return x + 0.8 * blur * (soft - x) + 0.2 * noise * torch.randn_like(x)


def _velocities(labels: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    kinds = one_hot(labels, 10).float()  # (B, digits, 10)
    velocity = positions[:, :, 1] - positions[:, :, 0]
    total = torch.einsum("b d k, b d a -> b k a", kinds, velocity)
    count = kinds.sum(1)[:, :, None]
    return total / count.clamp(min=1), count[:, :, 0] > 0  # two equal digits: their mean


def _loss(
        frame_net: FrameNet,
        video_net: VideoNet,
        x: Tensor,
        labels: Tensor,
        positions: Tensor) -> Tensor:
    size = x.shape[-1]
    some = torch.randint(x.shape[2], (4,))  # four frames of each clip
    seen = centres(positions[:, :, some], size)
    seen = rearrange(seen, "b d f yx -> (b f) d yx")
    labels_of_frames = labels.repeat_interleave(4, 0)
    target = splat(labels_of_frames, seen, size)
    frames = rearrange(x[:, :, some], "b c f h w -> (b f) c h w")
    log_p, _ = frame_net(frames)
    likelihood = (target * log_p).sum((1, 2, 3))
    where = -likelihood.mean()
    logits, velocity, _ = video_net(x)
    shares = one_hot(labels, 10).float().mean(1)
    which = cross_entropy(logits, shares)
    true_velocity, present = _velocities(labels, positions)
    wrong = (velocity - true_velocity)[present]
    return where + which + wrong.square().mean()


def train(cfg: FeatureConfig) -> nn.ModuleList:
    """[FrameNet, VideoNet], trained on softened clips of the training split."""
    torch.manual_seed(cfg.seed)
    nets = nn.ModuleList([FrameNet(), VideoNet()])
    optimizer = torch.optim.AdamW(nets.parameters())
    data = DataConfig(size=cfg.size, digits=cfg.digits)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, cfg.steps + 1)
    for step in trange(cfg.steps):
        x, _, truth = moving_mnist(data, cfg.batch_size, (cfg.seed, step))
        positions = truth["positions"].float()
        optimizer.zero_grad()
        loss = _loss(*nets, _softened(x), truth["labels"], positions)
        loss.backward()
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
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def load_features(path: str | Path) -> Features:
    """The networks that `python -m experiments.features` wrote to path. ValueError: it is no such file."""
    saved = checkpoint.load(path)
    if "features" not in saved:
        raise ValueError(f"{path} is a checkpoint, but not one that features.py wrote")
    nets = nn.ModuleList([FrameNet(), VideoNet()])
    nets.load_state_dict(saved["features"])
    nets.eval().requires_grad_(False)
    return Features(*nets, saved["settings"], checksum(path))


@dataclass
class Seen:
    """What the networks see in B clips of F frames."""
    classes: Tensor  # (B, F, digits), linked
    places: Tensor  # (B, F, digits, 2), the linked centres in pixels
    kinds: Tensor  # (B F, 10), class probabilities of each frame
    frames: Tensor  # (B F, 64), features of each frame
    clips: Tensor  # (B, 64), features of each clip


@torch.no_grad()
def observe(x: Tensor, features: Features, digits: int) -> Seen:
    """What the networks see in clips x (B, C, F, H, W) in [-1, 1]."""
    size = features.settings["size"]
    assert x.shape[-1] == size, f"{tuple(x.shape)} is not of size {size}"

    def look(frames: Tensor) -> tuple[Tensor, ...]:
        log_p, pooled = features.frame(frames)
        p = log_p.exp()
        return *strongest(p, digits), p.sum((2, 3)), pooled

    frames = rearrange(x, "b c f h w -> (b f) c h w")
    classes, places, kinds, pooled = batched(look, frames)
    split = (len(x), x.shape[2])
    classes = classes.unflatten(0, split)
    places = places.unflatten(0, split)
    classes, places = link(classes, places)
    _, _, clips = batched(features.video, x)
    return Seen(classes, places, kinds, pooled, clips)


def batched(net: Callable, x: Tensor) -> list[Tensor]:
    """What net, a function to a tuple of tensors, makes of x, of 128 clips or frames at a time."""
    parts = [net(part) for part in x.split(128)]
    return [torch.cat(one) for one in zip(*parts)]


def link(classes: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Orders the digits (B, F, digits) and (B, F, digits, 2) of each frame like those of the first: of all
    orders the one that is nearest, in sum, to where the last two frames lead. The class has no say, and how
    far a misread place is has none either."""
    digits = classes.shape[2]
    orders = torch.tensor(list(itertools.permutations(range(digits))))  # (digits!, digits)
    kinds = [classes[:, 0]]
    track = [positions[:, 0]]
    for f in range(1, positions.shape[1]):
        ahead = 2 * track[-1] - track[max(f - 2, 0)]
        here = positions[:, f]
        away = torch.cdist(ahead, here).clamp(max=FAR)  # of each digit from each place
        sums = away[:, torch.arange(digits), orders].sum(2)  # (B, digits!)
        order = orders[sums.argmin(1)]
        kinds.append(classes[:, f].gather(1, order))
        track.append(here.take_along_dim(order[:, :, None], 1))
    return torch.stack(kinds, 1), torch.stack(track, 1)


def main() -> None:
    """Trains the networks that measure."""
    cfg, = config.parse(FeatureConfig)
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    nets = train(cfg)
    content = {"features": nets.state_dict(), "settings": asdict(cfg)}
    checkpoint.save(cfg.out, content)
    print(cfg.out)


if __name__ == "__main__":
    config.run(main)

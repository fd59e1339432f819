"""MagicVideo (Zhou et al. 2022): an autoencoder of single frames, in whose latents a network diffuses.

Each frame is encoded alone. Clean frames are encoded and their latents diffused, never the other way round.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor, nn

from unet3d import Norm, UNetConfig, zero


@dataclass
class AutoencoderConfig:
    """The autoencoder of frames (MagicVideo). Raises ValueError if factor is no power of two."""
    channels: int = 1  # [1, 64] channels of a frame: 1 grey, 3 RGB
    factor: int = 4  # [2, 16] autoencoder: height and width of a latent are so many times smaller
    latent_channels: int = 4  # [1, 64] channels of a latent
    width: int = 32  # [8, 1024] autoencoder: channels inside
    kl_weight: float = 1e-4  # [0, 1] autoencoder: weight of the KL divergence from N(0, 1), in mean nats

    def __post_init__(self):
        if self.factor not in (2, 4, 8, 16):
            raise ValueError(f"--factor {self.factor} is not a power of two: 2, 4, 8 or 16")


class Residual(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, plus the input; ((b f), c, h, w)."""
    def __init__(self, dim: int):
        super().__init__()
        first = nn.Conv2d(dim, dim, 3, padding=1)
        second = zero(nn.Conv2d(dim, dim, 3, padding=1))
        self.net = nn.Sequential(Norm(dim), nn.SiLU(), first,
                                 Norm(dim), nn.SiLU(), second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class Autoencoder(nn.Module):
    """Videos (B, C, F, H, W) in [-1, 1] to latents, factor times smaller, and back.

    A call is a training pass: x -> reconstruction, mean, logvar. scale is a part of the
    weights: 1 over the standard deviation of the means, once measure() has seen some clips.
    """
    bounded = False  # see Pixels

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        dim = config.width
        levels = int(math.log2(config.factor))
        down = []
        for _ in range(levels):
            down.append(Residual(dim))
            down.append(nn.Conv2d(dim, dim, 3, stride=2, padding=1))
        self.encoder = nn.Sequential(nn.Conv2d(config.channels, dim, 3, padding=1),
                                     *down, Residual(dim), Norm(dim), nn.SiLU(),
                                     nn.Conv2d(dim, 2 * config.latent_channels, 1))
        self.entry = nn.Sequential(nn.Conv2d(config.latent_channels, dim, 3, padding=1),
                                   Residual(dim))
        up = []
        for _ in range(levels):
            up.append(nn.Upsample(scale_factor=2))
            up.append(nn.Conv2d(dim, dim, 3, padding=1))
            up.append(Residual(dim))
        self.exit = nn.Sequential(*up, Norm(dim), nn.SiLU(),
                                  nn.Conv2d(dim, config.channels, 3, padding=1))
        self.register_buffer("scale", torch.ones(()))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, (B, latent_channels, F, h, w) each, of x (B, C, F, H, W)."""
        frames = rearrange(x, "b c f h w -> (b f) c h w")
        out = self.encoder(frames).float()
        out = rearrange(out, "(b f) c h w -> b c f h w", b=len(x))
        return out.chunk(2, dim=1)

    def decode(self, y: Tensor) -> Tensor:
        """The video of the latents y, unscaled."""
        frames = rearrange(y, "b c f h w -> (b f) c h w")
        x = self.exit(self.entry(frames)).float()
        return rearrange(x, "(b f) c h w -> b c f h w", b=len(y))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.encode(x)
        std = (logvar / 2).exp()
        y = mean + std * torch.randn_like(mean)
        return self.decode(y), mean, logvar

    @torch.no_grad()
    def measure(self, x: Tensor) -> None:
        """Sets scale so that the latents of the clips x have unit variance."""
        means = [self.encode(clip)[0] for clip in x.split(1)]
        self.scale.copy_(1 / torch.cat(means).std())

    @torch.no_grad()
    def latents(self, x: Tensor) -> Tensor:
        """What is diffused: the scaled means of clean frames x (B, C, F, H, W)."""
        at_once = 4 if x.device.type == "cpu" else len(x)  # few stay in a CPU's cache
        means = [self.encode(clips)[0] for clips in x.split(at_once)]
        return torch.cat(means) * self.scale

    def unclamped(self, z: Tensor) -> Tensor:
        """The video of the scaled latents z, which guidance differentiates: so it is not clamped."""
        return self.decode(z / self.scale)

    @torch.no_grad()
    def video(self, z: Tensor) -> Tensor:
        """The video, in [-1, 1], of what was drawn."""
        return self.unclamped(z).clamp(-1, 1)


class Pixels:
    """The coder of a network that diffuses pixels, with what Autoencoder has for latents; it changes nothing.

    bounded: whether what is diffused lies in [-1, 1], so that x_hat is clipped. Latents have no bounds.
    """
    bounded = True

    def latents(self, x: Tensor) -> Tensor:
        return x

    def unclamped(self, z: Tensor) -> Tensor:
        return z

    def video(self, z: Tensor) -> Tensor:
        return z.clamp(-1, 1)


def in_latents(unet: UNetConfig, config: AutoencoderConfig) -> UNetConfig:
    """The architecture for frames as the autoencoder makes them. Raises ValueError if they do not divide."""
    if unet.size % config.factor:
        raise ValueError(f"--size {unet.size} is not divisible by --factor {config.factor}")
    size = unet.size // config.factor
    return replace(unet, channels=config.latent_channels, size=size)


def frozen(config: AutoencoderConfig, weights: dict[str, Tensor], device: torch.device) -> Autoencoder:
    """The autoencoder with these weights, to be used and not trained; RuntimeError if they do not fit."""
    model = Autoencoder(config)
    model.load_state_dict(weights)
    return model.to(device).eval().requires_grad_(False)


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of N(mean, e^logvar) from N(0, 1) in nats, each element alone."""
    return (mean.square() + logvar.exp() - 1 - logvar) / 2


def loss(network: nn.Module, x: Tensor, config: AutoencoderConfig) -> Tensor:
    """Mean squared error of the reconstruction plus kl_weight times the mean KL; a number."""
    reconstruction, mean, logvar = network(x)
    error = nnf.mse_loss(reconstruction, x)
    return error + config.kl_weight * kl(mean, logvar).mean()

"""Section 2: the diffusion process and the training loss, as pure functions of the log-SNR.

There is no table of constants and no integer time: everything the process needs, alpha, sigma, the reverse
mean and variance, follows from logsnr (the paper's lambda). It broadcasts against videos (B, C, F, H, W) in
[-1, 1]: 0-d in sampling, (B, 1, 1, 1, 1) in training, (B, 1, F, 1, 1) where each frame has a level of its own
(--frame_noise). t = 0 is clean, t = 1 is noise.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (z, logsnr) -> x_hat, shaped like z
Generators = torch.Generator | list[torch.Generator] | None  # of noise: one for all clips, or one for each


@dataclass
class DiffusionConfig:
    """The process, and what the network predicts."""
    prediction: Literal["eps", "v"] = "v"  # what the network predicts: the noise, or the velocity v
    logsnr_min: float = -20.0  # [-40, 0] log-SNR at t = 1, before noise_shift
    logsnr_max: float = 20.0  # [0, 40] log-SNR at t = 0, before noise_shift
    noise_shift: float = 1.0  # [0.1, 100] sigma/alpha is multiplied by this at every t; 1 is the paper
    frame_noise: float = 0.0  # [0, 1] share of clips in training whose frames have each a time of its own


def cosine_logsnr(t: Tensor, logsnr_min: float = -20.0, logsnr_max: float = 20.0) -> Tensor:
    """Cosine schedule lambda(t) = -2 log tan(at + b), t in [0, 1] (section 2; Progressive Distillation)."""
    b = math.atan(math.exp(-logsnr_max / 2))
    a = math.atan(math.exp(-logsnr_min / 2)) - b
    angle = a * t.double() + b  # float32 loses tan's digits near pi/2
    logsnr = -2 * angle.tan().log()
    return logsnr.to(t.dtype)


def schedule(t: Tensor, config: DiffusionConfig) -> Tensor:
    """The log-SNR at time t in [0, 1], shaped like t: cosine, moved towards noise by config.noise_shift."""
    # Paper: no shift. F nearly equal frames average the noise away, so small clips profit from more of it.
    logsnr = cosine_logsnr(t, config.logsnr_min, config.logsnr_max)
    return logsnr - 2 * math.log(config.noise_shift)


def alpha_sigma(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma, variance preserving: alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr)."""
    alpha = logsnr.sigmoid().sqrt()
    sigma = (-logsnr).sigmoid().sqrt()  # never sqrt(1 - alpha^2): it cancels
    return alpha, sigma


def noise_like(z: Tensor, generator: Generators = None) -> Tensor:
    """Standard normal noise shaped like z; a generator on the CPU gives the same noise on every device.

    A list holds a generator for each clip of z (else ValueError): its noise does not depend on the others.
    """
    if isinstance(generator, list):
        clips = zip(z, generator, strict=True)
        return torch.stack([noise_like(clip, own) for clip, own in clips])
    device = generator.device if generator else z.device
    noise = torch.randn(z.shape, dtype=z.dtype, device=device, generator=generator)
    return noise.to(z.device, non_blocking=z.is_cuda)


def diffuse(x: Tensor, logsnr: Tensor, eps: Tensor) -> Tensor:
    """z_t ~ q(z_t | x): the video x with noise eps at level logsnr, shaped like x."""
    alpha, sigma = alpha_sigma(logsnr)
    return alpha * x + sigma * eps  # Eq. 1


def x_from_eps(z: Tensor, logsnr: Tensor, eps: Tensor) -> Tensor:
    """The clean video that z and its noise eps imply (section 2, epsilon-prediction)."""
    alpha, sigma = alpha_sigma(logsnr)
    return (z - sigma * eps) / alpha


def eps_from_x(z: Tensor, logsnr: Tensor, x: Tensor) -> Tensor:
    """The noise that z and its clean video x imply; -sigma times the score when x = E[x | z]."""
    alpha, sigma = alpha_sigma(logsnr)
    return (z - alpha * x) / sigma  # Paper: the alpha is missing where it is printed beside Eq. 6


def x_from_v(z: Tensor, logsnr: Tensor, v: Tensor) -> Tensor:
    """The clean video that z and its velocity v imply (section 2, v-prediction)."""
    alpha, sigma = alpha_sigma(logsnr)
    return alpha * z - sigma * v


def v_from_x(x: Tensor, logsnr: Tensor, eps: Tensor) -> Tensor:
    """The velocity v = alpha eps - sigma x, the target of v-prediction (section 2)."""
    alpha, sigma = alpha_sigma(logsnr)
    return alpha * eps - sigma * x


def reverse(z_t: Tensor, x: Tensor, logsnr_t: Tensor, logsnr_s: Tensor,
            gamma: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of z_s given z_t and x, s < t: the posterior q(z_s | z_t, x) at gamma = 0.

    gamma in [0, 1] is the exponent that interpolates between the small variance (0) and the large one (1).
    """
    alpha_t, sigma_t = alpha_sigma(logsnr_t)
    alpha_s, sigma_s = alpha_sigma(logsnr_s)
    ratio = torch.exp(logsnr_t - logsnr_s)
    fresh = -torch.expm1(logsnr_t - logsnr_s)  # 1 - e^(lambda_t - lambda_s), exact for close levels
    mean = ratio * (alpha_s / alpha_t) * z_t + fresh * alpha_s * x  # Eq. 3
    small = fresh * sigma_s**2
    large = fresh * sigma_t**2
    std = (small ** (1 - gamma) * large**gamma).sqrt()  # Eq. 4
    return mean, std


def loss(model: Callable, x: Tensor, config: DiffusionConfig, cond: Tensor | None = None,
         num_images: int = 0, generator: torch.Generator | None = None) -> Tensor:
    """The loss of each clip (B,): mean squared error on eps or v at a random time (Eq. 2 with its weights).

    x: (B, C, F + num_images, H, W); cond: token embeddings as UNet3D takes them, or None for c = 0.
    """
    t = times(len(x), x.shape[2], config, generator)
    logsnr = schedule(t, config).to(x.device, non_blocking=x.is_cuda)
    logsnr = logsnr[:, None, :, None, None]
    eps = noise_like(x, generator)
    z = diffuse(x, logsnr, eps)
    output = model(z, logsnr, cond, num_images)
    error = output - target(x, logsnr, eps, config)
    return error.square().flatten(1).mean(1)  # Eq. 2


def times(batch: int, frames: int, config: DiffusionConfig,
          generator: torch.Generator | None) -> Tensor:
    """Random times in [0, 1], (B, 1) for each clip, or (B, frames) for each frame with frame_noise."""
    # Paper: t ~ U[0, 1] for each clip. One draw from each of B equal strata has the same mean, less variance.
    strata = torch.arange(batch) + torch.rand(batch, generator=generator)
    t = strata[:, None] / batch
    if not config.frame_noise:
        return t
    # Paper: no such clips. Frames that are less noisy teach the network to look at other frames.
    own = torch.rand(batch, 1, generator=generator) < config.frame_noise
    shift = own * torch.rand(batch, frames, generator=generator)
    return (t + shift) % 1  # past 1 it begins again at 0: each frame's time alone is uniform still


def target(x: Tensor, logsnr: Tensor, eps: Tensor, config: DiffusionConfig) -> Tensor:
    """What a perfect network would say, shaped like x: eps or v, as config.prediction has it."""
    if config.prediction == "eps":
        return eps
    return v_from_x(x, logsnr, eps)


def denoiser(model: Callable, config: DiffusionConfig, cond: Tensor | None = None) -> Denoiser:
    """The denoiser x_hat(z, logsnr) of a network: binds the condition and undoes the prediction type."""
    def denoise(z, logsnr):
        output = model(z, logsnr, cond)
        if config.prediction == "eps":
            return x_from_eps(z, logsnr, output)
        return x_from_v(z, logsnr, output)
    return denoise

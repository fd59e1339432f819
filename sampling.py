"""Section 2, sampling: ancestral, predictor-corrector, and two that add no noise, made for few network calls.

A sampler sees a denoiser (z, logsnr) -> x_hat and nothing else: condition and guidance were bound before
(guidance.py). It walks logsnrs (N + 1,), rising from noise to data, and calls the denoiser N times (2N - 1
with the corrector). constrain(z, logsnr) -> z is imposed on z after every step (the replacement method,
section 3.1).
"""
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from diffusion import Denoiser, Generators, alpha_sigma, diffuse, eps_from_x, noise_like, reverse

Constraint = Callable[[Tensor, Tensor], Tensor]  # (z, logsnr) -> z


def identity(z: Tensor, logsnr: Tensor) -> Tensor:
    """The constraint that imposes nothing."""
    return z


@torch.no_grad()  # not inference_mode: guidance differentiates inside
def sample(denoise: Denoiser, z: Tensor, logsnrs: Tensor, gamma: float = 0.0, delta: float = 0.0,
           constrain: Constraint = identity, generator: Generators = None) -> Tensor:
    """Ancestral sampling from noise z (B, C, F, H, W) to a video; delta > 0 adds the corrector (section 2).

    gamma in [0, 1] chooses the variance of Eq. 4; delta is the Langevin step size of Eq. 5, 0.1 in the paper.
    """
    z = constrain(z, logsnrs[0])
    for logsnr_t, logsnr_s in pairwise(logsnrs[:-1]):
        mean, std = reverse(z, denoise(z, logsnr_t), logsnr_t, logsnr_s, gamma)
        z = mean + std * noise_like(z, generator)
        z = constrain(z, logsnr_s)
        if delta:
            z = langevin(denoise, z, logsnr_s, delta, generator)
            z = constrain(z, logsnr_s)
    x_hat = denoise(z, logsnrs[-2])  # the last step: without noise
    return constrain(x_hat, logsnrs[-1])


def langevin(denoise: Denoiser, z: Tensor, logsnr: Tensor, delta: float,
             generator: Generators = None) -> Tensor:
    """One Langevin step of size delta at a fixed noise level: the corrector of Eq. 5, shaped like z."""
    _, sigma = alpha_sigma(logsnr)
    eps = eps_from_x(z, logsnr, denoise(z, logsnr))
    noise = noise_like(z, generator)
    return z - 0.5 * delta * sigma * eps + delta**0.5 * sigma * noise  # Eq. 5


@torch.no_grad()
def ddim(denoise: Denoiser, z: Tensor, logsnrs: Tensor, constrain: Constraint = identity) -> Tensor:
    """The deterministic sampler of Song et al. 2021: the same noise at every level (not in the paper)."""
    z = constrain(z, logsnrs[0])
    for logsnr_t, logsnr_s in pairwise(logsnrs[:-1]):
        x_hat = denoise(z, logsnr_t)
        eps = eps_from_x(z, logsnr_t, x_hat)
        z = diffuse(x_hat, logsnr_s, eps)
        z = constrain(z, logsnr_s)
    x_hat = denoise(z, logsnrs[-2])
    return constrain(x_hat, logsnrs[-1])


@torch.no_grad()
def dpm_solver(denoise: Denoiser, z: Tensor, logsnrs: Tensor, constrain: Constraint = identity) -> Tensor:
    """DPM-Solver++(2M) of Lu et al. 2022: second-order multistep in log-SNR (not in the paper)."""
    z = constrain(z, logsnrs[0])
    x_previous = h_previous = None  # of the step before
    slope = 0  # of x_hat; the first step has none yet
    for logsnr_t, logsnr_s in pairwise(logsnrs[:-1]):
        x_hat = denoise(z, logsnr_t)
        h = (logsnr_s - logsnr_t) / 2  # their lambda is log(alpha / sigma)
        if x_previous is not None:
            slope = (x_hat - x_previous) / h_previous
        x_middle = x_hat + h / 2 * slope  # extrapolated to the middle of the step
        _, sigma_t = alpha_sigma(logsnr_t)
        alpha_s, sigma_s = alpha_sigma(logsnr_s)
        z = sigma_s / sigma_t * z - alpha_s * torch.expm1(-h) * x_middle
        z = constrain(z, logsnr_s)
        x_previous = x_hat
        h_previous = h
    x_hat = denoise(z, logsnrs[-2])
    return constrain(x_hat, logsnrs[-1])

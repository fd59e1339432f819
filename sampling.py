"""Section 2, sampling: ancestral, predictor-corrector, and two deterministic ones with fewer network calls.

A sampler sees a denoiser (z, logsnr) -> x_hat and nothing else: condition and guidance were bound before
(guidance.py). It walks logsnrs (N + 1,), rising from noise to data, and calls the denoiser N times (2N - 1
with the corrector). constrain(z, logsnr) -> z is imposed on z after every step (the replacement method,
section 3.1).
"""
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion import Denoiser, alpha_sigma, eps_from_x, noise_like, reverse

Constraint = Callable[[Tensor, Tensor], Tensor]  # (z, logsnr) -> z


def identity(z: Tensor, logsnr: Tensor) -> Tensor:
    """The constraint that imposes nothing."""
    return z


@torch.no_grad()  # not inference_mode: guidance differentiates inside
def sample(denoise: Denoiser, z: Tensor, logsnrs: Tensor, gamma: float = 0.0, delta: float = 0.0,
           constrain: Constraint = identity, generator: torch.Generator | None = None) -> Tensor:
    """Ancestral sampling from noise z (B, C, F, H, W) to a video; delta > 0 adds the corrector (section 2).

    gamma in [0, 1] chooses the variance of Eq. 4; delta is the Langevin step size of Eq. 5, 0.1 in the paper.
    """
    z = constrain(z, logsnrs[0])
    for logsnr_t, logsnr_s in zip(logsnrs[:-2], logsnrs[1:-1]):
        mean, std = reverse(z, denoise(z, logsnr_t), logsnr_t, logsnr_s, gamma)
        z = constrain(mean + std * noise_like(z, generator), logsnr_s)
        if delta:
            z = constrain(langevin(denoise, z, logsnr_s, delta, generator), logsnr_s)
    return constrain(denoise(z, logsnrs[-2]), logsnrs[-1])  # the last step: x_hat, without noise


def langevin(denoise: Denoiser, z: Tensor, logsnr: Tensor, delta: float,
             generator: torch.Generator | None = None) -> Tensor:
    """One Langevin step of size delta at a fixed noise level: the corrector of Eq. 5, shaped like z."""
    _, sigma = alpha_sigma(logsnr)
    eps = eps_from_x(z, logsnr, denoise(z, logsnr))
    return z - 0.5 * delta * sigma * eps + delta**0.5 * sigma * noise_like(z, generator)  # Eq. 5


@torch.no_grad()
def ddim(denoise: Denoiser, z: Tensor, logsnrs: Tensor, constrain: Constraint = identity) -> Tensor:
    """The deterministic sampler of Song et al. 2021: the same noise at every level (not in the paper)."""
    z = constrain(z, logsnrs[0])
    for logsnr_t, logsnr_s in zip(logsnrs[:-2], logsnrs[1:-1]):
        x_hat, (alpha_s, sigma_s) = denoise(z, logsnr_t), alpha_sigma(logsnr_s)
        z = constrain(alpha_s * x_hat + sigma_s * eps_from_x(z, logsnr_t, x_hat), logsnr_s)
    return constrain(denoise(z, logsnrs[-2]), logsnrs[-1])


@torch.no_grad()
def dpm_solver(denoise: Denoiser, z: Tensor, logsnrs: Tensor, constrain: Constraint = identity) -> Tensor:
    """DPM-Solver++(2M) of Lu et al. 2022: second-order multistep in log-SNR (not in the paper)."""
    z, x_previous, h_previous = constrain(z, logsnrs[0]), None, None
    for logsnr_t, logsnr_s in zip(logsnrs[:-2], logsnrs[1:-1]):
        x_hat, h = denoise(z, logsnr_t), (logsnr_s - logsnr_t) / 2  # their lambda is log(alpha / sigma)
        # x_hat extrapolated to the middle of the step; the first step has no slope yet
        slope = 0 if x_previous is None else (x_hat - x_previous) / h_previous
        (_, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
        z = constrain(sigma_s / sigma_t * z - alpha_s * torch.expm1(-h) * (x_hat + h / 2 * slope), logsnr_s)
        x_previous, h_previous = x_hat, h
    return constrain(denoise(z, logsnrs[-2]), logsnrs[-1])

"""Sections 2 and 3.1: guidance. Denoisers in, a denoiser out, so that no sampler ever hears of it.

They are stacked in this order: classifier-free first, reconstruction guidance on its x_hat, clipping last.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion import Denoiser, Generators, alpha_sigma, diffuse, noise_like


def classifier_free(conditional: Denoiser, unconditional: Denoiser, w: float) -> Denoiser:
    """Classifier-free guidance, weight w >= 0; 0 is the conditional denoiser (Eq. 6). Table 5 most likely
    lists 1 + w.
    """
    if w == 0:
        return conditional

    def guided(z, logsnr):
        # Eq. 6 mixes eps; x_hat is affine in eps and the weights sum to 1, so mixing x_hat is the same
        return (1 + w) * conditional(z, logsnr) - w * unconditional(z, logsnr)  # Eq. 6
    return guided


def reconstruction_guided(denoise: Denoiser, x_a: Tensor, observe: Callable[[Tensor], Tensor],
                          w_r: float, power: float = 1.0) -> Denoiser:
    """Reconstruction guidance of weight w_r: moves x_hat so that observe(x_hat) agrees with x_a.

    observe is differentiable and maps a video (B, C, F, H, W) to what x_a shows of it: the known frames
    (Eq. 7, with replacement() as the sampler's constraint) or the video down-sampled (Eq. 8, without).
    Paper: power 1, which takes sigma^2 / alpha^2 as the variance of x_a given z. That grows without bound
    at high noise, where a digit's place is decided. Power -1 takes sigma^2, exact for white data of variance 1.
    """
    def guided(z, logsnr):
        alpha, _ = alpha_sigma(logsnr)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            x_hat = denoise(z, logsnr)
            residual = x_a - observe(x_hat)
            error = residual.square().sum()  # a mean would weaken with batch and resolution
        grad, = torch.autograd.grad(error, z)
        return x_hat.detach() - w_r * alpha**power / 2 * grad  # Eqs. 7 and 8
    return guided


def replacement(x_a: Tensor, known: Tensor, generator: Generators = None) -> Callable:
    """The constraint of the replacement method: where known, z^a is drawn anew from q(z^a | x^a) (3.1).

    x_a: (B, C, F, H, W), read only where known, a bool mask that broadcasts against it, is True.
    """
    def constrain(z, logsnr):
        z_a = diffuse(x_a, logsnr, noise_like(z, generator))
        return torch.where(known, z_a, z)
    return constrain


def clipped(denoise: Denoiser) -> Denoiser:
    """x_hat clipped to [-1, 1]; always outermost: in guidance it would zero the gradient where it binds."""
    return lambda z, logsnr: denoise(z, logsnr).clamp(-1, 1)

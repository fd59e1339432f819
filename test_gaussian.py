"""The oracle of the other tests: Gaussian videos, whose denoiser, marginals and conditionals are known.

With a Gaussian's denoiser every sampler and every linear guidance is an affine map of its start and of the
noises it draws, so law() reads off the exact distribution of the result: nothing is estimated from samples.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

import sampling

FLOAT = torch.float64


def level(logsnr: float) -> Tensor:
    """A log-SNR as samplers hand it on: 0-d."""
    return torch.tensor(logsnr, dtype=FLOAT)


def signal_and_noise(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma, written otherwise than in diffusion.py: tan of the angle is e^(-logsnr / 2)."""
    angle = torch.atan(torch.exp(-logsnr / 2))
    return angle.cos(), angle.sin()


@dataclass
class Gaussian:
    """Normally distributed videos of shape (C, F, H, W): mean (D,) and cov (D, D) of the flattened video."""
    mean: Tensor
    cov: Tensor
    shape: tuple[int, ...]

    def marginal(self, logsnr: Tensor) -> "Gaussian":
        """The distribution of z at this level."""
        alpha, sigma = signal_and_noise(logsnr)
        cov = alpha**2 * self.cov + sigma**2 * torch.eye(len(self.mean), dtype=FLOAT)
        return Gaussian(alpha * self.mean, cov, self.shape)

    def gain(self, logsnr: Tensor) -> Tensor:
        """The matrix M (D, D) of the denoiser M z + c."""
        alpha, _ = signal_and_noise(logsnr)
        return alpha * self.cov @ torch.linalg.inv(self.marginal(logsnr).cov)

    def denoise(self, z: Tensor, logsnr: Tensor) -> Tensor:
        """E[x | z]: what a perfectly trained network's denoiser returns, z (B, C, F, H, W)."""
        centered = z.flatten(1) - self.marginal(logsnr).mean
        return (self.mean + centered @ self.gain(logsnr).T).view_as(z)

    def posterior(self, z: Tensor, logsnr: Tensor) -> "Gaussian":
        """The distribution of x given one z (1, C, F, H, W)."""
        alpha, _ = signal_and_noise(logsnr)
        cov = self.cov - alpha * self.gain(logsnr) @ self.cov
        return Gaussian(self.denoise(z, logsnr).flatten(), cov, self.shape)

    def given(self, known: Tensor, value: Tensor) -> "Gaussian":
        """The distribution of the flat entries ~known when those where known (D,) are value's, (D,)."""
        joint, weights = self.cov, self.cov[~known][:, known] @ torch.linalg.inv(self.cov[known][:, known])
        mean = self.mean[~known] + weights @ (value - self.mean)[known]
        return Gaussian(mean, joint[~known][:, ~known] - weights @ joint[known][:, ~known], (len(mean),))

    def log_prob(self, flat: Tensor) -> Tensor:
        """The log density at flat (..., D), differentiable."""
        return torch.distributions.MultivariateNormal(self.mean, self.cov).log_prob(flat)

    def samples(self, number: int, seed: int = 0) -> Tensor:
        """Videos (number, C, F, H, W)."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(number, len(self.mean), dtype=FLOAT, generator=generator)
        return (self.mean + noise @ torch.linalg.cholesky(self.cov).T).view(number, *self.shape)


def correlation(length: int, rho: float) -> Tensor:
    """rho^|i - j|: the correlation of an autoregressive process of order one."""
    index = torch.arange(length)
    return torch.tensor(rho, dtype=FLOAT) ** (index[:, None] - index).abs()


def autoregressive(frames: int = 4, size: int = 2, rho: float = 0.9) -> Gaussian:
    """Videos (1, frames, size, size), correlated over frames and pixels, variance 0.5, mean rising."""
    pixels = torch.kron(correlation(size, 0.6), correlation(size, 0.6))
    cov = 0.5 * torch.kron(correlation(frames, rho), pixels)
    return Gaussian(torch.linspace(-0.3, 0.5, len(cov), dtype=FLOAT), cov, (1, frames, size, size))


def white(shape: tuple[int, ...] = (1, 4, 2, 2)) -> Gaussian:
    """Standard normal noise: where every sampler starts."""
    dim = math.prod(shape)
    return Gaussian(torch.zeros(dim, dtype=FLOAT), torch.eye(dim, dtype=FLOAT), shape)


def law(run: Callable[[Tensor], Tensor], start: Gaussian) -> Gaussian:
    """The exact distribution of run(z), z from start, for a run affine in z and in every noise_like it draws.

    run sees a batch: the mean, then one clip for each direction in which z or one of the noises can deviate.
    """
    dim, draws, root = len(start.mean), _draws(run, start), torch.linalg.cholesky(start.cov).T
    z = start.mean.repeat(1 + dim * (1 + draws), 1)
    z[1:1 + dim] += root
    calls = iter(range(1, draws + 1))

    def unit_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise, first = torch.zeros(like.shape, dtype=FLOAT).flatten(1), 1 + dim * next(calls)
        noise[first:first + dim] = torch.eye(dim, dtype=FLOAT)
        return noise.view_as(like)

    with mock.patch("sampling.noise_like", unit_noise), mock.patch("guidance.noise_like", unit_noise):
        result = run(z.view(-1, *start.shape))
    deviations = result.flatten(1)[1:] - result.flatten(1)[0]
    return Gaussian(result.flatten(1)[0], deviations.T @ deviations, tuple(result.shape[1:]))


def _draws(run: Callable[[Tensor], Tensor], start: Gaussian) -> int:
    """How many noises a run draws."""
    zeros = mock.Mock(side_effect=lambda like, generator=None: torch.zeros_like(like))
    with mock.patch("sampling.noise_like", zeros), mock.patch("guidance.noise_like", zeros):
        run(start.mean.view(1, *start.shape))
    return zeros.call_count


def grid(points: int = 401, reach: float = 6.0) -> tuple[Tensor, float]:
    """Every two-frame video of one pixel on a grid, (points^2, 2), and the area that each stands for."""
    axis = torch.linspace(-reach, reach, points, dtype=FLOAT)
    return torch.cartesian_prod(axis, axis), float((axis[1] - axis[0]) ** 2)


def test_the_denoiser_and_the_marginal_agree_with_integration_over_a_grid():
    data, z = autoregressive(frames=2, size=1), torch.tensor([0.4, -0.9], dtype=FLOAT)
    videos, area = grid()
    for logsnr in (level(-2.0), level(0.5), level(3.0)):
        alpha, sigma = signal_and_noise(logsnr)
        weights = (data.log_prob(videos) - ((z - alpha * videos) / sigma).square().sum(1) / 2).exp()
        x_hat = (weights[:, None] * videos).sum(0) / weights.sum()
        cov = torch.einsum("n,ni,nj->ij", weights, videos - x_hat, videos - x_hat) / weights.sum()
        posterior = data.posterior(z.view(1, 1, 2, 1, 1), logsnr)
        torch.testing.assert_close((posterior.mean, posterior.cov), (x_hat, cov))
        density = weights.sum() * area / (2 * math.pi * sigma**2)
        torch.testing.assert_close(data.marginal(logsnr).log_prob(z), density.log())


def test_the_conditional_agrees_with_integration_along_a_line():
    data = autoregressive(frames=2, size=1)
    axis = torch.linspace(-6, 6, 4001, dtype=FLOAT)
    weights = data.log_prob(torch.stack([torch.full_like(axis, 0.7), axis], dim=1)).exp()
    mean = (weights * axis).sum() / weights.sum()
    variance = (weights * (axis - mean) ** 2).sum() / weights.sum()
    rest = data.given(torch.tensor([True, False]), torch.full((2,), 0.7, dtype=FLOAT))
    torch.testing.assert_close(torch.stack([rest.mean[0], rest.cov[0, 0]]), torch.stack([mean, variance]))


def test_the_law_of_a_noisy_map_agrees_with_many_samples():
    data = autoregressive(frames=3, size=1)
    generator = torch.Generator().manual_seed(1)

    def run(z: Tensor) -> Tensor:
        noise = sampling.noise_like(z, generator)
        return 2 * z.flip(2) + noise.cumsum(2) - 0.5 * noise + sampling.noise_like(z, generator) + 1

    exact, number = law(run, data), 100_000
    many = run(data.samples(number)).flatten(1)
    assert (many.mean(0) - exact.mean).abs().max() < 5 * (exact.cov.diagonal().max() / number) ** 0.5
    assert (many.T.cov() - exact.cov).abs().max() < 5 * exact.cov.diagonal().max() * (2 / number) ** 0.5

"""Guidance against Gaussian videos: Eqs. 6, 7 and 8 in closed form, and the conditionals they stand for."""
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d, interpolate

from diffusion import cosine_logsnr
from guidance import classifier_free, clipped, reconstruction_guided, replacement
from sampling import sample
from test_gaussian import FLOAT, Gaussian, autoregressive, law, level, signal_and_noise, white

DATA, OTHER = autoregressive(), autoregressive(rho=0.3)
KNOWN = torch.tensor([True, True, False, False]).view(1, 1, 4, 1, 1)
FLAT = KNOWN.expand(1, *DATA.shape).flatten()
LEVELS = [-3.0, 0.0, 2.0, 6.0]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noisy(data: Gaussian, logsnr: Tensor, number: int = 3) -> Tensor:
    return data.marginal(logsnr).samples(number, seed=7)


def first_frames(x: Tensor) -> Tensor:
    return x[:, :, :2].flatten(1)


def pooled(x: Tensor) -> Tensor:
    return avg_pool3d(x, (1, 2, 2)).flatten(1)


def bilinear(x: Tensor) -> Tensor:
    return interpolate(x.flatten(1, 2), scale_factor=0.5, mode="bilinear", antialias=True).flatten(1)


def frames_and_pooled(x: Tensor) -> Tensor:
    return torch.cat([first_frames(x), pooled(x[:, :, 2:])], dim=1)


OBSERVATIONS = [first_frames, pooled, bilinear, frames_and_pooled]


def matrix(observe: Callable, shape: tuple[int, ...]) -> Tensor:
    """The matrix A of a linear observation, column by column."""
    dim = torch.Size(shape).numel()
    return observe(torch.eye(dim, dtype=FLOAT).view(dim, *shape)).T


def conditional(data: Gaussian, a: Tensor, y: Tensor) -> Gaussian:
    """The distribution of x given A x = y, by the formula for the joint of x and A x."""
    dim, joint = len(data.mean), torch.cat([torch.eye(len(data.mean), dtype=FLOAT), a])
    both = Gaussian(joint @ data.mean, joint @ data.cov @ joint.T, ())
    return both.given(torch.arange(len(joint)) >= dim, torch.cat([torch.zeros(dim, dtype=FLOAT), y]))


def conditional_denoiser(data: Gaussian, a: Tensor, y: Tensor) -> Callable:
    """E[x | z, A x = y]: the denoiser of the conditional distribution, which is Gaussian too."""
    rest = conditional(data, a, y)
    return Gaussian(rest.mean, rest.cov, data.shape).denoise


# Eq. 6

@pytest.mark.parametrize("w", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("logsnr", LEVELS)
def test_classifier_free_guidance_follows_the_sharpened_score(w: float, logsnr: float):
    logsnr = level(logsnr)
    z, (alpha, sigma) = noisy(DATA, logsnr), signal_and_noise(logsnr)
    flat = z.flatten(1).requires_grad_()
    log_prob = (1 + w) * DATA.marginal(logsnr).log_prob(flat) - w * OTHER.marginal(logsnr).log_prob(flat)
    score, = torch.autograd.grad(log_prob.sum(), flat)
    eps = -sigma * score.view_as(z)  # (1 + w) eps(z, c) - w eps(z)
    guided = classifier_free(DATA.denoise, OTHER.denoise, w)(z, logsnr)
    torch.testing.assert_close(guided, (z - sigma * eps) / alpha)


def test_weight_zero_is_the_conditional_denoiser_and_the_unconditional_one_is_never_called():
    def never(z: Tensor, logsnr: Tensor) -> Tensor:
        raise AssertionError("called")
    z, logsnr = noisy(DATA, level(0.0)), level(0.0)
    assert torch.equal(classifier_free(DATA.denoise, never, 0.0)(z, logsnr), DATA.denoise(z, logsnr))
    with pytest.raises(AssertionError, match="called"):
        classifier_free(DATA.denoise, never, 0.1)(z, logsnr)


# The missing term of section 3.1

@pytest.mark.parametrize("logsnr", LEVELS)
def test_the_missing_term_has_the_factor_sigma_squared_over_alpha_and_no_other(logsnr: float):
    logsnr, x_a = level(logsnr), DATA.samples(1, seed=2).flatten()
    alpha, sigma = signal_and_noise(logsnr)
    z = noisy(DATA, logsnr, number=1).requires_grad_()
    posterior = DATA.posterior(z, logsnr)
    known = Gaussian(posterior.mean[FLAT], posterior.cov[FLAT][:, FLAT], ())
    grad, = torch.autograd.grad(known.log_prob(x_a[FLAT]), z)
    x_hat_b, exact = posterior.mean[~FLAT].detach(), posterior.given(FLAT, x_a).mean.detach()

    def error(factor: Tensor) -> float:
        return float((x_hat_b + factor * grad.flatten()[~FLAT] - exact).abs().max())

    assert error(sigma**2 / alpha) < 1e-8
    assert error(sigma / alpha) > 0.02 and error(-(alpha**2) / 2) > 0.02  # two forms in circulation


@pytest.mark.parametrize("observe", OBSERVATIONS)
@pytest.mark.parametrize("logsnr", LEVELS)
def test_with_the_true_covariance_guidance_is_the_conditional_denoiser(observe: Callable, logsnr: float):
    logsnr = level(logsnr)
    a, (alpha, sigma) = matrix(observe, DATA.shape), signal_and_noise(logsnr)
    z, y = noisy(DATA, logsnr), observe(DATA.samples(1, seed=2))
    # The paper puts (sigma / alpha)^2 I in the place of this covariance of A x given z.
    uncertainty = a @ DATA.posterior(z[:1], logsnr).cov @ a.T
    whiten = sigma / alpha * torch.linalg.inv(torch.linalg.cholesky(uncertainty)).T
    guided = reconstruction_guided(DATA.denoise, y @ whiten, lambda x: observe(x) @ whiten, 1.0)
    expected = conditional_denoiser(DATA, a, y[0])(z, logsnr)
    torch.testing.assert_close(guided(z, logsnr), expected, rtol=1e-7, atol=1e-8)


# Eqs. 7 and 8

@pytest.mark.parametrize("observe", OBSERVATIONS)
@pytest.mark.parametrize("data", [DATA, autoregressive(frames=3, size=4)], ids=["4x2x2", "3x4x4"])
@pytest.mark.parametrize("logsnr", LEVELS)
def test_guidance_adds_the_transposed_jacobian_of_the_observed_residual(
        observe: Callable, data: Gaussian, logsnr: float):
    logsnr, w_r = level(logsnr), 1.7
    a, alpha, z = matrix(observe, data.shape), signal_and_noise(logsnr)[0], noisy(data, logsnr)
    y, x_hat = observe(data.samples(3, seed=2)), data.denoise(z, logsnr).flatten(1)
    jacobian = a @ data.gain(logsnr)  # of the observed prediction, with respect to all of z
    expected = x_hat + w_r * alpha * (y - x_hat @ a.T) @ jacobian
    guided = reconstruction_guided(data.denoise, y, observe, w_r)(z, logsnr)
    torch.testing.assert_close(guided.flatten(1), expected)


@pytest.mark.parametrize("logsnr", LEVELS)
def test_power_minus_one_is_exact_for_white_data_and_the_papers_is_not(logsnr: float):
    data, logsnr = white(), level(logsnr)
    z, y = noisy(data, logsnr), pooled(data.samples(1, seed=2))
    a = 2 * matrix(pooled, data.shape)  # of norm 1: the mean of two by two pixels, twice
    exact = conditional_denoiser(data, a, 2 * y[0])(z, logsnr)
    far = {power: (reconstruction_guided(data.denoise, 2 * y, lambda x: 2 * pooled(x), 1.0, power)(z, logsnr)
                   - exact).abs().max() for power in (-1, 1)}
    assert far[-1] < 1e-9 and far[1] > 1e-3


@pytest.mark.parametrize("observe", OBSERVATIONS)
def test_guidance_strength_does_not_depend_on_batch_size(observe: Callable):
    def guided(z: Tensor, y: Tensor) -> Tensor:
        return reconstruction_guided(DATA.denoise, y, observe, 2.0)(z, level(1.0))

    z, y = noisy(DATA, level(1.0), number=5), observe(DATA.samples(5, seed=2))
    alone = [guided(*clip) for clip in zip(z.split(1), y.split(1))]
    torch.testing.assert_close(guided(z, y), torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_guidance_differentiates_through_both_denoisers_of_classifier_free_guidance():
    logsnr, w, y = level(1.0), 2.0, first_frames(DATA.samples(3, seed=2))
    z, a, alpha = noisy(DATA, logsnr), matrix(first_frames, DATA.shape), signal_and_noise(logsnr)[0]
    gain = (1 + w) * DATA.gain(logsnr) - w * OTHER.gain(logsnr)
    both = classifier_free(DATA.denoise, OTHER.denoise, w)
    x_hat = both(z, logsnr).flatten(1)
    expected = x_hat + 1.5 * alpha * (y - x_hat @ a.T) @ a @ gain
    guided = reconstruction_guided(both, y, first_frames, 1.5)(z, logsnr)
    torch.testing.assert_close(guided.flatten(1), expected)


@pytest.mark.parametrize("observe, eigenvalue", [(first_frames, 1), (pooled, 1 / 4)])
@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0, 3.0])
def test_at_high_snr_guidance_multiplies_the_residual_by_one_minus_w_r_times_the_eigenvalue(
        observe: Callable, eigenvalue: float, strength: float):  # of A A^T
    logsnr, y = level(16.0), observe(DATA.samples(3, seed=2))
    z = noisy(DATA, logsnr)
    guided = reconstruction_guided(DATA.denoise, y, observe, strength / eigenvalue)(z, logsnr)
    before, after = y - observe(DATA.denoise(z, logsnr)), y - observe(guided)
    torch.testing.assert_close(after, (1 - strength) * before, rtol=1e-4, atol=1e-4)


def test_known_first_frames_steer_the_first_frames_and_not_the_last():
    data, first = autoregressive(frames=8, size=1, rho=0.5), torch.arange(8).view(1, 1, 8, 1, 1) < 1
    z, logsnr = torch.zeros(1, 1, 8, 1, 1, dtype=FLOAT), level(2.0)
    guided = reconstruction_guided(data.denoise, 1.0 * first, lambda x: x * first, 1.0)(z, logsnr)
    shift = (guided - data.denoise(z, logsnr)).flatten()
    assert shift[0] > 0.2 and (shift.diff() < 0).all() and shift[-1] < 0.01 * shift[0]


# Gradients

class Linear(torch.nn.Module):
    """A network with parameters: the denoiser of DATA at one level."""

    def __init__(self, logsnr: Tensor):
        super().__init__()
        self.gain = torch.nn.Parameter(DATA.gain(logsnr))

    def forward(self, z: Tensor, logsnr: Tensor) -> Tensor:
        return (z.flatten(1) @ self.gain.T).view_as(z)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("graph", [True, False])
def test_guidance_differentiates_with_respect_to_z_alone_and_leaves_no_graph(frozen: bool, graph: bool):
    logsnr, y = level(1.0), first_frames(DATA.samples(3, seed=2))
    model, z = Linear(logsnr).requires_grad_(not frozen), noisy(DATA, logsnr).requires_grad_(graph)
    with torch.set_grad_enabled(graph):
        guided = reconstruction_guided(model, y, first_frames, 1.0)(z, logsnr)
    assert not guided.requires_grad and z.requires_grad == graph
    assert z.grad is None and model.gain.grad is None
    with torch.no_grad():
        assert not torch.allclose(guided, model(z, logsnr))


def test_clipping_inside_guidance_silences_it_and_outside_does_not():
    bright = Gaussian(DATA.mean + 5, DATA.cov, DATA.shape)  # predictions beyond 1, where clamp has no slope
    logsnr, y = level(0.0), first_frames(DATA.samples(3, seed=2))
    z = noisy(bright, logsnr)
    inside = reconstruction_guided(clipped(bright.denoise), y, first_frames, 5.0)(z, logsnr)
    outside = clipped(reconstruction_guided(bright.denoise, y, first_frames, 5.0))(z, logsnr)
    assert torch.equal(inside, torch.ones_like(inside))
    assert (outside[:, :, 2:] < 0.9).any() and outside.abs().max() <= 1


def test_clipped_limits_x_hat_to_the_range_of_videos_and_touches_nothing_inside_it():
    x_hat = torch.tensor([-3.0, -1.0, -0.2, 0.7, 1.0, 1.5]).view(1, 1, 6, 1, 1)
    expected = torch.tensor([-1.0, -1.0, -0.2, 0.7, 1.0, 1.0]).view(1, 1, 6, 1, 1)
    assert torch.equal(clipped(lambda z, logsnr: z)(x_hat, level(0.0)), expected)


# The replacement method

@pytest.mark.parametrize("logsnr", [-20.0, 0.0, 5.0, 20.0])
def test_replacement_draws_the_known_frames_from_their_marginal_and_leaves_the_others(logsnr: float):
    x_a, logsnr = DATA.samples(1, seed=2), level(logsnr)
    alpha, sigma = signal_and_noise(logsnr)
    drawn = law(lambda z: replacement(x_a, KNOWN)(z, logsnr), DATA)
    assert torch.equal(drawn.mean[~FLAT], DATA.mean[~FLAT])
    torch.testing.assert_close(drawn.mean[FLAT], alpha * x_a.flatten()[FLAT])
    expected = torch.where(FLAT[:, None] | FLAT, sigma**2 * torch.eye(16, dtype=FLOAT), DATA.cov)
    torch.testing.assert_close(drawn.cov, expected)


def test_replacement_draws_anew_at_every_call():
    logsnr, constrain = level(0.0), replacement(DATA.samples(1), KNOWN)
    difference = law(lambda z: constrain(z, logsnr) - constrain(z, logsnr), DATA)
    torch.testing.assert_close(difference.cov.diagonal(), FLAT.to(FLOAT))  # twice sigma^2, and 0


def test_replacement_follows_its_generator_and_broadcasts_its_mask():
    x_a, z, whole = DATA.samples(3, seed=2), white().samples(3), KNOWN.expand(3, *DATA.shape)
    by_frame, by_pixel = (replacement(x_a, known, seeded(5))(z, level(0.0)) for known in (KNOWN, whole))
    assert torch.equal(by_frame, by_pixel)
    assert not torch.equal(by_frame, replacement(x_a, KNOWN, seeded(6))(z, level(0.0)))


def test_replacement_draws_a_clip_from_its_own_generator():
    x_a, z = DATA.samples(4, seed=2), white().samples(4)
    four = replacement(x_a, KNOWN, [seeded(seed) for seed in range(4)])(z, level(0.0))
    for clip in range(4):
        one = slice(clip, clip + 1)
        assert torch.equal(four[one], replacement(x_a[one], KNOWN, [seeded(clip)])(z[one], level(0.0)))


def test_replacement_reads_x_a_only_where_known():
    x_a, z = DATA.samples(3).masked_fill(~KNOWN, float("nan")), white().samples(3)
    assert replacement(x_a, KNOWN)(z, level(0.0)).isfinite().all()


# Whole videos drawn under guidance

def drawn(denoise: Callable, delta: float = 0.0, **more) -> Gaussian:
    """The exact distribution of what ancestral sampling draws in 64 steps."""
    logsnrs = cosine_logsnr(torch.linspace(1, 0, 65, dtype=FLOAT))
    return law(lambda z: sample(denoise, z, logsnrs, delta=delta, **more), white())


@cache
def infill_errors(w_r: float, delta: float) -> tuple[float, float]:
    """How far mean (root mean square over four x_a) and covariance of x^b are from those of q(x^b | x^a)."""
    exact_cov, squares = DATA.given(FLAT, DATA.mean).cov, []
    for x_a in DATA.samples(4, seed=3).split(1):
        guided = reconstruction_guided(DATA.denoise, x_a * KNOWN, lambda x: x * KNOWN, w_r)
        video = drawn(guided, delta, constrain=replacement(x_a, KNOWN))
        torch.testing.assert_close(video.mean[FLAT], x_a.flatten()[FLAT], atol=1e-6, rtol=0)
        squares.append((video.mean[~FLAT] - DATA.given(FLAT, x_a.flatten()).mean).square().mean())
    cov_error = (video.cov[~FLAT][:, ~FLAT] - exact_cov).abs().max()  # it does not depend on x_a
    return float(torch.stack(squares).mean().sqrt()), float(cov_error)


@pytest.mark.parametrize("delta", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
def test_reconstruction_guidance_halves_the_errors_of_the_replacement_method(delta: float):
    replaced_mean, replaced_cov = infill_errors(0.0, delta)
    guided_mean, guided_cov = infill_errors(2.0, delta)
    assert guided_mean < 0.45 * replaced_mean and guided_cov < 0.45 * replaced_cov
    assert replaced_mean > 0.15  # of a standard deviation of 0.7: the replaced frames are not cohered with


def test_reconstruction_guidance_works_best_with_the_corrector():
    assert infill_errors(2.0, 0.1)[0] < 0.85 * infill_errors(2.0, 0.0)[0]


@pytest.mark.parametrize("observe, w_r", [(pooled, 4.0), (frames_and_pooled, 1.5)])
def test_without_replacement_guidance_draws_from_the_conditional(observe: Callable, w_r: float):
    y = observe(DATA.samples(1, seed=3))
    exact = conditional(DATA, matrix(observe, DATA.shape), y[0])
    errors = []
    for weight in (0.0, w_r):
        video = drawn(reconstruction_guided(DATA.denoise, y, observe, weight), delta=0.1)
        errors.append(((video.mean - exact.mean).abs().max(), (video.cov - exact.cov).abs().max()))
    (unguided_mean, unguided_cov), (guided_mean, guided_cov) = errors
    assert guided_mean < 0.2 * unguided_mean and guided_cov < 0.1 * unguided_cov

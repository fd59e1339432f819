"""The diffusion process against Bayes' rule, the paper's values and models that know the answer."""
import math

import pytest
import torch
from torch import Tensor

from diffusion import (DiffusionConfig, alpha_sigma, cosine_logsnr, denoiser, diffuse, eps_from_x, loss,
                       noise_like, reverse, schedule, times, v_from_x, x_from_eps, x_from_v)
from test_gaussian import FLOAT, level, signal_and_noise

PREDICTIONS = ["eps", "v"]
LEVELS = [-18.0, -3.0, 0.0, 1.5, 7.0]
STEPS = [(-20.0, -19.0), (-6.0, 2.0), (-0.5, 0.0), (1.0, 1.001), (5.0, 9.0), (-20.0, 20.0)]  # from t to s


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def videos(number: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(number, 1, 4, 2, 2, dtype=FLOAT, generator=seeded(seed))


def fresh_variance(logsnr_t: Tensor, logsnr_s: Tensor) -> Tensor:
    """sigma^2_{t|s} by subtraction: what the signal scaled down from s leaves of sigma_t^2."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = signal_and_noise(logsnr_t), signal_and_noise(logsnr_s)
    return sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2


def exact_output(prediction: str, x: Tensor):
    """A model that knows x: it returns the eps or v that z then implies."""
    def model(z: Tensor, logsnr: Tensor, cond: Tensor | None = None, num_images: int = 0) -> Tensor:
        alpha, sigma = signal_and_noise(logsnr.double())
        return (z - alpha * x) / sigma if prediction == "eps" else (alpha * z - x) / sigma
    return model


# The schedule

def test_the_cosine_schedule_has_the_papers_values():
    logsnr = cosine_logsnr(torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=FLOAT))
    expected = torch.tensor([20, 1.7626, 0, -1.7626, -20], dtype=FLOAT)
    torch.testing.assert_close(logsnr, expected, atol=5e-5, rtol=0)
    assert float(alpha_sigma(logsnr)[0][-1]) == pytest.approx(4.54e-5, rel=1e-3)


def test_alpha_and_sigma_are_the_cosine_and_sine_of_an_angle_linear_in_time():
    t, b = torch.linspace(0, 1, 101, dtype=FLOAT), math.atan(math.exp(-10))
    angle = (math.atan(math.exp(10)) - b) * t + b
    torch.testing.assert_close(alpha_sigma(cosine_logsnr(t)), (angle.cos(), angle.sin()))


def test_the_schedule_falls_from_logsnr_max_to_logsnr_min():
    config = DiffusionConfig(logsnr_min=-4.0, logsnr_max=7.0)
    logsnr = schedule(torch.linspace(0, 1, 1001, dtype=FLOAT), config)
    assert (logsnr.diff() < 0).all()
    torch.testing.assert_close(logsnr[[0, -1]], torch.tensor([7, -4], dtype=FLOAT))


def test_float32_times_give_accurate_log_snrs_near_both_ends():
    t = torch.tensor([0, 1e-6, 1e-4, 0.3, 0.99, 0.9999, 0.999999, 1], dtype=torch.float32)
    logsnr = cosine_logsnr(t)
    assert logsnr.dtype == torch.float32
    torch.testing.assert_close(logsnr.double(), cosine_logsnr(t.double()), atol=2e-6, rtol=1e-7)


def test_noise_shift_multiplies_sigma_over_alpha_by_exactly_that():
    t = torch.linspace(0, 1, 11, dtype=FLOAT)
    (alpha, sigma), (alpha_3, sigma_3) = (
        alpha_sigma(schedule(t, DiffusionConfig(noise_shift=shift))) for shift in (1.0, 3.0))
    torch.testing.assert_close(sigma_3 / alpha_3, 3 * sigma / alpha)


def test_the_process_preserves_variance_at_the_given_snr():
    logsnr = torch.linspace(-20, 20, 81, dtype=FLOAT)
    alpha, sigma = alpha_sigma(logsnr)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    torch.testing.assert_close((alpha**2 / sigma**2).log(), logsnr)


def test_alpha_and_sigma_keep_their_digits_in_float32():
    logsnr = torch.linspace(-20, 20, 81)
    for given, exact in zip(alpha_sigma(logsnr), signal_and_noise(logsnr.double())):
        torch.testing.assert_close(given.double(), exact, rtol=1e-6, atol=0)


# The forward process and the four conversions

def test_diffuse_has_the_marginal_of_equation_1_at_every_clips_own_level():
    x, eps, logsnr = videos(5, 0), videos(5, 1), torch.tensor(LEVELS, dtype=FLOAT).view(-1, 1, 1, 1, 1)
    alpha, sigma = signal_and_noise(logsnr)
    torch.testing.assert_close(diffuse(x, logsnr, eps), alpha * x + sigma * eps)
    torch.testing.assert_close(diffuse(x, logsnr, eps)[1:2], diffuse(x[1:2], level(LEVELS[1]), eps[1:2]))


@pytest.mark.parametrize("logsnr", LEVELS)
def test_x_eps_and_v_convert_into_each_other(logsnr: float):
    x, eps, logsnr = videos(seed=0), videos(seed=1), level(logsnr)
    z, v = diffuse(x, logsnr, eps), v_from_x(x, logsnr, eps)
    torch.testing.assert_close(eps_from_x(z, logsnr, x), eps)
    torch.testing.assert_close(x_from_eps(z, logsnr, eps), x)  # z - sigma eps alone would be alpha x
    torch.testing.assert_close(x_from_v(z, logsnr, v), x)


@pytest.mark.parametrize("logsnr", LEVELS)
def test_v_is_the_velocity_of_z_along_the_circle(logsnr: float):
    x, eps, logsnr = videos(seed=0), videos(seed=1), level(logsnr)
    angle, turn = torch.atan(torch.exp(-logsnr / 2)), 1e-6
    z_after, z_before = ((angle + d).cos() * x + (angle + d).sin() * eps for d in (turn, -turn))
    velocity = (z_after - z_before) / (2 * turn)
    torch.testing.assert_close(v_from_x(x, logsnr, eps), velocity, rtol=1e-6, atol=1e-8)


def test_noise_is_standard_normal_and_follows_its_generator_alone():
    like, state = torch.zeros(1000, 1, 4, 2, 2, dtype=FLOAT), torch.get_rng_state()
    generator = seeded(0)
    first, second = noise_like(like, generator), noise_like(like, generator)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(first, noise_like(like, seeded(0)))
    assert first.dtype == FLOAT and first.shape == like.shape
    assert first.mean().abs() < 0.04 and abs(first.var() - 1) < 0.06 and (first * second).mean().abs() < 0.04


def test_with_a_generator_for_each_clip_its_noise_does_not_depend_on_the_other_clips():
    like = torch.zeros(4, 1, 4, 2, 2, dtype=FLOAT)
    noise = noise_like(like, [seeded(seed) for seed in range(4)])
    assert noise.shape == like.shape and noise.dtype == FLOAT
    for clip in range(4):
        assert torch.equal(noise[clip:clip + 1], noise_like(like[:1], [seeded(clip)]))
        assert torch.equal(noise[clip:clip + 1], noise_like(like[:1], seeded(clip)))
    assert not torch.equal(noise[0], noise[1])
    with pytest.raises(ValueError):
        noise_like(like, [seeded(0)])


# The reverse process

@pytest.mark.parametrize("logsnr_t, logsnr_s", STEPS)
def test_gamma_zero_is_the_posterior(logsnr_t: float, logsnr_s: float):
    x, z_t, logsnr_t, logsnr_s = videos(seed=0), videos(seed=1), level(logsnr_t), level(logsnr_s)
    (alpha_t, _), (alpha_s, sigma_s) = signal_and_noise(logsnr_t), signal_and_noise(logsnr_s)
    scale, fresh = alpha_t / alpha_s, fresh_variance(logsnr_t, logsnr_s)
    # Bayes: q(z_t | z_s) times q(z_s | x), as functions of z_s
    variance = 1 / (1 / sigma_s**2 + scale**2 / fresh)
    mean = variance * (alpha_s * x / sigma_s**2 + scale * z_t / fresh)
    given_mean, given_std = reverse(z_t, x, logsnr_t, logsnr_s)
    torch.testing.assert_close(given_mean, mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(given_std, variance.sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("logsnr_t, logsnr_s", STEPS)
def test_gamma_one_is_the_variance_of_the_forward_step(logsnr_t: float, logsnr_s: float):
    logsnr_t, logsnr_s = level(logsnr_t), level(logsnr_s)
    _, std = reverse(videos(), videos(), logsnr_t, logsnr_s, gamma=1.0)
    torch.testing.assert_close(std**2, fresh_variance(logsnr_t, logsnr_s), rtol=1e-6, atol=0)


def test_two_forward_steps_make_one_only_with_the_fresh_variance_and_not_with_sigma_squared():
    x, logsnr_t, logsnr_s = videos(), level(-1.0), level(1.0)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
    carried = (alpha_t / alpha_s * sigma_s) ** 2  # of the noise at s, seen through q(z_t | z_s)
    _, std = reverse(x, x, logsnr_t, logsnr_s, gamma=1.0)
    torch.testing.assert_close(carried + std**2, sigma_t**2)
    torch.testing.assert_close(alpha_t / alpha_s * diffuse(x, logsnr_s, 0 * x), diffuse(x, logsnr_t, 0 * x))
    assert carried + sigma_t**2 > 1.05 * sigma_t**2


@pytest.mark.parametrize("logsnr_t, logsnr_s", STEPS)
def test_a_reverse_step_with_the_true_video_lands_on_the_next_marginal(logsnr_t: float, logsnr_s: float):
    x, zero, logsnr_t, logsnr_s = videos(), torch.zeros_like(videos()), level(logsnr_t), level(logsnr_s)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = signal_and_noise(logsnr_t), signal_and_noise(logsnr_s)
    mean, std = reverse(alpha_t * x, x, logsnr_t, logsnr_s)
    per_noise, _ = reverse(sigma_t * torch.ones_like(x), zero, logsnr_t, logsnr_s)
    torch.testing.assert_close(mean, alpha_s * x)
    torch.testing.assert_close(per_noise**2 + std**2, (sigma_s**2).expand_as(x))


def test_gamma_is_an_exponent_and_not_a_factor():
    small, third, half, large = (
        reverse(videos(), videos(), level(-2.0), level(1.0), gamma)[1] for gamma in (0.0, 0.3, 0.5, 1.0))
    torch.testing.assert_close(half, (small * large).sqrt())
    torch.testing.assert_close(third.log(), 0.7 * small.log() + 0.3 * large.log())
    assert (half**2 - (small**2 + large**2) / 2).abs() > 0.05


def test_close_levels_keep_their_variance_in_float32():
    logsnr_t, logsnr_s = torch.tensor(0.0), torch.tensor(1e-6)  # 1 - e^(-1e-6) keeps one digit in float32
    for gamma in (0.0, 1.0):
        mean, std = reverse(videos().float(), videos(seed=1).float(), logsnr_t, logsnr_s, gamma)
        assert float(std) == pytest.approx(math.sqrt(1e-6 * 0.5), rel=1e-5)
        assert mean.dtype == torch.float32


# The loss

@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_model_that_knows_the_answer_has_no_loss(prediction: str):
    x, config = videos(8), DiffusionConfig(prediction, logsnr_min=-6, logsnr_max=6)
    per_clip = loss(exact_output(prediction, x), x, config, generator=seeded(9))
    assert per_clip.shape == (8,) and (per_clip < 1e-9).all()
    other = PREDICTIONS[prediction == "eps"]
    assert (loss(exact_output(other, x), x, config, generator=seeded(9)) > 1e-3).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_model_that_always_says_zero_has_loss_one_on_videos_of_unit_size(prediction: str):
    x = videos(4000).sign()
    per_clip = loss(lambda z, *_: torch.zeros_like(z), x, DiffusionConfig(prediction), generator=seeded(9))
    assert per_clip.mean() == pytest.approx(1, abs=5 * (2 / x.numel()) ** 0.5)


@pytest.mark.parametrize("prediction, weight", [("eps", lambda l: l.exp()), ("v", lambda l: 1 + l.exp())])
def test_the_loss_weights_the_error_of_x_by_the_snr_for_eps_and_by_one_more_for_v(prediction: str, weight):
    x, output, seen, config = videos(8), videos(8, seed=5), {}, DiffusionConfig(prediction, logsnr_min=-6, logsnr_max=6)

    def model(z: Tensor, logsnr: Tensor, cond: Tensor | None = None, num_images: int = 0) -> Tensor:
        seen.update(z=z, logsnr=logsnr.double())
        return output

    per_clip = loss(model, x, config, generator=seeded(9))
    x_hat = denoiser(model, config)(seen["z"], seen["logsnr"])
    expected = weight(seen["logsnr"].flatten()) * (x_hat - x).square().flatten(1).mean(1)
    torch.testing.assert_close(per_clip, expected, rtol=1e-5, atol=0)


def test_the_loss_repeats_with_its_generator_and_leaves_the_global_one_alone():
    x, state, model = videos(4), torch.get_rng_state(), lambda z, *_: z
    first, again, other = (loss(model, x, DiffusionConfig(), generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_frame_noise_gives_the_frames_of_a_share_of_clips_uniform_times_of_their_own():
    t = times(4000, 5, DiffusionConfig(frame_noise=0.3), seeded(0))
    own = (t != t[:, :1]).any(1)
    assert t.shape == (4000, 5) and abs(own.float().mean() - 0.3) < 0.03
    for part in (t[own], t[~own][:, :1]):
        assert torch.allclose(part.flatten().quantile(torch.tensor([0.1, 0.5, 0.9])),
                              torch.tensor([0.1, 0.5, 0.9]), atol=0.03)
    assert (torch.corrcoef(t[own].T) - torch.eye(5)).abs().max() < 0.1  # independent of each other
    assert times(8, 5, DiffusionConfig(), seeded(0)).shape == (8, 1)


def test_the_times_of_a_batch_are_uniform_one_in_each_stratum():
    found, b, generator = [], math.atan(math.exp(-10)), seeded(0)

    def model(z: Tensor, logsnr: Tensor, cond: Tensor | None, num_images: int) -> Tensor:
        assert logsnr.shape == (8, 1, 1, 1, 1)
        angle = torch.atan(torch.exp(-logsnr.double().flatten() / 2))
        found.append((angle - b) / (math.atan(math.exp(10)) - b))
        return z

    for _ in range(200):
        loss(model, videos(8), DiffusionConfig(), generator=generator)
    strata = torch.stack(found) * 8
    assert torch.equal(strata.floor().sort(1).values, torch.arange(8, dtype=FLOAT).expand(200, 8))
    inside = strata.frac().flatten().sort().values
    assert (inside - torch.linspace(0, 1, 1600, dtype=FLOAT)).abs().max() < 0.05  # Kolmogorov, 1600 draws


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_loss_tells_the_model_the_level_it_has_diffused_to(shift: float):
    x, seen, config = torch.zeros(2000, 1, 4, 2, 2, dtype=FLOAT), {}, DiffusionConfig(noise_shift=shift)
    loss(lambda z, logsnr, *_: seen.update(z=z, logsnr=logsnr) or z, x, config, generator=seeded(9))
    _, sigma = signal_and_noise(seen["logsnr"].double())
    assert (seen["z"] / sigma).var() == pytest.approx(1, abs=0.04)
    assert seen["logsnr"].median() == pytest.approx(-2 * math.log(shift), abs=0.02)


def test_condition_and_number_of_images_reach_the_model_in_third_and_fourth_place():
    cond, calls = torch.ones(2, 3, 5), []
    model = lambda *arguments: calls.append(arguments) or arguments[0]
    loss(model, videos(2), DiffusionConfig(), cond, num_images=1)
    loss(model, videos(2), DiffusionConfig())
    assert calls[0][2] is cond and calls[0][3] == 1 and calls[1][2:] == (None, 0)


# The denoiser

@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("logsnr", LEVELS)
def test_the_denoiser_undoes_the_prediction(prediction: str, logsnr: float):
    x, logsnr = videos(seed=0), level(logsnr)
    z = diffuse(x, logsnr, videos(seed=1))
    x_hat = denoiser(exact_output(prediction, x), DiffusionConfig(prediction))(z, logsnr)
    torch.testing.assert_close(x_hat, x, rtol=1e-6, atol=1e-8)


def test_the_denoiser_hands_its_condition_to_the_model():
    calls, cond = [], torch.ones(2, 3, 5)
    model = lambda *arguments: calls.append(arguments) or arguments[0]
    for bound in (cond, None):
        denoiser(model, DiffusionConfig(), bound)(videos(), level(0.0))
    assert calls[0][2] is cond and calls[1][2] is None

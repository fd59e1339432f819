"""Samplers against Gaussian videos: with the exact denoiser, what they draw is known without drawing."""
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffusion import cosine_logsnr, noise_like
from guidance import classifier_free, reconstruction_guided, replacement
from sampling import ddim, dpm_solver, langevin, sample
from test_gaussian import FLOAT, Gaussian, autoregressive, law, level, signal_and_noise, white

DATA = autoregressive()
ONE_VIDEO = Gaussian(DATA.mean, torch.zeros_like(DATA.cov), DATA.shape)
ANCESTRAL = [(gamma, delta) for gamma in (0.0, 0.1, 0.3, 1.0) for delta in (0.0, 0.1)]
DETERMINISTIC = [ddim, dpm_solver]


def levels(steps: int, start: float = 1.0, end: float = 0.0) -> Tensor:
    """Log-SNRs (steps + 1,) at uniform times."""
    return cosine_logsnr(torch.linspace(start, end, steps + 1, dtype=FLOAT))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ancestral(gamma: float, delta: float) -> Callable:
    return lambda denoise, z, logsnrs, **more: sample(denoise, z, logsnrs, gamma=gamma, delta=delta, **more)


def drawn(sampler: Callable, steps: int, data: Gaussian = DATA) -> Gaussian:
    """The exact distribution of what a sampler draws."""
    return law(lambda z: sampler(data.denoise, z, levels(steps)), white())


def drawn_at(sampler: Callable, data: Gaussian, logsnrs: Tensor, index: int) -> Gaussian:
    """The exact distribution of a sampler's z at logsnrs[index], started from the exact marginal."""
    def run(z: Tensor) -> Tensor:
        trace = []
        sampler(data.denoise, z, logsnrs, constrain=lambda z, logsnr: trace.append(z) or z)
        return trace[index]
    return law(run, data.marginal(logsnrs[0]))


def spread_error(drawn: Gaussian, data: Gaussian = DATA) -> float:
    return float((drawn.cov - data.cov).abs().max())


def recorded(calls: list) -> Callable:
    """The exact denoiser, noting the level of every call."""
    return lambda z, logsnr: calls.append(float(logsnr)) or DATA.denoise(z, logsnr)


# What is drawn

@pytest.mark.parametrize("gamma, delta", ANCESTRAL)
def test_ancestral_sampling_draws_the_data(gamma: float, delta: float):
    coarse, fine, finer = (drawn(ancestral(gamma, delta), steps) for steps in (32, 64, 128))
    torch.testing.assert_close(finer.mean, DATA.mean, atol=1e-6, rtol=0)
    assert spread_error(finer) < 0.022 < spread_error(white())
    assert spread_error(coarse) > 1.7 * spread_error(fine) > 1.7**2 * spread_error(finer)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.3, 1.0])
def test_the_limit_of_many_ancestral_steps_is_the_data_and_nothing_near_it(gamma: float):
    fine, finer = (drawn(ancestral(gamma, 0.0), steps) for steps in (128, 256))
    limit = 2 * finer.cov - fine.cov  # Richardson: the error is of first order
    torch.testing.assert_close(limit, DATA.cov, atol=1e-3, rtol=0)


@pytest.mark.parametrize("sampler, order, error", [(ddim, 1, 0.013), (dpm_solver, 2, 8e-4)])
def test_the_deterministic_samplers_draw_the_data(sampler: Callable, order: int, error: float):
    coarse, fine, finer = (drawn(sampler, steps) for steps in (32, 64, 128))
    torch.testing.assert_close(finer.mean, DATA.mean, atol=1e-4, rtol=0)  # z starts alpha(1) off
    assert spread_error(finer) < error
    assert spread_error(coarse) > 1.7**order * spread_error(fine) > 1.7 ** (2 * order) * spread_error(finer)


@pytest.mark.parametrize("sampler, ratio", [(ddim, 2), (dpm_solver, 4)])
@pytest.mark.parametrize("uneven", [0.0, 0.8])
def test_ddim_is_of_first_and_dpm_solver_of_second_order(sampler: Callable, ratio: float, uneven: float):
    def error(steps: int) -> float:
        t = torch.linspace(0.8, 0.2, steps + 1, dtype=FLOAT)
        t[1:-1:2] += uneven * 0.6 / steps  # steps alternately short and long
        logsnrs = torch.cat([cosine_logsnr(t), level(20.0)[None]])
        return spread_error(drawn_at(sampler, DATA, logsnrs, -2), DATA.marginal(logsnrs[-2]))
    errors = [error(steps) for steps in (32, 64, 128)]
    assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(ratio, rel=0.1)


@pytest.mark.parametrize("sampler", [ancestral(0.0, 0.0), ddim, dpm_solver])
@pytest.mark.parametrize("index", [1, 3, -2])
def test_with_one_video_as_data_every_level_is_exact_however_few_the_steps(sampler: Callable, index: int):
    logsnrs = levels(6, end=0.1)
    exact, given = ONE_VIDEO.marginal(logsnrs[index]), drawn_at(sampler, ONE_VIDEO, logsnrs, index)
    torch.testing.assert_close((given.mean, given.cov), (exact.mean, exact.cov))
    assert spread_error(drawn(sampler, 6, ONE_VIDEO), ONE_VIDEO) < 1e-12


@pytest.mark.parametrize("index", [1, 3, -2])
def test_with_white_data_gamma_one_is_exact_however_few_the_steps(index: int):
    given = drawn_at(ancestral(1.0, 0.0), white(), levels(6), index)
    torch.testing.assert_close((given.mean, given.cov), (white().mean, white().cov))
    assert spread_error(drawn_at(ancestral(0.0, 0.0), white(), levels(6), index), white()) > 0.01


@pytest.mark.parametrize("delta", [0.0, 0.1])
def test_samples_drawn_with_a_generator_follow_the_exact_law(delta: float):
    number, exact = 20_000, drawn(ancestral(0.3, delta), 8)
    x = sample(DATA.denoise, white().samples(number), levels(8), 0.3, delta, generator=seeded(1)).flatten(1)
    assert (x.mean(0) - exact.mean).abs().max() < 5 * (exact.cov.max() / number) ** 0.5
    assert (x.T.cov() - exact.cov).abs().max() < 5 * exact.cov.max() * (2 / number) ** 0.5


# The corrector

@pytest.mark.parametrize("logsnr", [-4.0, 0.0, 3.0])
@pytest.mark.parametrize("delta", [0.1, 0.4])
def test_a_corrector_step_on_the_exact_marginal_errs_by_delta_squared_alone(logsnr: float, delta: float):
    marginal, (_, sigma) = DATA.marginal(level(logsnr)), signal_and_noise(level(logsnr))
    after = law(lambda z: langevin(DATA.denoise, z, level(logsnr), delta), marginal)
    excess = delta**2 / 4 * sigma**4 * torch.linalg.inv(marginal.cov)  # Eq. 5 with eps = -sigma score
    torch.testing.assert_close((after.mean, after.cov), (marginal.mean, marginal.cov + excess))


def test_a_corrector_step_moves_a_wrong_mean_by_half_delta_sigma_squared_times_the_score():
    logsnr, delta = level(1.0), 0.1
    marginal, (_, sigma) = DATA.marginal(logsnr), signal_and_noise(logsnr)
    wrong = marginal.mean + torch.linspace(0, 1, 16, dtype=FLOAT)
    score = torch.func.grad(marginal.log_prob)(wrong)
    start = Gaussian(wrong, marginal.cov, DATA.shape)
    after = law(lambda z: langevin(DATA.denoise, z, logsnr, delta), start)
    torch.testing.assert_close(after.mean, wrong + delta / 2 * sigma**2 * score)


def test_many_corrector_steps_forget_a_wrong_start():
    logsnr, delta, identity = level(0.0), 0.2, torch.eye(16, dtype=FLOAT)
    marginal, (_, sigma) = DATA.marginal(logsnr), signal_and_noise(logsnr)
    pull = delta / 2 * sigma**2 * torch.linalg.inv(marginal.cov)
    settled = marginal.cov @ torch.linalg.inv(identity - pull / 2)
    now = Gaussian(torch.ones_like(DATA.mean), identity, DATA.shape)
    for _ in range(800):
        now = law(lambda z: langevin(DATA.denoise, z, logsnr, delta), now)
    torch.testing.assert_close((now.mean, now.cov), (marginal.mean, settled), rtol=0, atol=1e-5)
    assert spread_error(now, marginal) < 0.04  # it settles delta sigma^2 / 4 away; it started 0.25 away


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_the_corrector_brings_ancestral_sampling_nearer_to_the_data(gamma: float):
    corrected, plain = (drawn(ancestral(gamma, delta), 64) for delta in (0.1, 0.0))
    assert spread_error(corrected) < 0.8 * spread_error(plain)


# The walk along the levels

@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("sampler", [ancestral(0.3, 0.0), *DETERMINISTIC])
def test_a_sampler_calls_the_denoiser_once_a_step_and_constrains_every_level(sampler: Callable, steps: int):
    calls, constrained, logsnrs = [], [], levels(steps)
    constrain = lambda z, logsnr: constrained.append(float(logsnr)) or z
    sampler(recorded(calls), white().samples(1), logsnrs, constrain=constrain)
    assert calls == logsnrs[:-1].tolist() and constrained == logsnrs.tolist()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_corrector_adds_a_call_at_every_level_but_the_first_and_last(steps: int):
    calls, constrained, logsnrs = [], [], levels(steps)
    sampler = ancestral(0.3, 0.1)
    constrain = lambda z, logsnr: constrained.append(float(logsnr)) or z
    sampler(recorded(calls), white().samples(1), logsnrs, constrain=constrain)
    first, *between, last = logsnrs.tolist()
    assert calls == [first] + [logsnr for logsnr in between for _ in range(2)]
    assert len(calls) == 2 * steps - 1 and constrained == calls + [last]


@pytest.mark.parametrize("sampler", [ancestral(0.3, 0.0), ancestral(0.3, 0.1), *DETERMINISTIC])
def test_the_last_step_returns_x_hat_without_noise(sampler: Callable):
    returned = []
    denoise = lambda z, logsnr: returned.append(DATA.denoise(z, logsnr)) or returned[-1]
    assert torch.equal(sampler(denoise, white().samples(2), levels(4)), returned[-1])


@pytest.mark.parametrize("sampler", [ancestral(0.3, 0.0), ancestral(0.3, 0.1), *DETERMINISTIC])
def test_what_a_constraint_imposes_is_what_the_denoiser_sees_and_the_caller_gets(sampler: Callable):
    known = torch.tensor([True, False, False, True]).view(1, 1, 4, 1, 1)
    seen = []
    denoise = lambda z, logsnr: seen.append(z) or DATA.denoise(z, logsnr)
    constrain = lambda z, logsnr: torch.where(known, logsnr, z)
    x = sampler(denoise, white().samples(2), levels(4), constrain=constrain)
    assert all((z[:, :, [0, 3]] == logsnr).all() for z, logsnr in zip(seen[-1:] + [x], levels(4)[-2:]))
    assert (seen[0][:, :, [0, 3]] == levels(4)[0]).all() and (x[:, :, [1, 2]] != 20).all()


@pytest.mark.parametrize("delta", [0.0, 0.1])
def test_the_same_seed_draws_the_same_video(delta: float):
    z, state = white().samples(2), torch.get_rng_state()
    first, again, other = (
        sample(DATA.denoise, z, levels(5), 0.3, delta, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.isclose(first, other).any()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sampler", [ancestral(0.3, 0.0), ancestral(0.3, 0.1), *DETERMINISTIC])
def test_a_clip_of_a_seed_is_the_same_whatever_the_number_of_clips(sampler: Callable):
    x_a, known = DATA.samples(4), torch.arange(4).view(1, 1, 4, 1, 1) < 1

    def clips(number: int) -> Tensor:
        generators = [seeded(seed) for seed in range(number)]
        noise = noise_like(x_a[:number], generators)
        more = {} if sampler in DETERMINISTIC else {"generator": generators}
        constrain = replacement(x_a[:number], known, generators)
        return sampler(DATA.denoise, noise, levels(5), constrain=constrain, **more)
    four = clips(4)
    for number in (1, 2):
        torch.testing.assert_close(clips(number), four[:number], rtol=1e-9, atol=1e-9)
    assert not torch.isclose(four[0], four[1]).any()


# Gradients

@pytest.mark.parametrize("sampler", [ancestral(0.3, 0.1), *DETERMINISTIC])
def test_a_sampler_records_no_graph(sampler: Callable):
    factor, modes = torch.ones((), dtype=FLOAT, requires_grad=True), []
    denoise = lambda z, logsnr: modes.append(torch.is_grad_enabled()) or factor * DATA.denoise(z, logsnr)
    assert not sampler(denoise, white().samples(1), levels(3)).requires_grad and not any(modes)


@pytest.mark.parametrize("sampler", [ancestral(0.3, 0.1), *DETERMINISTIC])
def test_a_sampler_lets_guidance_differentiate_which_inference_mode_would_forbid(sampler: Callable):
    known = torch.arange(4).view(1, 1, 4, 1, 1) < 1
    x_a, start = DATA.samples(1), white().samples(3)
    both = classifier_free(DATA.denoise, ONE_VIDEO.denoise, 0.5)
    guided = reconstruction_guided(both, x_a * known, lambda x: x * known, 1.0)
    x, unguided = (sampler(denoise, start, levels(4), constrain=replacement(x_a, known, seeded(0)))
                   for denoise in (guided, both))
    assert x.isfinite().all() and not torch.equal(x, unguided) and not x.is_inference()
    torch.testing.assert_close(x[:, :, :1], x_a[:, :, :1].expand(3, -1, -1, -1, -1), atol=3e-4, rtol=0)

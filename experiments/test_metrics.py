"""Measures on clips whose value is known: real, shuffled, frozen, swapped, jumping and shifted ones."""
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data import DataConfig, moving_mnist
from diffusion import alpha_sigma, noise_like
from experiments.features import Features, load_features, observe, walls
from experiments.metrics import (exchange, frechet, identity_kept, identity_true, inception_score, measure,
                                 psnr, same_paths, seam, squared_error, ssim, trajectory_residual)

HERE = Path(__file__).parents[1]
TRAINED = HERE / "pretrained" / "features_32.pt"
LOW, HIGH = walls(32)
N = 64  # clips in a set


@functools.cache
def clips(seed: int, n: int = N, digits: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Clips of the test split at 32 pixels, labels, and positions (B, F, digits, 2) of the corners."""
    x, _, truth = moving_mnist(DataConfig(split="test", size=32, digits=digits), n, seed)
    return x, truth["labels"], truth["positions"].float().transpose(1, 2)


@functools.cache
def trained() -> Features:
    return load_features(TRAINED)


@functools.cache
def real() -> tuple[Tensor, Tensor]:
    """Features of other real frames and clips."""
    seen = observe(clips(1)[0], trained(), 1)
    return seen.frames, seen.clips


@functools.cache
def floor() -> dict[str, float]:
    return measure(clips(0)[0], trained(), 1, real())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def path(start: tuple, velocity: tuple, frames: int = 16) -> Tensor:
    """One digit's bouncing path (1, F, 1, 2) between LOW and HIGH, frame by frame as a ball would fly."""
    (at, v), found = (list(start), list(velocity)), []
    for _ in range(frames):
        found.append(list(at))
        for axis in (0, 1):
            at[axis] += v[axis]
            if not LOW <= at[axis] <= HIGH:
                at[axis], v[axis] = 2 * (LOW if at[axis] < LOW else HIGH) - at[axis], -v[axis]
    return torch.tensor(found)[None, :, None]


def residual(positions: Tensor, max_speed: float = 3.6) -> float:
    return trajectory_residual(positions, LOW, HIGH, max_speed).item()


# What is measured of a set of clips

def test_real_clips_are_near_other_real_ones_and_keep_their_digit_on_a_straight_path():
    assert floor()["identity_kept"] > 0.97 and 0.3 < floor()["trajectory_residual"] < 0.7
    assert 1.6 < floor()["step"] < 2.0 and floor()["inception_score"] > 7


def test_shuffled_frames_are_far_as_clips_and_the_same_as_frames():
    x = clips(0)[0][:, :, torch.randperm(16, generator=seeded(0))]
    found = measure(x, trained(), 1, real())
    assert found["frechet_clip"] > 1.5 * floor()["frechet_clip"]
    assert found["frechet_frame"] == pytest.approx(floor()["frechet_frame"], rel=1e-3)
    assert found["trajectory_residual"] > 5 * floor()["trajectory_residual"] and found["step"] > 4
    assert found["identity_kept"] == pytest.approx(floor()["identity_kept"])


def test_frozen_clips_do_not_step_and_are_far_as_clips():
    x = clips(0)[0][:, :, :1].expand(-1, -1, 16, -1, -1)
    found = measure(x, trained(), 1, real())
    assert found["frechet_clip"] > 2 * floor()["frechet_clip"]
    assert found["identity_kept"] == 1 and found["step"] < 1e-3 and found["trajectory_residual"] < 0.02


def test_noise_is_far_in_every_way():
    found = measure(torch.rand(N, 1, 16, 32, 32, generator=seeded(0)) * 2 - 1, trained(), 1, real())
    assert found["frechet_clip"] > 10 * floor()["frechet_clip"]
    assert found["frechet_frame"] > 10 * floor()["frechet_frame"]


def test_digits_swapped_halfway_keep_their_identity_in_half_of_the_frames():
    x, labels, _ = clips(5)
    other = (labels != labels.roll(1, 0))[:, 0]
    swapped = torch.cat([x[:, :, :8], x.roll(1, 0)[:, :, 8:]], 2)[other]
    classes = observe(swapped, trained(), 1).classes
    assert identity_kept(classes) == pytest.approx(0.5, abs=0.03)
    assert identity_true(classes, labels[other]) == pytest.approx(0.5, abs=0.03)
    assert identity_true(observe(x, trained(), 1).classes, labels) > 0.95


def test_identity_is_a_set_without_order_but_counts_equal_digits():
    classes = torch.tensor([[[1, 2], [2, 1], [1, 1], [2, 2]], [[5, 5], [5, 5], [5, 5], [5, 6]]])
    assert identity_kept(classes) == (2 / 4 + 3 / 4) / 2
    assert identity_true(classes, torch.tensor([[2, 1], [6, 5]])) == (2 / 4 + 1 / 4) / 2
    assert identity_kept(torch.tensor([[[1, 1, 2], [1, 2, 2]]])) == 1 / 2


def test_the_score_is_ten_for_ten_certain_classes_and_one_for_a_constant():
    assert inception_score(torch.eye(10).repeat(5, 1)) == pytest.approx(10)
    assert inception_score(torch.tensor([[0.7, 0.2, 0.1]]).repeat(9, 1)) == pytest.approx(1)
    assert inception_score(torch.eye(10)[:4]) == pytest.approx(4)


def exactly(mean: Tensor, root: Tensor, n: int = 200) -> Tensor:
    """n samples whose mean and covariance are exactly mean and root root^T."""
    z = torch.randn(n, len(mean), generator=seeded(len(mean)), dtype=torch.float64)
    white = torch.linalg.solve(torch.linalg.cholesky(torch.cov(z.T)), (z - z.mean(0)).T)
    return (root @ white).T + mean


def test_the_distance_of_diagonal_gaussians_is_that_of_means_and_deviations():
    zero, mean = torch.zeros(3).double(), torch.tensor([1.0, -2.0, 0.5]).double()
    s, t = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 0.5, 0.0]).double()
    value = frechet(exactly(zero, s.diag()), exactly(mean, t.diag()))
    assert value == pytest.approx((mean.square().sum() + (s - t).square().sum()).item())


@pytest.mark.parametrize("angle", [0.3, math.pi / 4, math.pi / 2])
def test_the_distance_of_rotated_gaussians_is_the_closed_form_in_two_dimensions(angle: float):
    c, s = math.cos(angle), math.sin(angle)
    turned = torch.tensor([[c, -s], [s, c]]).double() @ torch.tensor([3.0, 1.0]).double().diag()
    value = frechet(exactly(torch.zeros(2).double(), torch.tensor([1.0, 2.0]).double().diag()),
                    exactly(torch.zeros(2).double(), turned))
    product = torch.tensor([1.0, 4.0]).double().diag() @ turned @ turned.T
    # of a 2 x 2 matrix M, tr(M^1/2) is the root of tr M + 2 (det M)^1/2
    cross = (product.trace() + 2 * product.det().sqrt()).sqrt()
    assert value == pytest.approx((5 + 10 - 2 * cross).item())


def test_the_distance_of_features_to_themselves_is_zero_even_with_fewer_samples_than_features():
    few = torch.randn(10, 64, generator=seeded(0))
    assert abs(frechet(few, few)) < 1e-5
    assert frechet(few, few + 1) == pytest.approx(64, rel=1e-4)


# Paths

@pytest.mark.parametrize("start, velocity", [((8.0, 20.0), (0.0, 0.0)), ((10.3, 12.1), (1.7, -0.6)),
                                             ((24.2, 7.1), (-0.4, 1.75)), ((15.0, 15.0), (-3.1, 2.9))])
def test_a_path_that_bounces_has_no_residual(start: tuple, velocity: tuple):
    assert residual(path(start, velocity)) < 0.02


def test_a_longer_path_that_bounces_has_no_residual():
    assert residual(path((10.3, 12.1), (1.7, -0.6), 64)) < 0.02


def test_a_path_through_the_wall_is_off_by_twice_what_lies_beyond():
    through = path((16.0, 22.0), (0.0, 1.5))
    through[:, :, 0, 1] = 22 + 1.5 * torch.arange(16)
    beyond = (through[0, :, 0, 1] - HIGH).clamp(min=0)
    assert residual(through) > 0.5 * beyond.square().mean().sqrt()  # not even the best path reaches outside
    assert residual(through) <= (2 * beyond).square().mean().sqrt()  # the reflected path is a candidate


def test_a_stop_halfway_has_the_residual_of_the_best_straight_line():
    t = torch.arange(16.0)
    stopping = path((16.0, 10.0), (0.0, 0.0))
    stopping[0, :, 0, 1] = 10 + t.clamp(max=7.5)
    design = torch.stack([torch.ones(16), t], 1)
    y = stopping[0, :, 0, 1]
    line = design @ torch.linalg.lstsq(design, y[:, None]).solution
    assert residual(stopping) == pytest.approx((y - line[:, 0]).square().mean().sqrt().item(), abs=0.01)


def test_a_residual_is_root_mean_square_over_both_axes():
    crooked = path((16.0, 16.0), (0.0, 0.0))
    crooked[0, :, 0, 0] += 0.3 * torch.tensor([1.0, -1.0] * 8)
    crooked[0, :, 0, 1] += 0.4 * torch.tensor([1.0, -1.0] * 8)
    assert residual(crooked) == pytest.approx(0.5, abs=0.01)


def test_speed_is_bounded():
    assert residual(path((10.0, 10.0), (0.0, 3.0)), max_speed=3.2) < 0.02
    assert residual(path((10.0, 10.0), (0.0, 3.0)), max_speed=1.0) > 1


def test_every_digit_of_every_clip_has_its_own_residual():
    good, bad = path((10.0, 10.0), (1.0, 0.5)), path((20.0, 20.0), (-1.0, 0.5))
    bad[0, 8:] = path((8.0, 8.0), (0.0, 1.0))[0, 8:]
    both = torch.cat([torch.cat([good, bad], 2), torch.cat([good, good], 2)])
    found = trajectory_residual(both, LOW, HIGH, 3.6)
    assert found.shape == (2, 2) and found[0, 1] > 1 and found.flatten()[[0, 2, 3]].max() < 0.02


# Seams

def test_a_jump_and_a_change_of_class_at_a_seam_are_found_there_and_nowhere_else():
    at, classes = path((16.0, 10.0), (0.0, 0.5)), torch.full((1, 16, 1), 3)
    at[:, 8:, 0, 0] += 4  # 4 down and the usual 0.5 to the right
    classes[:, 8:] = 5
    found = seam(at, classes, [8])
    expected = {"step_seam": math.hypot(4, 0.5), "step_inside": 0.5, "identity_seam": 1, "identity_inside": 0}
    assert found == pytest.approx(expected, abs=1e-5)
    wrong = seam(at, classes, [4])
    assert wrong["step_seam"] == pytest.approx(0.5) and wrong["identity_inside"] == pytest.approx(1 / 10)


# Whether other frames are used

@functools.cache
def exchanged() -> tuple[Tensor, Tensor]:
    return same_paths(DataConfig(split="test", size=32, digits=1), 64, 3)


def one_frame(z: Tensor, logsnr: Tensor) -> Tensor:
    """The best linear guess of a pixel of variance 1 from itself alone."""
    return alpha_sigma(logsnr)[0] * z


def all_frames(z: Tensor, logsnr: Tensor) -> Tensor:
    """The mean of all frames, as if a clip stood still."""
    return (z / alpha_sigma(logsnr)[0]).mean(2, keepdim=True).expand_as(z)


@pytest.mark.parametrize("logsnr", [-5.0, -2.0, 0.0])
def test_a_denoiser_that_looks_at_each_frame_alone_exchanges_nothing(logsnr: float):
    assert exchange(one_frame, *exchanged(), torch.tensor(logsnr), seeded(0)) == 1


@pytest.mark.parametrize("logsnr", [-4.0, -1.0])
def test_a_denoiser_that_averages_all_frames_exchanges_what_a_calculation_by_hand_says(logsnr: float):
    x, difference = torch.full((64, 1, 16, 16, 16), 0.3), 0.4
    found = exchange(all_frames, x, x + difference, torch.tensor(logsnr), seeded(0))
    # twelve frames of sixteen are off by the difference, and the noise's variance e^-logsnr falls to 1/16
    expected = 1 + (difference * 12 / 16) ** 2 * 16 * math.exp(logsnr)
    assert found == pytest.approx(expected, rel=0.02)
    noise = (noise_like(x, seeded(0)) * math.exp(-logsnr / 2)).mean(2)  # this one, not its variance
    assert found == pytest.approx(((0.75 * difference + noise).square().sum() / noise.square().sum()).item())


def test_exchanged_frames_show_another_digit_on_the_same_path():
    data = DataConfig(split="test", size=32, digits=1)
    (x, other), (every, _, truth) = exchanged(), moving_mnist(data, 128, 3)
    assert x.shape == other.shape == (64, 1, 16, 32, 32)
    which = [next(i for i in range(128) if every[i].equal(clip)) for clip in x]
    for i, clip in zip(which, other):
        assert truth["labels"][i] != truth["labels"][i - 1]
        patches = [clip[0, f, y:y + 14, x:x + 14] for f, (y, x) in
                   enumerate(truth["positions"][i, 0].long().tolist())]
        assert all(patch.equal(patches[0]) for patch in patches)
        assert torch.stack(patches).add(1).sum() == pytest.approx(clip.add(1).sum().item(), rel=1e-4)
        top, left = truth["positions"][i - 1, 0, 0].long().tolist()
        assert patches[0].equal(every[i - 1, 0, 0, top:top + 14, left:left + 14])


# Predicted frames

def pair() -> tuple[Tensor, Tensor]:
    x = clips(6)[0][:2, :, :3]
    return x, x.roll(1, -1)


def test_shifted_frames_have_the_error_that_numpy_finds():
    a, b = (x.double().numpy() / 2 + 0.5 for x in pair())
    by_frame = [((a[i, :, f] - b[i, :, f]) ** 2) for i in range(2) for f in range(3)]
    assert squared_error(*pair()).mean() == pytest.approx(np.mean([e.sum() for e in by_frame]), rel=1e-5)
    assert psnr(*pair()) == pytest.approx(np.mean([10 * np.log10(1 / e.mean()) for e in by_frame]), rel=1e-5)


def test_ssim_is_that_of_all_windows_as_a_loop_finds_it():
    x, y = (clip[:1, :, :2, :9, :10] for clip in pair())
    found = []
    for a, b in zip(x[0, 0].double() / 2 + 0.5, y[0, 0].double() / 2 + 0.5):
        for top in range(3):
            for left in range(4):
                p, q = (side[top:top + 7, left:left + 7].flatten().numpy() for side in (a, b))
                (v, both), (_, w) = np.cov(p, q)
                found.append((2 * p.mean() * q.mean() + 1e-4) * (2 * both + 9e-4)
                             / ((p.mean()**2 + q.mean()**2 + 1e-4) * (v + w + 9e-4)))
    assert ssim(x, y) == pytest.approx(np.mean(found), rel=1e-6) and ssim(x, x) == pytest.approx(1)


def test_an_error_of_one_tenth_everywhere_is_twenty_decibels():
    x = torch.zeros(2, 1, 3, 16, 16)
    assert psnr(x, x + 0.2) == pytest.approx(20, rel=1e-4) and psnr(x, x) == pytest.approx(100)
    assert squared_error(x, x + 0.2).mean() == pytest.approx(2.56, rel=1e-4)

"""The networks that measure: what they are trained towards, what they see, which digit is which later."""
import hashlib
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import checkpoint
from experiments import features
from experiments.features import (FeatureConfig, FrameNet, VideoNet, centres, link, load_features, observe, splat,
                      strongest)
from experiments.test_metrics import HIGH, LOW, TRAINED, N, clips, path, seeded, trained


# The networks, and what they are trained towards

def test_a_digit_between_four_cells_is_divided_among_them_by_distance():
    # pixel 7.5 is cell 3.25 and pixel 10 is cell 4.5
    target = splat(torch.tensor([[3]]), torch.tensor([[[7.5, 10.0]]]), 32)
    expected = torch.zeros(1, 10, 16, 16)
    expected[0, 3, 3:5, 4:6] = torch.tensor([[0.375, 0.375], [0.125, 0.125]])
    torch.testing.assert_close(target, expected)


def test_two_digits_share_the_target_equally_even_in_one_class():
    target = splat(torch.tensor([[3, 5], [7, 7]]), torch.tensor([[[9.0, 9.0], [21.0, 9.0]]] * 2), 32)
    torch.testing.assert_close(target.sum((2, 3)).sum(1), torch.ones(2))
    assert target[0, 3, 4, 4] == target[0, 5, 10, 4] == target[1, 7, 4, 4] == target[1, 7, 10, 4] == 0.5


def test_digits_are_read_back_from_their_target_strongest_first():
    labels, at = torch.tensor([[4, 9], [2, 2]]), torch.tensor([[[9.3, 14], [20, 11.7]], [[8, 8], [23, 23.5]]])
    faint, strong = (splat(labels[:, d : d + 1], at[:, d : d + 1], 32) for d in (0, 1))
    classes, found = strongest(0.1 * faint + 0.9 * strong, 2)
    assert torch.equal(classes, labels.flip(1))
    torch.testing.assert_close(found, at.flip(1))


def test_a_second_digit_is_never_the_first_one_seen_again_as_another_class():
    p = torch.zeros(1, 10, 16, 16)
    p[0, 4, 5, 5], p[0, 9, 5, 6], p[0, 1, 12, 12] = 0.5, 0.4, 0.1  # a 4 that is nearly a 9
    classes, found = strongest(p, 2)
    assert classes.tolist() == [[4, 1]] and found.tolist() == [[[11.0, 11.0], [25.0, 25.0]]]


def test_the_mass_of_a_digit_is_on_average_where_centres_says():
    x, _, corners = clips(0)
    light = x[:, 0] + 1
    y, x = (light.sum(other) @ (torch.arange(32) + 0.5) / light.sum((2, 3)) for other in (3, 2))
    off = (torch.stack([y, x], 2) - centres(corners, 32)[:, :, 0]).mean((0, 1))
    assert off.abs().max() < 0.3, off  # MNIST centres the mass, to a pixel of 28 and so to half of one here


def test_the_walls_are_those_the_generator_bounces_at():
    at = centres(clips(2, 512)[2], 32)
    assert at.min() == LOW + 0.5 and at.max() == HIGH - 0.5  # whole pixels cut from [LOW, HIGH] + 1/2


def test_the_networks_see_grey_and_any_number_of_frames():
    x = clips(0)[0][:2]
    for net, given in ((trained().frame, x[:, :, 0]), (trained().video, x)):
        grey, colour = net(given), net(torch.cat([given + 0.3, given - 0.4, given + 0.1], 1))
        torch.testing.assert_close(grey, colour, atol=1e-4, rtol=1e-4)
    longer = x.repeat(1, 1, 2, 1, 1)
    assert [part.shape for part in trained().video(longer)] == [(2, 10), (2, 10, 2), (2, 64)]
    assert [part.shape for part in trained().frame(x[:, :, 0])] == [(2, 10, 16, 16), (2, 64)]


def test_trained_networks_find_the_class_and_the_place_of_test_digits():
    x, labels, corners = clips(3)
    classes, at = strongest(trained().frame(x.transpose(1, 2).flatten(0, 1))[0].exp(), 1)
    right = (classes.view(N, 16) == labels).float().mean()
    away = (at.view(N, 16, 1, 2) - centres(corners, 32)).norm(dim=-1).mean()
    assert right > 0.96 and away < 0.33


def test_the_velocity_net_knows_where_a_digit_starts_to_go():
    x, labels, corners = clips(3)
    velocity = trained().video(x)[1][torch.arange(N), labels[:, 0]]
    true = (corners[:, 1] - corners[:, 0])[:, 0]
    assert (velocity - true).norm(dim=1).mean() < 0.5 < true.norm(dim=1).mean() / 3


def test_the_velocity_of_two_equal_digits_is_their_mean_and_absent_classes_are_left_out():
    corners = torch.tensor([[[[0.0, 0.0], [1.0, 2.0], [9.0, 9.0]], [[5.0, 5.0], [8.0, 4.0], [9.0, 9.0]]]])
    velocity, present = features._velocities(torch.tensor([[6, 6]]), corners)
    assert present.tolist() == [[k == 6 for k in range(10)]] and velocity[0, 6].tolist() == [2.0, 0.5]


def test_the_program_trains_and_writes_a_file_that_loads(tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "deep" / "f.pt"
    monkeypatch.setattr(sys, "argv", ["features.py", "--size", "16", "--steps", "2", "--out", str(out)])
    features.config.run(features.main)
    assert str(out) in capsys.readouterr().out
    loaded = load_features(out)
    assert loaded.settings["steps"] == 2 and loaded.settings["seed"] == 0
    assert loaded.sha256 == features.checksum(out) and not loaded.frame.training


def test_the_same_seed_trains_the_same_networks():
    cfg = FeatureConfig(steps=2, batch_size=2)
    nets, again = features.train(cfg), features.train(cfg).state_dict()
    assert not nets.training
    assert all(torch.equal(value, again[key]) for key, value in nets.state_dict().items())


def test_networks_of_known_loss_are_pushed_towards_the_truth():
    torch.manual_seed(0)
    nets = nn.ModuleList([FrameNet(), VideoNet()])
    x, labels, corners = clips(4)
    batch = x[:8], labels[:8], corners[:8].transpose(1, 2)
    optimizer = torch.optim.Adam(nets.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        losses.append(features._loss(*nets, *batch))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    # at first: every cell, every class and no motion equally likely
    assert abs(losses[0].item() - math.log(2560) - math.log(10) - 1.62) < 1 and losses[-1] < losses[0] - 2


def test_softened_clips_keep_their_light_and_most_of_their_strokes():
    torch.manual_seed(0)
    x = clips(0)[0]
    change = features._softened(x) - x
    assert abs(change.mean()) < 0.01 and 0.05 < change.square().mean().sqrt() < 0.3


def test_the_trained_file_is_small_and_says_how_it_was_made():
    content = checkpoint.load(TRAINED)
    assert TRAINED.stat().st_size < 1e6 and content["settings"]["size"] == 32
    assert len(trained().sha256) == 64


def test_another_checkpoint_is_refused_with_a_sentence(tmp_path: Path):
    checkpoint.save(tmp_path / "model.pt", {"model": {}})
    with pytest.raises(ValueError, match="not one that features.py wrote"):
        load_features(tmp_path / "model.pt")


def test_clips_of_another_size_are_refused():
    with pytest.raises(AssertionError, match="not of size 32"):
        observe(torch.zeros(1, 1, 4, 64, 64), trained(), 1)


def test_linking_undoes_any_order_of_crossing_digits():
    a, b = path((10.0, 8.0), (0.1, 1.0)), path((11.0, 23.5), (0.0, -1.0))
    true, kinds = torch.cat([a, b], 2), torch.tensor([3, 8]).expand(1, 16, 2)
    flip = torch.rand(1, 16, generator=seeded(1)) < 0.5
    flip[:, 0] = False
    mixed = torch.where(flip[:, :, None, None], true.flip(2), true)
    classes, positions = link(torch.where(flip[:, :, None], kinds.flip(2), kinds), mixed)
    assert torch.equal(positions, true) and torch.equal(classes, kinds)


def test_linking_follows_the_place_when_a_digit_changes_its_class_and_never_takes_one_twice():
    at = torch.tensor([[[10.0, 10.0], [20.0, 20.0]], [[10.0, 11.0], [10.0, 8.0]]])[None]
    classes, positions = link(torch.tensor([[[1, 2], [2, 1]]]), at)
    assert torch.equal(positions, at) and classes.tolist() == [[[1, 2], [2, 1]]]


def test_one_wrong_place_does_not_exchange_two_digits_for_good():
    a, b = torch.tensor([[10.0, 10], [10, 12], [10, 14]]), torch.tensor([[12.0, 14], [14, 12], [16, 10]])
    ghost = torch.tensor([40.0, 40])  # read in place of a in the middle frame
    at = torch.stack([a, b], 1)
    at[1] = torch.stack([b[1], ghost])
    kinds = torch.tensor([[[3, 8], [8, 0], [3, 8]]])
    classes, positions = link(kinds, at[None])
    assert classes[0].tolist() == [[3, 8], [0, 8], [3, 8]] and torch.equal(positions[0, 2], at[2])


def test_the_checksum_is_that_of_the_file_and_tells_contents_apart(tmp_path: Path):
    checkpoint.save(tmp_path / "x.pt", {"step": 3})
    checkpoint.save(tmp_path / "y.pt", {"step": 4})
    one, other = (features.checksum(tmp_path / name) for name in ("x.pt", "y.pt"))
    assert one == hashlib.sha256((tmp_path / "x.pt").read_bytes()).hexdigest() != other

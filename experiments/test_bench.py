"""bench.py measures what it says, and its tables come out. Nothing here looks at how long anything took."""
import sys
import time
import types

import pytest
import torch
from torch import nn

from experiments import bench
from experiments.bench import BenchConfig, Peer, Trainer, networks, peer_width, take_turns
from experiments.cost import count
from machine import Machine

CPU = Machine(torch.device("cpu"), "float32")
SMALL = dict(dim=16, head_dim=8, attention_resolutions=(4,), emb_dim=16, dim_mults=(1, 2))


class OtherNet(nn.Module):
    """Stands in for the peer's network: as wide as asked, with its call."""
    def __init__(self, dim, dim_mults, channels):
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, (1, 3, 3), padding=(0, 1, 1))
        self.wide = nn.Parameter(torch.zeros(dim, dim))

    def forward(self, x, time):
        assert time.shape == x.shape[:1]
        return self.conv(x)


@pytest.fixture
def with_peer(monkeypatch):
    monkeypatch.setitem(sys.modules, "video_diffusion_pytorch", types.SimpleNamespace(Unet3D=OtherNet))
    for name in ("torchvision", "torchvision.transforms", "transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


@pytest.fixture
def without_peer(monkeypatch):
    monkeypatch.setitem(sys.modules, "video_diffusion_pytorch", None)  # importing it raises ImportError
    for name in ("torchvision", "torchvision.transforms", "transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(bench.PRESETS, "films", bench.PRESETS["films"] | SMALL)


def program(monkeypatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    bench.config.run(bench.main)


def test_everything_compared_takes_its_turn_in_every_round_and_the_first_is_not_kept():
    calls = []
    seconds = take_turns({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3)
    assert calls == list("abababab") and [len(s) for s in seconds.values()] == [3, 3]


def test_the_seconds_belong_to_the_function_that_took_them():
    seconds = take_turns({"short": lambda: None, "long": lambda: time.sleep(0.02)}, rounds=2)
    assert min(seconds["long"]) >= 0.02 and list(seconds) == ["short", "long"]  # a sleep is never shorter


@pytest.mark.slow
def test_a_training_step_moves_weights_and_ema_and_a_call_moves_nothing(small):
    c = BenchConfig(size=16, batch_size=1)
    trainer = Trainer(bench.ours(c), c, CPU)
    before = [p.clone() for p in trainer.network.parameters()]
    trainer.call()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.network.parameters()))
    trainer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.network.parameters()))
    assert trainer.steps == 1 and all(p.grad is None for p in trainer.network.parameters())


def test_the_peer_is_the_narrowest_with_as_many_parameters(with_peer):
    width = peer_width(3000, (1, 2))
    assert count(Peer(width, (1, 2))) >= 3000 > count(Peer(width - 4, (1, 2)))


def test_the_peer_gets_one_noise_level_for_each_clip(with_peer):
    z = torch.randn(3, 1, 4, 8, 8)
    peer = Peer(8, (1, 2))
    assert peer(z, torch.zeros(())).shape == peer(z, torch.zeros(3, 1, 1, 1, 1)).shape == z.shape


def test_without_the_peer_ours_is_timed_alone_and_it_says_how_to_get_it(without_peer, small, capsys):
    assert [name[:4] for name in networks(BenchConfig(size=16))] == ["ours", "ours"]
    assert "pip install --no-deps video-diffusion-pytorch" in capsys.readouterr().out


def test_rates_are_shown_as_the_median_with_the_extremes():
    assert bench.shown(6, [3.0, 1.0, 2.0]) == "3 [2, 6]"


@pytest.mark.slow
def test_the_table_of_networks_comes_out(with_peer, small, monkeypatch, capsys):
    program(monkeypatch, *"--size 16 --batch_size 1 --rounds 1 --precision float32 --device cpu".split())
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert lines[0].startswith("`python -m experiments.bench --size 16") and len(rows) == 5
    assert {row.count("|") for row in rows} == {5}


def test_bad_flags_are_one_sentence(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, "--rounds", "0")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and "--rounds" in err

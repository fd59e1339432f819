"""bench.py measures what it says, and its tables come out. Nothing here looks at how long anything took."""
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments import bench
from experiments.bench import BenchConfig, Entrant, Peer, Trainer, entrants, flops, parameters, peak_memory, take_turns
from machine import Machine

CPU = Machine(torch.device("cpu"), "float32")
SMALL = (("size", 16), ("dim", 16), ("head_dim", 8), ("attention_resolutions", (4,)), ("emb_dim", 16))
OURS = Entrant("ours", "cpu", SMALL)


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


def test_everything_compared_takes_its_turn_in_every_round_and_the_first_is_not_kept():
    calls = []
    seconds = take_turns({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3)
    assert calls == list("abababab") and [len(s) for s in seconds.values()] == [3, 3]


def test_the_seconds_belong_to_the_function_that_took_them():
    seconds = take_turns({"short": lambda: None, "long": lambda: time.sleep(0.02)}, rounds=2)
    assert min(seconds["long"]) >= 0.02 and list(seconds) == ["short", "long"]  # a sleep is never shorter


def test_flops_of_a_convolution_are_counted_by_hand(monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, z, logsnr, cond=None, num_images=0):
            return self.conv(z[:, 0].transpose(0, 1))[None].transpose(1, 2)
    monkeypatch.setattr(Entrant, "build", lambda self: Net())
    forward = 2 * 9 * 16 * 8 * 8  # multiply and add, nine taps, 16 frames of 8 x 8
    assert flops(OURS, 16, 8) == 2 * forward  # and once more for the weights; z needs no gradient


@pytest.mark.slow
def test_flops_grow_with_the_frames_and_do_not_need_memory():
    assert flops(OURS, 32, 16) > 1.9 * flops(OURS, 16, 16)
    assert flops(Entrant("huge", "ucf101", (("size", 64),)), 16, 64) > 1e12


def test_a_training_step_moves_weights_and_ema_and_a_call_moves_nothing():
    trainer = Trainer(OURS, 4, 16, BenchConfig(batch_size=1), CPU)
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.call()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
    trainer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
    assert trainer.ema.n_averaged == 1 and all(p.grad is None for p in trainer.model.parameters())


def test_ceiling_counts_the_work_it_does():
    for function, work in bench.ceiling(Machine(torch.device("meta"), "float32")).values():
        with FlopCounterMode(display=False) as counter:
            function()
        assert counter.get_total_flops() == work


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the kernel's own figures")
def test_peak_memory_sees_the_batch():
    small, large = (peak_memory(OURS, 16, 16, BenchConfig(batch_size=b)) for b in (1, 64))
    activations = 64 * 16 * 16 * 8 * 8 * 4 / 2**30  # one map of 16 channels at 8 px, float32
    assert 0 < small < large - 5 * activations


def test_the_peer_is_the_one_nearest_in_parameters(with_peer):
    c = BenchConfig()
    ours, _, same, near = entrants(c, 32)
    assert dict(same.flags)["dim"] == bench.config.PRESETS["cpu_wide"]["dim"]
    others = [Entrant("", "", (("dim", dim), ("dim_mults", (1, 2, 4)))) for dim in range(16, 128, 4)]
    gaps = [abs(parameters(other) - parameters(ours)) for other in [near, *others]]
    assert gaps[0] == min(gaps)


def test_the_peer_gets_one_noise_level_for_each_clip(with_peer):
    z = torch.randn(3, 1, 4, 8, 8)
    peer = Peer(8, (1, 2))
    assert peer(z, torch.zeros(())).shape == peer(z, torch.zeros(3, 1, 1, 1, 1)).shape == z.shape


def test_without_the_peer_ours_is_timed_alone_and_it_says_how_to_get_it(without_peer, capsys):
    assert [e.preset for e in entrants(BenchConfig(), 32)] == ["cpu_wide", "cpu_wide"]
    assert "pip install --no-deps video-diffusion-pytorch" in capsys.readouterr().out


def test_exponents_are_those_of_power_laws():
    assert bench._exponent((1, 2, 4), [3, 12, 48]) == pytest.approx(2)


def test_shown_is_the_median_with_the_extremes():
    assert bench.shown([3.0, 1.0, 2.0]) == "2 [1, 3]"


@pytest.mark.parametrize("table", ["peer", pytest.param("parts", marks=pytest.mark.slow)])
def test_the_tables_come_out(table, with_peer, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--table", table, "--sizes", "16", "--batch_size", "1",
                                      "--rounds", "1", "--precision", "float32"])
    tiny = bench.config.PRESETS["cpu_wide"] | dict(dim=8, head_dim=8, emb_dim=16, dim_mults=(1, 2))
    monkeypatch.setitem(bench.config.PRESETS, "cpu_wide", tiny)
    monkeypatch.setattr(bench, "peak_memory", lambda *args: 1.0)
    monkeypatch.setattr(bench, "ceiling", lambda machine: {"add": (lambda: torch.ones(1) + 1, 1)})
    monkeypatch.setattr(bench, "ddim", lambda *args: None)
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert lines[0].startswith(f"`python -m experiments.bench --table {table}") and len(rows) >= 6
    assert table == "parts" or len({row.count("|") for row in rows}) == 1


def test_the_growth_table_comes_out(monkeypatch, capsys):
    monkeypatch.setattr(bench, "Trainer", lambda *args: types.SimpleNamespace(step=lambda: time.sleep(1e-4)))
    monkeypatch.setattr(bench, "peak_memory", lambda e, frames, size, c: frames * size**2 * c.batch_size)
    bench.growth_table(BenchConfig(rounds=1), CPU)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["frames", "size", "batch_size"]
    assert [float(row.split("|")[-2]) for row in rows] == pytest.approx([1, 2, 1])


def test_bad_flags_are_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--rounds", "0"])
    with pytest.raises(SystemExit) as stop:
        bench.config.run(bench.main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and "--rounds" in err

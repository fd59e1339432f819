"""cost.py counts what a model costs from its settings, without its memory."""
import re
import resource
import sys
from pathlib import Path

import pytest

import config
from experiments import cost
from magicvideo import build_network
from presets import PRESETS
from settings import read_settings
from torch import nn, zeros
from torch._subclasses.fake_tensor import FakeTensorMode

TINY = ("--preset cpu --latent= --optimizer adam --frame_noise 0 --lr 0.001 "
        "--device cpu --size 16 --dim 8 --dim_mults 1,2 --blocks 1 --head_dim 8 --emb_dim 16 "
        "--patch 2 --attention_resolutions 4").split()


def printed(monkeypatch, capsys, *flags: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["cost.py", *flags])
    config.run(cost.main)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("preset", ["cpu", pytest.param("text_large", marks=pytest.mark.slow)])
def test_a_preset_is_counted_without_allocating_it(preset, monkeypatch, capsys, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(cost, "memory", lambda *_: "")  # which has tests of its own
    line, *_ = printed(monkeypatch, capsys, "--preset", preset)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10  # MiB on Linux
    row = re.fullmatch(rf"{preset}: ([\d.]+) M parameters, ([\d.]+) TFLOP per training step of (\d+) clips; "
                       r"float32: weights ([\d.]+) GiB, gradients .* GiB, optimizer ([\d.]+) GiB, .*", line)
    assert row, line
    parameters, flops, clips, weights, optimizer = map(float, row.groups())
    assert weights == pytest.approx(parameters * 4e6 / 2**30, abs=0.006)
    assert optimizer == pytest.approx(2 * parameters * 4e6 / 2**30, abs=0.006)
    values = {"accumulate": 1} | PRESETS[preset]
    assert flops > 0 and clips == values["batch_size"] * values["accumulate"]
    assert grown < 150 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arch", ["unet3d", "magicvideo"])
def test_the_parameters_are_those_of_the_network_that_is_built(arch):
    s = read_settings([*TINY, "--arch", arch])
    network = build_network(arch, s.network)
    assert cost.step_cost(s)[0] == sum(p.numel() for p in network.parameters())


def test_flops_of_a_convolution_are_counted_by_hand():
    conv = nn.Conv2d(1, 1, 3, padding=1)
    forward = 2 * 9 * 16 * 8 * 8  # multiply and add, nine taps, 16 frames of 8 x 8
    x = zeros(16, 1, 8, 8)
    assert cost.flops(lambda: conv(x)) == forward
    assert cost.flops(lambda: conv(x).sum().backward()) == 2 * forward  # once more for the weights


def test_without_a_preset_all_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(cost, "step_cost", lambda s: (1, 1))
    monkeypatch.setattr(cost, "peak_memory", lambda s, clips, checkpointing: 1.0 * clips)
    lines = printed(monkeypatch, capsys)[::3]
    assert [line.split(":")[0] for line in lines] == [name for name in PRESETS if name != "autoencoder"]


def test_an_autoencoder_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(cost.sys, "argv", ["cost", "--preset", "autoencoder"])
    with pytest.raises(ValueError, match="not --arch autoencoder"):
        cost.main()


@pytest.mark.slow
def test_flags_of_training_change_what_is_counted(monkeypatch, capsys):
    monkeypatch.setattr(cost, "memory", lambda *_: "")
    one, *_ = printed(monkeypatch, capsys, *TINY)
    two, *_ = printed(monkeypatch, capsys, *TINY, "--batch_size", "2", "--accumulate", "3")
    assert "of 6 clips" in two and "of 6 clips" not in one


def test_live_bytes_are_counted_by_hand():
    with FakeTensorMode(), cost.Live() as live:
        a = zeros(1000)
        b = a + a
        view = b[:10]
        del b
        a = None
        c = zeros(500)
        del view
    assert (live.peak, live.now) == (8000, 2000) and c.shape == (500,)


@pytest.mark.slow
def test_the_peak_holds_what_training_keeps_and_grows_with_the_clips():
    s = read_settings(TINY)
    parameters, _ = cost.step_cost(s)
    kept = 5 * 4 * parameters / 2**30
    one, four = cost.peak_memory(s, 1, False), cost.peak_memory(s, 4, False)
    assert kept < one < four
    assert kept < cost.peak_memory(s, 4, True) < 0.9 * four


def test_a_fifth_of_a_card_stays_to_spare(monkeypatch):
    monkeypatch.setattr(cost, "peak_memory", lambda s, clips, checkpointing: 6.0 + 0.8 * clips)
    text = cost.memory(read_settings(TINY), True)
    assert "--checkpointing, modelled: 6.8 GiB with one clip at a time and 0.80 with each more" in text
    assert text.endswith("0 in 8, 4 in 12, 8 in 16, 16 in 24, 32 in 40, 64 in 80")

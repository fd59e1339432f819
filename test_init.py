"""--init: a run that begins with the averaged weights of another."""
import sys
from pathlib import Path

import pytest
import torch
from pytest import CaptureFixture

import checkpoint
import config
import train
from machine import Machine
from settings import read_settings
from state import new_state
from test_train import fitted

CPU = Machine(torch.device("cpu"), "float32")
TINY = ("--preset cpu --latent= --optimizer adam --frame_noise 0 --lr 0.001 "
        "--device cpu --precision float32 --dataset moving_mnist --size 16 --digits 1 --dim 8 "
        "--dim_mults 1,2 --blocks 1 --head_dim 8 --emb_dim 16 --emb_layers 1 --patch 1 --cond_dim 8 "
        "--tokens 12 --attention_resolutions 8 --num_images 1 --batch_size 2 --steps 2 --warmup 0 "
        "--lr 0.01").split()


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Path:
    """A run to begin with."""
    out = tmp_path_factory.mktemp("slow") / "run"
    fitted([*TINY, "--frames", "4"], out)
    return out


def test_a_run_begins_with_the_averaged_weights_and_the_network_of_another(slow, tmp_path):
    s = read_settings(["--init", str(slow), "--preset", "cpu", "--num_images", "3", "--device", "cpu"])
    old = checkpoint.load(checkpoint.newest(slow))
    state = new_state(s, CPU.device)
    assert (s.unet.dim, s.text.cond_dim, s.data.size, s.data.num_images) == (8, 8, 16, 3)
    assert s.data.frame_stride == (1,) and state.step == 0
    for weights in (state.model.state_dict(), state.ema.state_dict()):
        assert all(torch.equal(value, old["ema"][name]) for name, value in weights.items())


@pytest.mark.slow
def test_what_was_begun_with_is_not_needed_to_resume(slow, tmp_path):
    moved = tmp_path / "moved.pt"
    checkpoint.publish(slow, moved)
    fitted([*TINY, "--frames", 4, "--init", moved], tmp_path / "run")
    moved.unlink()
    assert fitted(["--resume", tmp_path / "run", "--steps", 3], tmp_path / "run")["step"] == 3


@pytest.mark.parametrize("flags, parts", [
    (["--init", "nowhere"], ("nowhere",)), (["--init", "SLOW", "--dim", "16"], ("--init", "another network")),
    (["--init", "SLOW", "--resume", "SLOW"], ("--init", "--resume")),
    (["--init", "FEATURES"], ("--init", "no network that diffuses"))])
def test_a_bad_beginning_is_one_sentence(flags, parts, slow, tmp_path, monkeypatch, capsys: CaptureFixture):
    known = {"SLOW": slow, "FEATURES": Path(__file__).parent / "pretrained" / "features_32.pt"}
    flags = [str(known.get(flag, flag)) for flag in flags]
    monkeypatch.setattr(sys, "argv", ["train.py", "--device", "cpu", *flags, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        config.run(train.main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("error:") == 1 and all(part in err for part in parts)

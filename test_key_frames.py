"""Key frames and the frames between them (MagicVideo), from the loss to the program; --init beside it."""
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from pytest import CaptureFixture, MonkeyPatch
from torch import Tensor

import checkpoint
import config
import infill
import sample
import train
from diffusion import DiffusionConfig, denoiser, loss
from experiments.features import load_features, observe
from machine import Machine
from settings import read_settings
from state import new_state
from magicvideo import MagicVideoConfig, build_network, ends, reveal
from magicvideo import between as between_keys
from test_train import fitted
from test_unet3d import changed, noise, small, wild

CPU = Machine(torch.device("cpu"), "float32")
TINY = ("--preset cpu --latent= --optimizer adam --frame_noise 0 --lr 0.001 "
        "--device cpu --precision float32 --dataset moving_mnist --size 16 --digits 1 --dim 8 "
        "--dim_mults 1,2 --blocks 1 --head_dim 8 --emb_dim 16 --emb_layers 1 --patch 1 --cond_dim 8 "
        "--tokens 12 --attention_resolutions 8 --num_images 1 --batch_size 2 --steps 2 --warmup 0 "
        "--lr 0.01").split()
BETWEEN = [*TINY, "--keys", "--frames", "4"]  # two frames between two key frames


@pytest.fixture(scope="module")
def between(tmp_path_factory) -> Path:
    """A run of a network that interpolates."""
    out = tmp_path_factory.mktemp("between") / "run"
    fitted(BETWEEN, out)
    return out


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Path:
    """A run of a network whose clips are three times as fast."""
    out = tmp_path_factory.mktemp("slow") / "run"
    fitted([*TINY, "--frames", "4", "--frame_stride", "3"], out)
    return out


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    """A run of a network that knows two speeds, one of them three times the other."""
    out = tmp_path_factory.mktemp("several") / "run"
    fitted([*TINY, "--frames", "4", "--frame_stride", "1,3"], out)
    return out


def program(monkeypatch: MonkeyPatch, *flags: object) -> list:
    """Videos and marks that python sample.py writes."""
    written = []
    monkeypatch.setattr(sample, "save_video", lambda x, path, known, *rest: written.append((x, known)) or [])
    always = "sample.py --device cpu --precision float32 --steps 2".split()
    monkeypatch.setattr(sys, "argv", [*always, *map(str, flags)])
    config.run(sample.main)
    return written[0]


# ---- what the network sees and what counts -----------------------------------------------------------------


@pytest.mark.parametrize("num_images", [0, 2])
def test_the_network_sees_both_ends_clean_and_in_every_frame_but_the_images(num_images):
    z, x = noise(2, 3, 5 + num_images, 4, 4), noise(2, 3, 5 + num_images, 4, 4, seed=2)
    seen = reveal(z, x, num_images)
    assert seen.shape == (2, 9, 5 + num_images, 4, 4)
    for f in range(5 + num_images):
        assert torch.equal(seen[:, :3, f], (x if f in (0, 4) else z)[:, :, f])
        keys = torch.cat([x[:, :, 0], x[:, :, 4]], 1)
        assert torch.equal(seen[:, 3:, f], keys if f < 5 else torch.zeros_like(keys))


@pytest.mark.parametrize("num_images", [0, 2])
def test_the_frames_between_count_and_the_ends_do_not(num_images):
    x, counting = noise(4, 1, 5 + num_images, 4, 4), [f for f in range(5 + num_images) if f not in (0, 4)]
    eps = DiffusionConfig("eps", logsnr_min=-10, logsnr_max=10)

    def of(frames: list[int]) -> Tensor:
        """The loss of a model that says 0, on videos whose noise is 0 but 2 in these frames."""
        fixed = torch.zeros_like(x)
        fixed[:, :, frames] = 2
        with MonkeyPatch.context() as patch:
            patch.setattr("diffusion.noise_like", lambda *_: fixed)
            return loss(between_keys(lambda z, *_: torch.zeros_like(z[:, :1]), x, eps), x, eps, None, num_images)
    assert torch.allclose(of([0, 4]), torch.zeros(4), atol=1e-6)
    for frames in (counting, counting[:1]):
        assert torch.allclose(of(frames), torch.full((4,), 4.0 * len(frames) / x.shape[2]))


def test_the_denoiser_returns_the_given_ends_and_denoises_the_rest():
    keys, z, logsnr, seen = noise(2, 1, 5, 4, 4), noise(2, 1, 5, 4, 4, seed=3), torch.tensor(-1.0), []
    model = lambda z, *_: seen.append(z) or z[:, :1] * 0.5  # noqa: E731
    x = denoiser(between_keys(model, keys, DiffusionConfig("v")), DiffusionConfig("v"))(z, logsnr)
    plain = denoiser(lambda z, *_: seen[0][:, :1] * 0.5, DiffusionConfig("v"))(z, logsnr)
    known = ends(z)[:, 0, 0]
    assert known.tolist() == [True, False, False, False, True]
    assert torch.allclose(x[:, :, known], keys[:, :, known], atol=1e-6)
    assert torch.equal(x[:, :, ~known], plain[:, :, ~known])
    assert torch.equal(seen[0], reveal(z, keys))


@pytest.mark.parametrize("arch", ["unet3d", "magicvideo"])
def test_every_frame_between_hears_of_both_ends(arch):
    model = wild(build_network(arch, small(MagicVideoConfig, keys=True, frames=5)))
    z, x, logsnr = noise(1, 2, 5, 8, 8), noise(1, 2, 5, 8, 8, seed=2), torch.tensor(0.0)
    before = model(reveal(z, x), logsnr)
    assert before.shape == z.shape
    for end in (0, 4):
        other = x.clone()
        other[:, :, end] += 1
        assert changed(before, model(reveal(z, other), logsnr)) == list(range(5))


def test_two_frames_leave_nothing_to_interpolate():
    with pytest.raises(ValueError, match="--keys needs --frames 3"):
        small(MagicVideoConfig, keys=True, frames=2)


# ---- the sample mode ---------------------------------------------------------------------------------------


def test_gaps_are_joined_to_the_clips_they_are_of(between):
    model = infill.load_model(checkpoint.newest(between), CPU.device)
    time = torch.arange(10.0).view(1, 1, 10, 1, 1) + 100 * torch.arange(2.0).view(2, 1, 1, 1, 1)
    video = time.expand(2, 1, 10, 16, 16)
    given = sample.gaps(model, infill.SampleConfig(num=2), video[:, :, ::3])
    assert given.known.tolist() == [True, False, False, True] and given.x.shape[:3] == (6, 1, 4)
    first, last = given.x[:, :, :1], given.x[:, :, 3:]
    filled = first + (last - first) * torch.linspace(0, 1, 4).view(1, 1, 4, 1, 1)
    assert torch.allclose(sample.joined(filled, 2), video)


def test_key_frames_stay_and_the_frames_between_are_drawn(between, tmp_path, monkeypatch):
    flags = ["--checkpoint", between, "--mode", "key_frames", "--num", 2, "--out", tmp_path]
    video, marks = program(monkeypatch, *flags, "--text", "a 3|a 4")
    assert video.shape == (2, 1, 13, 16, 16)  # four gaps of three steps
    assert marks.tolist() == [f % 3 == 0 for f in range(13)]
    model = infill.load_model(checkpoint.newest(between), CPU.device)
    true = sample.source(model, infill.SampleConfig(num=2), 13)
    assert torch.allclose(video[:, :, ::3], true[:, :, ::3], atol=1e-3)
    assert not torch.allclose(video[:, :, 1], true[:, :, 1], atol=0.01)
    shorter, _ = program(monkeypatch, *flags, "--frames", 7)
    assert shorter.shape[2] == 7 and torch.allclose(shorter[:, :, ::3], true[:, :, :7:3], atol=1e-3)


def test_another_model_draws_the_key_frames_and_hears_their_speed(between, several, tmp_path, monkeypatch):
    heard, drawn, embed, fill = [], [], infill.embed, sample.fill

    def filling(*given) -> Tensor:
        drawn.append(fill(*given))
        return drawn[-1]
    monkeypatch.setattr(infill, "embed", lambda texts, text: heard.append(texts) or embed(texts, text))
    monkeypatch.setattr(sample, "fill", filling)
    video, _ = program(monkeypatch, "--checkpoint", between, "--base", several, "--mode", "key_frames",
                       "--num", 2, "--text", "a 3|a 4", "--out", tmp_path)
    assert heard == [[f"a {digit} at {8 / 3:g} fps" for digit in (3, 4)], ["a 3", "a 4"] * 3]
    assert video.shape[2] == 10 and torch.allclose(video[:, :, ::3], drawn[0], atol=1e-5)


def test_a_base_draws_with_captions_where_the_frames_between_know_none(slow, tmp_path, monkeypatch):
    fitted([*BETWEEN, "--cond_dim", 0, "--arch", "magicvideo"], tmp_path / "run")
    video, _ = program(monkeypatch, "--checkpoint", tmp_path / "run", "--base", slow, "--mode", "key_frames",
                       "--text", "a 3", "--w", 1, "--num", 1, "--frames", 7, "--out", tmp_path)
    assert video.shape[2] == 7


@pytest.mark.parametrize("flags, parts", [
    (["--checkpoint", "BETWEEN"], ("--mode key_frames", "--keys")),
    (["--checkpoint", "SLOW", "--mode", "key_frames"], ("--mode key_frames", "--keys")),
    (["--checkpoint", "BETWEEN", "--mode", "key_frames", "--frames", "1"], ("one key frame", "--frames")),
    (["--checkpoint", "BETWEEN", "--mode", "key_frames", "--frames", "8"], ("--frames 8", "a multiple of 3")),
    (["--checkpoint", "BETWEEN", "--mode", "key_frames", "--text", "a 3", "--fps", "2"], ("--fps", "key")),
    (["--checkpoint", "SLOW", "--text", "a 3", "--fps", "2"], ("--fps", "--frame_stride")),
    (["--checkpoint", "BETWEEN", "--mode", "key_frames", "--base", "SEVERAL"], ("--base", "--text")),
    (["--checkpoint", "BETWEEN", "--mode", "key_frames", "--w_r", "2"], ("--w_r", "--keys")),
    (["--checkpoint", "BETWEEN", "--mode", "key_frames", "--base", "SLOW", "--input", "x"], ("--input",)),
    (["--checkpoint", "BETWEEN", "--mode", "key_frames", "--base", "BETWEEN"], ("--base", "_stride 3")),
    (["--checkpoint", "SLOW", "--base", "SLOW"], ("--base", "key_frames"))])
def test_a_mistake_is_one_sentence(flags, parts, between, slow, several, tmp_path, monkeypatch, capsys):
    runs = {"BETWEEN": between, "SLOW": slow, "SEVERAL": several}
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, *[runs.get(flag, flag) for flag in flags], "--out", tmp_path)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("error:") == 1 and all(part in err for part in parts)


# ---- a run that begins with weights ------------------------------------------------------------------------


def test_a_run_begins_with_the_averaged_weights_and_the_network_of_another(slow, tmp_path):
    s = read_settings(["--init", str(slow), "--preset", "cpu", "--num_images", "3", "--device", "cpu"])
    old = checkpoint.load(checkpoint.newest(slow))
    state = new_state(s, CPU.device)
    assert (s.unet.dim, s.text.cond_dim, s.data.size, s.data.num_images) == (8, 8, 16, 3)
    assert s.data.frame_stride == (1,) and state.step == 0
    for weights in (state.model.state_dict(), state.ema.module.state_dict()):
        assert all(torch.equal(value, old["ema"][name]) for name, value in weights.items())


def test_what_was_begun_with_is_not_needed_to_resume(slow, tmp_path):
    moved = tmp_path / "moved.pt"
    checkpoint.publish(slow, moved)
    fitted([*TINY, "--frames", 4, "--init", moved], tmp_path / "run")
    moved.unlink()
    assert fitted(["--resume", tmp_path / "run", "--steps", 3], tmp_path / "run")["step"] == 3


def test_the_network_of_an_interpolator_is_taken_over_too(between):
    s = read_settings(["--init", str(between), "--preset", "cpu", "--device", "cpu"])
    assert s.unet.keys and s.train.arch == "unet3d" and dataclasses.asdict(s.unet)["frames"] == 4


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


@pytest.mark.slow
def test_the_shipped_networks_go_as_fast_as_asked_and_then_fill_in():
    """4 clips in 8 steps; measured with more (results/speed.md): 2.5, 4.1 and 7.0 px a frame at 8, 4, 2 fps."""
    pretrained, digits = Path(__file__).parent / "pretrained", (0, 1, 7, 6)
    features = load_features(pretrained / "features_32.pt")
    slow, between = (infill.load_model(pretrained / f"{name}_32.pt", CPU.device)
                     for name in ("magicvideo", "interpolate"))
    s = infill.SampleConfig(num=4, text="|".join(f"a {digit} moving left" for digit in digits), w=1.0,
                            sampler="dpm_solver", steps=8)

    def seen(x: Tensor) -> tuple[float, float]:
        classes, places, *_ = observe(x, features, 1)
        return (places.diff(dim=1).norm(dim=3).mean().item(),
                (classes[..., 0] == torch.tensor(digits)[:, None]).float().mean().item())
    clips = {fps: infill.fill(slow, dataclasses.replace(s, fps=fps), infill.nothing(slow, s, 16))
             for fps in (8.0, 4.0, 2.0)}
    (normal, named), (faster, _), (fastest, _) = map(seen, clips.values())
    assert 1.2 < normal < faster - 0.7 < fastest - 2 and named > 0.7
    s = dataclasses.replace(s, mode="key_frames", text="", w=0.0)
    filled = infill.fill(between, s, sample.gaps(between, s, sample.latents(between, clips[2.0])))
    step, named = seen(sample.joined(filled, 4))
    assert 1.2 < step < fastest / 2 and named > 0.5

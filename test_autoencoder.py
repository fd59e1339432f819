"""The autoencoder: shapes, the KL's closed form, which frames hear of which, and diffusion in its latents."""
import types
from pathlib import Path

import pytest
import torch
from pytest import CaptureFixture, MonkeyPatch
from torch import Tensor, nn

import autoencoder
import checkpoint
import config
import infill
import sample
import settings
import train
from autoencoder import Autoencoder, AutoencoderConfig, Pixels, in_latents, kl
from data import DataConfig, batches
from diffusion import DiffusionConfig, alpha_sigma
from machine import Machine
from settings import read_settings
from state import new_state
from test_train import fitted
from test_unet3d import changed, noise, wild
from unet3d import UNet3D, UNetConfig

CPU = Machine(torch.device("cpu"), "float32")
TINY = ("--preset cpu --latent= --optimizer adam --frame_noise 0 --lr 0.001 "
        "--device cpu --precision float32 --dataset moving_mnist --size 16 --frames 4 "
        "--num_images 1 --digits 1 --dim 8 --dim_mults 1 --blocks 1 --head_dim 8 --emb_dim 16 --emb_layers 1 "
        "--patch 1 --cond_dim 8 --tokens 12 --batch_size 2 --steps 2 --warmup 0 --lr 0.01 "
        "--preview_every 2").split()
CODER = [*TINY, *"--arch autoencoder --attention_resolutions 16 --width 8 --factor 4".split()]
LATENT = [*TINY, *"--attention_resolutions 4 --latent".split()]


def digits(n: int, size: int = 16, **changes) -> Tensor:
    return next(batches(DataConfig(size=size, frames=4, digits=1, **changes), n, 0))[0]


@pytest.fixture(scope="module")
def coder(tmp_path_factory) -> Path:
    """A run of two steps of an autoencoder."""
    out = tmp_path_factory.mktemp("coder") / "run"
    fitted(CODER, out)
    return out


@pytest.fixture(scope="module")
def latent(coder, tmp_path_factory) -> Path:
    """A run of two steps in its latents."""
    out = tmp_path_factory.mktemp("latent") / "run"
    fitted([*LATENT, coder], out)
    return out


# ---- the autoencoder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [4, 8])
def test_latents_are_factor_times_smaller_and_come_back_to_the_size(factor):
    model = wild(Autoencoder(AutoencoderConfig(3, factor, width=8)))
    x = noise(2, 3, 5, 16, 32)
    mean, logvar = model.encode(x)
    assert mean.shape == logvar.shape == (2, 4, 5, 16 // factor, 32 // factor)
    assert model.decode(mean).shape == x.shape and not torch.equal(mean, logvar)


def test_a_factor_that_is_no_power_of_two_is_one_sentence():
    with pytest.raises(ValueError, match="^--factor 6 is not a power of two"):
        AutoencoderConfig(factor=6)


def test_each_frame_is_encoded_alone_in_its_place():
    model, x = wild(Autoencoder(AutoencoderConfig(width=8))), noise(2, 1, 3, 16, 16)
    whole = model.encode(x)[0]
    for clip in range(2):
        for i in range(3):
            one = model.encode(x[clip:clip + 1, :, i:i + 1])[0]
            assert torch.allclose(whole[clip, :, i], one[0, :, 0], atol=1e-5)


def test_each_frame_is_decoded_alone():
    model, y = wild(Autoencoder(AutoencoderConfig(width=8))), noise(1, 4, 4, 4, 4)
    before = model.decode(y)
    for frame in range(4):
        other = y.clone()
        other[:, :, frame] = noise(1, 4, 4, 4, seed=5)
        assert changed(before, model.decode(other)) == [frame]


def test_the_kl_is_that_of_two_gaussians():
    mean, logvar = torch.tensor([0.0, 1.5, -0.5]), torch.tensor([0.0, -1.0, 0.7])
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (logvar / 2).exp()),
                                                 torch.distributions.Normal(0.0, 1.0))
    assert torch.allclose(kl(mean, logvar), expected, atol=1e-6) and kl(mean, logvar)[0] == 0


def test_the_loss_is_squared_error_plus_weighted_kl():
    x, mean, logvar = noise(2, 1, 3, 8, 8), noise(2, 4, 3, 2, 2, seed=2), noise(2, 4, 3, 2, 2, seed=3)
    value = autoencoder.loss(lambda x: (x + 0.5, mean, logvar), x, AutoencoderConfig(kl_weight=0.1))
    expected = 0.25 + 0.1 * kl(mean, logvar).mean().item()
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_training_draws_a_latent_around_the_mean_with_its_deviation():
    model, x, seen = wild(Autoencoder(AutoencoderConfig(width=8))), noise(4, 1, 4, 32, 32), []
    model.encoder[-1].bias[4:] = -2  # a deviation that is not its own square
    model.decode = lambda y: seen.append(y) or y
    _, mean, logvar = model(x)
    eps = (seen[0] - mean) / (logvar / 2).exp()
    assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.05


def test_every_parameter_is_used_in_training():
    model = wild(Autoencoder(AutoencoderConfig(width=8))).requires_grad_(True)
    autoencoder.loss(model, noise(1, 1, 3, 8, 8), model.config).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_digits_come_back_after_a_short_training():
    torch.manual_seed(0)
    model, x = Autoencoder(AutoencoderConfig(width=8)), digits(4)
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):  # at the start the error is six times the variance
        adam.zero_grad()
        autoencoder.loss(model, x, model.config).backward()
        adam.step()
    error = (model.video(model.latents(x)) - x).square().mean()
    assert error < 0.6 * x.var()  # the mean alone leaves x.var()


def test_measured_latents_have_unit_variance_and_are_scaled_back():
    model, x = wild(Autoencoder(AutoencoderConfig(width=8))), digits(8)
    model.measure(x)
    assert model.latents(x).std().item() == pytest.approx(1, abs=1e-4) and abs(model.scale - 1) > 1e-3
    unscaled = model.decode(model.encode(x)[0]).clamp(-1, 1)
    assert torch.allclose(model.video(model.latents(x)), unscaled, atol=1e-4)


def test_the_coder_of_pixels_changes_nothing_and_stands_in_for_an_autoencoder():
    coder, x = Pixels(), 2 * noise(1, 1, 3, 8, 8)
    assert coder.latents(x) is x and coder.unclamped(x) is x
    assert torch.equal(coder.video(x), x.clamp(-1, 1))
    assert coder.bounded and not Autoencoder(AutoencoderConfig(width=8)).bounded
    assert all(hasattr(Autoencoder, name) for name in dir(coder))


# ---- training it, and diffusing in its latents -------------------------------------------------------------


def test_an_autoencoder_trains_like_a_network_and_shows_reconstructions(coder):
    content = checkpoint.load(checkpoint.newest(coder))
    start = new_state(read_settings(CODER), CPU.device).model.state_dict()
    moved = {name for name in start if not torch.equal(start[name], content["model"][name])}
    assert content["step"] == 2 and {"encoder", "exit"} <= {name.split(".")[0] for name in moved}
    assert (coder / "samples" / "step_00000002.png").exists()


def test_a_stopped_autoencoder_goes_on_as_if_it_had_not_been(coder, tmp_path):
    whole = fitted([*CODER, "--steps", 3, "--decay", "constant"], tmp_path / "whole")
    fitted([*CODER, "--decay", "constant"], tmp_path / "half")
    on = fitted(["--resume", tmp_path / "half", "--steps", 3], tmp_path / "half")
    assert all(torch.equal(on["ema"][name], value) for name, value in whole["ema"].items())


def test_the_network_takes_channels_and_size_of_the_latents():
    coder = AutoencoderConfig(factor=4, latent_channels=5)
    model = UNet3D(in_latents(UNetConfig(size=32, channels=3, dim=8, dim_mults=(1, 2),
                                         attention_resolutions=(8,)), coder))
    assert (model.config.size, model.config.channels) == (8, 5)
    assert model(noise(1, 5, 2, 8, 8), torch.tensor(0.0)).shape == (1, 5, 2, 8, 8)
    assert len(model.down[0][0].attention) == 2 and len(model.down[1][0].attention) == 0
    with pytest.raises(ValueError, match="^--size 18 is not divisible by --factor 4"):
        in_latents(UNetConfig(size=18), coder)
    with pytest.raises(ValueError, match="--size gives the network frames of 5 px, which are not divisible by 2"):
        in_latents(UNetConfig(size=20, dim_mults=(1, 2)), coder).heights()


def test_what_is_diffused_are_scaled_latents_of_clean_frames(coder, monkeypatch):
    s, seen = read_settings([*LATENT, str(coder)]), []
    built = new_state(s, CPU.device)
    x, _ = next(batches(s.data, 2, 0))
    monkeypatch.setattr(train, "loss", lambda network, z, *rest: seen.append(z) or z.mean(0) * 0)
    with pytest.raises(RuntimeError):  # this loss has no gradient
        train.train_step(built.model, built, iter([(x, [["a"], ["b"]])]), s, CPU)
    expected = built.coder.encode(x)[0] * built.coder.scale
    assert torch.equal(seen[0], expected) and seen[0].shape == (2, 4, 5, 4, 4)
    trained = checkpoint.load(checkpoint.newest(coder))["ema"]
    assert all(torch.equal(value, trained[name]) for name, value in built.coder.state_dict().items()
               if name != "scale")
    clips = next(batches(DataConfig(size=16, frames=4, digits=1), 64, 0))[0]
    assert built.coder.latents(clips).std().item() == pytest.approx(1, abs=1e-4)
    assert not any(p.requires_grad for p in built.coder.parameters())


def drawn(monkeypatch: MonkeyPatch, run: Path, out: Path, *flags: object) -> Tensor:
    """What python sample.py saves."""
    seen, save = [], sample.save_video
    monkeypatch.setattr(sample, "save_video", lambda x, *rest, **more: seen.append(x) or save(x, *rest))
    always = "--device cpu --precision float32 --num 1 --steps 2".split()
    everything = ["--checkpoint", run, "--out", out, *always, *flags]
    monkeypatch.setattr("sys.argv", ["sample.py", *map(str, everything)])
    config.run(sample.main)
    return seen[0][1:2] if "super_resolve" in flags or "cascade" in flags else seen[0]  # between input and truth


@pytest.mark.parametrize("flags", ["--mode generate", "--mode predict --overlap 2",
                                   "--mode extend --frames 6"])
def test_a_checkpoint_carries_its_autoencoder_and_is_drawn_from(flags, latent, coder, tmp_path, monkeypatch):
    moved = coder.rename(coder.with_name("elsewhere"))
    try:
        x = drawn(monkeypatch, latent, tmp_path, *flags.split())
    finally:
        moved.rename(coder)
    assert x.shape == (1, 1, 6 if "extend" in flags else 4, 16, 16) and x.abs().max() <= 1


def test_given_frames_are_given_as_their_latents(latent, tmp_path, monkeypatch):
    x = drawn(monkeypatch, latent, tmp_path, *"--mode predict --overlap 2".split())
    model = infill.load_model(checkpoint.newest(latent), CPU.device)
    given = next(batches(DataConfig(size=16, frames=2, digits=1, split="test"), 1, 0))[0]
    assert torch.allclose(x[:, :, :2], model.coder.video(model.coder.latents(given)), atol=1e-3)


def test_latents_are_not_clipped(latent, monkeypatch):
    model = infill.load_model(checkpoint.newest(latent), CPU.device)
    given = infill.nothing(model, infill.SampleConfig(num=1), 4)
    far = infill.draw_block(lambda z, logsnr: torch.full_like(z, 3.0), given, model,
                      infill.SampleConfig(num=1, steps=2), [torch.Generator()])
    assert torch.allclose(far, torch.tensor(3.0), atol=1e-3)


def test_a_run_in_latents_goes_on_without_the_autoencoders_file(latent, coder, tmp_path):
    moved = coder.rename(coder.with_name("elsewhere"))
    try:
        before = checkpoint.load(checkpoint.newest(latent))
        after = fitted(["--resume", latent, "--steps", 3, "--out", tmp_path / "on"], tmp_path / "on")
    finally:
        moved.rename(coder)
    assert after["step"] == 3 and before["autoencoder"]["scale"] != 1
    assert all(torch.equal(after["autoencoder"][name], v) for name, v in before["autoencoder"].items())


def test_what_is_published_holds_the_autoencoder(latent, tmp_path):
    checkpoint.publish(latent, tmp_path / "small.pt")
    model = infill.load_model(tmp_path / "small.pt", CPU.device)
    assert isinstance(model.coder, Autoencoder)
    assert checkpoint.load(tmp_path / "small.pt")["settings"]["latent"] == ""


@pytest.mark.parametrize("flags, parts", [
    (["--latent", "LATENT"], ("--latent", "no autoencoder")),
    (["--latent", "nowhere"], ("nowhere",)),
    (["--latent", "CODER", "--arch", "autoencoder"], ("--arch autoencoder",)),
    (["--latent", "CODER", "--resume", "LATENT"], ("--latent", "--resume")),
    (["--latent", "CODER", "--width", "16"], ("--latent", "flags")),
    (["--init", "LATENT"], ("--init", "draws latents", "--latent")),
    (["--arch", "autoencoder", "--factor", "16", "--size", "24"], ("--size 24", "--factor 16"))])
def test_a_mistake_in_training_is_one_sentence(flags, parts, latent, coder, tmp_path, monkeypatch, capsys):
    flags = [{"LATENT": str(latent), "CODER": str(coder)}.get(flag, flag) for flag in flags]
    start = [] if "--resume" in flags else [*CODER[:CODER.index("--arch")], "--attention_resolutions", "16"]
    if "--size" in flags:
        start += ["--attention_resolutions", "24"]
    if flags[0] == "--latent" and start:
        start += ["--attention_resolutions", "4" if flags[1] == str(coder) else "16"]
    monkeypatch.setattr("sys.argv", ["train.py", *start, *flags, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        config.run(train.main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and all(part in err for part in parts)


@pytest.mark.parametrize("mode", ["super_resolve", "cascade"])
def test_small_frames_are_seen_through_the_decoder(mode, monkeypatch):
    """With a linear decoder D and x_hat = c z, Eq. 8 is a matrix: c z - w_r alpha c A^T (A c z - a), where A is
    pooling times D over the scale of the latents."""
    coder, kernel = Autoencoder(AutoencoderConfig(1, 4, width=8)), noise(4, 1, 4, 4)
    coder.scale.fill_(0.7)
    monkeypatch.setattr(coder, "decode", lambda y: torch.stack(
        [torch.nn.functional.conv_transpose2d(frame, kernel, stride=4) for frame in y.unbind(2)], 2))
    stub = types.SimpleNamespace(config=types.SimpleNamespace(keys=False))
    model = infill.Model(stub, None, DiffusionConfig(), None, CPU.device, coder)
    s = infill.SampleConfig(mode=mode, scale=2, w_r=0.3, steps=1)
    stride = 1 if mode == "super_resolve" else 2
    seen, small = range(0, 3, stride), noise(1, 1, 3, 4, 4)[:, :, ::stride]
    nothing = infill.Given(torch.zeros(1, 4, 3, 2, 2), torch.zeros(3, dtype=torch.bool))
    given = infill.show_small(nothing, stride, small)
    monkeypatch.setattr(infill, "sample", lambda denoise, z, *rest: denoise)
    guided = infill.draw_block(lambda z, logsnr: 0.6 * z, given, model, s, [torch.Generator()])
    z, logsnr = noise(1, 4, 3, 2, 2), torch.tensor(0.4)
    patches = torch.einsum("b c f i j, c k l -> b f i j k l", z / 0.7 * 0.6, kernel[:, 0])  # what D shows
    pooled = patches.unflatten(5, (2, 2)).unflatten(4, (2, 2)).mean((5, 7))  # b f i j k l, k and l of 2
    wanted = small[:, 0].unflatten(3, (2, 2)).unflatten(2, (2, 2)).permute(0, 1, 2, 4, 3, 5)
    error = torch.zeros_like(pooled)
    error[:, seen] = 2 * pooled[:, seen] - 2 * wanted  # the factor is the scale's: pooling has norm 1 with it
    spread = error.repeat_interleave(2, 4).repeat_interleave(2, 5) * 2 / 4
    back = torch.einsum("b f i j k l, c k l -> b c f i j", spread, kernel[:, 0]) / 0.7
    alpha, _ = alpha_sigma(logsnr)
    assert torch.allclose(guided(z, logsnr), 0.6 * z - 0.3 * alpha * 0.6 * back, atol=1e-5)


@pytest.mark.parametrize("flags", ["--mode super_resolve", "--mode super_resolve --scale 4 --frames 6",
                                   "--mode cascade --stride 2"])
def test_latents_are_drawn_from_small_frames(flags, latent, tmp_path, monkeypatch):
    assert drawn(monkeypatch, latent, tmp_path, *flags.split()).shape == (1, 1, 6 if "6" in flags else 4, 16, 16)


def test_an_autoencoder_alone_draws_nothing(coder, tmp_path, monkeypatch, capsys: CaptureFixture):
    with pytest.raises(SystemExit):
        drawn(monkeypatch, coder, tmp_path)
    assert "holds an autoencoder, which draws nothing: train in its latents with python train.py --latent" in capsys.readouterr().err


def test_the_settings_of_an_autoencoder_become_those_of_the_run(coder):
    taken = settings.start_of("", str(coder))
    assert taken == {"channels": 1, "factor": 4, "latent_channels": 4, "width": 8, "kl_weight": 1e-4}

"""Sampling: the modes end to end from a tiny checkpoint, and their composition with closed-form denoisers."""
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytest import CaptureFixture, MonkeyPatch
from torch import Tensor

import checkpoint
import config
import infill
import sample
import settings
import state
import train
from autoencoder import Pixels
from data import DataConfig, batches
from diffusion import DiffusionConfig, denoiser
from files import load_video
from machine import Machine
from presets import SAMPLING
from infill import Given, Model, SampleConfig, block_starts, fill, load_model
from test_gaussian import FLOAT, Gaussian, correlation, signal_and_noise
from text import TextConfig
from magicvideo import MagicVideoConfig

HERE = Path(__file__).parent
CPU = Machine(torch.device("cpu"), "float32")
TINY = ("--preset cpu --latent= --optimizer adam --frame_noise 0 --lr 0.001 "
        "--device cpu --precision float32 --dataset moving_mnist --size 16 --frames 4 "
        "--num_images 1 --digits 1 --dim 8 --dim_mults 1,2 --blocks 1 --head_dim 8 --emb_dim 16 "
        "--emb_layers 1 --patch 1 --attention_resolutions 8 --cond_dim 8 --tokens 8 --batch_size 2 "
        "--steps 1").split()
QUICK = "--device cpu --precision float32 --steps 3 --num 2".split()
ORANGE, GREY = (255, 140, 0), (64, 64, 64)


# ---- a tiny checkpoint, and python sample.py in this process -----------------------------------------------


def checkpointed(folder: Path, *flags: str) -> Path:
    """A run's folder; in its checkpoint no weight is zero, so that whatever it is told has an effect."""
    s = settings.read_settings([*TINY, *flags, "--out", str(folder)])
    folder.mkdir(parents=True)
    made, generator = state.new_state(s, CPU.device), torch.Generator().manual_seed(1)
    for parameter in made.ema.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    state.save_state(made, s, CPU)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpointed(tmp_path_factory.mktemp("tiny") / "run")


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpointed(tmp_path_factory.mktemp("unconditional") / "run", "--cond_dim", "0")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half the size, for the cascade."""
    flags = "--size 8 --attention_resolutions 4".split()
    return checkpointed(tmp_path_factory.mktemp("small") / "run", *flags)


@dataclasses.dataclass
class Drawn:
    video: Tensor
    known: Tensor
    files: list[Path]
    model: Model
    given: list[tuple[Given, Tensor]]  # each block as it was given, and as it was drawn


def program(folder: Path, *flags: object) -> Drawn:
    """python sample.py --checkpoint folder flags, in this process; what it saved is seen on the way."""
    saved, models, blocks, results = [], [], [], []
    honest = sample.save_video, infill.load_model, infill.draw_block, sample.draw_mode

    def saving(*given: object) -> list[Path]:
        saved.append(honest[0](*given))
        return saved[-1]

    def finishing(*given: object) -> tuple:
        results.append(honest[3](*given))
        return results[-1]

    def loading(*given: object) -> Model:
        models.append(honest[1](*given))
        return models[-1]

    def drawing(denoise: Callable, given: Given, *rest: object) -> Tensor:
        before = dataclasses.replace(given, x=given.x.clone(), known=given.known.clone())
        blocks.append((before, honest[2](denoise, given, *rest)))
        return blocks[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        for module, name, spy in ((sample, "save_video", saving), (sample, "load_model", loading),
                                  (sample, "draw_mode", finishing), (infill, "draw_block", drawing)):
            patch.setattr(module, name, spy)
        patch.setattr(sys, "argv", ["sample.py", "--checkpoint", str(folder), *QUICK, *map(str, flags)])
        config.run(sample.main)
    files, = saved
    whole, video = results[0]
    return Drawn(video, whole.known, files, models[0], blocks)


@pytest.fixture()
def clip(tmp_path: Path) -> Path:
    """A video of 6 frames of 16 px, getting brighter."""
    x = np.linspace(0.1, 0.9, 6)[:, None, None] * np.ones((6, 16, 16))
    np.save(tmp_path / "clip.npy", (255 * x).round().astype(np.uint8))
    return tmp_path / "clip.npy"


MODES = {"generate": 4, "predict": 4, "extend": 16, "interpolate": 4, "super_resolve": 4, "cascade": 4}


def test_every_mode_is_tried() -> None:
    mode, = (field for field in dataclasses.fields(SampleConfig) if field.name == "mode")
    assert set(MODES) == set(mode.type.__args__)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_runs_end_to_end_and_prints_the_three_files_it_wrote(mode: str, tiny: Path, tmp_path: Path,
                                                                    capsys: CaptureFixture) -> None:
    drawn = program(tiny, "--mode", mode, "--out", tmp_path)
    assert capsys.readouterr().out.splitlines()[-3:] == [str(tmp_path / f"{mode}_001.{suffix}")
                                                         for suffix in ("gif", "webp", "png")]
    assert all(file.stat().st_size > 0 for file in drawn.files) and len(list(tmp_path.iterdir())) == 4
    assert drawn.video.shape == (2, 1, MODES[mode], 16, 16)
    clean = [load_video(tmp_path / f"{mode}_001" / f"{i}.npy", 16, 1) for i in (1, 2)]
    assert (torch.stack(clean) - drawn.video).abs().max() < 0.005  # no margins: what goes back in with --input
    assert drawn.video.isfinite().all() and drawn.video.abs().max() < 1.001 and drawn.video.std() > 0.01


def test_what_is_printed_for_input_is_read_by_it(tiny: Path, tmp_path: Path, capsys: CaptureFixture) -> None:
    first = program(tiny, "--out", tmp_path)
    line, = (line for line in capsys.readouterr().out.splitlines() if "for --input: " in line)
    longer = program(tiny, *"--mode extend --frames 6 --input".split(), line.split("for --input: ")[1], "--out", tmp_path)
    assert (longer.video[:, :, :4] - first.video[:1]).abs().max() < 0.005


def test_given_frames_come_back_exactly(tiny: Path, clip: Path, tmp_path: Path) -> None:
    drawn = program(tiny, *"--mode extend --frames 9 --input".split(), clip, "--out", tmp_path)
    assert torch.equal(drawn.video[:, :, :6], load_video(clip, 16, 1).expand(2, -1, -1, -1, -1))


@pytest.mark.parametrize("mode", ["super_resolve", "cascade"])
def test_a_small_input_is_seen_as_it_is(mode: str, tiny: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8), np.uint8)
    np.save(tmp_path / "small.npy", pixels)
    drawn = program(tiny, "--mode", mode, "--input", tmp_path / "small.npy", "--out", tmp_path)
    block = drawn.given[0][0]
    seen = block.low[:, :, block.low_known]
    shown = load_video(tmp_path / "small.npy", 8, 1)[:, :seen.shape[2]]
    assert torch.equal(seen, shown.expand(2, -1, -1, -1, -1))


def test_no_sample_is_written_over(tiny: Path, tmp_path: Path) -> None:
    first = program(tiny, "--out", tmp_path).files
    before = [file.read_bytes() for file in first]
    second = program(tiny, "--out", tmp_path, "--seed", 5).files
    assert not set(first) & set(second) and before == [file.read_bytes() for file in first]


@pytest.mark.parametrize("mode", ["generate", "extend --frames 6", "cascade"])
def test_the_seed_alone_decides_the_video(mode: str, tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    one = program(tiny, "--mode", *mode.split(), "--seed", 3, "--out", tmp_path)
    torch.manual_seed(2)
    two = program(tiny, "--mode", *mode.split(), "--seed", 3, "--out", tmp_path)
    other = program(tiny, "--mode", *mode.split(), "--seed", 4, "--out", tmp_path)
    assert torch.equal(one.video, two.video) and not torch.equal(one.video, other.video)
    assert [f.read_bytes() for f in one.files] == [f.read_bytes() for f in two.files]


@pytest.mark.parametrize("mode", ["generate --delta 0.1", "generate --sampler dpm_solver", "predict --w_r 1",
                                  "extend --frames 6", "interpolate", "super_resolve", "cascade"])
def test_clip_i_of_a_seed_is_the_same_however_many_there_are(mode: str, tiny: Path, tmp_path: Path) -> None:
    flags = ["--mode", *mode.split(), "--out", tmp_path, "--num"]
    one, three = program(tiny, *flags, 1).video, program(tiny, *flags, 3).video
    torch.testing.assert_close(three[:1], one, rtol=0, atol=0.02)  # rounding that the steps amplify
    assert (three[1] - one[0]).abs().max() > 0.1


def test_a_given_clip_is_read_at_the_speed_that_is_asked_for(tiny: Path, clip: Path) -> None:
    model = load_model(checkpoint.newest(tiny), CPU.device)
    s = SampleConfig(mode="predict", text="four", fps=4.0, input=str(clip.with_suffix(".gif")))
    assert sample.stride_of(model, s) == 2 and sample.stride_of(model, SampleConfig()) == 1
    Image.new("L", (16, 16)).save(clip.with_suffix(".gif"), save_all=True, duration=125, append_images=[
        Image.new("L", (16, 16), 20 * n) for n in range(1, 9)])
    x = sample.source(model, s, 4)
    assert [round((value + 1) * 127.5) for value in x[0, 0, :, 0, 0].tolist()] == [0, 40, 80, 120]


@pytest.mark.parametrize("mode", ["interpolate", "cascade"])
def test_a_slow_clip_is_given_frame_by_frame(mode: str, tiny: Path, tmp_path: Path) -> None:
    model = load_model(checkpoint.newest(tiny), CPU.device)
    model.data = dataclasses.replace(model.data, fps=8.0, frame_stride=(2,))
    path = tmp_path / "slow.gif"  # two frames a second
    Image.new("L", (16, 16)).save(path, save_all=True, duration=500, append_images=[
        Image.new("L", (16, 16), 20 * n) for n in range(1, 4)])
    x, frames = sample.slow_clip(model, SampleConfig(mode=mode, num=1, input=str(path)))
    assert frames == 10
    assert [round((value + 1) * 127.5) for value in x[0, 0, :, 0, 0].tolist()] == [0, 20, 40, 60]


def test_a_speed_in_one_caption_leaves_the_others_theirs(tiny: Path) -> None:
    model = load_model(checkpoint.newest(tiny), CPU.device)
    model.data = dataclasses.replace(model.data, frame_stride=(1, 2))
    said = infill.captions(model, SampleConfig(num=3, text="a 2 at 4 fps|a 3"))
    assert said == ["a 2 at 4 fps", "a 3 at 8 fps", "a 2 at 4 fps"]


def test_what_is_not_finite_is_an_error_and_not_black_frames(tiny: Path) -> None:
    model = load_model(checkpoint.newest(tiny), CPU.device)
    model.network.entry.weight.data.fill_(torch.nan)
    s = SampleConfig(num=1, steps=2)
    with pytest.raises(ValueError, match="not finite: try --precision float32"):
        fill(model, s, infill.nothing(model, s, 4))


def test_a_folder_that_cannot_be_written_to_is_known_before_anything_is_drawn(tiny: Path, tmp_path: Path,
                                                                             monkeypatch: MonkeyPatch) -> None:
    model = load_model(checkpoint.newest(tiny), CPU.device)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(sample, "fill", None)
    with pytest.raises(ValueError, match="cannot be written to"):
        sample.draw_mode(model, SampleConfig(out=str(tmp_path)))


@pytest.mark.parametrize("kept", ["generate_001.gif", "generate_001.webp", "generate_001.png", "generate_001"])
def test_a_sample_of_which_one_file_is_left_keeps_its_name(kept: str, tmp_path: Path) -> None:
    (tmp_path / kept).touch()
    assert sample.free_name(tmp_path, "generate") == tmp_path / "generate_002"


def test_many_clips_of_small_frames_lie_in_several_columns(tiny: Path) -> None:
    model = load_model(checkpoint.newest(tiny), CPU.device)
    given = infill.show_small(infill.nothing(model, SampleConfig(num=70), 1), 1, torch.zeros(70, 1, 1, 8, 8))
    s = SampleConfig(mode="super_resolve", num=70, input="x.gif")
    assert sample.sheet(model, s, given, torch.zeros(70, 1, 1, 16, 16))[2] == 2 * 3


def test_w_r_0_takes_no_gradient(tiny: Path, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    flags = ["--mode", "predict", "--out", tmp_path, "--w_r"]
    guided = []
    monkeypatch.setattr(infill, "reconstruction_guided", lambda denoise, *_: guided.append(denoise) or denoise)
    program(tiny, *flags, 0)
    assert not guided
    program(tiny, *flags, 10)
    assert len(guided) == 1


def test_small_frames_stand_beside_the_result_and_the_truth(tiny: Path, tmp_path: Path) -> None:
    drawn = program(tiny, *"--mode cascade --frames 4 --stride 3 --num 2".split(), "--out", tmp_path)
    given, s = drawn.given[0][0], SampleConfig(mode="cascade", num=2, stride=3)
    x, marks, columns = sample.sheet(drawn.model, s, given, drawn.video)
    assert x.shape == (6, 1, 4, 16, 16) and columns == 3
    assert torch.equal(x[1::3], drawn.video)
    assert torch.equal(x[2::3], clips(drawn.model, 4))
    assert torch.equal(x[0::3, ..., ::2, ::2], given.low) and torch.equal(x[0::3, ..., 1::2, 1::2], given.low)
    assert marks[0::3].tolist() == [[True, False, False, True]] * 2 and not marks[1::3].any()
    x, _, columns = sample.sheet(drawn.model, dataclasses.replace(s, input="x.gif"), given, drawn.video)
    assert len(x) == 4 and columns == 2  # of somebody's own input the truth is not known


CHANGES = [  # flags, and flags that must make another video of them
    ("", "--sampler ddim"), ("--sampler ddim", "--sampler dpm_solver"),
    ("", "--steps 4"), ("", "--gamma 0.5"), ("", "--delta 0.1"), ("", "--text four"),
    ("--text four", "--text five"), ("--text four", "--text four --w 2"),
    ("--mode predict", "--mode predict --w_r 0"), ("--mode predict", "--mode predict --w_r 1.5"),
    ("--mode predict --w_r 1", "--mode predict --w_r 1 --text four --w 2"),
    ("--mode super_resolve", "--mode super_resolve --w_r 0.5"),
    ("--mode cascade", "--mode cascade --scale 4"),
    ("--mode predict", "--mode predict --overlap 1"),
    ("--mode extend --frames 8", "--mode extend --frames 8 --overlap 1"),
]


@pytest.mark.parametrize("flags, more", CHANGES)
def test_a_flag_has_an_effect(flags: str, more: str, tiny: Path, tmp_path: Path) -> None:
    one, two = (program(tiny, *words.split(), "--out", tmp_path).video for words in (flags, more))
    assert one.shape == two.shape and (one - two).abs().max() > 1e-3


@pytest.mark.parametrize("flags, shape", [
    ("--num 3", (3, 4)), ("--frames 7", (2, 7)), ("--frames 3", (2, 3)),
    ("--mode predict --frames 9", (2, 9)), ("--mode extend --frames 5", (2, 5)),
    ("--mode interpolate --frames 8 --stride 3", (2, 8)),
    ("--mode interpolate --frames 7 --stride 2", (2, 7)), ("--mode super_resolve --frames 6", (2, 6)),
    ("--mode cascade --frames 6 --stride 2", (2, 6))])
def test_num_and_frames_are_those_of_the_result(flags: str, shape: tuple, tiny: Path, tmp_path: Path) -> None:
    assert program(tiny, *flags.split(), "--out", tmp_path).video.shape[:3:2] == shape


def test_a_model_of_single_frames_draws_them(tmp_path: Path) -> None:
    folder = checkpointed(tmp_path / "run", *"--frames 1 --num_images 0".split())
    assert program(folder, "--out", tmp_path).video.shape == (2, 1, 1, 16, 16)


def test_a_really_trained_checkpoint_is_drawn_from(tmp_path: Path) -> None:
    s = settings.read_settings([*TINY, "--out", str(tmp_path / "run")])
    with train.prepare(s, CPU):
        train.fit(s, CPU)
    assert program(tmp_path / "run", "--out", tmp_path).video.shape == (2, 1, 4, 16, 16)


# ---- what was given ----------------------------------------------------------------------------------------


def clips(model: Model, frames: int, stride: int = 1, num: int = 2) -> Tensor:
    """The clips of the test split that a mode starts from without --input."""
    data = dataclasses.replace(model.data, split="test", frames=frames, frame_stride=(stride,), num_images=0)
    return torch.cat([x for x, _ in itertools.islice(batches(data, 1, 0), num)])


def pooled(x: Tensor, scale: int = 2) -> Tensor:
    """Each scale x scale square of pixels averaged, written otherwise than in sample.py."""
    return sum(x[..., i::scale, j::scale] for i in range(scale) for j in range(scale)) / scale**2


@pytest.mark.parametrize("w_r", [0, 10])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_predict_keeps_the_first_frames(k: int, w_r: int, tiny: Path, tmp_path: Path) -> None:
    drawn = program(tiny, *f"--mode predict --overlap {k} --w_r {w_r}".split(), "--out", tmp_path)
    error = (drawn.video - clips(drawn.model, 4)).abs().amax((0, 1, 3, 4))
    assert (error < 1e-3).tolist() == drawn.known.tolist() == [frame < k for frame in range(4)]


def test_predict_takes_the_first_frames_of_the_input(tiny: Path, clip: Path, tmp_path: Path) -> None:
    drawn = program(tiny, "--mode", "predict", "--input", clip, "--overlap", 2, "--out", tmp_path)
    assert drawn.video[:, 0, :2].mean((0, 2, 3)).tolist() == pytest.approx([-0.8, -0.48], abs=0.01)


@pytest.mark.parametrize("stride, frames", [(2, 7), (2, 6), (3, 4), (3, 8)])
def test_interpolate_keeps_every_strideth_frame(stride: int, frames: int, tiny: Path, tmp_path: Path) -> None:
    flags = f"--mode interpolate --stride {stride} --frames {frames}".split()
    drawn = program(tiny, *flags, "--out", tmp_path)
    assert drawn.known.tolist() == [frame % stride == 0 for frame in range(frames)]
    slow = clips(drawn.model, (frames - 1) // stride + 1, stride)
    assert (drawn.video[:, :, ::stride] - slow).abs().max() < 1e-3  # the test split's clips at that stride
    assert (drawn.video[:, :, 1] - clips(drawn.model, frames)[:, :, 1]).abs().max() > 0.1


def test_extend_keeps_the_input_and_goes_on_after_its_end(tiny: Path, clip: Path, tmp_path: Path) -> None:
    flags = "--mode extend --frames 9 --overlap 1".split()
    drawn = program(tiny, *flags, "--input", clip, "--out", tmp_path)
    brightness = drawn.video[:, 0, :6].mean((0, 2, 3))
    assert brightness.tolist() == pytest.approx(np.linspace(-0.8, 0.8, 6), abs=0.01)
    assert drawn.video.shape[2] == 9 and drawn.known.tolist() == [True] * 6 + [False] * 3
    (given, _), = drawn.given  # one block is enough: frames 5 to 8
    assert given.known.tolist() == [True, False, False, False]
    assert given.x[:, 0, 0].mean().item() == pytest.approx(0.8, abs=0.01)  # the last of the input


@pytest.mark.parametrize("scale", [2, 4])
def test_super_resolve_sees_its_clip_small_and_nothing_else(scale: int, tiny: Path, tmp_path: Path) -> None:
    drawn = program(tiny, "--mode", "super_resolve", "--scale", scale, "--out", tmp_path)
    (given, _), = drawn.given
    assert torch.allclose(given.low, pooled(clips(drawn.model, 4), scale), atol=1e-6)
    assert not given.x.any() and not given.known.any() and given.low_known.all() and not drawn.known.any()


def test_cascade_without_a_base_sees_a_clip_small_and_slow(tiny: Path, tmp_path: Path) -> None:
    drawn = program(tiny, *"--mode cascade --stride 2 --frames 6".split(), "--out", tmp_path)
    slow = pooled(clips(drawn.model, 3, stride=2))
    assert not drawn.known.any()
    assert torch.allclose(drawn.given[0][0].low[:, :, ::2], slow[:, :, :2], atol=1e-6)
    assert not drawn.given[0][0].known.any()
    assert drawn.given[1][0].known.tolist() == [True, True, False, False]


def test_an_input_of_another_size_is_fitted_to_the_model(tiny: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", np.full((5, 30, 50, 3), 255, np.uint8))
    drawn = program(tiny, "--mode", "predict", "--input", tmp_path / "wide.npy", "--out", tmp_path)
    assert drawn.video[:, :, :2].min() > 0.99


@pytest.mark.parametrize("flags, marked", [
    ("", [False] * 4), ("--mode predict --overlap 1", [True, False, False, False]),
    ("--mode interpolate --stride 3", [True, False, False, True])])
def test_given_frames_have_a_coloured_border_in_the_files(flags: str, marked: list, tiny: Path,
                                                          tmp_path: Path) -> None:
    drawn = program(tiny, *flags.split(), "--num", 1, "--out", tmp_path)
    gif, webp, png = (Image.open(file) for file in drawn.files)
    strip = np.asarray(png.convert("RGB"))
    width = strip.shape[1] // 4
    borders = [ORANGE if given else GREY for given in marked]
    assert [tuple(strip[0, width * frame].tolist()) for frame in range(4)] == borders
    assert [tuple(strip[-1, width * (frame + 1) - 1].tolist()) for frame in range(4)] == borders
    for moving in (gif, webp):
        assert np.abs(np.asarray(moving.convert("RGB"))[0, 0].astype(int) - borders[0]).max() < 8


def test_beside_small_frames_the_border_marks_what_was_given_and_not_the_result(tiny: Path, tmp_path: Path) -> None:
    drawn = program(tiny, *"--mode cascade --stride 3 --num 2".split(), "--out", tmp_path)
    strip = np.asarray(Image.open(drawn.files[2]).convert("RGB"))
    height, width = strip.shape[0] // 6, strip.shape[1] // 4  # two clips of three rows
    borders = [[tuple(strip[height * row, width * frame].tolist()) for frame in range(4)] for row in range(6)]
    assert borders == 2 * [[ORANGE, GREY, GREY, ORANGE], [GREY] * 4, [GREY] * 4]


# ---- composition, with a denoiser in closed form -----------------------------------------------------------


class Oracle:
    """In the network's place: predicts the v that a denoiser implies, and counts its calls."""
    def __init__(self, denoise: Callable[[Tensor, Tensor], Tensor], frames: int = 4, size: int = 8):
        self.denoise, self.calls = denoise, 0
        self.config = MagicVideoConfig(size=size, frames=frames, dim_mults=(1,), cond_dim=0)

    def __call__(self, z: Tensor, logsnr: Tensor, cond: Tensor | None) -> Tensor:
        self.calls += 1
        alpha, sigma = signal_and_noise(logsnr)
        return ((alpha * z - self.denoise(z, logsnr)) / sigma).to(z.dtype)

    def model(self) -> Model:
        data = DataConfig(size=self.config.size, frames=self.config.frames)
        return Model(self, data, DiffusionConfig(), TextConfig(cond_dim=0), CPU.device, Pixels())


def smooth_in_time(rho: float = 0.95, std: float = 0.4) -> Callable[[Tensor, Tensor], Tensor]:
    """The denoiser of videos whose pixels are independent, each an autoregressive process over the frames."""
    def denoise(z: Tensor, logsnr: Tensor) -> Tensor:
        f = z.shape[2]
        pixel = Gaussian(torch.zeros(f, dtype=FLOAT), std**2 * correlation(f, rho), (1, f, 1, 1))
        return torch.einsum("i j, b c j h w -> b c i h w", pixel.gain(logsnr).to(z.dtype), z)
    return denoise


def nothing(frames: int, num: int = 1, size: int = 8) -> Given:
    return Given(torch.zeros(num, 1, frames, size, size), torch.zeros(frames, dtype=torch.bool))


def blocks_of(monkeypatch: MonkeyPatch) -> list[tuple[Given, Tensor]]:
    """What fill() gives and gets, block by block."""
    blocks, honest = [], infill.draw_block

    def spy(denoise: Callable, given: Given, *rest: object) -> Tensor:
        seen = dataclasses.replace(given, x=given.x.clone(), known=given.known.clone())
        blocks.append((seen, honest(denoise, given, *rest).clone()))
        return blocks[-1][1]
    monkeypatch.setattr(infill, "draw_block", spy)
    return blocks


STARTS = [  # overlap, frames, where the blocks of 4 begin
    (1, 4, [0]), (1, 5, [0, 1]), (1, 7, [0, 3]), (1, 16, [0, 3, 6, 9, 12]), (1, 3, [0]), (2, 5, [0, 1]),
    (2, 7, [0, 2, 3]), (2, 16, [0, 2, 4, 6, 8, 10, 12]), (3, 5, [0, 1]), (3, 7, [0, 1, 2, 3]),
    (3, 16, [*range(13)])]


@pytest.mark.parametrize("k, frames, starts", STARTS)
def test_blocks_begin_where_they_share_frames_with_the_last_and_end_at_the_end(k: int, frames: int,
                                                                               starts: list) -> None:
    assert block_starts(torch.zeros(frames, dtype=torch.bool), 4, k) == starts


@pytest.mark.parametrize("prefix, k, frames, starts", [
    (6, 1, 9, [5]), (6, 2, 9, [4, 5]), (6, 3, 9, [3, 4, 5]), (6, 2, 16, [4, 6, 8, 10, 12]), (6, 2, 7, [3]),
    (1, 2, 7, [0, 2, 3]), (4, 1, 5, [1])])
def test_after_a_known_beginning_the_first_block_takes_its_end(prefix: int, k: int, frames: int,
                                                               starts: list) -> None:
    assert block_starts(torch.arange(frames) < prefix, 4, k) == starts


def whole(given: Given, drawn: Tensor) -> Tensor:
    """A block as it goes into the video: its known frames as they were given."""
    return torch.where(given.known[:, None, None], given.x, drawn)


@pytest.mark.parametrize("w_r", [0.0, 10.0])
@pytest.mark.parametrize("k, frames, starts", [case for case in STARTS if len(case[2]) > 1 and case[1] < 16])
def test_the_first_frames_of_a_block_are_the_last_of_the_one_before(
        k: int, frames: int, starts: list, w_r: float, monkeypatch: MonkeyPatch) -> None:
    blocks = blocks_of(monkeypatch)
    s = SampleConfig(mode="extend", steps=4, overlap=k, w_r=w_r)
    video = fill(Oracle(smooth_in_time()).model(), s, nothing(frames))
    assert len(blocks) == len(starts) and video.shape[2] == frames
    assert not blocks[0][0].known.any()
    for i in range(1, len(starts)):
        shared = starts[i - 1] + 4 - starts[i]  # k, more in the last block
        assert shared >= k and blocks[i][0].known.tolist() == [frame < shared for frame in range(4)]
        assert torch.equal(blocks[i][0].x[:, :, :shared], whole(*blocks[i - 1])[:, :, -shared:])  # not its first
        assert (blocks[i][1] - blocks[i][0].x)[:, :, :shared].abs().max() < 1e-3  # and they stay
        assert (video[:, :, starts[i] : starts[i] + 4] - blocks[i][1]).abs().max() < 1e-3
    assert (video[:, :, :4] - blocks[0][1]).abs().max() < 1e-3 and video.std() > 0.1


@pytest.mark.parametrize("w_r", [0.0, 1.0])
def test_an_extended_video_goes_on_from_the_end_of_what_was_given(w_r: float) -> None:
    given = nothing(9, num=4)
    given.x[:, :, :6] = torch.linspace(-0.9, 0.9, 6)[:, None, None]
    given.known[:6] = True
    s = SampleConfig(mode="extend", steps=32, overlap=1, num=4, w_r=w_r)
    video = fill(Oracle(smooth_in_time(rho=0.99)).model(), s, given)
    assert (video[:, :, :6] - given.x[:, :, :6]).abs().max() < 1e-3
    new = video[:, :, 6:].mean((0, 1, 3, 4))
    # E[x_6 | x_5] = rho x_5; both methods only approach it, from below
    assert 0.15 < new[0] < 0.99 and new.diff().abs().max() < 0.2, new


def test_a_known_frame_is_not_drawn_again_when_its_block_is() -> None:
    given, s = nothing(7), SampleConfig(mode="interpolate", steps=4, overlap=2)
    given.x[:, :, ::3], given.known[::3] = torch.tensor([0.7, -0.7, 0.3])[:, None, None], True
    before = given.x.clone(), given.known.clone()
    video = fill(Oracle(smooth_in_time()).model(), s, given)
    assert (video[:, :, ::3] - given.x[:, :, ::3]).abs().max() < 1e-3
    assert torch.equal(before[0], given.x) and torch.equal(before[1], given.known)  # not written to


def small_given(frames: int, every: int, num: int = 2) -> Given:
    """Every so many frames seen small, as random squares."""
    given, generator = nothing(frames, num), torch.Generator().manual_seed(3)
    given.low_known = torch.arange(frames) % every == 0
    low = 0.4 * torch.randn(num, 1, frames, 4, 4, generator=generator).clamp(-2, 2)
    given.low = low * given.low_known[:, None, None]
    return given


def small_error(video: Tensor, given: Given) -> float:
    """Root mean square of what a video's seen frames, made small, are off."""
    return (pooled(video) - given.low)[:, :, given.low_known].square().mean().sqrt().item()


@pytest.mark.parametrize("mode, frames, every", [("super_resolve", 4, 1), ("super_resolve", 7, 1),
                                                 ("cascade", 4, 3), ("cascade", 10, 3)])
def test_the_result_made_small_is_what_was_given(mode: str, frames: int, every: int,
                                                 monkeypatch: MonkeyPatch) -> None:
    model, given = Oracle(smooth_in_time(rho=0.7)).model(), small_given(frames, every)
    s = SampleConfig(mode=mode, steps=32, num=2, overlap=2, w_r=1.0)
    without = small_error(fill(model, s, nothing(frames, num=2)), given)
    blocks = blocks_of(monkeypatch)
    error = small_error(fill(model, s, given), given)
    assert error < 0.03 < 0.3 < without, (error, without)
    for before, (given, _) in zip(blocks, blocks[1:]):  # small frames, and the block before
        if given.known.any():
            shared = int(given.known.sum())
            assert given.low is not None and torch.equal(given.x[:, :, :shared], whole(*before)[:, :, -shared:])


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("known", [0, 2])
def test_whole_and_small_frames_are_seen_with_the_same_weight(scale: int, known: int) -> None:
    """The observation's A A^T is the identity for any scale: at high SNR w_r = 1 removes the whole error."""
    given = small_given(4, 3, num=1)
    given.low = pooled(nothing(4).x, scale)
    given.known = torch.arange(4) < known
    s = SampleConfig(scale=scale)

    def observe(x: Tensor) -> Tensor:
        return infill.seen(given, s, x, infill.smaller(x, scale))[0]
    a = torch.func.jacrev(observe)(nothing(4).x).flatten(1)
    a = a[a.any(1)]  # of frames that are not seen nothing counts
    seen_small = [frame for frame in (0, 3) if frame >= known]
    assert len(a) >= known * 64 + len(seen_small) * 64 // scale**2
    small_rows = a[-2 * 64 // scale**2:]
    assert torch.allclose(small_rows @ small_rows.T, torch.eye(len(small_rows)), atol=1e-6)
    if known:
        assert torch.allclose(a[:known * 64] @ a[:known * 64].T, torch.eye(known * 64), atol=1e-6)


def test_frames_that_are_not_known_do_not_guide() -> None:
    """Zero stands for unknown; compared with the prediction, it would pull every frame to grey."""
    given, s = nothing(4), SampleConfig()
    given.known[1] = True
    x = torch.randn(1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = infill.seen(given, s, x, None).view(1, 1, 4, 8, 8)
    assert torch.equal(seen[:, :, 1], x[:, :, 1]) and not seen[:, :, [0, 2, 3]].any()


class Bar:
    """In the progress bar's place."""
    all: list["Bar"] = []

    def __init__(self, total: int, **options: object):
        self.total, self.count = total, 0
        Bar.all.append(self)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, number: int = 1) -> None:
        self.count += number


@pytest.mark.parametrize("flags, calls", [
    ({}, 5), ({"sampler": "ddim"}, 5), ({"sampler": "dpm_solver"}, 5), ({"delta": 0.1}, 9), ({"steps": 1}, 1),
    ({"delta": 0.1, "steps": 1}, 1), ({"frames": 7, "overlap": 1}, 10),
    ({"frames": 7, "delta": 0.1, "overlap": 1}, 18)])
def test_the_network_is_called_as_often_as_the_progress_bar_says(flags: dict, calls: int,
                                                                 monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(infill, "tqdm", Bar)
    Bar.all.clear()
    oracle, s = Oracle(smooth_in_time()), SampleConfig(**{"steps": 5} | flags)
    fill(oracle.model(), s, nothing(s.frames or 4))
    bar, = Bar.all
    assert oracle.calls == bar.count == bar.total == calls


def test_under_autocast_weights_are_cast_once_and_the_clip_stays_the_same(tiny: Path, monkeypatch) -> None:
    s, clips = SampleConfig(steps=2), []
    for cast in (infill.cast_weights, lambda *_: None):
        monkeypatch.setattr(infill, "cast_weights", cast)
        model = load_model(checkpoint.newest(tiny), CPU.device)
        with torch.autocast("cpu", torch.bfloat16):
            clips.append(fill(model, s, sample.generate(model, s)))
        assert (model.network.entry.weight.dtype == torch.bfloat16) == (len(clips) == 1)
        assert model.network.exit[0].weight.dtype == torch.float32  # a norm's
    assert torch.equal(*clips)


@pytest.mark.slow
def test_a_call_of_the_network_while_sampling_waits_for_no_gpu(monkeypatch) -> None:
    from test_cuda import CUDA, PIXELS, built, fake_gpu, read_settings  # which skips where it cannot be

    one = SampleConfig(num=1, frames=4, text="a 3", w=1.0, w_t=1.0, w_t_from=-40.0, delta=0.1)
    waits = []
    with fake_gpu() as lines, Machine(CUDA).autocast():
        s = read_settings(PIXELS)
        made = built(s)
        network = made.ema.eval().requires_grad_(False)
        model = Model(network, s.data, s.diffusion, s.text, CUDA, made.coder)
        for steps in (1, 2):
            lines.lines.clear()
            fill(model, dataclasses.replace(one, steps=steps), sample.generate(model, one))
            waits.append(list(lines.lines))
    assert waits[0] == waits[1]


def test_several_captions_take_turns(tiny: Path) -> None:
    model = load_model(checkpoint.newest(tiny), CPU.device)

    def captions(text: str, num: int) -> list[str]:
        return infill.captions(model, SampleConfig(text=text, num=num))
    assert captions("a 3|a 7", 5) == ["a 3", "a 7", "a 3", "a 7", "a 3"]
    assert captions("a 3", 2) == ["a 3", "a 3"]


def test_a_clip_is_drawn_from_its_own_caption(tiny: Path) -> None:
    model = load_model(checkpoint.newest(tiny), CPU.device)
    both, first = (fill(model, s, sample.generate(model, s)) for s in
                   (SampleConfig(text="a 3 moving up|a 7 moving down", num=2, steps=2),
                    SampleConfig(text="a 3 moving up", num=2, steps=2)))
    assert torch.allclose(both[0], first[0], atol=1e-5) and not torch.allclose(both[1], first[1], atol=1e-3)


def test_a_setting_that_is_younger_than_the_checkpoint_has_its_default(tiny: Path, tmp_path: Path) -> None:
    content = checkpoint.load(checkpoint.newest(tiny))
    del content["settings"]["dropout"]
    checkpoint.save(tmp_path / "older.pt", content)
    assert load_model(tmp_path / "older.pt", CPU.device).network.config.dropout == 0


def test_classifier_free_guidance_mixes_the_caption_and_no_caption(tiny: Path) -> None:
    model = load_model(checkpoint.newest(tiny), CPU.device)
    z, level = torch.randn(1, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(0.5)
    plain, told, guided = (infill.guided(model, s)(z, level) for s in (
        SampleConfig(num=1), SampleConfig(num=1, text="a four"), SampleConfig(num=1, text="a four", w=2.5)))
    assert (plain - told).abs().max() > 1e-3
    torch.testing.assert_close(guided, 3.5 * told - 2.5 * plain, rtol=1e-4, atol=1e-4)  # Eq. 6


def test_temporal_guidance_moves_away_from_frames_that_see_no_other(tiny: Path) -> None:
    model = load_model(checkpoint.newest(tiny), CPU.device)
    z, level = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(0.5)
    plain, away = (infill.guided(model, s)(z, level) for s in (
        SampleConfig(num=2), SampleConfig(num=2, w_t=1.5)))
    single = denoiser(model.network, model.diffusion)
    frames = torch.cat([single(frame, level) for frame in z.split(1, 2)], 2)  # each a clip of its own
    assert (plain - frames).abs().max() > 1e-3
    torch.testing.assert_close(away, 2.5 * plain - 1.5 * frames, rtol=1e-4, atol=1e-4)


def test_temporal_guidance_begins_at_its_log_snr(tiny: Path) -> None:
    model = load_model(checkpoint.newest(tiny), CPU.device)
    z = torch.randn(1, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    plain, late = (infill.guided(model, s) for s in (
        SampleConfig(num=1), SampleConfig(num=1, w_t=1.0, w_t_from=-2.0)))
    differs = [not torch.equal(plain(z, at), late(z, at)) for at in torch.tensor([-3.0, -2.1, -2.0, 0.0])]
    assert differs == [False, False, True, True]


def test_temporal_guidance_without_its_gradient_draws_the_same_frames(tiny: Path, monkeypatch: MonkeyPatch) -> None:
    model = load_model(checkpoint.newest(tiny), CPU.device)
    s = SampleConfig(mode="predict", num=2, steps=4, delta=0.1, w_t=1.0, w_r=10.0)

    def drawn() -> Tensor:
        given = infill.show(infill.nothing(model, s, 4), slice(0, 2), torch.ones(2, 1, 2, 16, 16))
        return fill(model, s, given)
    without = drawn()
    monkeypatch.setattr(infill, "each_alone", lambda network: lambda z, logsnr, cond: network(
        z, logsnr, cond, z.shape[2] - 1))
    torch.testing.assert_close(drawn(), without, rtol=1e-4, atol=1e-4)


def test_temporal_guidance_works_beside_a_caption(tiny: Path) -> None:
    model = load_model(checkpoint.newest(tiny), CPU.device)
    z, level = torch.randn(1, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(0.5)
    said = dict(num=1, text="a four")
    told, both = (infill.guided(model, s)(z, level) for s in (
        SampleConfig(**said, w=2.0), SampleConfig(**said, w=2.0, w_t=1.0)))
    frames = torch.cat([infill.guided(model, s)(frame, level)
                        for s in [SampleConfig(**said)] for frame in z.split(1, 2)], 2)
    torch.testing.assert_close(both, 2 * told - frames, rtol=1e-4, atol=1e-4)


def test_temporal_guidance_needs_image_frames_in_training(tmp_path: Path) -> None:
    model = load_model(checkpoint.newest(checkpointed(tmp_path / "run", "--num_images", "0")), CPU.device)
    with pytest.raises(ValueError, match="image frames"):
        infill.guided(model, s := SampleConfig(num=1, w_t=1.0))


def test_what_is_drawn_is_clipped_after_guidance() -> None:
    given, s = small_given(4, 1), SampleConfig(mode="super_resolve", steps=8, num=2, w_r=1.0)
    given.low = 3 * given.low.sign()  # beyond what a video can show
    assert fill(Oracle(smooth_in_time(std=1.0)).model(), s, given).abs().max() <= 1


# ---- checkpoints -------------------------------------------------------------------------------------------


def test_the_architecture_comes_from_the_checkpoint_never_from_flags(tiny: Path) -> None:
    flags, architecture = ({f.name for f in dataclasses.fields(c)} for c in (SampleConfig, MagicVideoConfig))
    assert flags & architecture == {"frames"}  # of the result
    model = load_model(checkpoint.newest(tiny), CPU.device)
    trained = checkpoint.load(checkpoint.newest(tiny))["settings"]
    assert model.network.config == MagicVideoConfig(**{name: trained[name] for name in architecture})
    assert model.network.config.dim == 8 and model.network.config.size == model.data.size == 16


def test_the_averaged_weights_are_drawn_from(tiny: Path) -> None:
    content = checkpoint.load(checkpoint.newest(tiny))
    weights = load_model(checkpoint.newest(tiny), CPU.device).network.state_dict()
    assert all(torch.equal(weights[name], content["ema"][name]) for name in weights)
    assert not all(torch.equal(weights[name], content["model"][name]) for name in weights)


def test_parameters_are_frozen_dropout_is_off_and_no_graph_is_kept(tiny: Path, tmp_path: Path) -> None:
    drawn = program(tiny, "--mode", "predict", "--text", "four", "--w", 1, "--out", tmp_path)
    assert not drawn.model.network.training
    assert all(not p.requires_grad and p.grad is None for p in drawn.model.network.parameters())
    assert not drawn.video.requires_grad and drawn.video.grad_fn is None


def lookup(monkeypatch: MonkeyPatch, folder: Path, *names: str) -> Callable[..., Path]:
    """choose_checkpoint with folder as working directory and as the project's, in which are these files; a run
    has done the steps that its newest file says, of 10."""
    for age, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
        os.utime(folder / name, (1000 + age, 1000 + age))
        if name.startswith("runs/"):
            config_json = (folder / name).parent / "config.json"
            config_json.write_text(json.dumps(RUN | {"cond_dim": 8 * ("told" in name)}))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sample, "__file__", str(folder / "sample.py"))

    def find(path: str, *asked: str) -> str:
        file, reason = sample.choose_checkpoint(path, *asked)
        return f"{file.resolve().relative_to(folder.resolve())} ({reason})"
    return find


RUN = {"arch": "unet3d", "steps": 10}


def test_without_a_checkpoint_flag_the_newest_run_is_taken(monkeypatch: MonkeyPatch, tmp_path: Path) -> None:
    names = ["pretrained/moving_mnist_32.pt", "runs/z/checkpoint_00000009.pt", "runs/a/checkpoint_00000005.pt",
             "runs/a/checkpoint_00000010.pt", "runs/b/.checkpoint_00000003.pt.1.tmp"]
    found = lookup(monkeypatch, tmp_path, *names)("")
    assert found == "runs/a/checkpoint_00000010.pt (your newest run)"


def test_a_run_that_has_not_done_half_of_its_steps_is_passed_over_and_named(monkeypatch: MonkeyPatch,
                                                                            tmp_path: Path) -> None:
    shipped = "pretrained/moving_mnist_32.pt"
    find = lookup(monkeypatch, tmp_path, shipped, "runs/young/checkpoint_00000004.pt")
    assert find("") == (f"{shipped} (shipped weights, since runs/young has not done half of its --steps: "
                        "--checkpoint runs/young takes it)")
    assert find("runs/young") == "runs/young/checkpoint_00000004.pt (as given)"
    (tmp_path / "runs/young/checkpoint_00000005.pt").write_text("")
    assert find("") == "runs/young/checkpoint_00000005.pt (your newest run)"


def test_a_run_that_cannot_draw_what_is_asked_for_is_passed_over(monkeypatch: MonkeyPatch, tmp_path: Path) -> None:
    kinds = ("told", "silent")
    names = [f"runs/{kind}/checkpoint_00000010.pt" for kind in kinds]
    find = lookup(monkeypatch, tmp_path, *names, "runs/coder/checkpoint_00000010.pt")
    (tmp_path / "runs/coder/config.json").write_text(json.dumps(RUN | {"arch": "autoencoder"}))
    assert find("").startswith("runs/silent/")
    assert find("", "a 3").startswith("runs/told/")


def test_without_runs_the_weights_that_come_with_the_project_are_taken(monkeypatch: MonkeyPatch,
                                                                       tmp_path: Path) -> None:
    shipped = "pretrained/moving_mnist_32.pt"
    find = lookup(monkeypatch, tmp_path, shipped, "runs/started/.checkpoint_00000003.pt.1.tmp")
    assert find("") == find("", "a 3") == f"{shipped} (shipped weights)"


def test_without_any_checkpoint_there_is_one_sentence(monkeypatch: MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint in runs/ or pretrained/"):
        lookup(monkeypatch, tmp_path)("")


def test_a_run_folder_or_a_file_can_be_named(monkeypatch: MonkeyPatch, tmp_path: Path) -> None:
    find = lookup(monkeypatch, tmp_path, "a run/checkpoint_00000001.pt", "a run/checkpoint_00000002.pt",
                  "pretrained/moving_mnist_32.pt", "runs/newer/checkpoint_00000010.pt")
    assert find("a run") == "a run/checkpoint_00000002.pt (as given)"
    assert find("a run/checkpoint_00000001.pt") == "a run/checkpoint_00000001.pt (as given)"


@pytest.mark.slow
def test_a_checkpoint_says_how_to_sample_it_unless_told_otherwise(tmp_path: Path, capsys: CaptureFixture) -> None:
    folder = checkpointed(tmp_path / "run")
    content = checkpoint.load(checkpoint.newest(folder))
    checkpoint.save(checkpoint.newest(folder), content | {"sampling": SAMPLING["bair"]})
    paper = "--steps 3 --delta 0.1 --gamma 0 --sampler ancestral".split()
    as_said = program(folder, *paper, "--out", tmp_path).video
    capsys.readouterr()
    assert torch.equal(program(folder, "--out", tmp_path).video, as_said)
    assert "chosen with it: --delta 0.1 --overlap 1\n" in capsys.readouterr().out
    program(folder, "--sampler", "ddim", "--out", tmp_path)  # whose --delta must not be held against it
    enlarged = program(folder, *"--mode super_resolve --steps 60".split(), "--out", tmp_path)
    low = enlarged.given[0][0].low
    # the paper's w_r of 50 is for whole frames; for small ones it is far beyond what is stable
    assert (pooled(enlarged.video) - low).square().mean() < 0.15 * low.square().mean()


CHOSEN = {"all": {"steps": 25, "delta": 0.1}, "extend": {"w_r": 0.0},
          "generate": {"sampler": "ddim", "delta": 0.0, "w": 3.0}}
MUTE = {"w": 0.0}  # without a caption


@pytest.mark.parametrize("given, changed", [
    ({}, MUTE), ({"steps": 9}, MUTE), ({"w": 1.0, "text": "a 3"}, {}), ({"text": "a 3"}, {}), ({"delta": 0.0}, MUTE),
    ({"gamma": 0.0}, MUTE), ({"gamma": 0.1, "text": "a 3"}, {"sampler": "ancestral"}),
    ({"delta": 0.2, "text": "a 3"}, {"sampler": "ancestral"}), ({"text": ""}, MUTE), ({"mode": "predict"}, {}), ({"mode": "predict", "sampler": "ddim"}, {"delta": 0.0}),
    ({"mode": "extend", "w_r": 2.0}, {}), ({"mode": "extend", "input": "x.gif"}, {}),
    ({"mode": "extend", "delta": 0.0}, {})])
def test_a_flag_changes_what_it_names_and_what_else_must_change_is_printed(given: dict, changed: dict, tiny: Path,
                                                                           capsys: CaptureFixture) -> None:
    model = dataclasses.replace(load_model(checkpoint.newest(tiny), CPU.device), sampling=CHOSEN)
    carried = CHOSEN["all"] | CHOSEN.get(given.get("mode", "generate"), {})
    assert sample.decide(model, given) == carried | changed
    said = capsys.readouterr().out
    for name, value in changed.items():
        assert f"{name} {carried[name]} → {value}" in said
    assert said.count("→") == len(changed)
    SampleConfig(**(carried | changed | given))  # they go together


def test_temporal_guidance_is_not_carried_by_a_model_without_image_frames(tiny: Path) -> None:
    model = dataclasses.replace(load_model(checkpoint.newest(tiny), CPU.device), sampling={"all": {"w_t": 1.0}})
    assert sample.decide(model, {}) == {"w_t": 1.0}
    model.data = dataclasses.replace(model.data, num_images=0)
    assert sample.decide(model, {}) == {}


def test_a_caption_is_the_users_alone(tiny: Path) -> None:
    model = dataclasses.replace(load_model(checkpoint.newest(tiny), CPU.device), sampling={"all": {"text": "a 0", "num": 9}})
    assert sample.decide(model, {}) == {}


@pytest.mark.parametrize("sampling", [{"all": {"steps": "many"}}, {"all": {"steps": 0}}, {"all": 3}, "fast"])
def test_bad_settings_in_a_checkpoint_are_one_sentence(sampling: object, tiny: Path, tmp_path: Path,
                                                       capsys: CaptureFixture) -> None:
    content = checkpoint.load(checkpoint.newest(tiny))
    checkpoint.save(tmp_path / "x.pt", content | {"sampling": sampling})
    assert "x.pt holds no model" in mistaken(tiny, ["--checkpoint", tmp_path / "x.pt"], capsys)


def test_a_checkpoint_may_carry_a_weight_for_captions_without_a_caption(tiny: Path, tmp_path: Path) -> None:
    content = checkpoint.load(checkpoint.newest(tiny))
    checkpoint.save(tmp_path / "x.pt", content | {"sampling": {"all": {"w": 2.0}}})
    checkpoint.save(tmp_path / "y.pt", content | {"sampling": {}})
    plain = program(tmp_path / "y.pt", "--text", "four", "--w", 2, "--out", tmp_path).video
    assert torch.equal(program(tmp_path / "x.pt", "--text", "four", "--out", tmp_path).video, plain)
    program(tmp_path / "x.pt", "--out", tmp_path)  # of no use there, but no mistake


def test_a_checkpoint_cannot_say_where_files_go(tiny: Path) -> None:
    model = dataclasses.replace(load_model(checkpoint.newest(tiny), CPU.device), sampling={
        "all": {"out": "/", "input": "x", "device": "cuda", "steps": 3}})
    assert sample.decide(model, {}) == {"steps": 3}


# ---- mistakes ----------------------------------------------------------------------------------------------


def truncated(tiny: Path, folder: Path) -> list:
    whole = checkpoint.newest(tiny).read_bytes()
    (folder / "half.pt").write_bytes(whole[:len(whole) // 2])
    return ["--checkpoint", folder / "half.pt"]


def foreign(tiny: Path, folder: Path) -> list:
    torch.save({"weights": torch.zeros(3)}, folder / "foreign.pt")
    return ["--checkpoint", folder / "foreign.pt"]


def no_model(tiny: Path, folder: Path) -> list:
    checkpoint.save(folder / "other.pt", {"weights": torch.zeros(3)})
    return ["--checkpoint", folder / "other.pt"]


def other_shape(tiny: Path, folder: Path) -> list:
    content = checkpoint.load(checkpoint.newest(tiny))
    checkpoint.save(folder / "other.pt", content | {"settings": content["settings"] | {"dim": 16}})
    return ["--checkpoint", folder / "other.pt"]


def video(name: str, frames: int, mode: str, *flags: str) -> Callable[[Path, Path], list]:
    def flags_for(tiny: Path, folder: Path) -> list:
        np.save(folder / f"{name}.npy", np.zeros((frames, 16, 16), np.uint8))
        return ["--mode", mode, "--input", folder / f"{name}.npy", *flags]
    return flags_for


def broken_video(tiny: Path, folder: Path) -> list:
    (folder / "broken.gif").write_bytes(b"GIF89a and no more")
    return ["--mode", "predict", "--input", folder / "broken.gif"]


def out_is_a_file(tiny: Path, folder: Path) -> list:
    (folder / "file").write_text("")
    return ["--out", folder / "file"]


MISTAKES: dict[str, tuple[list | Callable, str]] = {
    "unknown mode": (["--mode", "dream"], "--mode"),
    "unknown flag": (["--dim", "32"], "--dim"),
    "negative steps": (["--steps", "-1"], "--steps"),
    "no steps": (["--steps", "0"], "--steps"),
    "no clips": (["--num", "0"], "--num"),
    "gamma above one": (["--gamma", "1.5"], "--gamma"),
    "no such device": (["--device", "cuda:99"], "--device cuda:99"),
    "unknown device": (["--device", "gpu"], "--device gpu"),
    "missing checkpoint": (["--checkpoint", "nowhere"], "nowhere"),
    "folder without checkpoint": (lambda tiny, folder: ["--checkpoint", folder], "there is no checkpoint in"),
    "truncated checkpoint": (truncated, "half.pt"),
    "foreign checkpoint": (foreign, "foreign.pt"),
    "checkpoint without a model": (no_model, "other.pt"),
    "checkpoint of another shape": (other_shape, "other.pt"),
    "w without text": (["--w", "1"], "--w"),
    "overlap too long": (["--mode", "extend", "--overlap", "4"], "--overlap 4"),
    "nothing to predict": (["--mode", "predict", "--frames", "2"], "what follows 2 of 2 frames"),
    "scale that does not divide": (["--mode", "super_resolve", "--scale", "3"], "--scale 3"),
    "delta with ddim": (["--sampler", "ddim", "--delta", "0.1"], "--delta"),
    "gamma with dpm_solver": (["--sampler", "dpm_solver", "--gamma", "0.1"], "--gamma"),
    "more captions than clips": ("--text a|b|c --num 2".split(), "--text has 3 captions, and --num is 2"),
    "small frames that guide nothing": ("--mode super_resolve --w_r 0".split(), "--w_r 0"),
    "input without a mode for it": (video("clip", 6, "generate"), "--input"),
    "input is missing": (["--mode", "predict", "--input", "nowhere.gif"], "nowhere.gif"),
    "input is broken": (broken_video, "broken.gif"),
    "input too short": (video("short", 1, "predict"), "1 frames, 2 needed"),
    "input too short to interpolate": (video("short", 2, "interpolate", "--frames", "16"), "6 needed"),
    "input too long to extend": (video("long", 16, "extend"), "has 16 frames already"),
    "out is a file": (out_is_a_file, "file"),
}


def mistaken(folder: Path, flags: list, capsys: CaptureFixture) -> str:
    """The one line on stderr that the program ends with."""
    with pytest.raises(SystemExit) as stopped:
        program(folder, *flags)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("sample.py: error: "), lines
    return lines[0]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_one_sentence_and_status_2(
        name: str, tiny: Path, monkeypatch: MonkeyPatch, tmp_path: Path, capsys: CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    flags, expected = MISTAKES[name]
    flags = flags(tiny, tmp_path) if callable(flags) else flags
    before = sorted(tmp_path.rglob("*"))
    assert expected in mistaken(tiny, flags, capsys)
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"


@pytest.mark.parametrize("flags", [["--text", "four"], ["--text", "four", "--w", "1"], ["--w", "1"]])
def test_an_unconditional_model_takes_no_text(flags: list, unconditional: Path,
                                              capsys: CaptureFixture) -> None:
    assert "a model trained with captions" in mistaken(unconditional, flags, capsys)


def test_the_real_process_ends_with_status_2_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "sample.py", "--checkpoint", str(tmp_path / "nowhere")]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines() == [f"sample.py: error: there is no checkpoint {tmp_path / 'nowhere'}"]

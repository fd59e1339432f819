"""MagicVideo's blocks against loops over frames, what may depend on what, training and sampling."""
import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import CaptureFixture, MonkeyPatch
from torch import Tensor, nn

import checkpoint
import config
import infill
import sample
import test_unet3d
import train
from data import DataConfig, batches
from experiments.features import load_features, observe
from machine import Machine
from settings import read_settings
from state import new_state
from magicvideo import (Adaptor, CrossAttention, DirectedMix, MagicBlock, MagicVideo, MagicVideoConfig,
                        SpeedEmbedding, build_network)
from test_unet3d import IMAGES, VIDEO, attend_by_loops, changed, close, inputs, noise, nothing, wild
from text import TextConfig, embed
from unet3d import Attention, SpatialMix, UNet3D, isolate

CPU = Machine(torch.device("cpu"), "float32")
TINY = ("--arch magicvideo --preset cpu --latent= --optimizer adam --frame_noise 0 --lr 0.001 "
        "--device cpu --precision float32 --dataset moving_mnist --size 16 "
        "--frames 4 --num_images 1 --digits 1 --dim 8 --dim_mults 1,2 --blocks 1 --head_dim 8 --emb_dim 16 "
        "--emb_layers 1 --patch 1 --attention_resolutions 8 --cond_dim 8 --tokens 12 --batch_size 2 "
        "--steps 2 --warmup 0 --lr 0.01").split()
small = functools.partial(test_unet3d.small, MagicVideoConfig)


def network(**changes) -> MagicVideo:
    return wild(MagicVideo(small(**dict(dim=16) | changes)))


def fitted(flags: list, out: Path) -> dict:
    """The checkpoint of a run with these flags."""
    s = read_settings([*TINY, *map(str, flags), "--out", str(out)])
    with train.prepare(s, CPU):
        train.fit(s, CPU)
    return checkpoint.load(checkpoint.newest(out))


# ---- the adaptor -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames, num_images", [(4, 0), (3, 0), (6, 2), (3, 2)])
def test_an_adaptor_scales_and_shifts_each_channel_of_each_video_frame_and_no_image(frames, num_images):
    adaptor, x = wild(Adaptor(3, small())), noise(2 * frames, 3, 2, 2)
    out = adaptor(x, frames, num_images)
    for clip in range(2):
        for i in range(frames):
            for c in range(3):
                pixel, video = x[clip * frames + i, c], i < frames - num_images
                expected = adaptor.scale[i, c] * pixel + adaptor.shift[i, c] if video else pixel
                assert torch.equal(out[clip * frames + i, c], expected)


def started(model: nn.Module) -> nn.Module:
    """The model with its adaptors as they are at the start of training."""
    for module in model.modules():
        if isinstance(module, Adaptor):
            nn.init.ones_(module.scale), nn.init.zeros_(module.shift)
    return model


def test_adaptors_at_their_start_change_nothing_and_trained_ones_do(monkeypatch):
    fresh = [module for module in MagicVideo(small()).modules() if isinstance(module, Adaptor)]
    assert all((a.scale == 1).all() and (a.shift == 0).all() for a in fresh)
    model, given = network(), (*inputs(), IMAGES)
    trained = model(*given)
    start = started(model)(*given)
    adaptors = [module for module in model.modules() if isinstance(module, Adaptor)]
    assert len(adaptors) == len(fresh) == 2 * 6 + 3  # the third where a block attends
    changes = []
    for adaptor in adaptors:  # each of them is heard
        adaptor.scale[1] += 1
        changes.append(changed(start, model(*given)))
        started(model)
    assert all(1 in frames and not {0, 3, 4} & set(frames) for frames in changes)  # 2 hears of 1
    assert changed(trained, start) == [0, 1, 2]
    monkeypatch.setattr(Adaptor, "forward", lambda self, x, frames, num_images: x)
    assert torch.equal(start, model(*given))


def test_a_clip_of_more_frames_than_the_adaptors_know_is_one_sentence():
    model = network()
    assert model(noise(1, 2, 6, 8, 8), torch.tensor(0.0), None, 2).shape == (1, 2, 6, 8, 8)
    with pytest.raises(ValueError, match=r"^a clip of 5 frames was given, the adaptors know 4$"):
        model(noise(1, 2, 5, 8, 8), torch.tensor(0.0))


# ---- directed attention over time --------------------------------------------------------------------------


def masked_afterwards(q: Tensor, k: Tensor, v: Tensor, sees) -> Tensor:
    """Softmax over what isolate shows, and only then the triangle, without normalising again."""
    out = torch.zeros_like(v)
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if sees(i, j)]
        weights = {j: math.exp(float(q[i] @ k[j]) / math.sqrt(q.shape[1])) for j in seen}
        for j in seen:
            out[i] += (j <= i) * weights[j] / sum(weights.values()) * v[j]
    return out


@pytest.mark.parametrize("mask", ["before", "after"])
@pytest.mark.parametrize("frames, num_images", [(4, 0), (6, 2), (1, 0)])
def test_directed_attention_is_the_sum_over_the_frames_until_then(mask, frames, num_images):
    video = frames - num_images
    q, k, v = (noise(2 * frames, 2, 2, 3, seed=s) for s in range(3))
    out = DirectedMix(mask)(q, k, v, isolate(frames, num_images, q.device))
    for clip in range(2):
        for pixel in range(2):
            for head in range(2):
                one = (slice(clip * frames, (clip + 1) * frames), pixel, head)
                if mask == "before":
                    expected = attend_by_loops(q[one], k[one], v[one], lambda i, j: i == j or j < i < video,
                                               nothing, nothing)
                else:
                    expected = masked_afterwards(q[one], k[one], v[one],
                                                 lambda i, j: i == j or max(i, j) < video)
                assert close(out[one], expected)


def heard(mask: str, frame: int) -> list[int]:
    """The frames of the usual clip that change when one of them does."""
    model, (z, logsnr, cond) = network(mask=mask), inputs()
    other = z.clone()
    other[:, :, frame] = noise(*z[:, :, frame].shape, seed=7)
    return changed(model(z, logsnr, cond, IMAGES), model(other, logsnr, cond, IMAGES))


@pytest.mark.parametrize("frame", range(VIDEO))
def test_a_frame_changes_itself_and_those_after_it_and_no_image(frame):
    assert heard("before", frame) == list(range(frame, VIDEO))


@pytest.mark.parametrize("frame", range(VIDEO))
def test_masked_after_the_softmax_an_earlier_frame_still_hears_how_much_was_masked(frame):
    assert heard("after", frame) == list(range(VIDEO))


@pytest.mark.parametrize("mask", ["before", "after"])
def test_an_image_frame_cannot_change_anything_else(mask):
    assert [heard(mask, image) for image in (VIDEO, VIDEO + 1)] == [[VIDEO], [VIDEO + 1]]


def test_the_first_frames_of_a_clip_are_those_of_a_shorter_clip():
    model, z, cond = network(frames=16, dim=8), noise(1, 2, 16, 8, 8), noise(1, 5, 6, seed=2)
    logsnr = torch.tensor(0.5)
    assert close(model(z, logsnr, cond)[:, :, :8], model(z[:, :, :8], logsnr, cond))


def test_the_video_frames_equal_the_video_without_image_frames_and_each_image_itself_alone():
    model, (z, logsnr, cond) = network(), inputs()
    together = model(z, logsnr, cond, IMAGES)
    assert close(together[:, :, :VIDEO], model(z[:, :, :VIDEO], logsnr, cond[:, 0]))
    with MonkeyPatch.context() as patch:  # an image passes no adaptor, a video of one frame does
        patch.setattr(Adaptor, "forward", lambda self, x, frames, num_images: x)
        for k in range(IMAGES):
            frame = slice(VIDEO + k, VIDEO + k + 1)
            assert close(together[:, :, frame], model(z[:, :, frame], logsnr, cond[:, 1 + k]))


# ---- the block ---------------------------------------------------------------------------------------------


def test_a_block_adds_its_two_branches_of_the_same_input():
    block = wild(MagicBlock(16, 16, True, small()))
    x, emb, tokens = noise(5, 16, 8, 8), noise(1, 5, 16, seed=2), noise(5, 4, 6, seed=3)
    mask = isolate(5, IMAGES, x.device)
    first, second, third = (functools.partial(a, frames=5, num_images=IMAGES) for a in block.adaptors)
    e = block.res.emb(emb[0])[:, :, None, None]
    h = first(block.res.conv1(nn.functional.silu(block.res.norm1(x)))) + e
    h = x + second(block.res.conv2(nn.functional.silu(block.res.norm2(h))))
    attended = third(block.space(h, mask) - h)  # an Attention adds its input, a branch does not
    spatial = attended + block.cross(h + attended, tokens)
    temporal = block.time(h, mask) - h
    assert close(block(x, emb, mask, tokens, IMAGES), h + spatial + temporal)
    assert isinstance(block.space.mix, SpatialMix) and isinstance(block.time.mix, DirectedMix)


def test_magicvideo_is_the_unet_with_another_block_and_another_embedding():
    vdm, magic = UNet3D(small()), MagicVideo(small())
    inner = ("embedding.", "space.", "time.", "cross.", "adaptors.", "attention.")
    shapes = [{name: p.shape for name, p in net.named_parameters() if not any(part in name for part in inner)}
              for net in (vdm, magic)]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 50
    assert sum(isinstance(m, Attention) for m in vdm.modules()) == sum(isinstance(m, Attention)
                                                                      for m in magic.modules())
    assert [type(build_network(arch, small())) for arch in ("unet3d", "magicvideo")] == [UNet3D, MagicVideo]


def test_a_fresh_network_returns_zeros_and_a_fresh_block_changes_nothing():
    z, logsnr, cond = inputs()
    assert torch.equal(MagicVideo(small())(z, logsnr, cond, IMAGES), torch.zeros_like(z))
    x, block = noise(5, 16, 8, 8), MagicBlock(16, 16, True, small())
    assert torch.equal(block(x, noise(1, 5, 16), isolate(5, IMAGES, x.device), noise(5, 4, 6), IMAGES), x)


# ---- captions and speed ------------------------------------------------------------------------------------


def test_cross_attention_is_the_sum_over_the_tokens_that_are_no_padding():
    d, layer = 4, wild(CrossAttention(8, small(head_dim=4)))
    x, tokens = noise(3, 8, 2, 3), noise(3, 5, 6, seed=2)
    tokens[0, 3:], tokens[1, 0], tokens[2] = 0, 0, 0
    h, mixed = layer.norm(x).flatten(2), torch.zeros(3, 6, 8)
    q = torch.einsum("o c, f c n -> f n o", layer.q.weight[:, :, 0, 0], h)
    for frame in range(2):
        kept = tokens[frame][[t for t in range(5) if tokens[frame, t].any()]]
        for channels in (slice(0, d), slice(d, 2 * d)):
            k, v = kept @ layer.k.weight[channels].T, kept @ layer.v.weight[channels].T
            for n in range(6):
                weights = [math.exp(float(q[frame, n, channels] @ key) / math.sqrt(d)) for key in k]
                mixed[frame, n, channels] = sum(w / sum(weights) * value for w, value in zip(weights, v))
    out = torch.einsum("o c, f n c -> f o n", layer.out.weight[:, :, 0, 0], mixed)
    assert close(layer(x, tokens), out.view_as(x)) and torch.equal(layer(x, tokens)[2], torch.zeros(8, 2, 3))


def test_no_condition_is_exactly_c_equal_to_zero():
    model, (z, logsnr, cond) = network(), inputs()
    none = model(z, logsnr, None, IMAGES)
    assert torch.equal(none, model(z, logsnr, torch.zeros(2, 5, 6), IMAGES))
    assert close(none, model(z, logsnr, torch.zeros_like(cond), IMAGES))
    assert close(none, model(z, logsnr, torch.zeros(2, 1, 6), IMAGES))  # nothing but the speed
    assert not close(none, model(z, logsnr, cond, IMAGES))


@pytest.mark.parametrize("token", [0, -1])
def test_each_caption_and_each_speed_changes_its_own_frames_alone(token):
    model, (z, logsnr, cond) = network(), inputs()
    before = model(z, logsnr, cond, IMAGES)
    for caption, frames in enumerate([[0, 1, 2], [3], [4]]):
        other = cond.clone()
        other[:, caption, token] = noise(2, 6, seed=9)
        after = model(z, logsnr, other, IMAGES)
        assert changed(before, after) == frames
        assert (before - after)[:, :, frames].abs().amax((0, 1, 3, 4)).min() > 1e-3  # heard, not only rounded


def test_the_last_token_is_the_speed_and_no_token_of_the_caption():
    model, (z, logsnr, cond) = network(), inputs()
    cond[:, :, :-1] = 0
    said = model(z, logsnr, cond, IMAGES)
    with MonkeyPatch.context() as patch:
        patch.setattr(CrossAttention, "forward", lambda self, x, tokens: torch.zeros_like(x))
        assert torch.equal(said, model(z, logsnr, cond, IMAGES))
    assert not close(said, model(z, logsnr, None, IMAGES))
    cond[:, :, -1] = 0
    assert close(model(z, logsnr, cond, IMAGES), model(z, logsnr, None, IMAGES))


def test_the_speed_is_added_as_linear_silu_linear_of_its_token():
    embedding, tokens = wild(SpeedEmbedding(small())), noise(1, 2, 5, 6)
    tokens[0, 1, -1] = 0
    first, _, second = embedding.speed
    expected = second(nn.functional.silu(first(tokens[0, 0, -1])))
    assert close(embedding.pool(tokens), torch.stack([expected, torch.zeros(16)])[None])


SPOKEN = TextConfig(cond_dim=6, tokens=5)


def test_a_caption_with_a_speed_ends_in_a_sinusoid_of_it():
    plain, said = embed(["a 3 up", "a 3 up at 2.5 fps"], SPOKEN)
    waves = [2.5, 2.5e-2, 2.5e-4]
    expected = torch.tensor([math.sin(v) for v in waves] + [math.cos(v) for v in waves])
    assert torch.equal(plain[:4], said[:4]) and not plain[4].any() and torch.allclose(said[4], expected)
    alone, = embed([" at 8 fps"], SPOKEN)  # a clip without a caption has a speed too
    assert not alone[:4].any() and alone[4].any()


def test_a_speed_in_the_middle_of_a_caption_is_words():
    middle, start = embed(["a 3 at 8 fps up", "at 8 fps"], TextConfig(cond_dim=6, tokens=8))
    assert middle[:6].any(-1).all() and not middle[6:].any()
    assert start[:3].any(-1).all() and not start[3:].any()


@pytest.mark.parametrize("dim", [1, 2, 7, 64])
def test_every_stride_has_a_speed_of_its_own(dim):
    captions = [f"a 3 at {8 / stride:g} fps" for stride in (1, 2, 3, 4, 64)]
    said = embed(captions, TextConfig(cond_dim=dim))[:, -1]
    distance = torch.cdist(said, said) + 9 * torch.eye(5)
    assert distance.min() > 0.02 and said.any(-1).all()


def test_a_long_caption_leaves_room_for_its_speed():
    cut, said = embed(["a b c d e f g", "a b c d e f g at 8 fps"], SPOKEN)
    assert torch.equal(cut[:4], said[:4]) and cut[:4].any(-1).all() and not cut[4].any() and said[4].any()


def test_a_speed_of_any_length_is_a_finite_number_or_words():
    for number in ("9" * 400, "1e999", "0.5e-9", "9999.5"):
        assert embed([f"a 3 at {number} fps"], SPOKEN).isfinite().all()


# ---- several speeds in the data ----------------------------------------------------------------------------


def test_of_several_strides_each_clip_draws_one_and_says_its_speed_and_images_say_none():
    several = DataConfig(size=32, frames=4, digits=1, num_images=1, frame_stride=(1, 2, 4))
    x, captions = next(batches(several, 60, 0))
    assert x.shape == (60, 1, 5, 32, 32)
    said = [clip[0].rpartition(" at ")[2] for clip in captions]
    assert set(said) == {"8 fps", "4 fps", "2 fps"} and not any("fps" in image for _, image in captions)
    again = next(batches(several, 60, 0))
    assert torch.equal(x, again[0]) and captions == again[1]
    way, mass = torch.arange(32.0), x[:, 0, :4] + 1
    centre = torch.stack([(mass.sum(axis) * way).sum(-1) / mass.sum((2, 3)) for axis in (2, 3)], -1)
    moved = (centre[:, 1:] - centre[:, :-1]).norm(dim=-1).mean(1)
    mean = {speed: moved[[s == speed for s in said]].mean() for speed in set(said)}
    assert mean["8 fps"] < mean["4 fps"] < mean["2 fps"]


def test_a_single_stride_says_nothing():
    one = DataConfig(size=16, frames=4, digits=1)
    assert "fps" not in str(next(batches(one, 8, 0))[1])


def test_clips_of_a_folder_are_cut_at_their_strides(tmp_path):
    for name in range(3):  # the grey of a frame is its number; a clip fits stride 3 and not 4
        np.save(tmp_path / f"{name}.npy", np.repeat(np.arange(10, dtype=np.uint8), 64).reshape(10, 8, 8))
    folder = DataConfig(dataset="video_folder", data_dir=str(tmp_path), size=8, frames=4, num_images=1,
                        frame_stride=(1, 3))
    x, captions = next(batches(folder, 12, 0))
    frames = ((x[:, 0, :4, 0, 0] + 1) * 127.5).round().int()
    strides = [8 / float(clip[0].split()[1]) for clip in captions]
    assert [row.diff().unique().tolist() for row in frames] == [[round(s)] for s in strides]
    assert set(map(round, strides)) == {1, 3}
    with pytest.raises(ValueError, match="10 frames, 13 needed"):
        batches(DataConfig(dataset="video_folder", data_dir=str(tmp_path), size=8, frames=4,
                           frame_stride=(1, 4)), 1, 0)


# ---- training and sampling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [dict(dim=9), dict(cond_dim=0), dict(cond_dim=1), dict(frames=3),
                                     dict(patch=2, attention_resolutions=(4,)), dict(scale_shift=True),
                                     dict(attention_resolutions=()), dict(checkpointing=True)])
def test_every_parameter_is_used(changes):
    model, (z, logsnr, cond) = network(**changes), inputs()
    cond = cond[..., :model.config.cond_dim] if model.config.cond_dim else None
    model.requires_grad_(True)(z, logsnr, cond, IMAGES).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []  # or processes wait for it


def test_every_parameter_gets_a_gradient():
    model, (z, logsnr, cond) = network(frames=VIDEO), inputs()
    model.requires_grad_(True)(z, logsnr, cond, IMAGES).square().sum().backward()
    assert [name for name, p in model.named_parameters() if not p.grad.abs().max() > 1e-5] == []


def test_bf16_autocast_agrees_with_float32():
    model, (z, logsnr, cond) = network(), inputs()
    expected = model(z, logsnr, cond, IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(z, logsnr, cond, IMAGES)
    assert out.dtype == torch.float32 and (out - expected).norm() < 0.05 * expected.norm()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two steps on clips of two speeds."""
    out = tmp_path_factory.mktemp("magic") / "run"
    fitted(["--frame_stride", "1,2"], out)
    return out


def test_a_run_trains_saves_and_is_drawn_from(run, tmp_path, monkeypatch):
    model = infill.load_model(checkpoint.newest(run), CPU.device)
    assert type(model.network) is MagicVideo and model.data.frame_stride == (1, 2)
    flags = ["--checkpoint", run, "--mode", "extend", "--frames", 6, "--out", tmp_path,
             "--text", "a 3 moving up",
             "--fps", 4, "--num", 1, "--steps", 2, "--device", "cpu", "--precision", "float32"]
    monkeypatch.setattr("sys.argv", ["sample.py", *map(str, flags)])
    config.run(sample.main)
    assert len(list(tmp_path.glob("extend_001.*"))) == 3


def test_a_run_of_two_steps_moves_weights_and_adaptors(run):
    content = checkpoint.load(checkpoint.newest(run))
    start = new_state(read_settings([*TINY, "--frame_stride", "1,2"]), CPU.device).model.state_dict()
    assert content["step"] == 2 and content["settings"]["arch"] == "magicvideo"
    assert any(not torch.equal(start[name], value) for name, value in content["model"].items())
    assert any("adaptors" in name and not torch.equal(start[name], content["model"][name]) for name in start)


def test_a_speed_is_said_after_each_caption(run):
    model = infill.load_model(checkpoint.newest(run), CPU.device)
    s = infill.SampleConfig(text="a 3|a 7", num=3, fps=4)
    assert infill.captions(model, s) == ["a 3 at 4 fps", "a 7 at 4 fps", "a 3 at 4 fps"]


@pytest.mark.parametrize("flags, expected", [
    ({}, "a 3 at 8 fps"), ({"fps": 4.0}, "a 3 at 4 fps"), ({"text": "a 3 at 2 fps"}, "a 3 at 2 fps")])
def test_where_training_said_every_speed_one_is_said_in_any_case(flags, expected, run, monkeypatch):
    model = infill.load_model(checkpoint.newest(run), CPU.device)
    heard, embed = [], infill.embed
    monkeypatch.setattr(infill, "embed", lambda texts, text: heard.append(texts) or embed(texts, text))
    s = infill.SampleConfig(**{"text": "a 3", "num": 1} | flags)
    infill.guided(model, s)
    alone = dataclasses.replace(model, data=dataclasses.replace(model.data, frame_stride=(1,)))
    infill.guided(alone, s := infill.SampleConfig(text="a 3", num=1))
    assert heard == [[expected], ["a 3"]]


def test_given_frames_have_the_speed_that_is_asked_for(run):
    model = infill.load_model(checkpoint.newest(run), CPU.device)
    slow, fast = (sample.source(model, infill.SampleConfig(num=2, text="a 3", fps=fps), 4) for fps in (8.0, 4.0))
    assert torch.equal(slow[:, :, ::2], fast[:, :, :2])


def test_reconstruction_cannot_reach_frames_that_no_given_one_sees_and_says_so(run, monkeypatch, capsys):
    flags = ["sample.py", "--checkpoint", str(run), "--mode", "predict", "--w_r", "5", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", flags)
    with pytest.raises(SystemExit):
        config.run(sample.main)
    assert "--w_r steers nothing that --mode predict draws" in capsys.readouterr().err
    model = infill.load_model(checkpoint.newest(run), CPU.device)
    for parameter in model.network.parameters():
        parameter.data += 0.05 * noise(*parameter.shape)
    s, replaced = infill.SampleConfig(num=1, steps=2), infill.SampleConfig(num=1)
    given = sample.predict(model, replaced)
    drawn = [infill.fill(model, dataclasses.replace(s, w_r=w_r), given) for w_r in (5.0, 0.0)]
    assert torch.equal(*drawn) and not torch.equal(drawn[0][:, :, -1], torch.zeros(1, 1, 16, 16))


def test_a_directed_network_is_drawn_from_without_a_gradient_that_is_zero(run):
    model = infill.load_model(checkpoint.newest(run), CPU.device)
    assert sample.decide(model, {"mode": "predict"})["w_r"] == 0
    assert sample.decide(model, {"mode": "interpolate"})["w_r"] > 0  # there later frames are given


def test_a_speed_without_a_caption_is_one_sentence(run, monkeypatch, capsys: CaptureFixture):
    monkeypatch.setattr("sys.argv", ["sample.py", "--checkpoint", str(run), "--fps", "4", "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        config.run(sample.main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "--fps" in err and "--text" in err


@pytest.mark.slow
def test_the_shipped_network_goes_as_fast_as_asked():
    """4 clips in 8 steps; measured with more (results/speed.md): 2.5, 4.1 and 7.0 px a frame at 8, 4, 2 fps."""
    pretrained, digits = Path(__file__).parent / "pretrained", (0, 1, 7, 6)
    features = load_features(pretrained / "features_32.pt")
    model = infill.load_model(pretrained / "magicvideo_32.pt", torch.device("cpu"))
    s = infill.SampleConfig(num=4, text="|".join(f"a {digit} moving left" for digit in digits), w=1.0,
                            sampler="dpm_solver", steps=8)

    def seen(fps: float) -> tuple[float, float]:
        clips = infill.fill(model, dataclasses.replace(s, fps=fps), infill.nothing(model, s, 16))
        found = observe(clips, features, 1)
        return (found.places.diff(dim=1).norm(dim=3).mean().item(),
                (found.classes[..., 0] == torch.tensor(digits)[:, None]).float().mean().item())
    (normal, named), (faster, _), (fastest, _) = map(seen, (8.0, 4.0, 2.0))
    assert 1.2 < normal < faster - 0.7 < fastest - 2 and named > 0.7

"""Tests of files.py: animations by their delays, arrays of every kind, and what is written to be read again."""
import numpy as np
import pytest
import torch
from PIL import Image

import files
from data import DataConfig, batches
from files import decode, load_video, probe, save_clips, save_video

NOISE = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
EQUAL = NOISE.copy()
EQUAL[4:12] = EQUAL[4]  # eight frames of which writers make one


def animation(path, clip, duration, **options):
    first, *others = map(Image.fromarray, clip)
    first.save(path, save_all=True, append_images=others, duration=duration, **options)
    return path


def stored(path):
    with Image.open(path) as image:
        return image.n_frames


# ---- delays are the time -----------------------------------------------------------------------------------

KINDS = {"a.gif": {}, "a.webp": {"lossless": True}, "a.apng": {"format": "PNG"}, "b.png": {}}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("delay", [40, 125])
def test_frames_that_a_writer_merged_come_back(tmp_path, name, delay):
    grey = np.repeat(EQUAL[..., :1], 3, 3)
    path = animation(tmp_path / name, grey, delay, **KINDS[name])
    assert stored(path) == 9 and probe(path)[0] == 16
    assert np.array_equal(decode(path, 16, 3), grey.transpose(3, 0, 1, 2))
    assert np.array_equal(decode(path, 16, 3, slice(6, 14, 2)), grey[6:14:2].transpose(3, 0, 1, 2))


@pytest.mark.parametrize("name", KINDS)
def test_fps_samples_an_animation_by_its_delays(tmp_path, name):
    delays = [100, 300, 100, 500, 200, 100, 100, 600]
    path = animation(tmp_path / name, np.repeat(NOISE[:8, ..., :1], 3, 3), delays, **KINDS[name])
    numbers = [0, 1, 1, 1, 2, 3, 3, 3, 3, 3, 4, 4, 5, 6, 7, 7, 7, 7, 7, 7]
    assert probe(path) == (20, 2.0, 1)
    for fps, wanted in ((0, numbers), (10, numbers), (5, numbers[::2]), (2, numbers[::5])):
        shown = np.repeat(NOISE[wanted, ..., :1], 3, 3).transpose(3, 0, 1, 2)
        assert np.array_equal(decode(path, 16, 3, fps=fps), shown), fps


def test_the_commonest_delay_is_one_frame_and_none_is_lost(tmp_path):
    grey = np.repeat(NOISE[:6, ..., :1], 3, 3)
    path = animation(tmp_path / "a.webp", grey, [100, 30, 100, 260, 100, 40], lossless=True)
    assert np.array_equal(decode(path, 16, 3), grey[[0, 1, 2, 3, 3, 3, 4, 5]].transpose(3, 0, 1, 2))


@pytest.mark.parametrize("delay", [0, 10])
@pytest.mark.parametrize("name", KINDS)
def test_delays_that_no_browser_believes_are_a_tenth_of_a_second(tmp_path, name, delay):
    assert probe(animation(tmp_path / name, NOISE, delay, **KINDS[name])) == (16, 1.6, 1)


def test_what_was_drawn_and_saved_has_all_its_frames(tmp_path):
    x = torch.from_numpy(EQUAL).permute(3, 0, 1, 2)[None] / 127.5 - 1
    for path in save_video(x[:, :1], tmp_path / "predict")[:2]:
        assert stored(path) == 9 and load_video(path, 32, 1).shape == (1, 16, 32, 32)


def test_pictures_of_all_kinds_are_frames_of_a_folder(tmp_path):
    kinds = ("png", "bmp", "tif", "tiff", "webp", "pgm", "ppm", "jpg")
    for i, kind in enumerate(kinds):
        options = {"lossless": True} if kind == "webp" else {}
        Image.new("L", (16, 16), 20 * i).save(tmp_path / f"{i}.{kind}", **options)
    Image.fromarray(np.full((16, 16), 160 * 257, np.uint16)).save(tmp_path / "8.tif")
    Image.fromarray(np.full((16, 16), 180 * 257, np.uint16)).save(tmp_path / "9.pgm")
    assert decode(tmp_path, 16, 1)[0, :, 8, 8].tolist() == list(range(0, 200, 20))


def test_floats_in_a_picture_are_refused(tmp_path):
    Image.fromarray(np.full((16, 16), 0.5, np.float32)).save(tmp_path / "0.tif")
    with pytest.raises(ValueError, match="floats"):
        decode(tmp_path, 16, 1)


def test_pictures_of_a_telephone_are_upright(tmp_path):
    tag = Image.Exif()
    tag[0x0112] = 6  # turn it to the right
    lying = np.zeros((16, 16), np.uint8)
    lying[:, :8] = 200  # white on the left, which is up once it is turned
    Image.fromarray(lying).save(tmp_path / "0.png", exif=tag)
    upright = decode(tmp_path, 16, 1)[0, 0]
    assert upright[:8].min() == 200 and upright[8:].max() == 0


def test_a_picture_is_read_whatever_is_said_of_its_upper_side(tmp_path):
    Image.new("L", (16, 16), 40).save(tmp_path / "0.png", exif=b"garbage")
    assert decode(tmp_path, 16, 1)[0, 0, 8, 8] == 40


def test_several_pictures_in_one_file_are_no_frame(tmp_path):
    animation(tmp_path / "0.tif", NOISE, 100)
    with pytest.raises(ValueError, match="0.tif holds several pictures"):
        decode(tmp_path, 16, 1)
    assert probe(tmp_path / "0.tif")[0] == 16  # but a clip


def test_values_beyond_16_bits_are_refused(tmp_path):
    Image.fromarray(np.full((16, 16), 100_000, np.int32)).save(tmp_path / "0.tif")
    with pytest.raises(ValueError, match="beyond 16 bits"):
        decode(tmp_path, 16, 1)


def test_a_folder_of_frames_may_have_the_name_of_its_film(tmp_path):
    (tmp_path / "a.avi").mkdir()
    Image.new("L", (16, 16), 40).save(tmp_path / "a.avi/0.png")
    assert decode(tmp_path / "a.avi", 16, 1)[0, 0, 8, 8] == 40


def test_delays_that_take_turns_are_a_frame_each(tmp_path):
    path = animation(tmp_path / "a.gif", NOISE, [30, 20] * 8)  # 40 frames a second, in hundredths
    assert probe(path)[0] == 16


# ---- arrays ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, low", [(np.float32, -1), (np.float64, 0), (np.float16, -1)])
def test_all_floats_of_a_folder_have_one_range(tmp_path, capsys, kind, low):
    bright = np.linspace(0, 1, 10)[:, None, None] * np.ones((10, 16, 16))
    np.save(tmp_path / "bright.npy", bright.astype(kind))  # it could be of either range
    np.save(tmp_path / "dark.npy", (bright * (1 - low) + low).astype(kind))
    np.save(tmp_path / "bytes.npy", (bright * 255).astype(np.uint8))
    (tmp_path / "test").mkdir()
    (tmp_path / "train").mkdir()
    for path in tmp_path.glob("*.npy"):
        path.rename(tmp_path / "train" / path.name)
    config = DataConfig(dataset="video_folder", data_dir=str(tmp_path), frames=10, size=16)
    levels = {tuple(x[0, :, 0, 0].add(1).mul(127.5).round().int().tolist()) for x in next(batches(config, 40, 0))[0]}
    whole = np.linspace(0, 255, 10)
    expected = {tuple(np.rint(whole).astype(int).tolist()), tuple(whole.astype(np.uint8).tolist()),
                tuple(np.rint((bright[:, 0, 0] - low) / (1 - low) * 255).astype(int).tolist())}
    assert np.abs(np.array(sorted(levels)) - np.array(sorted(expected))).max() <= 1
    assert f"floats are from {low} to 1" in capsys.readouterr().out


def test_of_several_arrays_the_only_one_that_is_a_clip_is_taken(tmp_path):
    np.savez(tmp_path / "a.npz", label=np.zeros(3), frames=NOISE, name=np.array("x"))
    assert np.array_equal(decode(tmp_path / "a.npz", 16, 3), NOISE.transpose(3, 0, 1, 2))
    np.savez(tmp_path / "b.npz", frames=NOISE, mask=NOISE[..., 0])
    with pytest.raises(ValueError, match="b.npz: .*arrays frames, mask"):
        probe(tmp_path / "b.npz")


def test_many_clips_in_one_array_are_refused_with_what_to_do(tmp_path):
    path = tmp_path / "mnist_test_seq.npy"
    np.save(path, np.zeros((20, 7, 64, 64), np.uint8))
    with pytest.raises(ValueError, match=r"shape \(20, 7, 64, 64\).*save each as a file.*array\[:, i\]"):
        probe(path)
    np.save(tmp_path / "0.npy", np.load(path)[:, 0])
    assert probe(tmp_path / "0.npy") == (20, 0, 1)


# ---- what is written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_clean_clips_come_back_exactly_and_can_be_trained_on(tmp_path, channels):
    x = torch.from_numpy(np.stack([EQUAL, NOISE[::-1], np.zeros_like(NOISE)])).permute(0, 4, 1, 2, 3) / 127.5 - 1
    x = x[:, :channels]
    paths = save_clips(x, tmp_path / "new/predict_001")
    assert [path.name for path in paths] == ["1.npy", "2.npy", "3.npy"]
    for clip, path in zip(x, paths):
        assert torch.allclose(load_video(path, 16, channels), clip, atol=1e-6)
        assert torch.allclose(load_video(path, 16, channels, frames=4, stride=5), clip[:, ::5][:, :4], atol=1e-6)
    config = DataConfig(dataset="video_folder", data_dir=str(paths[0].parent), frames=16, size=16, channels=channels)
    drawn = next(batches(config, 9, 0))[0]
    assert all(any(torch.allclose(cut, clip, atol=1e-6) for clip in x) for cut in drawn)


def test_the_given_frames_may_differ_from_clip_to_clip(tmp_path):
    known = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    x = torch.zeros(3, 1, 16, 64, 64)
    for marks in (known, known.tolist(), known.numpy()):
        with Image.open(save_video(x, tmp_path / "v", known=marks)[2]) as strip:
            margins = np.array(strip)[::68, ::68]
        assert ((margins == files.ORANGE).all(-1) == known.numpy()).all()


def test_the_only_frame_that_was_not_given_has_no_orange_margin(tmp_path):
    _, _, strip = save_video(torch.zeros(1, 1, 1, 16, 16), tmp_path / "a", torch.tensor([False]))
    assert np.asarray(Image.open(strip))[0, 0].tolist() == list(files.GREY)


@pytest.mark.parametrize("columns, shape", [(0, (2, 2)), (1, (3, 1)), (3, (1, 3)), (4, (1, 4))])
def test_the_grid_has_as_many_columns_as_are_asked_for(tmp_path, columns, shape):
    with Image.open(save_video(torch.zeros(3, 1, 2, 64, 64), tmp_path / "v", columns=columns)[1]) as image:
        assert (image.height, image.width) == (68 * shape[0], 68 * shape[1])


def test_a_video_plays_at_its_speed(tmp_path):
    gif, webp, _ = save_video(torch.rand(1, 1, 4, 64, 64), tmp_path / "v", fps=5)
    assert probe(gif)[1] == probe(webp)[1] == 0.8


def test_a_clip_is_sampled_at_the_speed_of_a_model(tmp_path):
    path = animation(tmp_path / "a.webp", NOISE, 40, lossless=True)  # 25 a second
    for frames, stride, fps, numbers in ((0, 1, 0, range(16)), (4, 4, 0, range(0, 16, 4)), (3, 1, 5, (0, 5, 10))):
        x = load_video(path, 16, 3, frames, stride, fps)
        assert np.array_equal(((x + 1) * 127.5).round().numpy(), NOISE[[*numbers]].transpose(3, 0, 1, 2))
    with pytest.raises(ValueError, match="a.webp: .*16 frames, 17 needed"):
        load_video(path, 16, 3, 5, 4)

"""Tests of data.py; the oracles are loops written from the papers' conventions and pixels written by hand."""

import builtins
import gzip
import shutil
import struct
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

import data
import files
from data import DataConfig, batches, moving_mnist, video_folder
from files import load_video, save_video

SMALL = DataConfig(size=32, frames=4, num_images=2)
NOISE = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)  # a clip (F, H, W, C)


def take(config, n=3, batch_size=2, seed=5, **options):
    return list(islice(batches(config, batch_size, seed, **options), n))


def same(a, b):
    return all(torch.equal(x, y) and names == other for (x, names), (y, other) in zip(a, b, strict=True))


def to_bytes(x):
    return ((x + 1) * 127.5).round().to(torch.int64).numpy()


def mnist_digits(half):
    raw = gzip.decompress((data.MNIST / f"{half}-images-idx3-ubyte.gz").read_bytes())
    return np.frombuffer(raw[16:], np.uint8).reshape(-1, 28, 28)


def mnist_labels(half):
    raw = gzip.decompress((data.MNIST / f"{half}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(raw[8:], np.uint8)


# ---- the stream ------------------------------------------------------------------------------------------

ALL = ("moving_mnist", "video_folder")


@pytest.fixture
def each(request, tmp_path):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.roll(NOISE, i, axis=1))
    return replace(SMALL, dataset=request.param, data_dir=str(tmp_path))


@pytest.mark.parametrize("each", ALL, indirect=True)
def test_a_stream_can_be_resumed_anywhere(each):
    assert same(take(each, 5)[3:], take(each, 2, start=3))
    assert not same(take(each, 1), take(each, 1, start=1))


@pytest.mark.parametrize("each", ALL, indirect=True)
def test_ranks_share_one_stream(each):
    assert same(take(each, 6)[1::2], take(each, 3, start=1, stride=2))


@pytest.mark.parametrize("each", ALL, indirect=True)
def test_the_video_does_not_depend_on_the_number_of_images(each):
    with_images, without = take(each), take(replace(each, num_images=0))
    for (x, captions), (y, names) in zip(with_images, without):
        assert torch.equal(x[:, :, :4], y) and [c[:1] for c in captions] == names


@pytest.mark.parametrize("each", ALL, indirect=True)
def test_batches_have_the_shape_and_range_promised(each):
    for channels in (1, 3):
        x, captions = take(replace(each, channels=channels), 1)[0]
        assert x.shape == (2, channels, 6, 32, 32) and x.dtype == torch.float32
        assert -1 <= x.min() < -0.6 and 0.5 < x.max() <= 1
        assert [len(c) for c in captions] == [3, 3] and all(isinstance(s, str) for c in captions for s in c)


def test_seed_and_batch_number_are_not_added_up():
    drawn = [take(SMALL, 1, seed=s, start=i)[0][0] for s in range(4) for i in range(4)]
    assert len({x.numpy().tobytes() for x in drawn}) == 16


def test_a_seed_may_be_a_tuple():
    one, same_one, other = (moving_mnist(SMALL, 2, seed)[0] for seed in (7, (7,), (7, 0)))
    assert torch.equal(one, same_one) and not torch.equal(one, other)


def test_two_channels_are_refused():
    with pytest.raises(ValueError, match="channels is 2, but only 1"):
        batches(replace(SMALL, channels=2), 1, 0)


def grey(config, n, rng):
    """A data set of somebody's own: frame f of a clip has the grey that its caption says, and f more."""
    shades = rng.integers(100, 200, n)
    frames = shades[:, None] + np.arange(config.frames) * config.frame_stride[0]
    pixels = torch.from_numpy(frames).byte()[:, None, :, None, None]
    shown = pixels.expand(n, config.channels, config.frames, config.size, config.size)
    return shown, [str(shade) for shade in shades], {"shades": shades}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_function_in_the_table_is_a_data_set_with_images_and_speeds(monkeypatch, workers):
    monkeypatch.setitem(data.SOURCES, "grey", grey)
    config = DataConfig("grey", size=8, frames=5, num_images=2, frame_stride=(1, 4))
    stream = batches(config, 20, 0, workers=workers)
    x, captions = next(stream)
    stream.close()
    assert x.shape == (20, 1, 7, 8, 8) and (x == x[..., :1, :1]).all()
    speeds = set()
    for frames, (caption, *images) in zip(to_bytes(x)[:, 0, :, 0, 0], captions):
        shade, _, fps, _ = caption.split()
        speeds.add(fps)
        assert frames[:5].tolist() == [int(shade) + f * int(8 / float(fps)) for f in range(5)]
        assert all(0 <= frame - int(image) < 5 for frame, image in zip(frames[5:], images))
    assert speeds == {"8", "2"}


def test_captions_say_the_speed_at_the_rate_that_films_are_sampled_at(monkeypatch):
    monkeypatch.setitem(data.SOURCES, "grey", grey)
    _, captions = next(batches(DataConfig("grey", size=8, frames=5, fps=24, frame_stride=(1, 2)), 20, 0))
    assert {caption.split(" at ")[1] for caption, in captions} == {"24 fps", "12 fps"}


def test_a_data_set_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="--dataset mnist is not one of moving_mnist, (.*, )?video_folder$"):
        batches(DataConfig("mnist"), 1, 0)


# ---- moving digits ---------------------------------------------------------------------------------------


def straight_by_loop(start, velocity, room, frames):
    """One coordinate, walked in small exact steps: reflected at 0 and at room."""
    path, position = [], start
    for _ in range(frames):
        path.append(position)
        position += velocity
        if position < 0:
            position, velocity = -position, -velocity
        elif position > room:
            position, velocity = 2 * room - position, -velocity
    return path


def canvas_by_loop(digits, positions, size, combine):
    frame = np.zeros((size, size), np.int64)
    for digit, (y, x) in zip(digits, positions):
        for i in range(len(digit)):
            for j in range(len(digit)):
                frame[int(y) + i, int(x) + j] = combine(frame[int(y) + i, int(x) + j], int(digit[i, j]))
    return frame


def test_digits_fly_straight_at_constant_speed_and_bounce_elastically():
    _, _, truth = moving_mnist(DataConfig(frames=40), 20, seed=1)
    positions = truth["positions"].numpy()
    assert positions.min() >= 0 and positions.max() <= 36
    checked = 0
    for path in positions.transpose(0, 1, 3, 2).reshape(-1, 2, 40):
        if np.hypot(*(path[:, 1] - path[:, 0])) == pytest.approx(3.6):  # no wall met in the first step
            checked += 1
            for axis in path:
                assert np.allclose(axis, straight_by_loop(axis[0], axis[1] - axis[0], 36, 40), atol=1e-9)
    assert checked > 25


def test_at_walls_that_clamp_a_digit_stays_for_a_frame_and_turns_as_first_published():
    free, clamped = (moving_mnist(DataConfig(frames=1 if walls == "bounce" else 40, walls=walls), 20, 1)[2]["positions"]
                     for walls in ("bounce", "clamp"))
    turned = 0
    for start, path in zip(free.reshape(-1, 2), clamped.transpose(2, 3).reshape(-1, 2, 40)):
        for at, axis in zip((start / 36).tolist(), (path / 36).tolist()):
            speed = axis[0] - at
            if 0 < axis[0] < 1:  # else it is not known whether all of the first step was free
                for place in axis:
                    at += speed
                    if at <= 0 or at >= 1:
                        at, speed = min(max(at, 0), 1), -speed
                        turned += 1
                    assert place == pytest.approx(at, abs=1e-9)
    assert turned > 50


def test_a_frame_stride_shows_every_nth_frame_whatever_the_walls():
    for walls in ("bounce", "clamp"):
        whole = moving_mnist(DataConfig(frames=13, walls=walls), 3, 0)[2]["positions"]
        every = moving_mnist(DataConfig(frames=4, walls=walls, frame_stride=(4,)), 3, 0)[2]["positions"]
        assert torch.equal(every, whole[:, :, ::4])


def test_the_speed_is_a_tenth_of_the_free_path():
    for size, side in ((64, 28), (32, 14), (128, 56)):
        positions = moving_mnist(DataConfig(size=size, frames=8), 30, 0)[2]["positions"]
        speed = (positions[:, :, 1:] - positions[:, :, :-1]).norm(dim=-1)
        assert speed.max().item() == pytest.approx(0.1 * (size - side)) == speed.median().item()


def test_starts_cover_the_free_square_and_directions_the_circle():
    _, captions, truth = moving_mnist(DataConfig(frames=1, digits=1), 2000, 3)
    starts = truth["positions"][:, 0, 0]
    assert torch.allclose(starts.mean(0), torch.tensor(18.0).double(), atol=1)
    assert torch.allclose(starts.std(0), torch.tensor(36 / 12**0.5).double(), atol=0.5)
    counts = [sum(c.endswith("moving " + d) for c in captions) for d in data.DIRECTIONS]
    assert sum(counts) == 2000 and min(counts) > 190


def test_a_share_of_the_captions_names_the_digits_alone_and_the_clips_stay():
    named, short = (moving_mnist(DataConfig(frames=2, short_captions=p), 1000, 3) for p in (0.0, 0.3))
    assert torch.equal(named[0], short[0])
    brief = ["moving" not in caption for caption in short[1]]
    assert 0.25 < sum(brief) / 1000 < 0.35
    for one, other, cut in zip(named[1], short[1], brief):
        digits = " and ".join(part.split(" moving ")[0] for part in one.split(" and "))
        assert other == (digits if cut else one)


def crop_alone(x, truth, clip, digit):
    """The digit's pixels in a frame where the other one does not overlap it, if there is one."""
    corners = truth["positions"][clip].long()
    for t in range(corners.shape[1]):
        if (corners[digit, t] - corners[1 - digit, t]).abs().max() >= 28:
            y, x0 = corners[digit, t].tolist()
            return to_bytes(x)[clip, 0, t, y : y + 28, x0 : x0 + 28]
    return None


@pytest.mark.parametrize("split, half", [("train", "train"), ("test", "t10k")])
def test_digits_come_from_their_split_with_their_label(split, half):
    x, _, truth = moving_mnist(DataConfig(split=split), 12, 2)
    digits, labels = mnist_digits(half), mnist_labels(half)
    index = {digit.tobytes(): labels[i] for i, digit in enumerate(digits)}
    crops = [(crop_alone(x, truth, i, d), truth["labels"][i, d]) for i in range(12) for d in range(2)]
    found = [(crop.astype(np.uint8).tobytes(), label) for crop, label in crops if crop is not None]
    assert len(found) > 6 and all(index[crop] == label for crop, label in found)


def test_no_test_digit_is_among_the_training_digits():
    train = {digit.tobytes() for digit in mnist_digits("train")}
    assert len(train) == 60000 and not any(digit.tobytes() in train for digit in mnist_digits("t10k"))


def digits_of(x, truth, i):
    """Both digits of clip i, read off frames without overlap."""
    return [crop_alone(x, truth, i, d) for d in range(2)]


def test_frames_are_the_maximum_of_the_digits_at_truncated_positions():
    x, _, truth = moving_mnist(DataConfig(frames=30), 6, 4)
    checked = 0
    for i in range(6):
        digits = digits_of(x, truth, i)
        for t in range(0, 30, 5) if all(d is not None for d in digits) else ():
            expected = canvas_by_loop(digits, truth["positions"][i, :, t].tolist(), 64, max)
            assert np.array_equal(to_bytes(x)[i, 0, t], expected)
            checked += 1
    assert checked >= 12


def test_where_digits_cross_the_brighter_one_is_seen():
    pair, corner = torch.tensor([[[[200]], [[100]]]], dtype=torch.uint8), torch.zeros(1, 2, 1, 2)
    assert to_bytes(data._paste(DataConfig(size=1), pair, corner)).item() == 200


def test_smaller_sizes_average_the_digit():
    x, _, truth = moving_mnist(DataConfig(size=16, digits=1, frames=1), 1, 0)
    y, x0 = truth["positions"][0, 0, 0].long().tolist()
    crop = to_bytes(x)[0, 0, 0, y : y + 7, x0 : x0 + 7]
    digits = mnist_digits("train")[mnist_labels("train") == truth["labels"].item()]
    assert np.abs(digits.reshape(-1, 7, 4, 7, 4).mean((2, 4)) - crop).max((1, 2)).min() <= 0.5
    assert to_bytes(x).sum() == crop.sum()


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_captions_tell_the_labels_and_the_directions(digits):
    _, captions, truth = moving_mnist(DataConfig(digits=digits), 60, 6)
    steps = truth["positions"][:, :, 1] - truth["positions"][:, :, 0]
    checked = set()
    for caption, labels, step in zip(captions, truth["labels"], steps):
        phrases = caption.split(" and ")
        assert len(phrases) == digits
        for phrase, label, (dy, dx) in zip(phrases, labels.tolist(), step.tolist()):
            assert phrase.startswith(f"a {label} moving ")
            if np.hypot(dy, dx) == pytest.approx(3.6):
                limit = 3.6 * np.sin(np.pi / 8)
                signs = {"up": dy < -limit, "down": dy > limit, "left": dx < -limit, "right": dx > limit}
                words = " ".join(word for word, true in signs.items() if true)
                assert phrase == f"a {label} moving {words}"
                checked.add(words)
    assert len(checked) == 8


def test_frame_stride_shows_every_nth_frame_of_the_longer_clip():
    x, captions, truth = moving_mnist(DataConfig(frames=5, frame_stride=(4,)), 6, 9)
    y, names, longer = moving_mnist(DataConfig(frames=17), 6, 9)
    assert torch.equal(x, y[:, :, ::4]) and captions == names
    assert torch.equal(truth["positions"], longer["positions"][:, :, ::4])


@pytest.mark.parametrize("size", [8, 9, 11, 33, 100])
def test_any_size_keeps_the_digits_on_the_canvas(size):
    assert moving_mnist(DataConfig(size=size, frames=20), 20, 0)[0].max() > 0  # a digit over the edge is an error


def test_image_frames_are_frames_of_other_clips_with_their_own_caption():
    config = replace(SMALL, num_images=4, digits=1)
    (x, captions), (y, names) = take(config, 2, batch_size=8)
    images = torch.cat([x, y])[:, :, 4:]
    assert len({image.numpy().tobytes() for clip in images for image in clip.unbind(1)}) == 64
    assert len({c for clip in captions + names for c in clip[1:]}) > 20
    assert (images > 0).flatten(3).any(-1).all()
    digits, others = [c[0][2] for c in captions], [c[2] for clip in captions for c in clip[1:]][:8]
    assert digits != others  # as they would be if both began with the same random numbers


@pytest.mark.parametrize("make, dataset", [(moving_mnist, ALL[0])])
def test_an_image_frame_is_a_random_frame_of_the_clip_its_caption_describes(make, dataset):
    config = DataConfig(dataset=dataset, frames=8)
    stream = data.Batches(config, 60, 0, data.source_of(config))
    images, names, _ = stream.images(60, data._rng(0), beside={})
    clips, captions, _ = make(config, 60, 0)
    frames = [[t for t in range(8) if torch.equal(a[:, 0], b[:, t])] for a, b in zip(images, clips)]
    assert names == captions and all(frames) and {t for found in frames for t in found} == set(range(8))


# ---- the MNIST files -------------------------------------------------------------------------------------


@pytest.fixture
def mnist_copy(tmp_path, monkeypatch):
    for name in data.SHA256:
        shutil.copy(data.MNIST / name, tmp_path)
    monkeypatch.setattr(data, "MNIST", tmp_path)
    data._read_idx.cache_clear()
    yield tmp_path
    data._read_idx.cache_clear()


def test_an_altered_mnist_file_is_named_and_not_used(mnist_copy):
    moving_mnist(SMALL, 1, 0)
    data._read_idx.cache_clear()
    path = mnist_copy / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1] + b"\0"))
    with pytest.raises(FileNotFoundError, match=r"train-labels-idx1.*not the original.*git checkout mnist/"):
        moving_mnist(SMALL, 1, 0)


def test_a_missing_mnist_file_is_named(mnist_copy):
    (mnist_copy / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-images-idx3-ubyte.gz is missing.*git checkout mnist/"):
        next(batches(replace(SMALL, split="test"), 1, 0))
    next(batches(SMALL, 1, 0))


# ---- clips from a folder ---------------------------------------------------------------------------------


def images_of(clip):
    return [Image.fromarray(frame) for frame in clip]


def write(path, clip, **options):
    """A clip (F, H, W, C) uint8 in the format of path's suffix; without one, a folder of PNG frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, clip)
    elif path.suffix == ".npz":
        np.savez(path, clip)
    elif path.suffix:
        images = images_of(clip)
        images[0].save(path, save_all=True, append_images=images[1:], **options)
    else:
        path.mkdir()
        for i, image in enumerate(images_of(clip), 1):
            image.save(path / f"frame{i}.png")
    return path


def folder(path, **fields):
    fields = {"frames": 4, "size": 16, "channels": 3, **fields}
    return DataConfig(dataset="video_folder", data_dir=str(path), **fields)


def names_of(config):
    return [clip.path.name for clip in video_folder(config)]


LOSSLESS = [("a.webp", {"lossless": True}), ("a.png", {}), ("a.apng", {"format": "PNG"}), ("a.npy", {}),
            ("a.npz", {}), ("a", {})]


@pytest.mark.parametrize("name, options", LOSSLESS)
def test_lossless_formats_come_back_exactly(tmp_path, name, options):
    video = load_video(write(tmp_path / name, NOISE, **options), 16, 3)
    assert video.shape == (3, 10, 16, 16) and np.array_equal(to_bytes(video), NOISE.transpose(3, 0, 1, 2))


def test_a_grey_gif_comes_back_exactly_and_grey_stays_grey(tmp_path):
    grey = NOISE[..., 0]
    path = write(tmp_path / "a.gif", grey, optimize=False, loop=0)
    assert np.array_equal(to_bytes(load_video(path, 16, 1))[0], grey)
    assert np.array_equal(to_bytes(load_video(path, 16, 3)), np.stack([grey] * 3))


def test_a_folder_of_jpegs_is_a_clip_in_natural_order(tmp_path):
    for i in (10, 9, 1, 2):
        Image.new("L", (16, 16), i * 20).save(tmp_path / f"f{i}.JPG")
    (tmp_path / "._f3.jpg").write_bytes(b"not an image")
    assert to_bytes(load_video(tmp_path, 16, 1))[0, :, 8, 8] == pytest.approx([20, 40, 180, 200], abs=2)


def test_arrays_may_be_grey_with_alpha_or_floats(tmp_path):
    grey = NOISE[..., 0]
    signed, unit = (grey / 127.5 - 1).astype(np.float32), grey / 255
    alpha = np.concatenate([NOISE, np.full_like(NOISE[..., :1], 255)], -1)
    for i, array in enumerate([grey, grey[..., None], signed, unit, signed.astype(np.float64)[..., None]]):
        np.save(tmp_path / f"{i}.npy", array)
        assert np.array_equal(to_bytes(load_video(tmp_path / f"{i}.npy", 16, 1))[0], grey), i
    np.savez(tmp_path / "two.npz", labels=np.zeros(3), video=alpha)
    assert np.array_equal(to_bytes(load_video(tmp_path / "two.npz", 16, 3)), NOISE.transpose(3, 0, 1, 2))


@pytest.mark.parametrize("array, reason", [
    (np.zeros((4, 16)), "shape"), (NOISE.transpose(0, 3, 1, 2), "shape"), (np.zeros((0, 8, 8)), "."),
    (np.full((4, 8, 8), 200.0), "neither"), (np.full((4, 8, 8), np.nan), "neither"),
    (np.zeros((4, 8, 8), np.int32), "neither")])
def test_other_arrays_are_refused_with_the_reason(tmp_path, array, reason):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=f"a.npy: broken or unusable, .*{reason}"):
        load_video(tmp_path / "a.npy", 16, 1)


def test_a_pickle_is_never_run(tmp_path):
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    np.save(tmp_path / "a.npy", np.array([Trap()]), allow_pickle=True)
    np.savez(tmp_path / "b.npz", np.array([Trap()]))
    for name in ("a.npy", "b.npz"):
        with pytest.raises(ValueError, match="pickle|Python objects"):
            load_video(tmp_path / name, 16, 1)
    assert not ran.exists()


def test_sixteen_bit_palette_and_transparent_images_are_read_right(tmp_path):
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp * 257).save(tmp_path / "16.png")
    palette = Image.fromarray(ramp.astype(np.uint8)).convert("P")
    palette.putpalette([c for i in range(256) for c in (255 - i, i, 0)])
    palette.save(tmp_path / "p.png")
    alpha = np.stack([np.full((16, 16), 200), ramp], -1).astype(np.uint8)
    Image.fromarray(alpha, "LA").save(tmp_path / "la.png")
    assert np.array_equal(to_bytes(load_video(tmp_path / "16.png", 16, 1))[0, 0], ramp)
    assert np.array_equal(to_bytes(load_video(tmp_path / "p.png", 16, 3))[:, 0], [255 - ramp, ramp, 0 * ramp])
    assert np.abs(to_bytes(load_video(tmp_path / "la.png", 16, 1))[0, 0] - 200 * ramp / 255.0).max() <= 1


def test_a_wide_clip_is_fitted_by_its_short_side_and_cropped_in_the_middle(tmp_path):
    wide = np.zeros((3, 16, 48, 3), np.uint8)
    wide[:, :, :16], wide[:, :, 16:32], wide[:, :, 32:] = (255, 0, 0), NOISE[:3], (0, 0, 255)
    middle = to_bytes(load_video(write(tmp_path / "a.npy", wide), 16, 3))
    assert np.array_equal(middle, NOISE[:3].transpose(3, 0, 1, 2))
    tall = np.zeros((3, 96, 32, 3), np.uint8)
    tall[:, 31:65] = (10, 200, 30)
    middle = to_bytes(load_video(write(tmp_path / "b.npy", tall), 16, 3))
    assert middle.shape == (3, 3, 16, 16) and [set(c.ravel()) for c in middle] == [{10}, {200}, {30}]


def test_a_folder_is_searched_for_clips_and_folders_of_frames(tmp_path):
    for name in ("a.gif", "sub/b.webp", "sub/deep/c.npy", "d", "sub/e"):
        write(tmp_path / name, NOISE)
    write(tmp_path / "f.png", NOISE)  # animated, so a clip
    images_of(NOISE)[0].save(tmp_path / "sub/preview.png")  # a still beside clips is no clip
    write(tmp_path / ".hidden/g.gif", NOISE)
    write(tmp_path / ".h.gif", NOISE)
    (tmp_path / "notes.txt").write_text("nothing")
    data_dir = folder(tmp_path, split="train")
    found = sorted(names_of(data_dir) + names_of(replace(data_dir, split="test")))
    assert found == ["a.gif", "b.webp", "c.npy", "d", "e", "f.png"]


def test_one_clip_in_ten_is_for_testing_and_never_trained_on_whatever_others_come_or_go(tmp_path):
    for i in range(60):
        write(tmp_path / f"{i}.npy", NOISE)
    train, test = names_of(folder(tmp_path)), names_of(folder(tmp_path, split="test"))
    assert sorted(train + test) == sorted(f"{i}.npy" for i in range(60)) and 2 <= len(test) <= 12
    (tmp_path / test[0]).unlink(), (tmp_path / train[0]).unlink()
    write(tmp_path / "0a.npy", NOISE)
    video_folder.cache_clear()
    again = set(names_of(folder(tmp_path, split="test"))) - {"0a.npy"}
    assert again == set(test[1:])


def test_a_clip_that_a_list_names_twice_is_on_one_side(tmp_path):
    names = [f"{i}.npy" for i in range(30)]
    for name in names:
        write(tmp_path / name, NOISE)
    (tmp_path / "all.txt").write_text("".join(f"{name} {word}\n" for name in names for word in ("one", "two")))
    listed = folder(tmp_path, list=str(tmp_path / "all.txt"))
    train, test = names_of(listed), names_of(replace(listed, split="test"))
    assert len(train) + len(test) == 60 and not set(train) & set(test) and test


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["b", "c", "d"]])
def test_few_clips_are_divided_too(names, tmp_path):
    for name in names:
        write(tmp_path / f"{name}.npy", NOISE)
    assert names_of(folder(tmp_path)) and names_of(folder(tmp_path, split="test"))


def test_a_split_does_not_depend_on_the_length_asked_for(tmp_path):
    for i in range(1, 61):
        write(tmp_path / f"{i}.npy", NOISE[: 10 if i % 3 else 4])
    train = {n for frames in (4, 8) for n in names_of(folder(tmp_path, frames=frames))}
    test = {n for frames in (4, 8) for n in names_of(folder(tmp_path, frames=frames, split="test"))}
    assert test and not train & test


def test_one_clip_serves_both_splits(tmp_path):
    write(tmp_path / "a.npy", NOISE)
    assert names_of(folder(tmp_path)) == names_of(folder(tmp_path, split="test")) == ["a.npy"]


def test_subfolders_train_and_test_are_the_splits(tmp_path):
    for name in ("train/a.npy", "train/b.npy", "test/c.npy", "other/d.npy"):
        write(tmp_path / name, NOISE)
    assert names_of(folder(tmp_path)) == ["a.npy", "b.npy"]
    assert video_folder(folder(tmp_path, split="test")) == [(tmp_path / "test/c.npy", "", 10, 1)]


def test_where_there_is_no_test_val_is_it(tmp_path):
    for name in ("train/a.npy", "val/c.npy"):
        write(tmp_path / name, NOISE)
    assert names_of(folder(tmp_path)) == ["a.npy"] and names_of(folder(tmp_path, split="test")) == ["c.npy"]
    (tmp_path / "test").mkdir()
    write(tmp_path / "test/d.npy", NOISE)
    video_folder.cache_clear()
    assert names_of(folder(tmp_path)) == ["a.npy"] and names_of(folder(tmp_path, split="test")) == ["d.npy"]


def test_a_picture_in_an_array_is_no_clip(tmp_path):
    np.save(tmp_path / "a.npy", NOISE[0])  # (H, W, 3)
    with pytest.raises(ValueError, match="a.npy.*A picture is no clip"):
        load_video(tmp_path / "a.npy", 16, 3)


def test_a_caption_is_a_text_file_or_the_class_folder_or_nothing(tmp_path):
    for name in ("a.npy", "b.npy", "jump/c.npy", "jump/d", "e"):
        write(tmp_path / name, NOISE)
    (tmp_path / "b.txt").write_text("a red\nball \n")
    (tmp_path / "jump/d.txt").write_text("two dogs", encoding="utf-8-sig")
    (tmp_path / "e.txt").write_text("frames")
    captions = {}
    for split in ("train", "test"):
        captions |= {clip.path.name: clip.caption for clip in video_folder(folder(tmp_path, split=split))}
    assert captions == {"a.npy": "", "b.npy": "a red ball", "c.npy": "jump", "d": "two dogs", "e": "frames"}


def test_unusable_clips_are_skipped_and_named_once(tmp_path, capsys):
    write(tmp_path / "train/good.npy", NOISE)
    write(tmp_path / "train/short.npy", NOISE[:3])
    write(tmp_path / "train/half.webp", NOISE, lossless=True)
    whole = (tmp_path / "train/half.webp").read_bytes()
    (tmp_path / "train/half.webp").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train/empty.gif").write_bytes(b"")
    (tmp_path / "train/text.mp4").write_bytes(b"this is no film")
    (tmp_path / "train/zip.npz").write_bytes(b"PK\3\4" + b"\0" * 50)
    frame = write(tmp_path / "train/frames", NOISE) / "frame4.png"
    frame.write_bytes(frame.read_bytes()[:60])
    (tmp_path / "test").mkdir()
    for _ in range(2):
        x, _ = next(batches(folder(tmp_path), 30, 0))
    seen, *decoded = capsys.readouterr().err.splitlines()
    assert x.shape == (30, 3, 4, 16, 16) and torch.equal(x, next(batches(folder(tmp_path), 30, 0))[0])
    assert seen.startswith("skipped 5 of 7 clips: ") and "short.npy: 3 frames, 4 needed" in seen
    for name in ("empty.gif", "half.webp", "text.mp4", "zip.npz"):  # their headers tell
        assert seen.count(f"{name}: broken") == 1, (name, seen)
    assert len(decoded) == 2, decoded  # one in each stream
    assert all(line.startswith("skipped, 1 so far: ") and "frames: broken" in line for line in decoded)


def test_an_oversized_clip_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "a.npy", NOISE)
    monkeypatch.setattr(files, "MAX_FRAME", 255)
    with pytest.raises(ValueError, match="a.npy.*oversized"):
        load_video(tmp_path / "a.npy", 16, 1)
    monkeypatch.setattr(files, "MAX_FRAME", 256)
    load_video(tmp_path / "a.npy", 16, 1)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + b"\0\0\0\0"


def test_a_decompression_bomb_is_not_decoded(tmp_path):
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)))
    with pytest.raises(ValueError, match="a.png: broken or unusable"):
        load_video(tmp_path / "a.png", 16, 1)
    np.lib.format.open_memmap(tmp_path / "b.npy", "w+", np.uint8, (1, 8193, 8193))  # a sparse file
    with pytest.raises(ValueError, match="b.npy.*oversized"):
        load_video(tmp_path / "b.npy", 16, 1)


def test_other_image_formats_are_refused_whatever_their_name(tmp_path):
    Image.new("L", (16, 16)).save(tmp_path / "a.gif", format="TGA")
    with pytest.raises(ValueError, match="cannot identify"):
        load_video(tmp_path / "a.gif", 16, 1)


def test_a_folder_without_usable_clips_is_an_error_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="no usable clip for the train split"):
        batches(folder(tmp_path), 1, 0)
    write(tmp_path / "a.npy", NOISE)
    with pytest.raises(ValueError, match="no usable clip.*skipped 1 of 1 clips: .*a.npy: 10 frames, 11 need"):
        batches(folder(tmp_path, frames=6, frame_stride=(2,)), 1, 0)
    batches(folder(tmp_path, frames=4, frame_stride=(3,)), 1, 0)


@pytest.mark.parametrize("where", ["", "nowhere/at/all"])
def test_a_missing_data_dir_is_an_error_at_the_start(where):
    with pytest.raises(ValueError, match=f"data_dir is '{where}'"):
        batches(folder(where), 1, 0)


def test_a_missing_clip_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="nothing.gif"):
        load_video(tmp_path / "nothing.gif", 16, 1)


def test_films_without_av_are_skipped_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"")
    real = builtins.__import__

    def without_av(name, *args, **kwargs):
        if name == "av":
            raise ImportError("No module named 'av'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(ValueError, match="skipped 1 of 1.*a.mp4.*pip install av"):
        video_folder(folder(tmp_path))


def test_cuts_start_anywhere_and_take_every_nth_frame(tmp_path):
    write(tmp_path / "a.npy", NOISE)
    whole = NOISE.transpose(3, 0, 1, 2)
    cuts = to_bytes(next(batches(folder(tmp_path, frames=3, frame_stride=(4,)), 40, 0))[0])
    starts = [[s for s in (0, 1) if np.array_equal(cut, whole[:, s : s + 9 : 4])] for cut in cuts]
    assert all(starts) and {s for found in starts for s in found} == {0, 1}


def test_flip_mirrors_about_half_of_the_clips(tmp_path):
    write(tmp_path / "a.npy", NOISE[:4])
    whole = NOISE[:4].transpose(3, 0, 1, 2)
    plain, flipped = (to_bytes(next(batches(folder(tmp_path, flip=f), 60, 0))[0]) for f in (False, True))
    mirrored = [np.array_equal(cut, whole[..., ::-1]) for cut in flipped]
    assert all(np.array_equal(cut, whole) for cut in plain)
    assert 15 < sum(mirrored) < 45
    assert all(m or np.array_equal(cut, whole) for m, cut in zip(mirrored, flipped))


def test_image_frames_come_from_other_clips_of_the_folder(tmp_path):
    (tmp_path / "test").mkdir()
    for i in range(5):
        write(tmp_path / f"train/class{i}/{i}.npy", np.full((6, 8, 8), 50 * i, np.uint8))
    x, captions = next(batches(folder(tmp_path, channels=1, num_images=3), 40, 0))
    shown = to_bytes(x)[:, 0, :, 0, 0] // 50
    assert (shown[:, 4:] != shown[:, :1]).all() and set(shown[:, 4:].ravel()) == set(range(5))
    assert captions == [[f"class{i}" for i in [row[0], *row[4:]]] for row in shown.tolist()]


# ---- files to look at ------------------------------------------------------------------------------------


def decoded(path):
    image = Image.open(path)
    frames = []
    for i in range(getattr(image, "n_frames", 1)):
        image.seek(i)
        frames.append(np.array(image.convert("RGB")))
    return np.stack(frames).astype(int)


def video_of(clip):
    return torch.from_numpy(clip).permute(3, 0, 1, 2).float().div(127.5).sub(1)


def test_saved_webp_and_strip_hold_the_exact_pixels(tmp_path):
    x = torch.stack([video_of(np.roll(NOISE, i, 1)) for i in range(3)])
    gif, webp, png = save_video(x, tmp_path / "new/folder/v")
    assert [p.name for p in (gif, webp, png)] == ["v.gif", "v.webp", "v.png"]
    frames, strip = decoded(webp), decoded(png)[0]
    assert frames.shape == (10, 136, 136, 3) and strip.shape == (3 * 68, 10 * 68, 3)
    for i in range(3):
        big = np.kron(np.roll(NOISE, i, 1), np.ones((1, 4, 4, 1), int))
        y, left = 68 * (i // 2) + 2, 68 * (i % 2) + 2
        assert np.array_equal(frames[:, y : y + 64, left : left + 64], big)
        for t in range(10):
            assert np.array_equal(strip[68 * i + 2 : 68 * i + 66, 68 * t + 2 : 68 * t + 66], big[t])
    assert (frames[:, 68:, 68:] == 64).all()  # the empty place in the grid


def test_a_saved_gif_is_exact_in_grey_and_close_in_colour(tmp_path):
    x, _, _ = moving_mnist(DataConfig(), 4, 0)
    gif, webp, _ = save_video(x, tmp_path / "grey")
    assert np.array_equal(decoded(gif), decoded(webp))
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    clip = np.stack([np.stack([np.roll(np.tile(ramp, (64, 1)), t, 1), np.tile(ramp[:, None], (1, 64)),
                               np.full((64, 64), 90)], -1) for t in range(8)]).astype(np.uint8)
    gif, webp, _ = save_video(video_of(clip)[None], tmp_path / "colour")
    assert np.abs(decoded(gif) - decoded(webp)).mean() < 8 and decoded(gif).shape == decoded(webp).shape


def test_all_frames_of_a_gif_share_one_palette(tmp_path):
    still = NOISE.copy()
    still[:, :, :8] = NOISE[:1, :, :8]  # the left half stands still while the right one changes
    frames = decoded(save_video(video_of(still)[None], tmp_path / "v")[0])
    assert (frames[:, :, :34] == frames[:1, :, :34]).all() and (frames[0] != frames[1]).any()


def test_a_gif_loops_at_the_speed_asked_for(tmp_path):
    gif, webp, _ = save_video(video_of(NOISE)[None], tmp_path / "v", fps=5)
    for path in (gif, webp):
        with Image.open(path) as image:
            image.load()
            assert image.info["loop"] == 0 and image.info["duration"] == 200


def test_values_are_rounded_and_never_wrap(tmp_path):
    values = [-9.0, -1.002, -0.9999, 0.002, 0.9999, 1.01, 30.0, float("nan"), float("inf"), float("-inf")]
    x = torch.tensor(values).view(1, 1, 10, 1, 1).expand(1, 1, 10, 64, 64)
    strip = decoded(save_video(x, tmp_path / "v")[2])[0]
    assert strip[34, 34::68, 0].tolist() == [0, 0, 0, 128, 255, 255, 255, 0, 255, 0]


@pytest.mark.parametrize("channels", [1, 3])
def test_known_frames_have_an_orange_margin_in_all_files(tmp_path, channels):
    x = video_of(NOISE)[None, :channels].repeat(2, 1, 1, 1, 1)
    known = torch.arange(10) < 3
    for as_given in (known, known.tolist()):
        gif, webp, png = save_video(x, tmp_path / "v", known=as_given)
        for frames in (decoded(gif), decoded(webp)):
            corner = np.abs(frames[:, 0, 0] - files.ORANGE).max(-1)
            assert (corner[:3] < 40).all() and (corner[3:] > 100).all()
        strip = decoded(png)[0][::68, ::68]
        assert [tuple(c) == files.ORANGE for c in strip[1]] == known.tolist()
    assert not (decoded(save_video(x, tmp_path / "w")[2]) == files.ORANGE).all(-1).any()


def test_a_suffix_of_the_path_is_replaced_and_a_dot_is_not(tmp_path):
    x = video_of(NOISE)[None]
    assert save_video(x, tmp_path / "v.gif")[1].name == "v.webp"
    assert save_video(x, str(tmp_path / "w_0.5"))[0].name == "w_0.5.gif"


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    x = video_of(NOISE)[None]
    gif = save_video(x, tmp_path / "v")[0]
    old = gif.read_bytes()

    def half(self, path, **options):
        path.write_bytes(b"GIF8")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save_video(-x, tmp_path / "v")
    assert gif.read_bytes() == old


def test_one_frame_and_one_clip_can_be_saved(tmp_path):
    paths = save_video(video_of(NOISE[:1])[None], tmp_path / "v")
    assert all(decoded(path).shape == (1, 68, 68, 3) for path in paths)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.gif", "v.png", "v.webp"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_shows_the_same_videos():
    for dataset in ("moving_mnist",):
        config = replace(SMALL, dataset=dataset)
        (x, captions), (y, names) = take(config, 1)[0], take(config, 1, device="cuda")[0]
        assert y.device.type == "cuda" and torch.allclose(x, y.cpu(), atol=1e-6) and captions == names

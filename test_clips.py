"""Tests of clips.py: what is found in a folder or a list, what is noted of it, and which cuts are drawn."""
import json
import multiprocessing
import os
import pickle
import re
import shutil
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clips
from data import Batches, DataConfig, batches, source_of, video_folder
from files import load_video, probe
from test_films import film, grey

NOISE = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)


def config(path, **fields):
    return DataConfig(dataset="video_folder", data_dir=str(path),
                      **{"frames": 4, "size": 16, "channels": 3, **fields})


def array(path, frames=10):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.roll(NOISE[:frames], len(path.stem), 1))
    return path


# ---- films that are broken -----------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_stays_flat_over_a_thousand_films(tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    first = film(tmp_path / "0.mp4", preset="ultrafast")
    for i in range(1, 1000):
        os.link(first, tmp_path / f"{i}.mp4")
    stream, peaks = batches(config(tmp_path, size=32), 4, 0), []
    for _ in range(500):
        next(stream)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[-1] - peaks[100] < 4096, (peaks[100], peaks[-1])  # kilobytes; a clip alone is 192 as floats


def sound(path):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        out.mux([*stream.encode(frame), *stream.encode()])


def test_films_that_are_none_are_named_and_the_rest_is_used(tmp_path, capsys):
    train = tmp_path / "train"
    train.mkdir()
    (tmp_path / "test").mkdir()
    whole = film(train / "good.mp4", g="30")
    (train / "half.mp4").write_bytes(whole.read_bytes()[:3000])
    (train / "link.mkv").symlink_to(film(tmp_path / "outside.mkv", g="30"))
    (train / "dangling.mp4").symlink_to(tmp_path / "nowhere.mp4")
    sound(train / "sound.mp4")
    film(train / "one.mp4", 1)
    (train / "text.mp4").write_text("no film")
    (train / "empty.mov").write_bytes(b"")
    assert {clip.path.name for clip in video_folder(config(tmp_path))} == {"good.mp4", "link.mkv"}
    said = capsys.readouterr().err
    for name in ("sound.mp4", "one.mp4", "text.mp4", "empty.mov", "half.mp4", "dangling.mp4"):
        assert said.count(f"{name}: ") == 1, (name, said)
    assert "no moving pictures in it" in said and "Errno" not in said and said.count("\n") == 1


def test_what_is_broken_inside_is_named_once_and_replaced_by_the_next_clip(tmp_path, capsys):
    (tmp_path / "test").mkdir()
    for i in range(5):
        array(tmp_path / f"train/{i}.npy")
    broken = tmp_path / "train/2.npy"
    looked = config(tmp_path)
    video_folder(looked)
    broken.write_bytes(broken.read_bytes()[:500])  # after it was looked at
    streams = [list(islice(batches(looked, 8, 0), 4)) for _ in range(2)]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("skipped, 1 so far: ") and "2.npy" in line for line in lines)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(*streams))
    three = load_video(tmp_path / "train/3.npy", 16, 3)
    cuts = [cut for x, _ in streams[0] for cut in x]
    threes = sum(any(torch.equal(cut, three[:, s:s + 4]) for s in range(7)) for cut in cuts)
    assert len(cuts) == 32 and threes > 32 / 5  # of five, it has the share of two
    for path in (tmp_path / "train").glob("*.npy"):
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="none of 5 clips can be decoded: .*npy: broken"):
        next(batches(looked, 8, 0))


def test_a_folder_that_grows_and_shrinks_while_it_is_read(tmp_path, capsys):
    (tmp_path / "test").mkdir()
    for i in range(3):
        array(tmp_path / f"train/{i}.npy")
    stream = batches(looked := config(tmp_path), 8, 0)
    next(stream)
    (tmp_path / "train/half.npy").write_bytes((tmp_path / "train/1.npy").read_bytes()[:500])
    (tmp_path / "train/1.npy").unlink()
    before = [x for x, _ in islice(stream, 3)]
    assert "1.npy: broken or unusable, No such file" in (said := capsys.readouterr().err) and "half" not in said
    assert all(torch.equal(x, y) for x, (y, _) in zip(before, islice(batches(looked, 8, 0, start=1), 3)))
    array(tmp_path / "train/half.npy")  # complete at last, and a new run looks at it again
    video_folder.cache_clear()
    assert [clip.path.name for clip in video_folder(looked)] == ["0.npy", "2.npy", "half.npy"]


# ---- the index -------------------------------------------------------------------------------------------


def test_a_clip_is_looked_at_once_and_again_when_it_has_changed(tmp_path, monkeypatch):
    paths, looked = [array(tmp_path / f"{i}.npy") for i in range(4)], []
    monkeypatch.setattr(clips, "probe", lambda path: looked.append(path) or probe(path))
    assert [*map(list, clips.look(paths, tmp_path))] == [[10, 0, 1]] * 4 and sorted(looked) == paths
    assert [*map(list, clips.look(paths, tmp_path))] == [[10, 0, 1]] * 4 and len(looked) == 4
    array(paths[2], frames=7)
    assert clips.look(paths, tmp_path)[2] == (7, 0, 1) and looked[4:] == [paths[2]]
    shutil.copytree(tmp_path, tmp_path / "moved", copy_function=shutil.copy2)
    moved = [tmp_path / "moved" / path.name for path in paths]
    clips.look(moved, tmp_path / "moved")
    assert len(looked) == 5  # the index goes with the data


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"0.npy": 3}', '{"0.npy": [[1, 2], "x", {}]}'])
def test_a_damaged_index_is_made_anew(tmp_path, damage):
    path = array(tmp_path / "0.npy")
    (tmp_path / ".clips.json").write_text(damage)
    assert clips.look([path], tmp_path) == [(10, 0, 1)]
    kept = json.loads((tmp_path / ".clips.json").read_text())
    assert [kept[key] for key in kept if key.startswith("0.npy (")] == [[10, 0, 1]]


def test_without_an_index_where_the_data_cannot_be_written_to(tmp_path, monkeypatch):
    def refusing(index):
        raise PermissionError(index)

    path = array(tmp_path / "0.npy")
    monkeypatch.setattr(clips, "replacing", refusing)
    assert [clips.look([path], tmp_path) for _ in range(2)] == [[(10, 0, 1)]] * 2
    assert [p.name for p in tmp_path.iterdir()] == ["0.npy"]


# ---- lists -----------------------------------------------------------------------------------------------


def listed(root, text, split="train", name="list.txt"):
    (root / name).write_text(text)
    return [(str(path.relative_to(root)), caption) for path, caption in clips.list_videos(str(root), str(root / name), split)[0]]


def test_ucfs_list_as_it_is_distributed(tmp_path):
    for name in ("Archery/v_a.avi", "Diving/v_b.avi", "Diving/v_c.avi"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "testlist01.txt").write_text("Diving/v_c.avi\n")
    text = "Archery/v_a.avi 1\r\nDiving/v_b.avi 2\r\n"
    assert listed(tmp_path, text, name="trainlist01.txt") == [("Archery/v_a.avi", "Archery"),
                                                              ("Diving/v_b.avi", "Diving")]
    assert listed(tmp_path, text, "test", "trainlist01.txt") == [("Diving/v_c.avi", "Diving")]


def test_kinetics_csv_as_it_is_distributed(tmp_path):
    film = tmp_path / "air drumming/-6bJOK_1_000014_000024.mp4"
    film.parent.mkdir()
    film.write_bytes(b"")
    text = ("label,youtube_id,time_start,time_end,split,is_cc\n"
            'air drumming,-6bJOK_1,14,24,train,0\n"a, b",gone0000000,0,10,train,0\n')
    (tmp_path / "test.csv").write_text(text)
    found = listed(tmp_path, text, name="train.csv")
    assert found == [("air drumming/-6bJOK_1_000014_000024.mp4", "air drumming"),
                     ("gone0000000_000000_000010.mp4", "a, b")]


def test_kinetics_csv_without_labels_has_clips_without_captions(tmp_path):
    text = "youtube_id,time_start,time_end,split\nabcdefghijk,0,10,test\n"
    assert listed(tmp_path, text, name="train.csv") == [("abcdefghijk_000000_000010.mp4", "")]


@pytest.mark.parametrize("text, words", [
    ("label,youtube_id,time_start,time_end\na,b,1\n", "train.csv: a row of it ends too soon"),
    ("youtube_id,start,end\nb,1,2\n", "train.csv: it has no column 'time_start'"),
    ("youtube_id,time_start,time_end\nb,1.5,2\n", "train.csv: invalid literal")])
def test_another_csv_than_kinetics_is_one_sentence(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        listed(tmp_path, text, name="train.csv")


def test_numbers_of_frames_and_classes_are_no_captions(tmp_path):
    (tmp_path / "walk").mkdir()
    array(tmp_path / "walk/v1.npy")
    assert listed(tmp_path, "walk/v1.npy 163 1\n") == [("walk/v1.npy", "walk")]


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch, capsys):
    array(tmp_path / "a/0.npy")
    array(tmp_path / "b/0.npy")
    honest = os.scandir

    def scandir(path):
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return honest(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert clips.list_videos(str(tmp_path), "", "train") == ([(tmp_path / "b/0.npy", "b")], 0)
    assert capsys.readouterr().err == f"left out, {tmp_path / 'a'}: Permission denied\n"


@pytest.mark.parametrize("folder, out, inside", [
    ("d", "d/a.gif", True), ("d", "d/runs/1/samples/a.gif", True), ("d", "runs/a.gif", False),
    ("d", "d/.runs/a.gif", False), ("split", "split/runs/a.gif", False), ("split", "split/train/a.gif", True)])
def test_what_would_be_a_clip_of_the_folder(tmp_path, folder, out, inside):
    (tmp_path / "split/train").mkdir(parents=True)
    (tmp_path / "split/test").mkdir()
    assert clips.holds(str(tmp_path / folder), tmp_path / out) == inside


def test_a_folder_of_frames_may_be_the_working_directory(tmp_path, monkeypatch):
    for number in range(3):
        Image.new("L", (16, 16), number).save(tmp_path / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    assert clips.list_videos(".", "", "train") == ([(Path("."), "")], 0)


def test_a_list_of_captions_and_of_paths_with_blanks(tmp_path):
    lines = ["a b/c d.mp4 a red ball", "e.webm,two dogs", "frames/1 walking", '"f g.mp4","a, b"', "", "h.npy"]
    (tmp_path / "h.txt").write_text("from the text file")
    named = dict(listed(tmp_path, "\n".join([*lines, *(f"{i}.mp4" for i in range(9))])))
    named |= dict(listed(tmp_path, "\n".join([*lines, *(f"{i}.mp4" for i in range(9))]), "test"))
    expected = {"a b/c d.mp4": "a red ball", "e.webm": "two dogs", "frames/1": "walking", "f g.mp4": "a, b",
                "h.npy": "from the text file"}
    assert expected.items() <= named.items()


def test_what_a_list_names_and_is_not_there_is_named(tmp_path, capsys):
    array(tmp_path / "a.npy")
    (tmp_path / "train.txt").write_text("a.npy\nb.npy\n")
    (tmp_path / "test.txt").write_text("a.npy\n")
    found = video_folder(config(tmp_path, list=str(tmp_path / "train.txt")))
    assert [clip.path.name for clip in found] == ["a.npy"]
    assert "skipped 1 of 2 clips: " in (said := capsys.readouterr().err) and "b.npy" in said
    with pytest.raises(ValueError, match="nowhere.txt cannot be read"):
        video_folder(config(tmp_path, list=str(tmp_path / "nowhere.txt")))


# ---- workers ---------------------------------------------------------------------------------------------


def test_workers_change_nothing_but_the_speed(tmp_path):
    for i in range(12):
        array(tmp_path / f"{i}.npy")
    films = config(tmp_path, num_images=2, flip=True, frame_stride=(1, 2))
    for c in (films, replace(films, dataset="moving_mnist", channels=1)):
        alone = list(islice(batches(c, 3, 0, 1, 2), 4))
        many = list(islice(batches(c, 3, 0, 1, 2, workers=2), 4))
        assert all(torch.equal(a, b) and x == y for (a, x), (b, y) in zip(alone, many, strict=True))


def test_what_a_worker_finds_broken_is_one_sentence_too(tmp_path, capsys):
    (tmp_path / "test").mkdir()
    path = array(tmp_path / "train/a.npy")
    video_folder(c := config(tmp_path))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="^none of 1 clips can be decoded: [^\n]*a.npy: broken[^\n]*$"):
        next(batches(c, 2, 0, workers=2))
    assert not multiprocessing.active_children()  # one that stays would hold the whole program at its end


def test_workers_that_do_not_share_memory_make_the_same_batches(tmp_path):
    for i in range(3):
        array(tmp_path / f"{i}.npy")
    made = Batches(config(tmp_path), 4, 0, source_of(config(tmp_path)))
    x, captions, _ = pickle.loads(pickle.dumps(made))[5]  # as spawned ones do
    assert torch.equal(x, made[5][0]) and captions == made[5][1]


# ---- folders as people have them -----------------------------------------------------------------------------


def both(root, listing=""):
    """The names of all clips that are found."""
    return sorted(str(path.relative_to(root)) for split in ("train", "test")
                  for path, _ in clips.list_videos(str(root), listing, split)[0])


def test_folders_behind_links_are_read_once_and_loops_end(tmp_path):
    array(tmp_path / "elsewhere/one/b.npy")
    array(tmp_path / "data/a.npy")
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/again").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere/one/back").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere/own").symlink_to(tmp_path / "elsewhere/one")
    assert both(tmp_path / "data") == ["a.npy", "linked/one/b.npy"]
    (tmp_path / "only").symlink_to(tmp_path / "data")
    assert both(tmp_path / "only") == ["a.npy", "linked/one/b.npy"]


def test_what_is_left_out_is_counted_by_kind_in_one_line(tmp_path, capsys):
    array(tmp_path / "a.npy")
    (tmp_path / "a.txt").write_text("a caption")
    (tmp_path / ".hidden").write_text("")
    (tmp_path / "frames").mkdir()
    for name in ("b.MPEG4", "c.swf", "d.swf", "README", "frames/1.png", "frames/2.png", "frames/notes.doc"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "e.png").write_bytes(b"")  # beside a clip
    (tmp_path / "captions.txt").write_text("of no clip")
    assert both(tmp_path) == ["a.npy", "frames"]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"left out of {tmp_path}: 1 .doc, 1 .mpeg4, 1 .png, 2 .swf, 1 .txt, 1 without suffix", said
    clips.list_videos(str(tmp_path / "frames"), "", "train")
    (tmp_path / "frames/notes.doc").unlink()
    capsys.readouterr()
    clips.list_videos(str(tmp_path / "frames"), "", "train")
    assert capsys.readouterr().err == ""


def test_films_of_all_kinds_beside_each_other_are_used(tmp_path, capsys):
    kinds = ("mp4", "mpg", "ts", "flv", "wmv", "3gp", "m4v")
    codecs = {"mpg": "mpeg1video", "wmv": "wmv2", "3gp": "mpeg4"}
    (tmp_path / "test").mkdir()
    (tmp_path / "train").mkdir()
    for kind in kinds:
        container = {"container": "mp4"} if kind == "m4v" else {}
        film(tmp_path / "train" / f"a.{kind}", 12, codecs.get(kind, "libx264"), **container)
    assert [clip.path.suffix[1:] for clip in video_folder(config(tmp_path))] == sorted(kinds)
    assert capsys.readouterr().err == ""


def test_a_webp_that_stands_still_is_a_frame_and_one_that_moves_is_a_clip(tmp_path):
    still, *others = map(Image.fromarray, NOISE)
    (tmp_path / "frames").mkdir()
    for i in range(4):
        still.save(tmp_path / "frames" / f"{i}.webp")
    still.save(tmp_path / "moves.webp", save_all=True, append_images=others)
    assert both(tmp_path) == ["frames", "moves.webp"]


@pytest.mark.parametrize("fields, words", [
    ({"channels": 1}, ("19 clips to train, 1 held out", "the middle", "16 x 16 px", "grey", "8 to 25 frames")),
    ({"fps": 5.0, "split": "test", "frames": 2}, ("1 clips to test, 19 held out", "the middle", "at 5 frames"))])
def test_a_start_says_what_is_held_out_cropped_turned_grey_and_how_fast_it_is(tmp_path, capsys, fields, words):
    first, *others = map(Image.fromarray, NOISE)
    for i in range(10):
        first.save(tmp_path / f"{i}.gif", save_all=True, append_images=others, duration=40)
        first.save(tmp_path / f"{i}.webp", save_all=True, append_images=others, duration=125)
    video_folder(config(tmp_path, **fields))
    line, = capsys.readouterr().out.splitlines()
    assert all(word in line for word in words), line
    assert ("grey" in line) == (fields.get("channels") == 1)


def test_a_start_shows_the_longest_caption(tmp_path, capsys):
    for name, words in (("a", "short"), ("b", "one of five\nwords altogether")):
        array(tmp_path / "train" / f"{name}.npy")
        (tmp_path / "train" / f"{name}.txt").write_text(words)
    (tmp_path / "test").mkdir()
    video_folder(config(tmp_path))
    assert "captions of up to 5 words: “one of five words altogether”" in capsys.readouterr().out


def test_a_clip_is_as_long_as_it_is_at_the_rate_asked_for(tmp_path, capsys):
    first, *others = map(Image.fromarray, NOISE)
    first.save(tmp_path / "a.gif", save_all=True, append_images=others, duration=40)  # ten frames, 0.4 s
    array(tmp_path / "b.npy")  # knows no time
    for fps, frames in ((0, [10, 10]), (12.5, [5, 10]), (50, [20, 10])):
        found = [*video_folder(config(tmp_path, fps=fps, split="test")), *video_folder(config(tmp_path, fps=fps))]
        assert [clip.frames for clip in sorted(found)] == frames
    starts = set()
    for x in next(batches(config(tmp_path, fps=50, split="test"), 200, 0))[0]:
        starts.add(tuple(x[0, :, 0, 0].tolist()))
    assert len(starts) == 17
    with pytest.raises(ValueError, match="a.gif: 2 frames, 4 needed"):
        video_folder(config(tmp_path, fps=5, split="test"))


def test_a_broken_clip_is_named_once_whatever_is_said_of_it(tmp_path, capsys, monkeypatch):
    (tmp_path / "test").mkdir()
    for i in range(2):
        array(tmp_path / f"train/{i}.npy")
    whole = clips.decode

    def decode(path, *given):
        if path.name == "0.npy":
            raise ValueError(f"{path}: broken or unusable, at {given[2].start}")
        return whole(path, *given)

    monkeypatch.setattr(clips, "decode", decode)
    next(batches(config(tmp_path), 30, 0))
    assert capsys.readouterr().err.count("0.npy: broken") == 1


# ---- captions as people write them ---------------------------------------------------------------------------


def test_lists_are_csv_files_with_quoted_captions_and_further_columns(tmp_path):
    (tmp_path / "test.csv").write_text("")
    text = ('a.mp4,"a ball, red",20,10.0\n"b, c.mp4", "say ""hi""",3\nd.mp4,"two\nlines"\n'
            "e.mp4,plain,7\nf.mp4 free words, with a comma\ng.mp4\ta tab\n\nframes 1,walking\nh.mp4,7,\n")
    (tmp_path / "frames 1").mkdir()
    assert listed(tmp_path, text, name="train.csv") == [
        ("a.mp4", "a ball, red"), ("b, c.mp4", 'say "hi"'), ("d.mp4", "two lines"), ("e.mp4", "plain"),
        ("f.mp4", "free words, with a comma"), ("g.mp4", "a tab"), ("frames 1", "walking"), ("h.mp4", "")]


def test_a_quote_that_never_ends_is_named(tmp_path):
    with pytest.raises(ValueError, match="list.txt: unexpected end of data"):
        listed(tmp_path, 'a.mp4,"a ball\nb.mp4,two\nc.mp4,three\n')


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_and_lists_may_have_a_byte_order_mark(tmp_path, encoding):
    array(tmp_path / "a.npy")
    (tmp_path / "a.txt").write_text("ein größerer Ball 球", encoding)
    assert clips.list_videos(str(tmp_path), "", "train")[0][0][1] == "ein größerer Ball 球"
    (tmp_path / "a.csv").write_text('a.npy,"größer, 球"', encoding)
    assert clips.list_videos(str(tmp_path), str(tmp_path / "a.csv"), "train")[0][0][1] == "größer, 球"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le"])
@pytest.mark.parametrize("listing", ["", "b.txt"])
def test_a_caption_in_another_encoding_is_named(tmp_path, encoding, listing):
    array(tmp_path / "a.npy")
    word = "größer" if encoding == "latin-1" else "plain"
    (tmp_path / "a.txt").write_bytes(word.encode(encoding))
    (tmp_path / "b.txt").write_bytes(f"a.npy {word}".encode(encoding))
    with pytest.raises(ValueError, match=f"{listing or 'a.txt'} cannot be read as UTF-8"):
        clips.list_videos(str(tmp_path), listing and str(tmp_path / listing), "train")


# ---- a soak --------------------------------------------------------------------------------------------------


BROKEN = (lambda whole: b"", lambda whole: whole[:100], lambda whole: whole[:len(whole) // 2],
          lambda whole: whole[:len(whole) * 9 // 10], lambda whole: b"no film" * 100, lambda whole: bytes(len(whole)),
          lambda whole: whole[500:], lambda whole: whole[:len(whole) // 3] + bytes(len(whole) - len(whole) // 3),
          lambda whole: whole[:40] + b"\xff" * 400 + whole[440:], lambda whole: whole[::-1])


@pytest.mark.slow
def test_a_soak_of_two_thousand_films(tmp_path, capsys):
    """Kinds share the starts evenly, memory stays flat, and each broken film is named once."""
    kinds = ({"name": "a.mp4", "g": "12", "bf": "2"}, {"name": "b.mkv", "g": "20"}, {"name": "c.webm"},
             {"name": "d.avi"}, {"name": "e.mpg"}, {"name": "f.ts", "g": "12"}, {"name": "g.gif"}, {"name": "h.mp4"})
    codecs = {"c.webm": "libvpx-vp9", "d.avi": "mpeg4", "e.mpg": "mpeg1video"}
    (tmp_path / "test").mkdir()
    (tmp_path / "train").mkdir()
    for kind in kinds:
        name = kind.pop("name")
        if name == "g.gif":
            first, *others = [Image.new("L", (32, 32), 10 * i) for i in range(24)]
            first.save(tmp_path / name, save_all=True, append_images=others, duration=40)
        else:
            times = [40 * i + 10 * (i % 3) for i in range(24)] if name == "h.mp4" else None
            film(tmp_path / name, 24, codecs.get(name, "libx264"), size=(32, 32), times=times,
                 picture=lambda i, *size: grey(5 * i, *size), **kind)
    broken = set()
    for i in range(2000):
        source = sorted(tmp_path.glob("[a-h].*"))[i % 8]
        path = tmp_path / "train" / f"{i}{source.suffix}"
        content = source.read_bytes()
        if i % 100 == 57:
            content = BROKEN[i // 100 % 10](content)
            broken.add(path.name)
        path.write_bytes(content)
    stream, peaks = batches(config(tmp_path, size=8, channels=1), 4, 0, workers=2), []
    starts, tenth = np.zeros(21, int), int(os.environ.get("SOAK", 5000)) // 10
    for step, (x, _) in enumerate(islice(stream, 10 * tenth)):
        for first in x[:, 0, 0].add(1).mul(127.5).mean((1, 2)):
            starts[min(20, round(first.item() / 10))] += 1
        if step % tenth == tenth - 1:
            processes = [os.getpid(), *(process.pid for process in multiprocessing.active_children())]
            peaks.append(sum(int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1])
                             for process in processes))
    stream.close()
    said = capsys.readouterr().err
    named = Counter(re.findall(r"train/(\d+\.\w+): ", said))
    assert set(named) <= broken and set(named.values()) == {1}, named
    assert len(named) >= 14, (named, broken)  # some can be read in spite of it
    assert max(peaks[2:]) - peaks[1] < 16 * 1024, peaks  # kilobytes, of three processes
    value = ((starts - starts.mean()) ** 2 / starts.mean()).sum()
    assert value < 20 + 4 * 40**0.5, starts  # chi square of 20 degrees of freedom
    with capsys.disabled():
        print(f"{starts.sum()} cuts: chi square {value:.0f} of 20, memory {peaks} kB, {len(named)} named")

"""Faults done to real processes and files: what is lost, what is said, and how it goes on.

python -m pytest test_faults.py --slow --kills 50 --fuzz 60 kills a run fifty times and damages many files.
"""
import ctypes
import dataclasses
import errno
import io
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytest import CaptureFixture, MonkeyPatch

import checkpoint
import config
import data
import infill
import settings
import state
import sample
import train
from files import load_video, save_video
from machine import Machine
from progress import log, read_log
from test_train import HERE, TINY, fitted, learned, processes, program, same

RANDOM = [*TINY, *("--dropout 0.2 --cond_dropout 0.5 --ema 0.3 --lr 0.01 --log_every 1 --preview_every 40 "
                   "--save_every 2").split()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints 2 and 4; to be copied, not changed."""
    fitted([*TINY, "--steps", 4, "--save_every", 2], folder := tmp_path_factory.mktemp("faults") / "run")
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoints(folder: Path) -> set[Path]:
    return set(folder.glob("checkpoint_*.pt"))


def refusal(main: Callable, flags: list, monkeypatch: MonkeyPatch, capsys: CaptureFixture) -> str:
    """The one sentence with which a program ends, its exit status 2 checked."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, flags)])
    with pytest.raises(SystemExit) as ended:
        config.run(main)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and line.startswith(f"{main.__module__}.py: error: "), line
    return line


# ---- killed -----------------------------------------------------------------------------------------------


def life(flags: list[str]) -> None:
    """A training process, forked from one that has imported everything already."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.argv = ["train.py", *map(str, flags)]
    config.run(train.main)


@pytest.fixture(scope="module")
def spawn() -> Callable:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])

    def start(flags: list) -> multiprocessing.Process:
        process = context.Process(target=life, args=([*map(str, flags)],), daemon=True)
        process.start()
        return process
    return start


def wait(condition: Callable[[], object], process: multiprocessing.Process, seconds: float = 120) -> None:
    give_up = time.time() + seconds
    while not condition():
        assert process.is_alive() and time.time() < give_up
        time.sleep(0.002)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(spawn: Callable, tmp_path: Path,
                                                                   request: pytest.FixtureRequest) -> None:
    kills, generator, saving = request.config.getoption("--kills"), random.Random(0), 0
    flags, folder = [*RANDOM, "--steps", 50 * (kills + 1)], tmp_path / "killed"
    for _ in range(kills):
        before = checkpoints(folder)
        process = spawn(["--resume", folder] if before else [*flags, "--out", folder])
        wait(lambda: checkpoints(folder) - before, process)  # it has saved once in this life
        time.sleep(generator.random() * 0.5)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL  # it had not ended by itself
        saving += any(folder.glob(".checkpoint_*.tmp"))
        assert checkpoint.load(checkpoint.newest(folder))["step"] > 0
        for picture in (folder / "samples").glob("[!.]*"):
            load_video(picture, 16, 1)
    ends = []
    for last in (["--resume", folder], [*flags, "--out", tmp_path / "whole"]):  # with as many threads
        process = spawn(last)
        process.join(120 + 60 * kills)
        assert process.exitcode == 0
        ends.append(checkpoint.load(checkpoint.newest(Path(last[-1]))))
    assert same(learned(ends[0]), learned(ends[1])) and ends[0]["step"] == ends[1]["step"] == 50 * (kills + 1)
    steps = [line["step"] for line in read_log(folder)]  # those taken twice count once
    assert steps == list(range(1, 50 * (kills + 1) + 1))
    print(f"{kills} kills, {saving} while a checkpoint was being written")


@pytest.mark.slow
def test_a_second_ctrl_c_quits_at_once(tmp_path: Path) -> None:
    flags = [*TINY, *"--accumulate 250 --steps 9 --save_every 1".split(), "--out", tmp_path / "run"]
    with subprocess.Popen(**processes("train.py", *flags)) as process:
        while not checkpoints(tmp_path / "run"):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        before = files(tmp_path / "run")
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None  # it finishes the step
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT and files(tmp_path / "run") == before


def small_files_only() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # like a full disk, at the first checkpoint


@pytest.mark.slow  # in this process: test_checkpoint.py
def test_a_full_disk_is_one_sentence_and_the_old_checkpoint_is_intact(copy: Path) -> None:
    before = files(copy)
    given = processes("train.py", "--resume", copy, "--steps", 8)
    done = subprocess.run(**given, preexec_fn=small_files_only)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot be saved (File too large); older checkpoints are intact" in line, line
    assert {name: files(copy)[name] for name in before if name.endswith(".pt")} == {
        name: content for name, content in before.items() if name.endswith(".pt")}
    assert not [path for path in copy.rglob("*.tmp")]
    assert fitted(["--resume", copy], copy)["step"] == 4  # the 8 steps were never saved


def test_a_disk_that_is_full_says_so(run: Path, tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        old = checkpoint.load(checkpoint.newest(run))
        checkpoint.save(tmp_path / "checkpoint_1.pt", old)
        with pytest.raises(OSError, match=r"checkpoint_2.pt cannot be saved \(No space left on device\)"):
            for _ in range(3):
                checkpoint.save(tmp_path / "checkpoint_2.pt", [*range(10), torch.zeros(2**19)])
        assert os.listdir(tmp_path) == ["checkpoint_1.pt"]
        assert same(learned(checkpoint.load(tmp_path / "checkpoint_1.pt")), learned(old))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# ---- damaged, hostile and foreign checkpoints --------------------------------------------------------------

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda whole: whole[:len(whole) // 2],  # test_checkpoint.py knows more
    # sixteen of them, since a single one may hit the padding between tensors, which holds nothing
    "flipped bytes": lambda whole: bytes(byte ^ (i % (len(whole) // 16) == 7) for i, byte in enumerate(whole)),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("main", [train.main, sample.main])
def test_a_damaged_checkpoint_is_one_sentence_and_without_it_the_run_goes_on(
        main: Callable, damage: str, copy: Path, monkeypatch: MonkeyPatch, capsys: CaptureFixture) -> None:
    newest, flag = checkpoint.newest(copy), "--resume" if main is train.main else "--checkpoint"
    newest.write_bytes(DAMAGE[damage](newest.read_bytes()))
    line = refusal(main, [flag, copy, "--device", "cpu"], monkeypatch, capsys)
    assert "damaged" in line and "delete it and the newest of them is used" in line
    newest.unlink()  # as it says
    if main is train.main:
        program(monkeypatch, ["--resume", copy])
        assert checkpoint.load(checkpoint.newest(copy))["step"] == 4


class Harm:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("main", [train.main, sample.main])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(
        main: Callable, copy: Path, monkeypatch: MonkeyPatch, capsys: CaptureFixture) -> None:
    harm, newest = copy / "harm", checkpoint.newest(copy)
    torch.save({"content": {"settings": Harm(harm), "optimizer": 1, "step": 1}, "sha256": ""}, newest)
    flag = "--resume" if main is train.main else "--checkpoint"
    assert "is no checkpoint" in refusal(main, [flag, copy, "--device", "cpu"], monkeypatch, capsys)
    assert not harm.exists()
    torch.load(newest, weights_only=False)
    assert harm.exists()  # it would have


def test_another_architecture_is_refused_with_the_settings_that_differ(
        copy: Path, monkeypatch: MonkeyPatch, capsys: CaptureFixture) -> None:
    line = refusal(train.main, ["--resume", copy, "--dim", 16, "--head_dim", 16], monkeypatch, capsys)
    assert "holds another network: --dim 16 (was 8), --head_dim 16 (was 8); resume without" in line
    assert json.loads((copy / "config.json").read_text())["dim"] == 8  # which sample.py goes by


@pytest.mark.slow
def test_other_settings_than_before_are_listed_when_a_run_goes_on(copy: Path, monkeypatch: MonkeyPatch,
                                                                  capsys: CaptureFixture) -> None:
    program(monkeypatch, ["--resume", copy, "--steps", 5, "--lr", 0.002])
    changed = "other settings than before: --steps 5 (was 4), --lr 0.002 (was 0.001)\n"
    assert changed in capsys.readouterr().out
    program(monkeypatch, ["--resume", copy])
    assert "other settings" not in capsys.readouterr().out


STRANGE = [("dim", "8"), ("lr", float("nan")), ("size", torch.ones(2)), ("dim", -1), ("dim", 8.5),
           ("dim_mults", 3), ("dim_mults", (1, "2")), ("patch", 0), ("flip", "no"), ("prediction", "x"),
           ("prediction", ["v"]), ("data_dir", 3), ("steps", None), ("frames", {}), ("lr", 10**400)]


@pytest.mark.parametrize("name, value", STRANGE[:3])
def test_a_setting_of_a_stranger_is_checked_like_a_flag(name: str, value: object, copy: Path) -> None:
    content = checkpoint.load(newest := checkpoint.newest(copy))
    checkpoint.save(newest, content | {"settings": content["settings"] | {name: value}})
    with pytest.raises(SystemExit) as ended:
        settings.read_settings(["--resume", str(copy)])
    assert ended.value.code == 2
    if name != "lr":
        with pytest.raises(ValueError, match="holds no model"):
            infill.load_model(newest, torch.device("cpu"))


@pytest.mark.parametrize("name, value", STRANGE)
def test_no_setting_becomes_a_value_that_its_flag_would_not_take(name: str, value: object) -> None:
    parts = [type(part) for part in vars(settings.read_settings(TINY)).values() if dataclasses.is_dataclass(part)]
    part = next(part for part in parts if name in part.__dataclass_fields__)
    config.rebuild({}, part)
    with pytest.raises(ValueError):
        config.rebuild({name: value}, part)


@pytest.mark.parametrize("changed", [
    {"settings": 3}, {"step": "x"}, {"model": 1}, {"ema": {}}, {"ema": {"x": 1}},
    {"optimizer": {}}, {"optimizer": {"state": 1}}, {"model": {"entry.weight": "x"}}])
def test_a_part_that_is_not_what_it_should_be_is_one_sentence(
        changed: dict, copy: Path, monkeypatch: MonkeyPatch, capsys: CaptureFixture) -> None:
    newest = checkpoint.newest(copy)
    checkpoint.save(newest, checkpoint.load(newest) | changed)
    line = refusal(train.main, ["--resume", copy, "--steps", 5, "--device", "cpu"], monkeypatch, capsys)
    assert str(newest) in line
    if {"settings", "ema"} & set(changed):
        line = refusal(sample.main, ["--checkpoint", copy, "--device", "cpu"], monkeypatch, capsys)
        assert str(newest) in line


@pytest.mark.slow
def test_what_was_trained_compiled_is_loaded_plain(monkeypatch: MonkeyPatch, tmp_path: Path) -> None:
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: compiled(network, backend="eager"))
    plain = fitted([*TINY, "--steps", 2], tmp_path / "plain")
    content = fitted([*TINY, "--steps", 2, "--compile"], tmp_path / "compiled")
    assert content["model"].keys() == plain["model"].keys()
    assert infill.load_model(checkpoint.newest(tmp_path / "compiled"), torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_what_was_trained_on_cuda_is_loaded_on_the_cpu(monkeypatch: MonkeyPatch, tmp_path: Path) -> None:
    program(monkeypatch, [*TINY, "--device", "cuda", "--steps", 2, "--out", tmp_path / "run"])
    infill.load_model(checkpoint.newest(tmp_path / "run"), torch.device("cpu"))
    program(monkeypatch, ["--resume", tmp_path / "run", "--device", "cpu", "--steps", 3])


# ---- arithmetic and hardware -------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [
    "nan loss",
    pytest.param("infinite loss", marks=pytest.mark.slow),
    pytest.param("infinite gradient", marks=pytest.mark.slow)])
def test_what_is_not_finite_stops_before_the_step_and_names_it(
        wrong: str, monkeypatch: MonkeyPatch, tmp_path: Path, capsys: CaptureFixture) -> None:
    honest, calls = train.loss, itertools.count()

    def loss(network: Callable, *given: object, **more: object) -> torch.Tensor:
        value = honest(network, *given, **more)
        if next(calls) != 2:
            return value
        factor = {"nan loss": torch.nan, "infinite loss": torch.inf, "infinite gradient": 1.0}[wrong]
        return value * factor + (wrong == "infinite gradient") * (value - value).sqrt()  # of infinite slope
    good = fitted([*TINY, "--steps", 2, "--decay", "constant"], tmp_path / "good")
    monkeypatch.setattr(train, "loss", loss)
    line = refusal(train.main, [*TINY, "--steps", 9, "--decay", "constant", "--out", tmp_path / "run"],
                   monkeypatch, capsys)
    assert "the gradient of step 3 is not finite and was not applied; step 2 is saved" in line
    assert same(learned(checkpoint.load(checkpoint.newest(tmp_path / "run"))), learned(good))


GPU_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
CPU_FULL = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to "
                        "allocate 9 bytes")


@pytest.mark.parametrize("error, flags, levers", [
    (CPU_FULL, [], ["--batch_size", "--accumulate", "--checkpointing", "--num"]),
    (GPU_FULL, [], ["memory: --checkpointing takes"]),
    (GPU_FULL, ["--checkpointing"], ["--batch_size 1 --accumulate 2 takes"]),  # half of what TINY has
    (GPU_FULL, ["--checkpointing", "--batch_size", 1], ["smaller --num_images, --size", "--shard"])])  # nothing is left to divide
def test_out_of_memory_names_the_levers(error: Exception, flags: list, levers: list, monkeypatch: MonkeyPatch,
                                        tmp_path: Path, capsys: CaptureFixture) -> None:
    def loss(*given: object, **more: object) -> None:
        raise error
    monkeypatch.setattr(train, "loss", loss)
    line = refusal(train.main, [*TINY, *flags, "--out", tmp_path / "run"], monkeypatch, capsys)
    assert all(lever in line for lever in levers)


def test_memory_that_runs_out_while_weights_are_restored_is_no_other_network(monkeypatch: MonkeyPatch,
                                                                             tmp_path: Path,
                                                                             capsys: CaptureFixture) -> None:
    fitted([*TINY, "--steps", 2], tmp_path / "run")

    def restore(*given: object) -> None:
        raise GPU_FULL
    monkeypatch.setattr(state, "restore", restore)
    line = refusal(train.main, ["--resume", tmp_path / "run", "--steps", 9], monkeypatch, capsys)
    assert "memory: --checkpointing takes" in line and "another network" not in line


@pytest.mark.slow
def test_really_out_of_memory(copy: Path) -> None:
    def little() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))
    given = processes("sample.py", "--checkpoint", copy, "--frames", 100_000, "--num", 1024, "--steps", 1,
                      "--device", "cpu", "--out", copy / "out")
    done = subprocess.run(**given, preexec_fn=little)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "out of memory" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_that_is_not_there_is_one_sentence_and_auto_does_without(
        monkeypatch: MonkeyPatch, tmp_path: Path, capsys: CaptureFixture) -> None:
    flags = [*TINY, "--steps", 1, "--out", tmp_path / "run"]
    line = refusal(train.main, [*flags, "--device", "cuda"], monkeypatch, capsys)
    assert "--device cuda was given; PyTorch finds 0 CUDA devices" in line
    program(monkeypatch, [*flags, "--device", "auto"])
    assert "CPU" in capsys.readouterr().out.splitlines()[0]


def test_without_bf16_training_is_in_float32_and_says_so_once(monkeypatch: MonkeyPatch, tmp_path: Path,
                                                              capsys: CaptureFixture) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    program(monkeypatch, [*TINY, "--precision", "auto", "--steps", 1, "--out", tmp_path / "run"])
    assert capsys.readouterr().out.count("float32") == 1 and Machine(torch.device("cpu")).chosen() == "float32"


# ---- folders, processes, terminals -------------------------------------------------------------------------


def without_the_rights_of_root() -> None:
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # drops CAP_DAC_OVERRIDE at exec


@pytest.fixture
def mortal(tmp_path: Path) -> None:
    """Skips where rights cannot be dropped, so that no folder is unwritable."""
    (tmp_path / "closed").mkdir(mode=0o555)
    touch = subprocess.run(["touch", tmp_path / "closed" / "x"], preexec_fn=without_the_rights_of_root,
                           capture_output=True)
    (tmp_path / "closed").rmdir() if touch.returncode else pytest.skip("root may write everywhere here")


@pytest.mark.slow
@pytest.mark.parametrize("out", ["unwritable/run", "unwritable"])
def test_an_output_folder_that_cannot_be_written_is_refused_before_training(out: str, mortal: None,
                                                                            tmp_path: Path) -> None:
    (tmp_path / "unwritable").mkdir(mode=0o555)
    before = files(tmp_path)
    done = subprocess.run(**processes("train.py", *TINY, "--out", tmp_path / out),
                          preexec_fn=without_the_rights_of_root)
    line, = done.stderr.strip().splitlines()
    assert done.returncode == 2 and str(tmp_path / "unwritable") in line and files(tmp_path) == before


@pytest.mark.slow
def test_a_folder_in_use_is_refused_and_is_free_once_its_process_is_dead(
        spawn: Callable, tmp_path: Path, monkeypatch: MonkeyPatch, capsys: CaptureFixture) -> None:
    folder = tmp_path / "run"
    # --keep: none of its checkpoints goes while it is read here
    process = spawn([*TINY, "--steps", 100_000, "--save_every", 1, "--keep", 1000, "--out", folder])
    wait(lambda: checkpoints(folder), process)
    assert "is in use by another training process" in refusal(train.main, ["--resume", folder, "--steps", 3],
                                                              monkeypatch, capsys)
    assert process.is_alive()
    process.kill()
    process.join()
    newest = checkpoint.load(checkpoint.newest(folder))["step"]
    program(monkeypatch, ["--resume", folder, "--steps", newest + 1])
    assert checkpoint.load(checkpoint.newest(folder))["step"] == newest + 1


@pytest.mark.slow
def test_when_one_of_two_ranks_dies_the_other_ends_soon_and_the_run_goes_on(tmp_path: Path) -> None:
    folder, ranks = tmp_path / "run", []
    flags = [*TINY, *"--steps 100000 --save_every 1 --log_every 1".split(), "--out", folder]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for rank in "01":
        given = processes("train.py", *flags)
        given["env"] |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                         "MASTER_PORT": str(port)}
        ranks.append(subprocess.Popen(**given))
    try:
        while len(checkpoints(folder)) < 2:
            assert ranks[0].poll() is None, ranks[0].communicate()
            time.sleep(0.05)
        ranks[1].kill()
        _, err = ranks[0].communicate(timeout=60)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode != 0, err
    step = checkpoint.load(checkpoint.newest(folder))["step"]
    assert fitted(["--resume", folder, "--steps", step + 2], folder)["step"] == step + 2


@pytest.mark.slow
@pytest.mark.parametrize("words", [["train.py", "--help"], ["sample.py", "--steps", 2]])
def test_a_reader_that_has_enough_ends_a_program_quietly(words: list, run: Path, tmp_path: Path) -> None:
    if words[0] == "sample.py":
        words = [*words, "--checkpoint", run, "--out", tmp_path]
    with subprocess.Popen(**processes(*words)) as process:
        process.stdout.close()  # as head does
        error = process.stderr.read()
    assert process.returncode in (0, 128 + signal.SIGPIPE) and "rror" not in error, error


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
                                         {"TERM": "dumb", "PYTHONIOENCODING": "ascii"}])
def test_a_poor_terminal_is_enough(environment: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "a folder with blanks, -dashes and ünïcödé"
    for words in (["train.py", *TINY, "--steps", 1, "--preview_every", 1, "--out", folder],
                  ["sample.py", "--checkpoint", folder, "--steps", 2, "--out", folder / "samples"],
                  ["train.py", "--help"], ["sample.py", "--help"]):
        given = processes(*words)
        given["env"] |= environment
        given |= {"stdin": subprocess.DEVNULL}
        done = subprocess.run(**given | {"text": False})
        assert done.returncode == 0, done.stderr
    assert len(list((folder / "samples").glob("*.gif"))) == 2


@pytest.mark.slow
def test_a_project_folder_that_is_read_only_is_enough(run: Path, mortal: None, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for path in [*HERE.glob("*.py"), HERE / "mnist"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, project / path.name)
    project.chmod(0o555)
    given = processes(project / "sample.py", "--checkpoint", run, "--steps", 2, "--out", tmp_path / "samples")
    assert subprocess.run(**given, preexec_fn=without_the_rights_of_root).returncode == 0
    given = processes(project / "train.py", *TINY, "--steps", 1) | {"cwd": project}
    done = subprocess.run(**given, preexec_fn=without_the_rights_of_root)  # its runs/ would be in there
    line, = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "runs" in line and "Permission denied" in line
    project.chmod(0o755)


@pytest.mark.parametrize("torn", ['{"step": 5, "lo', "\udcff", '{"loss": 1}\n', "3\n"])
def test_metrics_torn_by_a_crash_hide_at_most_the_next_line(torn: str, tmp_path: Path) -> None:
    with open(tmp_path / "metrics.jsonl", "a", errors="surrogateescape") as file:
        file.write('{"step": 2, "loss": 0.5}\n' + torn)
    log(tmp_path, {"step": 3})  # as a run does when it goes on from its last checkpoint
    log(tmp_path, {"step": 4})
    steps = [line["step"] for line in read_log(tmp_path)]
    assert steps in ([2, 4], [2, 3, 4])


# ---- hostile videos and captions ---------------------------------------------------------------------------


def hostile_folder(folder: Path) -> list[str]:
    """A folder of clips, good and bad; returns the names of the bad."""
    folder.mkdir()
    clip = torch.rand(1, 3, 6, 16, 16) * 2 - 1
    for name in ("a name with blanks", "-a leading dash", "ünïcödé 球"):
        save_video(clip, folder / name)
    whole = (folder / "a name with blanks.gif").read_bytes()
    frames = [Image.fromarray(np.random.default_rng(i).integers(0, 2**16, (16, 16), dtype=np.uint16))
              for i in range(6)]
    for kind, mode in (("sixteen", None), ("palette", "P"), ("alpha", "RGBA")):
        (folder / kind).mkdir()
        for i, frame in enumerate(frames):
            (frame if mode is None else frame.convert("L").convert(mode)).save(folder / kind / f"{i}.png")
    (folder / "mixed sizes").mkdir()
    for i, size in enumerate((16, 40, 23, 16, 99, 7)):
        Image.new("RGB", (size, size + i), "red").save(folder / "mixed sizes" / f"{i}.png")
    Image.new("L", (16, 16)).save(folder / "one frame.gif")
    (folder / "zero frames.gif").write_bytes(b"GIF89a\x10\0\x10\0\0\0\0;")
    (folder / "truncated.gif").write_bytes(whole[:len(whole) // 3])
    np.save(folder / "pickled.npy", np.array([Harm(folder / "harm")], object), allow_pickle=True)
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    (folder / "bomb.gif").write_bytes(bomb.getvalue())
    return ["one frame.gif", "zero frames.gif", "truncated.gif", "pickled.npy", "bomb.gif"]


@pytest.mark.slow
def test_hostile_videos_are_named_once_and_the_others_are_trained_on(
        tmp_path: Path, capsys: CaptureFixture, monkeypatch: MonkeyPatch) -> None:
    bad = hostile_folder(tmp_path / "clips")
    program(monkeypatch, [*TINY, "--dataset", "video_folder", "--data_dir", tmp_path / "clips", "--steps", 2,
                          "--channels", 3, "--batch_size", 8, "--out", tmp_path / "run"])
    report = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(report) == 1 and all(report[0].count(f"/{name}: ") == 1 for name in bad), report
    assert not (tmp_path / "clips" / "harm").exists() and report[0].startswith(f"skipped {len(bad)} of ")


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "   ", "word " * 5000, "é|", "a\nb\t3"])
def test_any_caption_is_trained_on_and_drawn_from(text: str, run: Path, tmp_path: Path,
                                                  monkeypatch: MonkeyPatch) -> None:
    (tmp_path / "clips").mkdir()
    np.save(tmp_path / "clips" / "clip.npy", np.zeros((6, 16, 16), np.uint8))
    (tmp_path / "clips" / "clip.txt").write_text(text)
    program(monkeypatch, [*TINY, "--dataset", "video_folder", "--data_dir", tmp_path / "clips", "--steps", 1,
                          "--out", tmp_path / "run"])
    flags = ["--text", text, "--w", "1" if text else "0", "--steps", "2", "--out", str(tmp_path / "samples")]
    monkeypatch.setattr(sys, "argv", ["sample.py", "--checkpoint", str(run), "--device", "cpu", *flags])
    config.run(sample.main)
    assert len(list((tmp_path / "samples").glob("generate_001.*"))) == 3


# ---- files damaged at random -------------------------------------------------------------------------------


def damaged(whole: bytes, generator: random.Random) -> bytes:
    """A real file with some bytes changed, cut out, doubled, or its end missing."""
    content = bytearray(whole)
    for _ in range(generator.choice([1, 1, 2, 8, 64])):
        at, length = generator.randrange(len(content) + 1), generator.choice([1, 2, 4, 100])
        content[at:at + length] = generator.choice([
            generator.randbytes(length), b"", content[at:at + length] * 2, b"\xff" * length, b"\0" * length])
    return bytes(content[:generator.randrange(len(content) + 1)] if generator.random() < 0.2 else content)


WRITTEN: list[str] = []


def watch(event: str, given: tuple) -> None:
    if event == "open" and isinstance(given[0], (str, bytes)) and given[2] & (os.O_WRONLY | os.O_RDWR):
        WRITTEN.append(os.fsdecode(given[0]))
    elif event in ("os.remove", "os.rename", "os.system", "subprocess.Popen", "socket.connect"):
        WRITTEN.append(f"{event} {given}")


@pytest.fixture(scope="module")
def watched() -> None:
    sys.addaudithook(watch)


def fuzz(seconds: float, whole: dict[str, bytes], read: Callable[[Path], object],
         folder: Path) -> tuple[int, int]:
    """Damaged versions of files, read for some seconds: (how many were refused, how many were read)."""
    generator, until, counts, number = random.Random(0), time.time() + seconds, [0, 0], 0
    while time.time() < until or number < 20:
        name, number = generator.choice(sorted(whole)), number + 1
        path = folder / name
        path.write_bytes(damaged(whole[name], generator))
        WRITTEN.clear()
        try:
            read(path)
            counts[1] += 1
        except (ValueError, OSError) as error:
            assert type(error) in (ValueError, FileNotFoundError, OSError) and str(error)
            counts[0] += 1
        assert WRITTEN == [], "something was written, or run"
    return counts[0], counts[1]


def test_damaged_videos_raise_no_other_error(watched: None, tmp_path: Path,
                                             request: pytest.FixtureRequest) -> None:
    clip = torch.rand(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = {path.name: path.read_bytes() for path in save_video(clip, tmp_path / "clip")}
    for name, save in {"array.npy": np.save, "arrays.npz": np.savez_compressed}.items():
        save(tmp_path / name, np.zeros((5, 16, 16, 3), np.uint8))
        whole[name] = (tmp_path / name).read_bytes()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "still.jpg")
    whole["still.jpg"] = (tmp_path / "still.jpg").read_bytes()
    seconds = request.config.getoption("--fuzz")
    refused, read = fuzz(seconds, whole, lambda path: load_video(path, 16, 3), tmp_path)
    assert refused > 0 and read > 0


def test_damaged_checkpoints_raise_no_other_error(watched: None, run: Path, tmp_path: Path,
                                                  request: pytest.FixtureRequest) -> None:
    whole = {"checkpoint_00000004.pt": checkpoint.newest(run).read_bytes()}
    refused, _ = fuzz(request.config.getoption("--fuzz"), whole, checkpoint.load, tmp_path)
    assert refused > 0


def test_damaged_mnist_files_raise_no_other_error(watched: None, monkeypatch: MonkeyPatch, tmp_path: Path,
                                                  request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(data, "MNIST", tmp_path)
    whole = {path.name: path.read_bytes() for path in (HERE / "mnist").glob("t10k-labels*.gz")}
    refused, _ = fuzz(request.config.getoption("--fuzz"), whole,
                      lambda path: data._read_idx.__wrapped__(path.name), tmp_path)
    assert refused > 0

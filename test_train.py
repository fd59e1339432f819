"""Training: resumed runs, two processes, averaged weights, the run's folder, signals, and users' mistakes.

Most runs are a few steps of a tiny network in this process; real processes where the process is the point.
"""
import contextlib
import copy
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytest import CaptureFixture, MonkeyPatch
from torch import Tensor, nn

import checkpoint
import config
import optimizer
import progress
import settings
import train
from data import batches
from diffusion import denoiser, schedule
from machine import Machine
from sampling import dpm_solver
from state import State, new_state
from text import condition, embed
from unet3d import UNet3D

HERE = Path(__file__).parent
CPU = Machine(torch.device("cpu"), "float32")
TINY = ("--preset cpu --latent= --optimizer adam --frame_noise 0 --lr 0.001 "
        "--device cpu --precision float32 --dataset moving_mnist --size 16 --frames 4 "
        "--num_images 1 --digits 1 --dim 8 --dim_mults 1,2 --blocks 1 --head_dim 8 --emb_dim 16 "
        "--emb_layers 1 --patch 1 --attention_resolutions 8 --cond_dim 8 --tokens 8 --batch_size 2").split()
# everything random in one run: dropout, image frames, dropped captions, two micro-batches in a step
RUN = [*TINY, *("--steps 6 --accumulate 2 --dropout 0.2 --cond_dropout 0.5 --ema 0.3 --warmup 3 --lr 0.01 --decay cosine "
                "--save_every 2 --log_every 2 --preview_every 4").split()]


def program(monkeypatch: MonkeyPatch, flags: list) -> None:
    """python train.py flags, in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    config.run(train.main)


def fitted(flags: list, out: Path) -> dict:
    """The last checkpoint of a run with these flags."""
    s = settings.read_settings([*map(str, flags), "--out", str(out)])
    with train.prepare(s, CPU):
        train.fit(s, CPU)
    return checkpoint.load(checkpoint.newest(out))


def tensors(content: object) -> list[Tensor]:
    """All tensors of nested content, in order."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, (list, tuple)):
        return [tensor for part in content for tensor in tensors(part)]
    return [content] if isinstance(content, Tensor) else []


def learned(content: dict) -> list[Tensor]:
    """Weights, averaged weights and Adam's state of a checkpoint."""
    return tensors([content[key] for key in ("model", "ema", "optimizer")])


def apart(ours: dict, theirs: dict, *parts: str) -> float:
    """The root of the mean squared difference of two checkpoints, but for counts of steps."""
    pairs = zip(*(tensors([content[part] for part in parts]) for content in (ours, theirs)), strict=True)
    return torch.cat([(a - b).flatten() for a, b in pairs if a.shape]).square().mean().sqrt().item()


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    assert len(ours) == len(theirs) > 0, (len(ours), len(theirs))
    return all(torch.equal(a, b) for a, b in zip(ours, theirs))


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@dataclasses.dataclass
class Recorded:
    """A run as seen from outside: after each step the weights; the learning rate it used; what it was fed."""
    folder: Path
    content: dict
    weights: list[list[Tensor]]
    rates: list[float]
    fed: list[tuple[int, Tensor, list]]


def recorded(flags: list, folder: Path, stop_after: int = 0) -> Recorded:
    """A run with these flags into folder; after so many steps it is sent SIGTERM."""
    weights, rates, fed, step, loss = [], [], [], train.train_step, train.micro_batch_loss

    def spying_step(network: nn.Module, state: State, *rest: object) -> tuple[Tensor, float]:
        if not weights:
            state.optimizer.register_step_pre_hook(lambda adam, *_: rates.append(adam.param_groups[0]["lr"]))
        result = step(network, state, *rest)
        weights.append([p.detach().clone() for p in state.model.parameters()])
        if state.step == stop_after:
            signal.raise_signal(signal.SIGTERM)
        return result

    def spying_loss(network: nn.Module, batch: tuple, index: int, *rest: object) -> Tensor:
        fed.append((index, *batch))
        return loss(network, batch, index, *rest)

    with MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", spying_step)
        patch.setattr(train, "micro_batch_loss", spying_loss)
        try:
            s = settings.read_settings([*map(str, flags)])
            with train.prepare(s, CPU):
                train.fit(s, CPU)
        except SystemExit as stopped:
            assert stopped.code == 143 and stop_after, stopped.code
    return Recorded(folder, checkpoint.load(checkpoint.newest(folder)), weights, rates, fed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """An uninterrupted run of 6 steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return recorded([*RUN, "--out", folder], folder)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> list[Recorded]:
    """The same run, stopped after step 3, and what --resume made of it, without any other flag."""
    folder = tmp_path_factory.mktemp("halves") / "run"
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    first = recorded([*RUN, "--out", folder], folder, stop_after=3)
    second = recorded(["--resume", folder], folder)
    for number, handler in before.items():
        signal.signal(number, handler)
    return [first, second]


# ---- going on where it stopped -----------------------------------------------------------------------------


def test_a_stopped_run_is_saved_at_the_step_it_reached(halves: list[Recorded]) -> None:
    assert halves[0].content["step"] == 3


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(whole: Recorded, halves: list) -> None:
    assert halves[1].content["step"] == whole.content["step"] == 6
    assert same(learned(halves[1].content), learned(whole.content))
    assert not same(learned(halves[0].content), learned(whole.content))


def test_a_resumed_run_sees_the_data_that_come_next_and_none_twice(whole: Recorded, halves: list) -> None:
    assert [index for index, _, _ in halves[0].fed] == list(range(6))
    assert [index for index, _, _ in halves[1].fed] == list(range(6, 12))
    assert same([x for _, x, _ in halves[0].fed + halves[1].fed], [x for _, x, _ in whole.fed])
    assert [c for *_, c in halves[0].fed + halves[1].fed] == [c for *_, c in whole.fed]


def test_a_resumed_run_keeps_its_settings(whole: Recorded, halves: list[Recorded]) -> None:
    ours, theirs = halves[1].content["settings"], whole.content["settings"]
    assert {k for k in theirs if ours[k] != theirs[k]} == {"out", "resume"}


def test_flags_given_with_resume_win_over_the_run(whole: Recorded, tmp_path: Path) -> None:
    changed = "--steps 7 --decay constant --lr 0.003".split()
    resumed = recorded(["--resume", whole.folder, "--out", tmp_path / "on", *changed], tmp_path / "on")
    assert resumed.rates == pytest.approx([0.003])


def test_the_checkpoint_with_the_most_steps_is_resumed_whatever_the_dates(whole: Recorded) -> None:
    late, early = whole.folder / "checkpoint_00000006.pt", whole.folder / "checkpoint_00000004.pt"
    stat = late.stat()
    os.utime(late, (1, 1))  # as a copy of the folder leaves them
    try:
        assert checkpoint.newest(whole.folder) == late != early
    finally:
        os.utime(late, ns=(stat.st_atime_ns, stat.st_mtime_ns))


# ---- one step ----------------------------------------------------------------------------------------------


def test_each_micro_batch_depends_on_seed_and_index_alone(whole: Recorded) -> None:
    s = settings.read_settings(RUN)
    for index, x, captions in whole.fed:
        again, texts = next(batches(s.data, 2, s.train.seed, index))
        assert torch.equal(x, again) and captions == texts
    assert not torch.equal(whole.fed[0][1], whole.fed[1][1])


def test_times_noise_and_dropout_depend_on_seed_and_index_alone() -> None:
    s = settings.read_settings(RUN)
    network = new_state(s, CPU.device).model
    nn.init.normal_(network.exit[-1].weight)
    batch = next(batches(s.data, 2, 0))

    def value(index: int) -> float:
        torch.rand(3)  # whatever was drawn before
        return train.micro_batch_loss(network, batch, index, s, CPU).item()
    assert value(5) == value(5)
    assert value(5) != value(6)
    zero = value(5)
    s.train.seed = 1
    assert value(5) != zero


def test_captions_are_dropped_at_the_given_rate_for_clips_and_images_alike(monkeypatch: MonkeyPatch) -> None:
    s, seen = settings.read_settings([*TINY, "--cond_dropout", "0.25"]), []
    monkeypatch.setattr(train, "condition", lambda captions, text, device: torch.ones(len(captions), 2, 3, 8))
    monkeypatch.setattr(train, "loss", lambda _, x, d, cond, *k: seen.append(cond) or torch.zeros(2))
    for index in range(300):
        train.micro_batch_loss(None, (torch.zeros(200, 1, 5, 1, 1), [[]] * 8), index, s, CPU)
    cond = torch.stack(seen)  # step b k l d
    assert ((cond == 0).all((-1, -2)) | (cond == 1).all((-1, -2))).all()  # a caption goes or stays as a whole
    dropped = (cond == 0).all((-1, -2)).float().mean((0, 1))
    assert dropped.tolist() == pytest.approx([0.25, 0.25], abs=0.03)  # 2400 draws each: 3.4 deviations


def stub_loss(network: nn.Module, x: Tensor, diffusion: object, cond: Tensor, num_images: int) -> Tensor:
    """A loss of each clip without times or noise, so that batches of different sizes can be compared."""
    return (network(x, torch.tensor(0.0), cond, num_images) - x).square().flatten(1).mean(1)


def gradients(s: settings.Settings, stream: Iterator) -> tuple[list[Tensor], float]:
    """What one training step hands the optimizer, and the norm that it reports."""
    state, seen = new_state(s, CPU.device), []
    nn.init.normal_(state.model.exit[-1].weight)  # or all other gradients are 0 at the start
    state.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in state.model.parameters() if p.grad is not None))
    _, norm = train.train_step(state.model, state, stream, s, CPU)
    return seen, norm


def test_accumulating_micro_batches_is_one_large_batch(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(train, "loss", stub_loss)
    flags = [*TINY, "--clip", "1000000", "--cond_dropout", "0"]
    s = settings.read_settings([*flags, "--accumulate", "3"])
    parts = list(itertools.islice(batches(s.data, 2, 0), 3))
    joint = torch.cat([x for x, _ in parts]), [caption for _, captions in parts for caption in captions]
    ours, _ = gradients(s, iter(parts))
    theirs, _ = gradients(settings.read_settings(flags), iter([joint]))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
    assert max(g.abs().max() for g in theirs) > 0.01


def test_the_gradient_is_clipped_to_the_given_norm() -> None:
    s = settings.read_settings([*TINY, "--clip", "0.001"])
    clipped, norm = gradients(s, batches(s.data, 2, 0))
    length = torch.cat([g.flatten() for g in clipped]).norm().item()
    assert length == pytest.approx(0.001, rel=1e-3) and norm > 0.01  # the norm reported is the one before


def test_the_learning_rate_warms_up_and_follows_half_a_cosine(whole: Recorded) -> None:
    cosine = [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert whole.rates == pytest.approx([0.01 * w * c for w, c in zip((1 / 3, 2 / 3, 1, 1, 1, 1), cosine)])


def test_a_linear_decay_begins_after_half_of_the_steps() -> None:
    factors = [optimizer.lr_factor(step, 3, "linear", 6) for step in range(7)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3, 0])


def test_the_constant_learning_rate_stays_after_warm_up() -> None:
    factors = [optimizer.lr_factor(step, 4, "constant", 100) for step in (0, 1, 3, 4, 50, 99)]
    assert factors == pytest.approx([0.25, 0.5, 1, 1, 1, 1])


def test_averaged_weights_fit_the_plain_network(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", nn.DataParallel)  # which, too, puts a prefix before the names
    content = fitted([*TINY, "--steps", 1, "--compile"], tmp_path / "run")
    plain = new_state(settings.read_settings(TINY), CPU.device).model
    for weights in (content["model"], content["ema"]):
        plain.load_state_dict(weights)


def test_the_averaged_weights_are_those_of_a_loop_by_hand_with_warm_up(whole: Recorded) -> None:
    average = [p.clone() for p in whole.weights[0]]  # the first step's weights, not the random start's
    for n, weights in enumerate(whole.weights[1:], start=1):
        decay = min(0.3, (1 + n) / (10 + n))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights)]
    assert (1 + 2) / (10 + 2) < 0.3 < (1 + 3) / (10 + 3)  # both sides of the minimum were met
    for ours, theirs in zip(tensors(whole.content["ema"]), average, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert not same(tensors(whole.content["ema"]), tensors(whole.content["model"]))


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(monkeypatch: MonkeyPatch) -> None:
    s = settings.read_settings(TINY)
    state = new_state(s, CPU.device)
    before = [p.detach().clone() for p in state.model.parameters()]
    monkeypatch.setattr(train, "loss", lambda network, *rest: network.entry.weight.sum() * math.inf)
    train.train_step(state.model, state, batches(s.data, 2, 0), s, CPU)
    assert same(list(state.model.parameters()), before) and same(list(state.ema.parameters()), before)
    assert not state.optimizer.state and state.step == 0


@pytest.mark.slow
def test_a_run_whose_gradient_is_not_finite_can_be_resumed(
        monkeypatch: MonkeyPatch, tmp_path: Path, capsys: CaptureFixture) -> None:
    honest = train.loss
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        calls = itertools.count()
        patch.setattr(train, "loss", lambda *given, **more: (
            honest(*given, **more) * (math.nan if next(calls) == 2 else 1)))
        program(patch, [*TINY, "--steps", 4, "--out", tmp_path / "run"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "gradient of step 3 is not finite" in error and "--resume" in error
    program(monkeypatch, ["--resume", tmp_path / "run"])  # as it says
    assert checkpoint.load(checkpoint.newest(tmp_path / "run"))["step"] == 4


@pytest.mark.slow
def test_fp16_skips_a_step_whose_gradient_overflows_counts_it_and_goes_on_as_it_was(
        monkeypatch: MonkeyPatch, tmp_path: Path) -> None:
    honest, calls = train.loss, itertools.count()
    flags = [*TINY, *"--precision fp16 --steps 4 --save_every 2 --log_every 2 --decay constant".split()]
    half = Machine(torch.device("cpu"), "fp16")

    def run(folder: Path, *more: object) -> dict:
        s = settings.read_settings([*map(str, more)])
        with train.prepare(s, half):
            train.fit(s, half)
        return checkpoint.load(checkpoint.newest(folder))
    with monkeypatch.context() as patch:
        patch.setattr(train, "loss", lambda *given, **more: (
            honest(*given, **more) * (1e30 if next(calls) == 1 else 1)))  # finite, until it is scaled
        whole = run(tmp_path / "run", *flags, "--out", tmp_path / "run")
    skipped, none = (line["skipped"] for line in metrics(tmp_path / "run"))
    assert skipped >= 1 and none == 0  # the first scale may be too large as well
    assert whole["step"] == 4 and whole["scaler"]["scale"] == 2**(16 - skipped)
    assert {int(kept["step"]) for kept in whole["optimizer"]["state"].values()} == {4 - skipped}
    (tmp_path / "run" / "checkpoint_00000004.pt").unlink()
    again = run(tmp_path / "run", "--resume", tmp_path / "run")
    assert same(learned(again), learned(whole)) and again["scaler"] == whole["scaler"]


@pytest.mark.slow
def test_fifty_gradients_in_a_row_that_are_not_finite_are_an_error_in_fp16(
        monkeypatch: MonkeyPatch, tmp_path: Path, capsys: CaptureFixture) -> None:
    monkeypatch.setattr(train, "loss", lambda network, *rest: network.entry.weight.sum() * math.inf)
    with pytest.raises(SystemExit):
        program(monkeypatch, [*TINY, "--precision", "fp16", "--out", tmp_path])
    error = capsys.readouterr().err.splitlines()[-1]
    assert "fifty gradients in a row were not finite and not applied; step 50 is saved" in error


# ---- it learns ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Squares:
    """Two clips of a square on its way, right and down, and the settings to learn them by heart."""
    clips: Tensor  # (2, 1, 4, 16, 16)
    s: settings.Settings

    def stream(self) -> Iterator[tuple[Tensor, list]]:
        while True:
            yield self.clips.repeat(4, 1, 1, 1, 1), [["right"], ["down"]] * 4

    def drawn(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        """Of 8 videos, 4 with each caption: correlation and squared distance (8, 2) to the two clips."""
        d = self.s.diffusion
        x_hat = denoiser(network.eval(), d, embed(["right", "down"] * 4, self.s.text))
        z = torch.randn(8, 1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        logsnrs = schedule(torch.linspace(1, 0, 17), d)
        videos = dpm_solver(lambda z, logsnr: x_hat(z, logsnr).clamp(-1, 1), z, logsnrs).flatten(1)
        both = torch.cat([videos, self.clips.flatten(1)])
        return torch.corrcoef(both)[:8, 8:], (videos[:, None] - self.clips.flatten(1)).square().mean(-1)


@pytest.fixture(scope="module")
def squares() -> Squares:
    clips = -torch.ones(2, 1, 4, 16, 16)
    for f in range(4):
        clips[0, 0, f, 4:12, 1 + 2 * f : 9 + 2 * f] = 1
        clips[1, 0, f, 1 + 2 * f : 9 + 2 * f, 4:12] = 1
    flags = ("--num_images 0 --dim 32 --dim_mults 1,2,2 --patch 2 --head_dim 32 --emb_dim 64 --emb_layers 2 "
             "--attention_resolutions 4,2 --cond_dim 16 --cond_dropout 0 --noise_shift 3 --lr 0.003 "
             "--warmup 20 --ema 0.95 --batch_size 8 --steps 350 --seed 1").split()
    return Squares(clips, settings.read_settings([*TINY, *flags]))


def test_the_loss_of_two_clips_falls_at_once(squares: Squares) -> None:
    s, stream = squares.s, squares.stream()
    state = new_state(s, CPU.device)
    losses = [train.train_step(state.model, state, stream, s, CPU)[0].item() for _ in range(20)]
    assert sum(losses[:4]) / 4 > 0.9 and sum(losses[-4:]) / 4 < 0.65, losses


@pytest.mark.slow
def test_two_clips_are_learned_by_heart_and_drawn_when_their_caption_is_given(squares: Squares) -> None:
    s, stream = squares.s, squares.stream()
    state = new_state(s, CPU.device)
    losses = [train.train_step(state.model, state, stream, s, CPU)[0].item() for _ in range(s.train.steps)]
    assert sum(losses[:10]) / 10 > 0.8 and sum(losses[-50:]) / 50 < 0.1, (losses[:10], losses[-50:])
    likeness, distance = squares.drawn(state.ema)
    assert likeness.argmax(1).tolist() == distance.argmin(1).tolist() == [0, 1] * 4  # as the captions say
    assert likeness.max(1).values.min() > 0.9, likeness
    assert distance.min(1).values.max() < 0.1, distance  # the clips are 0.84 apart


def test_an_untrained_network_draws_neither_of_the_two_clips(squares: Squares) -> None:
    likeness, distance = squares.drawn(new_state(squares.s, CPU.device).model)
    assert likeness.abs().max() < 0.2 and distance.min() > 0.8


# ---- the run's folder --------------------------------------------------------------------------------------

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


def test_a_run_leaves_settings_metrics_two_checkpoints_and_previews(whole: Recorded) -> None:
    files = {str(path.relative_to(whole.folder)) for path in whole.folder.rglob("*") if path.is_file()}
    previews = {f"samples/step_0000000{step}.{suffix}" for step in (4, 6) for suffix in ("gif", "webp", "png")}
    kept = {"checkpoint_00000004.pt", "checkpoint_00000006.pt"}
    drawn = {"loss.png"} if HAS_MATPLOTLIB else set()
    assert files == {"config.json", "metrics.jsonl"} | drawn | kept | previews


def test_config_json_holds_every_setting(whole: Recorded) -> None:
    stored = json.loads((whole.folder / "config.json").read_text())
    assert stored == json.loads(json.dumps(whole.content["settings"])) | {"processes": 1}
    assert stored["dim"] == 8 and stored["accumulate"] == 2 and stored["digits"] == 1


@pytest.mark.parametrize("accumulate, said", [(2, True), (1, False)])
def test_a_run_that_goes_on_with_other_processes_is_told_when_other_clips_come(
        accumulate: int, said: bool, tmp_path: Path, capsys: CaptureFixture) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"processes": 2, "accumulate": 1}))
    s = settings.read_settings([*TINY, "--out", str(tmp_path), "--accumulate", str(accumulate)])
    train.announce(s, Machine(torch.device("cpu"), world=2))
    assert ("other clips than the next ones come" in capsys.readouterr().out) == said


def test_metrics_are_whole_lines_of_numbers(whole: Recorded) -> None:
    assert (whole.folder / "metrics.jsonl").read_text().endswith("}\n")
    lines = metrics(whole.folder)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert set(line) == {"step", "loss", "grad_norm", "skipped", "lr", "clips_per_second"}
        assert line["skipped"] == 0 and all(math.isfinite(value) for value in line.values())
        assert line["loss"] > 0 and line["grad_norm"] > 0 and line["clips_per_second"] > 0


def test_the_learning_rate_in_the_metrics_is_the_one_that_the_step_used(whole: Recorded) -> None:
    assert [line["lr"] for line in metrics(whole.folder)] == pytest.approx(whole.rates[1::2])


def test_the_last_whole_line_of_a_step_counts(tmp_path: Path) -> None:
    """A run that was killed takes the steps since its last checkpoint again, and may leave a torn line."""
    lines = ['{"step": 1, "loss": 3}', '{"step": 2, "loss": 2}', '{"step": 3, "lo', '{"step": 2, "loss": 1}', "7", "null"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "loss": 0')
    assert progress.read_log(tmp_path) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 1}]


def test_a_run_without_matplotlib_says_how_to_draw_its_loss(whole: Recorded, monkeypatch: MonkeyPatch) -> None:
    if HAS_MATPLOTLIB:
        assert train.loss_curve(whole.folder) == f"loss curve: {whole.folder / 'loss.png'}"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib && python -m experiments.plots --run" in train.loss_curve(whole.folder)


def test_fewer_steps_than_a_run_has_done_change_nothing(whole: Recorded, monkeypatch: MonkeyPatch,
                                                        capsys: CaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        program(monkeypatch, ["--resume", whole.folder, "--steps", 5])
    assert stopped.value.code == 2
    assert "--steps 5 counts from the beginning, and the run is at step 6 already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")} == before


def test_the_first_preview_comes_after_30_steps_at_the_latest(monkeypatch: MonkeyPatch) -> None:
    steps = []
    monkeypatch.setattr(train, "preview", lambda state, s, machine: steps.append(state.step))
    s = settings.read_settings([*TINY, "--preview_every", "150"])
    state = types.SimpleNamespace()
    for state.step in range(1, 320):
        train.write_due(state, s, CPU)
    assert steps == [30, 150, 200, 300]


# ---- what is trained on ------------------------------------------------------------------------------------


@pytest.fixture()
def clips(tmp_path: Path) -> Path:
    """A folder of three small clips, two GIFs and an array, with their captions beside them."""
    folder, random = tmp_path / "clips", np.random.default_rng(0)
    folder.mkdir()
    for name, caption in (("a", "a red square"), ("b", "a green disc"), ("c", "blue noise")):
        pixels = random.integers(0, 256, (6, 20, 20, 3), dtype=np.uint8)
        (folder / f"{name}.txt").write_text(caption)
        if name == "b":
            np.save(folder / "b.npy", pixels)
            continue
        first, *others = [Image.fromarray(frame) for frame in pixels]
        first.save(folder / f"{name}.gif", save_all=True, append_images=others, optimize=False, loop=0)
    return folder


def test_a_folder_of_clips_is_trained_on_with_its_captions(clips: Path, tmp_path: Path) -> None:
    flags = f"--dataset video_folder --data_dir {clips} --channels 3 --steps 4 --preview_every 4".split()
    run = recorded([*TINY, *flags, "--out", tmp_path / "run"], tmp_path / "run")
    assert run.fed[0][1].shape == (2, 3, 5, 16, 16)
    texts = {caption for *_, captions in run.fed for clip in captions for caption in clip}
    assert texts == {"a green disc", "blue noise"}  # the first of every ten clips is for testing
    assert (tmp_path / "run/samples/step_00000004.gif").exists()


@pytest.mark.parametrize("flags", [
    "--cond_dim 0", "--cond_dim 0 --num_images 0", "--emb_dim 17",
    "--prediction eps --noise_shift 3", "--channels 3", "--checkpointing --scale_shift",
    "--frames 1 --num_images 0", "--precision bf16"])
def test_training_works_with(flags: str, tmp_path: Path) -> None:
    s = settings.read_settings([*TINY, *flags.split(), "--steps", "1", "--out", str(tmp_path)])
    run = fitted([*TINY, *flags.split(), "--steps", 1], tmp_path / "run")
    start = new_state(s, CPU.device).model.state_dict()
    assert not same(tensors(run["model"]), tensors(start))
    assert all(tensor.isfinite().all() for tensor in learned(run))


def test_an_unconditional_run_has_no_text_in_its_network() -> None:
    s = settings.read_settings([*TINY, "--cond_dim", "0"])
    assert condition([["a 4"]], s.text, CPU.device) is None
    names = {name for name, _ in UNet3D(s.unet).named_parameters()}
    conditional = {name for name, _ in UNet3D(settings.read_settings(TINY).unet).named_parameters()}
    assert conditional - names == {"embedding.query", "embedding.value.weight"} and names < conditional


# ---- real processes ----------------------------------------------------------------------------------------


def processes(*words: object) -> dict:
    """Arguments of subprocess for a Python program in the project's folder, one thread each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return {"args": [sys.executable, *map(str, words)], "env": environment, "cwd": HERE,
            "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def test_the_micro_batches_of_two_processes_are_those_of_one(monkeypatch: MonkeyPatch) -> None:
    s, fed = settings.read_settings([*TINY, "--accumulate", "2"]), {}
    state = new_state(s, CPU.device)
    ranks = types.SimpleNamespace(no_sync=contextlib.nullcontext)  # in DistributedDataParallel's place

    def loss(network: object, batch: tuple, index: int, *rest: object) -> Tensor:
        fed[index] = batch[0]
        return 0 * state.model.entry.weight.sum()
    monkeypatch.setattr(train, "micro_batch_loss", loss)
    for rank in range(2):
        state.step = 1
        stream = batches(s.data, 2, 0, 4 + rank, 2)
        train.train_step(ranks, state, stream, s, Machine(CPU.device, "float32", rank, 2))
    assert fed.keys() == {4, 5, 6, 7}
    alone = itertools.islice(batches(s.data, 2, 0, 4), 4)
    assert same([fed[index] for index in range(4, 8)], [x for x, _ in alone])


def test_orthogonal_keeps_the_singular_vectors_and_levels_their_values() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((12, 20), (20, 12), (12, 30), (30, 12)):  # the last two are long
        u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
        matrix = u @ torch.diag(torch.linspace(1, 9, 12)) @ v
        levelled, = optimizer.orthogonal(matrix[None])
        core = u.T @ levelled @ v.T
        assert torch.allclose(levelled, u @ core @ v, atol=1e-5)
        assert torch.allclose(core, torch.diag(core.diagonal()), atol=1e-5)
        assert 0.6 < core.diagonal().min() and core.diagonal().max() < 1.3


def test_muon_turns_kernels_alone_and_half_as_far_as_lr() -> None:
    layer = nn.Conv2d(16, 12, 3)
    other = copy.deepcopy(layer)
    for one, kind in ((layer, optimizer.Muon), (other, torch.optim.AdamW)):
        moves = kind(one.parameters(), lr=0.1, weight_decay=0.0)
        one(torch.ones(1, 16, 3, 3)).square().sum().backward()
        before = one.weight.detach().clone()
        moves.step()
    moved = (layer.weight - before).flatten(1)
    assert torch.equal(layer.bias, other.bias) and not torch.equal(layer.weight, other.weight)
    assert 0.6 < torch.linalg.matrix_norm(moved, 2) / (0.05 * 144**0.5) < 1.3


def test_muon_turns_kernels_of_one_shape_together_as_it_turns_each_alone() -> None:
    layers = [nn.Conv2d(16, 12, 3, bias=False) for _ in range(3)]
    alone = copy.deepcopy(layers)
    for layer, other in zip(layers, alone):
        layer.weight.grad = other.weight.grad = torch.randn(12, 16, 3, 3)
        optimizer.Muon(other.parameters(), lr=0.1).step()
    optimizer.Muon([layer.weight for layer in layers], lr=0.1).step()
    for layer, other in zip(layers, alone):
        assert torch.allclose(layer.weight, other.weight, atol=1e-5)


@pytest.mark.slow
def test_a_run_with_muon_can_be_resumed(tmp_path: Path) -> None:
    flags = [*TINY, "--optimizer", "muon", "--save_every", 2, "--decay", "constant"]
    whole, _ = (fitted([*flags, "--steps", steps], tmp_path / str(steps)) for steps in (4, 2))
    s = settings.read_settings(["--resume", str(tmp_path / "2"), "--steps", "4", "--out", str(tmp_path / "on")])
    with train.prepare(s, CPU):
        train.fit(s, CPU)
    again = checkpoint.load(checkpoint.newest(tmp_path / "on"))
    assert same(learned(again), learned(whole))
    assert any("momentum" in state for state in whole["optimizer"]["state"].values())


@pytest.mark.slow
def test_a_run_goes_on_whatever_the_order_in_memory_of_what_is_saved(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    whole_4 = fitted([*TINY, *"--steps 4 --decay constant --save_every 2".split()], folder)
    half = checkpoint.load(path := folder / "checkpoint_00000002.pt")
    for values in half["optimizer"]["state"].values():
        values.update({name: value.contiguous() for name, value in values.items()})
    assert not all(value.is_contiguous() for value in half["model"].values())
    (tmp_path / "half").mkdir()
    checkpoint.save(tmp_path / "half" / path.name, half)
    s = settings.read_settings(["--resume", str(tmp_path / "half")])
    with train.prepare(s, CPU):
        train.fit(s, CPU)
    assert same(learned(checkpoint.load(checkpoint.newest(tmp_path / "half"))), learned(whole_4))


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_micro_batches(tmp_path: Path) -> None:
    flags = [*TINY, *"--steps 3 --dropout 0.1 --log_every 1 --ema 0.3 --clip 0.5".split()]
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 train.py --accumulate 2".split()
    done = subprocess.run(**processes(*torchrun, *flags, "--out", tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    two = checkpoint.load(checkpoint.newest(tmp_path / "two"))
    one = fitted([*flags, "--accumulate", 4], tmp_path / "one")
    half = fitted([*flags, "--accumulate", 2], tmp_path / "half")
    assert two["model"].keys() == one["model"].keys()  # no prefix of DistributedDataParallel
    difference = max((a - b).abs().max().item() for a, b in zip(learned(two), learned(one), strict=True))
    other = max((a - b).abs().max().item() for a, b in zip(learned(half), learned(one), strict=True))
    assert difference < 1e-5 < 1e-3 < other  # half the data would show: the ranks saw different ones
    ours, theirs = ([line["grad_norm"] for line in metrics(tmp_path / name)] for name in ("two", "one"))
    assert ours == pytest.approx(theirs, rel=1e-4)  # and only one process wrote
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("two", "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # of all processes, not of the first


@pytest.mark.slow
def test_shards_learn_what_one_process_learns_and_either_resumes_the_other(tmp_path: Path) -> None:
    flags = [*TINY, *"--dropout 0.1 --log_every 1 --ema 0.3 --decay constant".split()]
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 train.py --accumulate 2 --shard".split()
    whole, half = (fitted([*flags, "--accumulate", 4, "--steps", n], tmp_path / f"one{n}") for n in (4, 2))
    for name, words in {"shards": [*flags, "--preview_every", 2], "on": ["--resume", tmp_path / "one2"]}.items():
        steps = 2 if name == "shards" else 4
        done = subprocess.run(**processes(*torchrun, *words, "--steps", steps, "--out", tmp_path / name))
        assert done.returncode == 0, done.stderr
    shards, on = (checkpoint.load(checkpoint.newest(tmp_path / name)) for name in ("shards", "on"))
    s = settings.read_settings(["--resume", str(tmp_path / "shards"), "--no-shard", "--accumulate", "4", "--steps", "4",
                        "--out", str(tmp_path / "back")])
    with train.prepare(s, CPU):
        train.fit(s, CPU)
    back = checkpoint.load(checkpoint.newest(tmp_path / "back"))
    for ours, theirs in ((shards, half), (on, whole), (back, whole)):
        assert ours["model"].keys() == theirs["model"].keys() and ours["step"] == theirs["step"]
        assert apart(ours, theirs, "optimizer") < 1e-5 < 1e-4 < apart(half, whole, "optimizer")
        # Adam divides gradients that are 0 but for rounding by themselves
        assert apart(ours, theirs, "model", "ema") < 0.1 * apart(half, whole, "model", "ema")
    lines = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("shards", "one2")]
    assert lines[0] == pytest.approx(lines[1], rel=1e-4)
    assert (tmp_path / "shards" / "samples" / "step_00000002.gif").is_file()


@pytest.mark.slow
def test_each_process_holds_its_part_of_what_is_sharded(tmp_path: Path) -> None:
    program = f"""
import settings, state, torch, torch.distributed as dist
dist.init_process_group("gloo")
state = state.new_state(settings.read_settings({[*TINY, "--shard"]!r}), torch.device("cpu"))
for network in (state.model, state.ema):
    whole = sum(p.numel() for p in network.parameters())
    here = sum(p.to_local().numel() for p in network.parameters())
    assert 0.4 * whole < here < 0.6 * whole, (here, whole)
dist.destroy_process_group()
"""
    (file := tmp_path / "parts.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})" + program)
    done = subprocess.run(**processes(*"-m torch.distributed.run --standalone --nproc_per_node=2".split(), file))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["--shard", "--no-shard"])
def test_all_processes_ask_for_the_same_collectives_and_one_keeps_the_whole_state(shard: str, tmp_path: Path) -> None:
    """NCCL would wait for the one that is missing; a preview, checkpoints and --resume are among them."""
    flags = [*TINY, *f"--cond_dim 8 --preview_every 2 --save_every 2 --log_every 1 {shard}".split()]
    runs = [[*flags, "--steps", 2, "--out", tmp_path / "run"], ["--resume", tmp_path / "run", "--steps", 4]]
    program = f"""
import json, pathlib, sys
sys.path.insert(0, {str(HERE)!r})
import torch, torch.distributed as dist, config, state, train
from torch.utils._python_dispatch import TorchDispatchMode

calls, kept = [], []
class Count(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace in ("c10d", "_c10d_functional"):
            calls.append(str(operation))
        return operation(*args, **(kwargs or {{}}))

def gathered(content, keep, honest=state.gathered):
    result = honest(content, keep)
    kept.extend(result["model"].values())
    return result
state.gathered = gathered
run, *sys.argv[1:] = sys.argv[1:]
with Count():
    config.run(train.main)
held = sum(value is not None for value in kept)
pathlib.Path(f"{tmp_path}/{{run}}_{{train.os.environ['RANK']}}").write_text(json.dumps([calls, held]))
"""
    (file := tmp_path / "counted.py").write_text(program.replace("train.os", "__import__('os')"))
    for number, words in enumerate(runs):
        torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
        done = subprocess.run(**processes(*torchrun, file, number, *words))
        assert done.returncode == 0, done.stderr
        (calls, held), (others, held_there) = (json.loads((tmp_path / f"{number}_{rank}").read_text()) for rank in range(2))
        assert calls == others and len(calls) > 4
        assert held > 0 and (held_there == 0) == (shard == "--shard")  # a whole model is on each GPU anyway


def stopped(program: dict, folder: Path, number: int, beyond: int) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a training process that gets a signal after this step."""
    with subprocess.Popen(**program) as process:
        path, give_up = folder / "metrics.jsonl", time.time() + 240
        while not (path.exists() and f'"step": {beyond}' in path.read_text()):
            assert process.poll() is None and time.time() < give_up, process.communicate()
            time.sleep(0.1)
        process.send_signal(number)
        out, err = process.communicate(timeout=240)
        return process.returncode, out, err


def test_a_run_of_several_processes_goes_on_with_as_many(monkeypatch: MonkeyPatch, capsys: CaptureFixture) -> None:
    for name in ("save_state", "preview", "loss_curve"):
        monkeypatch.setattr(train, name, lambda *_: "")
    s = settings.read_settings([*TINY, "--out", "runs/a b"])
    for world, command in ((1, "python train.py"), (8, "torchrun --nproc_per_node=8 train.py")):
        with pytest.raises(SystemExit):
            train.finish(types.SimpleNamespace(step=1), s, [], False, Machine(torch.device("cpu"), world=world))
        assert f"to go on: {command} --resume 'runs/a b'\n" in capsys.readouterr().out
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(SystemExit):
        train.finish(types.SimpleNamespace(step=1), s, [], False, Machine(torch.device("cpu"), world=8))
    said = "torchrun --nproc_per_node=4 train.py --resume 'runs/a b', on each of 2 computers"
    assert f"to go on: {said}\n" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_and_sigterm_save_and_print_a_command_that_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "a run"  # with a blank: the command must be quoted
    flags = [*TINY, *"--steps 1000000 --decay constant --log_every 1".split(), "--out", folder]
    code, out, err = stopped(processes("train.py", *flags), folder, signal.SIGINT, beyond=2)
    assert code == 130 and "Traceback" not in err, err
    step, command = re.search(r"stopped at step (\d+); to go on: (python .*)", out).groups()
    first = checkpoint.load(checkpoint.newest(folder))
    assert first["step"] == int(step) == metrics(folder)[-1]["step"] >= 2
    python, *words = shlex.split(command)
    assert python == "python"
    code, out, err = stopped(processes(*words), folder, signal.SIGTERM, beyond=int(step) + 2)
    assert code == 143 and "Traceback" not in err, err
    assert checkpoint.load(checkpoint.newest(folder))["step"] >= int(step) + 2
    steps = [line["step"] for line in progress.read_log(folder)]
    assert steps == list(range(1, steps[-1] + 1))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_saves_the_step_and_leaves_no_process(
        number: int, clips: Path, tmp_path: Path) -> None:
    flags = f"--dataset video_folder --data_dir {clips} --channels 3 --workers 2 --steps 1000000".split()
    flags = [*TINY, *flags, *"--log_every 1".split(), "--out", folder := tmp_path / "run"]
    with subprocess.Popen(**processes("train.py", *flags), start_new_session=True) as process:
        while not (path := folder / "metrics.jsonl").exists() or '"step": 2' not in path.read_text():
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)  # a worker that stays would hold stdout open
    assert process.returncode == 128 + number and "Traceback" not in err, err
    step = int(re.search(r"stopped at step (\d+)", out)[1])
    assert checkpoint.load(checkpoint.newest(folder))["step"] == step >= 2


@pytest.mark.slow
def test_a_reading_process_that_dies_ends_the_run(clips: Path, tmp_path: Path) -> None:
    flags = f"--dataset video_folder --data_dir {clips} --channels 3 --workers 2 --steps 1000000".split()
    flags = [*TINY, *flags, *"--log_every 1 --save_every 1".split(), "--out", folder := tmp_path / "run"]
    with subprocess.Popen(**processes("train.py", *flags)) as process:
        while not (path := folder / "metrics.jsonl").exists() or '"step": 2' not in path.read_text():
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        children = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid=,args="],
                                  capture_output=True, text=True).stdout.splitlines()
        worker, _ = (int(line.split()[0]) for line in children if "train.py" in line)
        os.kill(worker, signal.SIGKILL)  # the other one must not hold the program
        _, err = process.communicate(timeout=240)
    assert process.returncode == 1 and "DataLoader worker" in err, err
    assert checkpoint.load(checkpoint.newest(folder))["step"] >= 1


# ---- mistakes ----------------------------------------------------------------------------------------------


def occupied(folder: Path) -> list:
    checkpoint.save(folder / "checkpoint_00000002.pt", {})
    return ["--out", folder]


def a_file(folder: Path) -> list:
    (folder / "file").write_text("")
    return ["--out", folder / "file"]


def in_a_file(folder: Path) -> list:
    return ["--out", a_file(folder)[1] / "run"]


def garbage(folder: Path) -> list:
    (folder / "checkpoint_00000002.pt").write_bytes(b"PK not one")
    return ["--resume", folder]


def foreign(folder: Path) -> list:
    checkpoint.save(folder / "checkpoint_00000002.pt", {"weights": torch.zeros(3)})
    return ["--resume", folder]


def short_clip(folder: Path) -> list:
    np.save(folder / "clip.npy", np.zeros((3, 16, 16), np.uint8))
    return ["--dataset", "video_folder", "--data_dir", folder]


def out_beside_clips(folder: Path) -> list:
    np.save(folder / "clip.npy", np.zeros((9, 16, 16), np.uint8))
    return ["--dataset", "video_folder", "--data_dir", folder, "--out", folder / "runs/a"]


def a_checkpoint(folder: Path) -> list:
    (folder / "run").mkdir()
    (folder / "run" / "checkpoint_00000002.pt").touch()
    return ["--resume", "run/checkpoint_00000002.pt"]


MISTAKES: dict[str, tuple[list | Callable, str]] = {
    "size not divisible": (["--size", "18", "--dim_mults", "1,2,4"], "frames of 18 px, which are not divisible by 4"),
    "unknown preset": (["--preset", "ucf"], "--preset ucf is not one of cpu, cuda, films, pixels, autoencoder, ucf101"),
    "unknown flag": (["--stepss", "3"], "--stepss"),
    "a word too many": (["moving_mnist"], "moving_mnist"),
    "no steps": (["--steps", "0"], "--steps"),
    "negative steps": (["--steps", "-3"], "--steps"),
    "no batch": (["--batch_size", "0"], "--batch_size"),
    "no number": (["--lr", "nan"], "--lr"),
    "unknown data": (["--dataset", "imagenet"], "--dataset imagenet is not one of moving_mnist, "),
    "two channels": (["--channels", "2"], "channels is 2"),
    "training on test digits": (["--split", "test"], "--split"),
    "unknown device": (["--device", "gpu"], "--device gpu"),
    "no such device": (["--device", "cuda:99"], "--device cuda:99"),
    "shards of one process": (["--shard"], "start several with torchrun"),
    "shards and muon": (["--shard", "--optimizer", "muon"], "--shard goes with --optimizer adam"),
    "shards of an autoencoder": (["--shard", "--arch", "autoencoder", "--attention_resolutions", "16"],
                                 "is not for --arch autoencoder"),
    "no data_dir": (["--dataset", "video_folder"], "data_dir is ''"),
    "missing data_dir": (["--dataset", "video_folder", "--data_dir", "nowhere"], "data_dir is 'nowhere'"),
    "a folder of clips for digits": (["--data_dir", "clips"], "--dataset video_folder"),
    "empty data_dir": (lambda folder: ["--dataset", "video_folder", "--data_dir", folder], "no usable clip"),
    "clips too short": (short_clip, "3 frames, 4 needed"),
    "out among the clips": (out_beside_clips, "lies in --data_dir"),
    "nothing to resume": (["--resume", "nowhere"], "nowhere"),
    "a file to resume": (a_checkpoint, "--resume takes the folder of a run: --resume run"),
    "resume from garbage": (garbage, "is no checkpoint of this project"),
    "resume from a foreign checkpoint": (foreign, "checkpoint_00000002.pt"),
    "out holds a run": (occupied, "holds a run already"),
    "out is a file": (a_file, "file"),
    "out is in a file": (in_a_file, "file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_one_sentence_and_status_2(
        name: str, monkeypatch: MonkeyPatch, tmp_path: Path, capsys: CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    flags, expected = MISTAKES[name]
    given = flags(tmp_path) if callable(flags) else flags
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        program(monkeypatch, ([] if "--resume" in given else [*TINY, "--steps", 1]) + given)
    lines = [line for line in capsys.readouterr().err.splitlines() if "clips" not in line or "error" in line]
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("train.py: error: ") and expected in lines[0], lines
    left = [path for path in sorted(tmp_path.rglob("*")) if path.name != ".clips.json"]  # looked at, at least
    assert left == before, "something was left behind"


def test_a_preset_in_latents_of_digits_is_not_for_films(capsys: CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        settings.read_settings("--preset cpu --dataset video_folder --data_dir .".split())
    assert "--preset cpu is in latents of digits" in capsys.readouterr().err


def test_another_shape_cannot_be_resumed(whole: Recorded, monkeypatch: MonkeyPatch,
                                         capsys: CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        program(monkeypatch, ["--resume", whole.folder, "--dim", 16])
    line, = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and str(whole.folder) in line


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_is_never_written_over_by_another(resume: bool, whole: Recorded, halves: list,
                                                monkeypatch: MonkeyPatch, capsys: CaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")}
    flags = ["--resume", halves[0].folder] if resume else TINY
    with pytest.raises(SystemExit) as stopped:
        program(monkeypatch, [*flags, "--out", whole.folder])
    line, = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "holds a run already" in line
    assert before == {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")}

"""evaluate.py: every experiment runs and writes its table; what it judges is checked on known clips."""
import copy
import dataclasses
import inspect
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import config
import infill
import sample
from experiments import ablations, benchmark, evaluate, metrics
from experiments import lab as lab_module
from experiments.ablations import small_model
from experiments.evaluate import table
from experiments.lab import EvaluateConfig, open_lab
from test_init import TINY
from test_train import fitted, program

HERE = Path(__file__).parents[1]
NARROW = "--size 32 --patch 4 --dim_mults 1 --attention_resolutions 8".split()
FEW = ("--clips 2 --reference 8 --seeds 1 --calls 4 --frames 24 --train_steps 2 --device cpu "
       "--precision float32 --samples 2").split()


@pytest.fixture(scope="module")
def opened():
    return open_lab(EvaluateConfig(clips=6, reference=8, batch_size=4, calls=2, seeds=1, device="cpu"))


@pytest.fixture
def lab(opened):
    """The laboratory with settings of its own."""
    return dataclasses.replace(opened, c=dataclasses.replace(opened.c))


def few(monkeypatch, experiment: str, out: Path, *flags: str) -> None:
    """python -m experiments.evaluate with few clips in this process, and the trainings that it starts."""
    def run(words: list) -> SimpleNamespace:
        with pytest.MonkeyPatch.context() as patch:
            program(patch, words[2:])
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--experiment", experiment, *FEW, "--out", str(out), *flags])
    config.run(evaluate.main)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> list[str]:
    """The flags of a small model."""
    folder = tmp_path_factory.mktemp("model") / "run"
    fitted([*TINY, *NARROW, "--frames", 16], folder)
    return ["--checkpoint", str(folder)]


LONG = ("samplers", "joint", "extend", "guidance")


def judged(experiment: str, out: Path, said: str) -> None:
    """What an experiment has said and written is its table."""
    page = (out / f"{experiment}.md").read_text()
    numbers = json.loads((out / f"{experiment}.json").read_text())
    assert page in said and inspect.getdoc(evaluate.EXPERIMENTS[experiment]) in page
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].strip("| ") for row in rows[1:]] == list(numbers["raw"])
    assert all(math.isfinite(v) for runs in numbers["raw"].values() for run in runs for v in run.values())
    assert "--clips 2" in numbers["command"] and len(numbers["features"]) == len(numbers["checkpoint"]) == 64
    if experiment in LONG:
        assert {"real clips (floor)", "their frames exchanged (chance)"} <= set(numbers["raw"])


@pytest.mark.parametrize("experiment", [
    pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in evaluate.EXPERIMENTS])
def test_every_experiment_runs_and_writes_its_table(experiment, run, tmp_path, monkeypatch, capsys):
    decide = sample.decide
    monkeypatch.setattr(sample, "decide", lambda model, given: decide(model, given) | {"steps": 2})
    monkeypatch.setattr(ablations, "RECIPE", ablations.RECIPE | dict(
        dim=8, head_dim=8, emb_dim=16, emb_layers=1, dim_mults="1,2", attention_resolutions="4", batch_size=2))
    monkeypatch.setattr(evaluate, "CALLS", (2, 4))
    few(monkeypatch, experiment, tmp_path, *run)
    judged(experiment, tmp_path, capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["guidance", "joint"])
def test_an_experiment_is_a_command_that_starts_others_and_takes_the_shipped_networks(experiment, tmp_path):
    command = [sys.executable, "-m", "experiments.evaluate", "--experiment", experiment, *FEW,
               "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    judged(experiment, tmp_path, done.stdout)


def test_the_flags_choices_are_the_experiments():
    assert set(evaluate.EXPERIMENTS) == set(lab_module.Experiment.__args__)


PAGES = ["README.md", "GUIDE.md", "experiments/README.md", "pretrained/README.md"]
COMMANDS = [line for page in PAGES for line in re.findall(
    r"^python -m experiments.evaluate (.*)$", (HERE / page).read_text(), re.M)]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_a_page_has_arms_to_run(line, opened):
    c, = config.parse(EvaluateConfig, argv=shlex.split(line))
    model = dataclasses.replace(opened.model, data=dataclasses.replace(opened.model.data, num_images=4))
    lab = dataclasses.replace(opened, c=c, model=model)
    for part in c.only.split("|"):  # none of it is forgotten
        lab.c.only = part
        assert evaluate.chosen(lab, evaluate.EXPERIMENTS[c.experiment])


def test_chance_keeps_the_frames_and_loses_the_video(lab):
    lab.c.clips = 32
    floor, chance = (arm(0) for arm in lab.bounds().values())
    assert chance["frechet_frame"] < 2 * floor["frechet_frame"] < chance["frechet_clip"]
    assert chance["identity_kept"] < 0.3 < 0.9 < floor["identity_kept"]
    assert chance["trajectory_residual"] > 4 * floor["trajectory_residual"]


def test_clips_are_drawn_in_batches_each_with_its_caption(lab, monkeypatch):
    seen = []

    def fill(model, s, given):
        seen.append((s.num, s.text.split("|"), given.x.shape[0]))
        return given.x
    monkeypatch.setattr(infill, "fill", fill)
    assert lab.draw(0, texts=list("abcdef")).shape[0] == 6
    assert seen == [(4, list("abcd"), 4), (2, list("ef"), 2)]


def test_what_a_checkpoint_carries_is_drawn_and_texts_and_numbers_are_the_labs(lab, monkeypatch):
    seen = []
    monkeypatch.setattr(infill, "fill", lambda model, s, given: seen.append((s.num, s.text)) or given.x)
    carried = {"text": "a 3|a 4", "num": 9}
    lab.draw(0, **carried)
    lab.draw(0, texts=list("abcdef"), **carried)
    assert seen == [(4, "a 3|a 4"), (2, "a 3|a 4"), (4, "a|b|c|d"), (2, "e|f")]


def test_batches_and_seeds_have_noise_of_their_own(lab, monkeypatch):
    seeds = []
    monkeypatch.setattr(infill, "fill", lambda model, s, given: seeds.append(s.seed) or given.x)
    lab.draw(0), lab.draw(1)
    assert len(set(seeds)) == len(seeds) == 4


def test_what_is_drawn_knows_the_true_frames(lab, monkeypatch):
    monkeypatch.setattr(infill, "fill", lambda model, s, given: given.x * given.known[:, None, None])
    x = lab.real(0)[0]
    drawn = lab.draw(0, evaluate.known(lab, x, slice(0, 5)))
    with lab.machine.autocast():
        latents = lab.model.latents(x[:, :, :5])
    assert torch.allclose(drawn[:, :, :5], latents, atol=0.05) and not drawn[:, :, 5:].any()


def test_known_frames_are_given_to_a_network_as_it_knows_them(lab):
    lab.model = dataclasses.replace(lab.model, coder=SimpleNamespace(latents=lambda x: x[..., :4, :4] + 3))
    x = lab.real(0)[0]
    given = evaluate.known(lab, x, slice(0, 5))(infill.SampleConfig(num=len(x)), slice(0, len(x)))
    assert torch.equal(given.x[:, :1, :5], x[:, :, :5, :4, :4] + 3) and not given.x[:, :, 5:].any()


def test_small_clips_are_known_and_nothing_else(lab, monkeypatch):
    x = lab.real(0)[0]
    monkeypatch.setattr(infill, "fill", lambda model, s, given: given.low.repeat_interleave(2, 3)
                        .repeat_interleave(2, 4))
    blocky = lab.draw(0, evaluate.made_small(lab, x, 2))
    assert torch.allclose(infill.smaller(blocky, 2), infill.smaller(x, 2), atol=1e-6)


def test_the_benchmark_compares_ten_drawn_frames_with_the_true_ones(lab, monkeypatch):
    lab.c.samples = 3
    x, _, _ = lab.real(0, 20)
    asked = []

    def draw(seed, known, **flags):  # the truth, darker by 0, 0.1 and 0.2
        given = known(infill.SampleConfig(num=len(x)), slice(0, len(x)))
        asked.append((given.known.tolist(), flags["mode"], flags["overlap"]))
        return x - 0.1 * (len(asked) - 1)
    monkeypatch.setattr(lab, "draw", draw)
    found = {name: arm(0) for name, arm in evaluate.benchmark(lab).items()}
    assert asked == [([True] * 10 + [False] * 10, "predict", 10)] * 3
    assert found["one sample"]["squared_error"] == found["best of 3"]["squared_error"] == 0
    assert found["one sample"]["ssim"] == pytest.approx(1)
    assert found["mean of 3"]["squared_error"] == pytest.approx(32 * 32 * 0.05**2, rel=1e-4)
    true = x[:, :, 10:]
    assert found["black frames"]["squared_error"] == pytest.approx(
        ((true + 1) / 2).square().sum((1, 3, 4)).mean().item(), rel=1e-5)
    assert found["the last frame again"]["squared_error"] == pytest.approx(
        ((true - x[:, :, 9:10]) / 2).square().sum((1, 3, 4)).mean().item(), rel=1e-5)
    assert found["one sample"]["digits"] > 0.9 > 0.3 > found["black frames"]["digits"]
    assert found["the true frames"] == found["one sample"]  # which was not changed


def test_the_error_of_the_mean_of_infinitely_many_has_no_spread_in_it(lab, monkeypatch):
    lab.c.samples, g = 4, torch.Generator().manual_seed(0)
    x, _, _ = lab.real(0, 20)
    monkeypatch.setattr(lab, "draw", lambda *args, **flags: x - 0.2 + 0.3 * torch.randn(x.shape, generator=g))
    arms = evaluate.benchmark(lab)
    wrong, spread = 32 * 32 * 0.1**2, 32 * 32 * 0.15**2
    assert arms["mean of 4"](0)["squared_error"] == pytest.approx(wrong + spread / 4, rel=0.02)
    assert arms["mean of infinitely many, by the spread"](0)["squared_error"] == pytest.approx(wrong, rel=0.02)


def test_the_public_test_file_is_read_clip_by_clip_and_seed_by_seed(lab, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (20, 5, 32, 32), np.uint8)
    lab.c.test_file, lab.c.clips, lab.c.seeds = str(tmp_path / "mnist_test_seq.npy"), 2, 2
    np.save(lab.c.test_file, array)
    x, truth = benchmark.clips(lab, 1)
    assert truth == {} and x.shape == (2, 1, 20, 32, 32)
    assert torch.equal(x[1, 0].add(1).mul(127.5).round().byte(), torch.from_numpy(array[:, 3]))
    lab.c.seeds = 3  # which is said before the first seed is drawn
    with pytest.raises(ValueError, match="holds 5 clips of 32 px"):
        benchmark.clips(lab, 0)


@pytest.fixture(scope="module")
def two_digits():
    return open_lab(EvaluateConfig(checkpoint="pretrained/two_digits_64.pt", features="pretrained/features_64.pt",
                                   experiment="reader", clips=48, device="cpu"))


def test_two_digits_are_read_where_they_are_apart_and_less_where_they_cross(two_digits):
    found = {name: arm(0) for name, arm in evaluate.reader(two_digits).items()}
    apart, middle, near = found["16 px apart or more"], found["8 to 16 px"], found["under 8 px"]
    assert apart["digits"] > 0.9 > near["digits"] > 0.3 and apart["off"] < 1 < near["off"]
    assert apart["share"] + middle["share"] + near["share"] == pytest.approx(1)
    assert found["all frames"]["share"] == 1 and found["whole clips"]["followed"] > 0.8


def test_of_two_digits_none_is_exchanged(two_digits):
    c = dataclasses.replace(two_digits.c, experiment="exchange")
    with pytest.raises(ValueError, match="exchanges one digit"):
        open_lab(c)


@pytest.mark.parametrize("array, reason", [
    (np.zeros((5, 20, 32, 32), np.uint8), "shape .5, 20, 32, 32."), (np.zeros((20, 5, 32, 32)), "float64"),
    (np.array([{}]), "no array")])
def test_another_file_than_the_public_one_is_refused(array, reason, tmp_path):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=reason):
        benchmark.read_test_file(str(tmp_path / "x.npy"))
    with pytest.raises(ValueError, match="there is no file"):
        benchmark.read_test_file(str(tmp_path / "y.npy"))


def test_modes_are_drawn_with_the_settings_that_the_checkpoint_carries(lab, monkeypatch):
    seen = []
    decode = lab.model.coder.video
    monkeypatch.setattr(infill, "fill", lambda model, s, given: seen.append(s) or decode(given.x))
    lab.model = dataclasses.replace(lab.model, sampling={"all": {"steps": 7}, "predict": {"w_r": 2.0, "steps": 9}})
    evaluate.modes(lab)["predict, 6 given"](0)
    evaluate.modes(lab)["predict by replacement"](0)
    evaluate.modes(lab)["generate"](0)
    assert {(s.mode, s.steps, s.w_r) for s in seen} == {("predict", 9, 2.0), ("predict", 9, 0.0), ("generate", 7, 10.0)}


def test_the_table_has_means_and_deviations_and_leaves_gaps():
    text, raw = table({"a": lambda seed: {"x": 1.0 + seed}, "b": lambda seed: {"y": 5.0}}, 3)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[0] == ["", "x", "y"] and rows[2:] == [["a", "2 ± 1", ""], ["b", "", "5 ± 0"]]
    assert raw["a"] == [{"x": 1.0}, {"x": 2.0}, {"x": 3.0}]


def test_a_nan_is_shown_and_loses_nothing():
    text, _ = table({"a": lambda seed: {"x": math.nan}}, 2)
    assert "nan ± nan" in text


def test_image_frames_are_compared_at_equal_steps(lab):
    lab.c.train_steps = 300
    flags = [arm.args[1] for name, arm in evaluate.joint(lab).items() if "image" in name]
    assert flags == [{"num_images": k, "steps": 300} for k in (0, 4, 8)]


def test_the_loss_is_the_same_for_the_same_model_and_less_for_a_trained_one(lab):
    untrained = dataclasses.replace(lab.model, network=copy.deepcopy(lab.model.network))
    for parameter in untrained.network.parameters():
        parameter.data *= 0.5
    trained, worse = (ablations.loss_of_real(dataclasses.replace(lab, model=model))
                      for model in (lab.model, untrained))
    assert trained == ablations.loss_of_real(lab) < 0.5 * worse


def test_a_trained_small_model_is_found_again(lab, tmp_path, monkeypatch):
    lab.c.out = str(tmp_path)
    folder = tmp_path / "runs" / "steps_2-size_32-digits_1-seed_0"
    folder.mkdir(parents=True)
    shutil.copy(HERE / "pretrained" / "moving_mnist_32.pt", folder / "checkpoint_00000002.pt")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("trained again"))
    assert {"frechet_clip", "loss"} <= set(small_model(lab, {"steps": 2}, 0))


def test_an_interrupted_training_goes_on(lab, tmp_path, monkeypatch):
    lab.c.out, started = str(tmp_path), []
    folder = tmp_path / "runs" / "steps_9-size_32-digits_1-seed_0"
    folder.mkdir(parents=True)
    monkeypatch.setattr(subprocess, "run", lambda words: started.append(words[2:]) or SimpleNamespace(returncode=0))
    ablations.trained(lab, {"steps": 9}, 0)
    (folder / "checkpoint_00000005.pt").touch()
    ablations.trained(lab, {"steps": 9}, 0)
    assert "--resume" not in started[0] and started[1] == ["--resume", str(folder)]


def test_long_clips_are_measured_in_pieces_of_the_models_length(lab, monkeypatch):
    monkeypatch.setattr(metrics, "measure", lambda x, *rest: {"clips": len(x), "frames": x.shape[2]})
    assert lab.measure(torch.zeros(2, 1, 40, 32, 32)) == {"clips": 4, "frames": 16}


def test_only_some_arms_are_run(run, tmp_path, monkeypatch, capsys):
    few(monkeypatch, "guidance", tmp_path, *run, "--only", "w = 1|^real")
    numbers = json.loads((tmp_path / "guidance.json").read_text())
    assert list(numbers["raw"]) == ["real clips (floor)", "w = 1 (2.0 in Table 5)"]
    for only, sentence in {"dreams": "leaves no arm of --experiment guidance",
                           "w = 1 (2.0": "is not a regular expression"}.items():
        with pytest.raises(SystemExit) as stop:
            few(monkeypatch, "guidance", tmp_path, *run, "--only", only)
        assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_features_of_other_clips_are_refused(monkeypatch):
    features = SimpleNamespace(settings={"size": 64, "digits": 2})
    monkeypatch.setattr(lab_module, "load_features", lambda path: features)
    with pytest.raises(ValueError, match="trained on 2 digits at 64 px"):
        open_lab(EvaluateConfig(device="cpu"))


@pytest.mark.parametrize("experiment, data, text, sentence", [
    ("samplers", {"dataset": "video_folder"}, {}, "measures moving_mnist alone"),
    ("guidance", {}, {"cond_dim": 0}, "trained without captions")])
def test_a_model_that_cannot_be_judged_is_refused(experiment, data, text, sentence, lab, monkeypatch):
    model = dataclasses.replace(lab.model, data=dataclasses.replace(lab.model.data, **data),
                                text=dataclasses.replace(lab.model.text, **text))
    monkeypatch.setattr(infill, "load_model", lambda path, device: model)
    with pytest.raises(ValueError, match=sentence):
        open_lab(EvaluateConfig(experiment=experiment, device="cpu"))


@pytest.mark.parametrize("frames, seams", [(64, [16, 24, 32, 40, 48, 56]), (60, [16, 24, 32, 40, 48, 56])])
def test_seams_are_where_drawn_frames_follow_given_ones(frames, seams, lab, monkeypatch):
    found = []
    monkeypatch.setattr(metrics, "seam", lambda places, classes, starts: found.append(list(starts)) or {})
    monkeypatch.setattr(metrics, "measure", lambda *args: {})
    nothing = SimpleNamespace(classes=torch.zeros(1, 2, 1).long(), places=torch.ones(1, 2, 1, 2), frames=0, clips=0)
    monkeypatch.setattr(type(lab), "observe", lambda *args: nothing)
    lab.c.frames = frames
    next(iter(evaluate.extend(lab).values()))(0)
    assert found == [seams]


@pytest.mark.parametrize("flags, sentence", [(["--checkpoint", "nothing.pt"], "nothing.pt"),
                                             (["--features", "nothing.pt"], "nothing.pt"),
                                             (["--experiment", "dreams"], "--experiment"),
                                             (["--clips", "1"], "--clips")])
def test_bad_input_is_one_sentence(flags, sentence, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        few(monkeypatch, "samplers", tmp_path, *flags)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and sentence in err

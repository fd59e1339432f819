"""evaluate.py: every experiment runs and writes its table; what it judges is checked on known clips."""
import copy
import dataclasses
import inspect
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments import ablations
from experiments import evaluate
import config
import infill
from experiments import lab as lab_module
from experiments import metrics
import sample
from data import DIRECTIONS, DataConfig, moving_mnist
from experiments.ablations import small_model
from experiments.evaluate import closest, heading, table
from experiments.lab import EvaluateConfig, build
from text import TextConfig
from test_key_frames import BETWEEN, TINY
from test_train import fitted, program

HERE = Path(__file__).parents[1]
NARROW = "--size 32 --patch 4 --dim_mults 1 --attention_resolutions 8".split()


@pytest.fixture(scope="module")
def lab():
    return build(EvaluateConfig(clips=6, reference=8, batch_size=4, calls=2, seeds=1, device="cpu"))


def quick(monkeypatch, experiment: str, out: Path, *flags: str) -> None:
    """python -m experiments.evaluate --quick in this process, and the trainings that it starts."""
    def run(words: list) -> SimpleNamespace:
        with pytest.MonkeyPatch.context() as patch:
            program(patch, words[2:])
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--experiment", experiment, "--quick", "--out", str(out),
                                      "--device", "cpu", *flags])
    config.run(evaluate.main)


@pytest.fixture(scope="module")
def speeds(tmp_path_factory) -> list[str]:
    """The flags of a small model that knows three speeds, and of one that fills between key frames."""
    folder = tmp_path_factory.mktemp("speeds")
    fitted([*TINY, *NARROW, "--frames", 16, "--frame_stride", "1,2,4"], folder / "slow")
    fitted([*BETWEEN, *NARROW, "--frames", 5], folder / "between")
    return ["--checkpoint", str(folder / "slow"), "--interpolator", str(folder / "between")]


def judged(experiment: str, out: Path, said: str) -> None:
    """What an experiment has said and written is its table."""
    page = (out / "quick" / f"{experiment}.md").read_text()
    numbers = json.loads((out / "quick" / f"{experiment}.json").read_text())
    assert page in said and inspect.getdoc(evaluate.EXPERIMENTS[experiment]) in page
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].strip("| ") for row in rows[1:]] == list(numbers["raw"])
    assert all(math.isfinite(v) for runs in numbers["raw"].values() for run in runs for v in run.values())
    assert "--quick" in numbers["command"] and len(numbers["features"]) == len(numbers["checkpoint"]) == 64
    if experiment not in ("predict", "speed", "exchange"):
        assert {"real clips (floor)", "their frames exchanged (chance)"} <= set(numbers["raw"])


@pytest.mark.parametrize("experiment", [  # "positions" and "blocks" train as "joint" does
    pytest.param(name, marks=[pytest.mark.slow] * (name in ("positions", "blocks")))
    for name in evaluate.EXPERIMENTS])
def test_every_experiment_runs_and_writes_its_table(experiment, speeds, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "NARROW", ablations.NARROW | dict(
        dim=8, head_dim=8, emb_dim=16, emb_layers=1, dim_mults="1,2", attention_resolutions="8"))
    monkeypatch.setattr(ablations, "parameters", lambda lab, flags: flags.get("dim", 8))  # of 240 networks
    quick(monkeypatch, experiment, tmp_path, *speeds)
    judged(experiment, tmp_path, capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["guidance", "joint"])
def test_an_experiment_is_a_command_that_starts_others_and_takes_the_shipped_networks(experiment, tmp_path):
    command = [sys.executable, "-m", "experiments.evaluate", "--experiment", experiment, "--quick",
               "--out", str(tmp_path), "--device", "cpu"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    judged(experiment, tmp_path, done.stdout)


def test_chance_keeps_the_frames_and_loses_the_video(lab):
    lab.c.clips = 32
    floor, chance = (arm(0) for arm in lab.bounds().values())
    lab.c.clips = 6
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


def test_batches_and_seeds_have_noise_of_their_own(lab, monkeypatch):
    seeds = []
    monkeypatch.setattr(infill, "fill", lambda model, s, given: seeds.append(s.seed) or given.x)
    lab.draw(0), lab.draw(1)
    assert len(set(seeds)) == len(seeds) == 4


def test_what_is_drawn_knows_the_true_first_frames(lab, monkeypatch):
    monkeypatch.setattr(infill, "fill", lambda model, s, given: given.x * given.known[:, None, None])
    x = lab.real(0)[0]
    drawn = lab.draw(0, evaluate.known(lab, x, slice(0, 5)))
    assert torch.equal(drawn[:, :, :5], x[:, :, :5]) and not drawn[:, :, 5:].any()


def test_equation_8_is_given_the_small_clip_and_bicubic_beats_nothing(lab, monkeypatch):
    x = lab.real(0)[0]
    monkeypatch.setattr(infill, "fill", lambda model, s, given: given.low.repeat_interleave(2, 3)
                        .repeat_interleave(2, 4))
    blocky = evaluate.equation_8(2, 1.0, lab, x, 0)
    assert torch.allclose(evaluate.smaller(blocky, 2), evaluate.smaller(x, 2), atol=1e-6)
    assert metrics.psnr(x, evaluate.bicubic(2, lab, x, 0)) > metrics.psnr(x, blocky)
    assert evaluate.bicubic(4, lab, x, 0).shape == x.shape


def test_closest_takes_the_nearest_sample_of_each_clip():
    x = torch.randn(3, 1, 4, 8, 8)
    drawn = torch.randn(5, 3, 1, 4, 8, 8)
    drawn[4, 0], drawn[2, 1], drawn[0, 2] = x[0] + 0.01, x[1], x[2] - 0.01
    assert torch.equal(closest(x, drawn), torch.stack([drawn[4, 0], drawn[2, 1], drawn[0, 2]]))


def test_real_clips_go_where_their_captions_say_and_reversed_ones_do_not():
    _, captions, truth = moving_mnist(DataConfig(size=32, digits=1), 400, 0)
    places = truth["positions"].float().transpose(1, 2)
    assert heading(places, captions) > 0.7  # some bounce at once
    backwards = 2 * places[:, :1] - places
    assert heading(backwards, captions) < 0.1
    other = [captions[i].rsplit(" moving ")[0] + " moving " + DIRECTIONS[i % 8] for i in range(400)]
    assert heading(places, other) == pytest.approx(0.25, abs=0.07)


def test_the_table_has_means_and_deviations_and_leaves_gaps():
    text, raw = table({"a": lambda seed: {"x": 1.0 + seed}, "b": lambda seed: {"y": 5.0}}, 3)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[0] == ["", "x", "y"] and rows[2:] == [["a", "2 ± 1", ""], ["b", "", "5 ± 0"]]
    assert raw["a"] == [{"x": 1.0}, {"x": 2.0}, {"x": 3.0}]


def test_image_frames_are_compared_at_equal_steps_and_at_equal_compute(lab):
    lab.c.train_steps = 300
    flags = {name: arm.args[1] for name, arm in evaluate.joint(lab).items() if "image" in name}
    assert all(name == f"{v['num_images']} image frames, {v['steps']} steps" for name, v in flags.items())
    assert [v["num_images"] for v in flags.values() if v["steps"] == 300] == [0, 4, 8]
    frames = {v["num_images"]: v["steps"] * (16 + v["num_images"]) for v in flags.values()}  # last
    assert frames == {0: 7200, 4: 7200, 8: 7200}


def test_the_loss_is_the_same_for_the_same_model_and_less_for_a_trained_one(lab):
    untrained = dataclasses.replace(lab.model, network=copy.deepcopy(lab.model.network))
    for parameter in untrained.network.parameters():
        parameter.data *= 0.5
    trained, worse = (ablations.loss_of_real(lab, model, 16) for model in (lab.model, untrained))
    assert trained == ablations.loss_of_real(lab, lab.model, 16) < 0.5 * worse


def test_the_model_with_positions_is_the_one_of_joint_without_image_frames(lab, tmp_path, monkeypatch):
    lab.c.out, lab.c.train_steps, names = str(tmp_path), 300, []
    monkeypatch.setattr(ablations, "small_model", lambda lab, flags, *rest: names.append(flags) or {})
    evaluate.joint(lab)["0 image frames, 300 steps"](0)
    evaluate.positions(lab)["Shaw, 32 frames"](0), evaluate.positions(lab)["none, 32 frames"](0)
    assert list(names[0].items()) == list(names[1].items())  # in their order, which names the folder
    assert names[2] == names[0] | {"relative_positions": False}


@pytest.mark.slow
def test_blocks_are_compared_with_as_many_parameters(lab, monkeypatch):
    seen = []
    monkeypatch.setattr(ablations, "steps_in_time", lambda lab, flags: seen.append(flags) or 2)
    names = [name.split(" block, ") for name in evaluate.blocks(lab) if "block" in name]
    assert sorted(names) == [["MagicVideo", "latents"], ["MagicVideo", "pixels"], ["VDM", "latents"],
                             ["VDM", "pixels"]]
    sizes = [ablations.parameters(lab, flags) for flags in seen]
    assert max(sizes) < 1.2 * min(sizes) and len({flags["dim"] for flags in seen}) > 1


def test_the_steps_are_those_that_fit_into_the_minutes(lab, tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text("".join(
        json.dumps({"step": 20 * (i + 1), "clips_per_second": rate}) + "\n"
        for i, rate in enumerate((1.0, 16.0, 16.0))))
    monkeypatch.setattr(ablations, "trained", lambda *args: tmp_path / "checkpoint.pt")
    lab.c.train_minutes = 5.0
    assert ablations.steps_in_time(lab, {}) == 5 * 60 * 16 // 4


def test_speeds_are_compared_of_a_model_that_knows_several_alone(lab, speeds):
    lab.c.interpolator = speeds[3]
    with pytest.raises(ValueError, match="--frame_stride 1,2,4"):
        evaluate.speed(lab)


def test_long_clips_are_measured_in_pieces_of_the_models_length(lab, monkeypatch):
    monkeypatch.setattr(metrics, "measure", lambda x, *rest: {"clips": len(x), "frames": x.shape[2]})
    assert lab.measure(torch.zeros(2, 1, 40, 32, 32)) == {"clips": 4, "frames": 16}


def test_fvd_is_printed_when_and_only_when_its_network_is_given(lab, monkeypatch):
    monkeypatch.setattr(metrics, "fvd", lambda real, fake, path: 7.0)
    x = lab.real(0)[0]
    assert "FVD" not in lab.measure(x)
    lab.c.i3d = "i3d.pt"
    assert lab.measure(x)["FVD"] == 7.0
    lab.c.i3d = ""


def test_only_some_arms_are_run(speeds, tmp_path, monkeypatch, capsys):
    quick(monkeypatch, "guidance", tmp_path, *speeds, "--only", "w = 1|^real")
    numbers = json.loads((tmp_path / "quick" / "guidance.json").read_text())
    assert list(numbers["raw"]) == ["real clips (floor)", "w = 1 (2.0 in Table 5)"]
    for only, sentence in {"dreams": "leaves no arm of --experiment guidance",
                           "w = 1 (2.0": "is not a regular expression"}.items():
        with pytest.raises(SystemExit) as stop:
            quick(monkeypatch, "guidance", tmp_path, *speeds, "--only", only)
        assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_features_of_other_clips_are_refused(tmp_path, lab, monkeypatch):
    features = SimpleNamespace(settings={"size": 64, "digits": 2})
    monkeypatch.setattr(lab_module, "load_features", lambda path: features)
    with pytest.raises(ValueError, match="trained on 2 digits at 64 px"):
        build(EvaluateConfig(device="cpu"))


def test_a_network_between_key_frames_is_refused(lab, monkeypatch):
    network = SimpleNamespace(config=dataclasses.replace(lab.model.network.config, keys=True))
    model = dataclasses.replace(lab.model, network=network)
    monkeypatch.setattr(infill, "load_model", lambda path, device: model)
    with pytest.raises(ValueError, match="draws between key frames: --experiment samplers cannot"):
        build(EvaluateConfig(experiment="samplers", device="cpu"))


def test_known_frames_are_given_to_a_network_as_it_knows_them(lab, monkeypatch):
    monkeypatch.setattr(sample, "inside", lambda model, x: x + 1)
    x = lab.real(0)[0]
    given = evaluate.known(lab, x, slice(0, 5))(infill.SampleConfig(num=len(x)), slice(0, len(x)))
    assert torch.equal(given.x[:, :, :5], x[:, :, :5] + 1) and not given.x[:, :, 5:].any()


@pytest.mark.parametrize("experiment, data, text, sentence", [
    ("samplers", {"dataset": "video_folder"}, {}, "measures moving_mnist alone"),
    ("guidance", {"dataset": "stochastic_moving_mnist"}, {}, "measures moving_mnist alone"),
    ("guidance", {}, {"cond_dim": 0}, "trained without captions")])
def test_a_model_that_cannot_be_judged_is_refused(experiment, data, text, sentence, lab, monkeypatch):
    model = dataclasses.replace(lab.model, data=dataclasses.replace(lab.model.data, **data),
                                text=dataclasses.replace(lab.model.text, **text))
    monkeypatch.setattr(infill, "load_model", lambda path, device: model)
    with pytest.raises(ValueError, match=sentence):
        build(EvaluateConfig(experiment=experiment, device="cpu"))


def test_a_nan_is_shown_and_loses_nothing():
    text, _ = table({"a": lambda seed: {"x": math.nan}}, 2)
    assert "nan ± nan" in text


@pytest.mark.parametrize("frames, seams", [(64, [16, 24, 32, 40, 48, 56]), (60, [16, 24, 32, 40, 48, 56])])
def test_seams_are_where_drawn_frames_follow_given_ones(frames, seams, lab, monkeypatch):
    found = []
    monkeypatch.setattr(metrics, "seam", lambda places, classes, starts: found.append(list(starts)) or {})
    monkeypatch.setattr(metrics, "measure", lambda *args: {})
    nothing = torch.zeros(1, 2, 1).long(), torch.ones(1, 2, 1, 2)
    monkeypatch.setattr(type(lab), "observe", lambda *args: nothing)
    monkeypatch.setattr(lab.c, "frames", frames)
    next(iter(evaluate.extend(lab).values()))(0)
    assert found == [seams]


def test_a_model_without_captions_extends_without_them(lab, monkeypatch):
    calls = []
    monkeypatch.setattr(lab, "model", dataclasses.replace(lab.model, text=TextConfig(cond_dim=0)))
    real = lab.real(0, 64)[0]
    monkeypatch.setattr(type(lab), "draw", lambda lab, seed, **flags: calls.append(flags) or real)
    evaluate.extend(lab)["replacement"](0)
    assert calls[0]["frames"] == lab.c.frames and not calls[0].keys() & {"texts", "w"}


@pytest.mark.parametrize("flags, sentence", [(["--checkpoint", "nothing.pt"], "nothing.pt"),
                                             (["--features", "nothing.pt"], "nothing.pt"),
                                             (["--experiment", "dreams"], "--experiment"),
                                             (["--clips", "1"], "--clips")])
def test_bad_input_is_one_sentence(flags, sentence, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        quick(monkeypatch, "samplers", tmp_path, *flags)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and sentence in err


def test_a_trained_small_model_is_found_again(lab, tmp_path, monkeypatch):
    lab.c.out = str(tmp_path)
    folder = tmp_path / "runs" / "steps_2-size_32-digits_1-seed_0"
    folder.mkdir(parents=True)
    shutil.copy(HERE / "pretrained" / "moving_mnist_32.pt", folder / "checkpoint_00000002.pt")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("trained again"))
    assert {"frechet_clip", "digit_named"} <= set(small_model(lab, {"steps": 2}, 16, 0))

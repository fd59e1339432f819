"""The command line: what every flag accepts and refuses, and the paper's numbers in the presets."""
import dataclasses
import functools
import inspect
import re
import typing
from dataclasses import dataclass
from typing import Literal

import pytest

import config
import sample
from presets import PRESETS, SAMPLING as CARRIED
from autoencoder import AutoencoderConfig
from data import DataConfig
from diffusion import DiffusionConfig
from infill import SampleConfig
from settings import TrainConfig, read_settings
from text import TextConfig
from magicvideo import MagicVideoConfig
from unet3d import UNetConfig

TRAIN = (DataConfig, MagicVideoConfig, DiffusionConfig, TextConfig, AutoencoderConfig, TrainConfig)
ALL = (*TRAIN, UNetConfig, SampleConfig)
FLAGS = [pytest.param(owner, field, id=f"{owner.__name__}.{field.name}") for owner in ALL
         for field in dataclasses.fields(owner)
         if field.name in vars(owner)["__annotations__"] and field.name in config.flags_of([owner])]


@pytest.fixture(autouse=True)
def read_each_source_once(monkeypatch):
    """inspect.getsource parses a whole file; the hundreds of parsers here need it once for each dataclass."""
    monkeypatch.setattr(inspect, "getsource", source)


source = functools.cache(inspect.getsource)


def kind(field: dataclasses.Field) -> type:
    """int, float, str, bool or Literal; int for tuples of int."""
    origin = typing.get_origin(field.type)
    return Literal if origin is Literal else typing.get_args(field.type)[0] if origin is tuple else field.type


NEEDS = {"w": ["--text=a"], "fps": ["--text=a"], "base": ["--mode=cascade"], "input": ["--mode=predict"]}
NUMERIC = [flag for flag in FLAGS if kind(flag.values[1]) in (int, float)]


def comment(owner: type, field: dataclasses.Field) -> str:
    owner = next(part for part in owner.__mro__ if field.name in vars(part)["__annotations__"])
    line, = re.findall(rf"^    {field.name}: .*", source(owner), re.M)
    return line.partition("  # ")[2]


def allowed(owner: type, field: dataclasses.Field) -> tuple[str, typing.Callable[[float], bool]]:
    """The range as written in the comment, and whether a number lies in it."""
    written = comment(owner, field)[:comment(owner, field).index(" ", comment(owner, field).index(",") + 2)]
    low, high = (float(end) for end in written[1:-1].split(", "))
    assert written[0] in "[(" and written[-1] in "])" and low < high

    def inside(x: float) -> bool:
        return low < x < high or x == low and written[0] == "[" or x == high and written[-1] == "]"
    return written, inside


def numbers(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def refusal(capsys, argv: list[str], *owners: type) -> str:
    """The one sentence with which a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        config.parse(*owners, argv=argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and err.endswith("\n")
    return err


def parsed(*argv: str, owners: tuple[type, ...] = TRAIN, **options) -> dict:
    return {k: v for part in config.parse(*owners, argv=list(argv), **options) for k, v in vars(part).items()}


# ---- every flag --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner, field", FLAGS)
def test_every_flag_has_a_help_text_and_a_default_of_its_type(owner, field):
    assert len(comment(owner, field)) > 5
    if kind(field) is Literal:
        assert field.default in typing.get_args(field.type)
    else:
        assert all(type(value) is kind(field) for value in numbers(field.default))


@pytest.mark.parametrize("owner, field", NUMERIC)
def test_every_number_has_a_range_with_its_default_and_all_presets_inside(owner, field):
    written, inside = allowed(owner, field)
    carried = [mode for modes in CARRIED.values() for mode in modes.values()]
    presets = carried if owner is SampleConfig else PRESETS.values()
    values = [field.default, *(preset[field.name] for preset in presets if field.name in preset)]
    for value in values:
        assert all(inside(number) for number in numbers(value)), (written, value)
        text = ",".join(map(str, numbers(value)))
        said = [f"--{field.name}={text}", *(NEEDS.get(field.name, []) if owner is SampleConfig else [])]
        assert getattr(config.parse(owner, argv=said)[0], field.name) == value


@pytest.mark.parametrize("owner, field", NUMERIC)
def test_every_number_outside_its_range_is_refused_with_the_flag_and_the_range(owner, field, capsys):
    written, inside = allowed(owner, field)
    low, high = (float(end) for end in written[1:-1].split(", "))
    bad = ["nan", "inf", "-inf", "1e999", "9" * 400, "9" * 5000, "ten", "", " ", "1;2", "0x10"]
    bad += [text for text in ("-1", str(int(low) - 1), str(int(high) + 1)) if not inside(float(text))]
    bad += [str(end) for end in (low, high) if kind(field) is float and not inside(end)]
    bad += ["1.5", "1e1"] if kind(field) is int else ["1,2"]
    bad += ["1,,2", "1,", "1,nan"] if field.type == tuple[int, ...] else []
    for text in bad:
        sentence = refusal(capsys, [f"--{field.name}={text}"], owner)
        assert f"--{field.name}:" in sentence and written in sentence and repr(text) in sentence


@pytest.mark.parametrize("owner, field", [flag for flag in FLAGS if kind(flag.values[1]) is Literal])
def test_a_choice_takes_its_values_and_nothing_else(owner, field, capsys):
    for value in typing.get_args(field.type):
        assert getattr(config.parse(owner, argv=[f"--{field.name}", value])[0], field.name) == value
    sentence = refusal(capsys, [f"--{field.name}", "nonsense"], owner)
    assert all(word in sentence for word in (f"--{field.name}", "nonsense", *typing.get_args(field.type)))


@pytest.mark.parametrize("owner, field", [flag for flag in FLAGS if kind(flag.values[1]) is bool])
def test_a_switch_is_turned_on_and_off(owner, field, capsys):
    assert getattr(config.parse(owner, argv=[f"--{field.name}"])[0], field.name) is True
    assert getattr(config.parse(owner, argv=[f"--no-{field.name}"])[0], field.name) is False
    assert field.name in refusal(capsys, [f"--{field.name}=1"], owner)


@pytest.mark.parametrize("owner, field", [flag for flag in FLAGS if kind(flag.values[1]) is str])
def test_a_text_is_taken_as_it_is(owner, field):
    values = list(PRESETS) if field.name == "preset" else ["", "a b", "50 %", "a,b"]
    for value in values:
        said = [f"--{field.name}", value, *NEEDS.get(field.name, [])]
        assert getattr(config.parse(owner, argv=said)[0], field.name) == value


def test_a_field_without_a_comment_is_no_flag(capsys):
    assert "split" in {field.name for field in dataclasses.fields(DataConfig)}
    assert "--split" in refusal(capsys, ["--split", "test"], DataConfig)


@pytest.mark.parametrize("owners", [TRAIN, (SampleConfig,)])
def test_help_shows_every_flag_with_its_comment_and_its_range(owners, capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse(*owners, argv=["--help_all"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for owner in owners:
        for field in dataclasses.fields(owner):
            if field.name == "split":
                continue
            assert re.search(rf"--{field.name}\b", shown)
            # one flag, one comment
            assert any(" ".join(comment(other, same).split()) in shown for other in owners
                       for same in dataclasses.fields(other) if same.name == field.name)


@pytest.mark.parametrize("owners", [TRAIN, (SampleConfig,)])
def test_no_flags_give_the_defaults(owners):
    assert config.parse(*owners, argv=[]) == [owner() for owner in owners]


@pytest.mark.parametrize("argv", [["--colour", "red"], ["stray"], ["--siz", "32"], ["--frames"],
                                  ["--frames", "8", "9"]])
def test_an_unknown_or_incomplete_flag_is_one_sentence(argv, capsys):
    assert argv[0] in refusal(capsys, argv, *TRAIN) or argv[-1] == "9"


# ---- shared flags ------------------------------------------------------------------------------------------


def shared() -> dict[str, list]:
    owners = {}
    for owner in TRAIN:
        for field in dataclasses.fields(owner):
            owners.setdefault(field.name, []).append((owner, field))
    return {name: found for name, found in owners.items() if len(found) > 1}


def test_a_shared_field_is_one_flag_that_sets_all_of_them():
    parts = config.parse(*TRAIN, argv="--frames 5 --size 32 --channels 3 --cond_dim 8".split())
    for name, value in dict(frames=5, size=32, channels=3, cond_dim=8).items():
        assert len(shared()[name]) == 2 + (name == "channels")
        assert {getattr(part, name) for part in parts if hasattr(part, name)} == {value}


@pytest.mark.parametrize("name", shared())
def test_a_shared_field_has_one_type_one_default_and_one_range(name):
    assert len({(field.type, field.default) for _, field in shared()[name]}) == 1
    assert len({allowed(owner, field)[0] for owner, field in shared()[name]}) == 1


# ---- what wins ---------------------------------------------------------------------------------------------


@dataclass
class Example:
    preset: str = ""  # a preset
    dim: int = 1  # [0, 1000] a number that the presets give
    kind: Literal["one", "two"] = "one"  # a choice that they do not give
    factor: float = 0.5  # (0, 1) a number
    widths: tuple[int, ...] = (1, 2)  # [1, 9] a list


def test_a_flag_by_hand_wins_over_defaults_those_over_the_preset_and_that_over_the_class():
    def example(*argv: str, **defaults):
        return config.parse(Example, argv=list(argv), defaults=lambda given: defaults)[0].dim

    preset = PRESETS["ucf101"]["dim"]
    assert example() == 1
    assert example("--preset", "ucf101") == example(preset="ucf101") == preset
    assert example("--preset", "bair", preset="ucf101") == PRESETS["bair"]["dim"]
    assert example("--preset", "ucf101", dim=7) == 7
    assert (example("--preset", "ucf101", "--dim", "3", dim=7)
            == example("--dim", "3", "--preset", "ucf101") == 3)
    assert example("--preset", "ucf101", "--dim", "0", dim=7) == 0  # also if it is falsy
    assert example("--preset", "ucf101", "--dim", "1") == 1  # also if it is the default


def test_defaults_are_told_the_flags_given_by_hand():
    told = []
    config.parse(Example, argv=["--factor", "0.25"], defaults=lambda given: told.append(dict(given)) or {})
    assert told == [{"factor": 0.25}]


def test_an_unknown_preset_is_one_sentence_that_lists_them(capsys):
    sentence = refusal(capsys, ["--preset", "gigantic"], *TRAIN)
    assert all(name in sentence for name in ("--preset", "gigantic", *PRESETS))


@pytest.mark.parametrize("argv, widths", [("--widths 3", (3,)), ("--widths 1,2,9", (1, 2, 9))])
def test_a_list_is_written_with_commas(argv, widths):
    assert config.parse(Example, argv=argv.split())[0].widths == widths


def test_every_number_of_a_list_must_lie_in_the_range(capsys):
    assert "[1, 9]" in refusal(capsys, ["--widths", "1,10"], Example)


@pytest.mark.parametrize("text, fits", [("0", False), ("1", False), ("0.001", True), ("0.999", True)])
def test_round_brackets_exclude_the_end_of_a_range(text, fits, capsys):
    if fits:
        assert config.parse(Example, argv=["--factor", text])[0].factor == float(text)
    else:
        assert "(0, 1)" in refusal(capsys, ["--factor", text], Example)


def test_flags_that_contradict_each_other_are_one_sentence(capsys):
    assert "--factor 3" in refusal(capsys, ["--factor", "3"], *TRAIN)


def test_help_shows_the_first_flags_with_the_values_that_they_would_have_here(capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse(*TRAIN, argv=["--dim", "24", "--help"], first=("steps", "dim", "dataset"),
                     defaults=lambda given: {"preset": "ucf101"})
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert re.findall(r"^  --(\w+)", out, re.M) == ["help", "help_all", "steps", "dim", "dataset"]
    assert re.findall(r"\(here: (.*?)\)", out) == ["60000", "24", "video_folder"]


def test_help_all_has_a_group_for_each_dataclass(capsys):
    with pytest.raises(SystemExit):
        config.parse(*TRAIN, argv=["--help_all"])
    titles = re.findall(r"^(\S.*):$", capsys.readouterr().out, re.M)
    assert len(titles) == len(set(titles)) == 2 + len(TRAIN)  # MagicVideo's adds a group to that of the U-Net


# ---- errors of a whole program -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("no such\n thing"), FileNotFoundError(2, "no such", "thing")])
def test_a_users_error_ends_a_program_with_one_sentence_and_status_2(error, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        config.run(main)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and "no such" in err and "thing" in err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
                                   RuntimeError("CUDA error: out of memory")])
def test_too_little_memory_is_one_sentence(error, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit):
        config.run(main)
    assert "error: out of memory: " in capsys.readouterr().err


def test_a_bug_is_shown_with_its_traceback():
    with pytest.raises(ZeroDivisionError):
        config.run(lambda: 1 / 0)


# ---- the paper's appendix ----------------------------------------------------------------------------------

COLUMNS = "ucf101 bair kinetics600 text_small text_large text_9x128".split()
APPENDIX = {  # section 6 of the facts about the paper, written again
    "frames": [16, 16, 16, 16, 16, 9],
    "size": [64, 64, 64, 64, 64, 128],
    "channels": [3] * 6,
    "dim": [256, 128, 256, 128, 256, 128],
    "dim_mults": [(1, 2, 4, 8), (1, 2, 3, 4), (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16)],
    "blocks": [2, 3, 2, 2, 2, 2],
    "head_dim": [64, 64, 64, 64, 64, 128],
    "attention_resolutions": [(8, 16, 32)] * 6,
    "emb_dim": [1024] * 6,
    "emb_layers": [4, 2, 2, 4, 4, 4],
    "scale_shift": [False] * 6,
    "patch": [1] * 6,
    "prediction": ["eps", "v", "v", "eps", "eps", "eps"],
    "logsnr_min": [-20] * 6,
    "logsnr_max": [20] * 6,
    "noise_shift": [1] * 6,
    "dropout": [0.1, 0.1, 0.1, 0, 0, 0],
    "lr": [3e-4, 2e-4, 2e-4, 3e-4, 3e-4, 2e-4],
    "beta2": [0.99, 0.999, 0.99, 0.99, 0.99, 0.99],
    "weight_decay": [0, 0.01, 0, 0, 0, 0],
    "batch_size": [128, 128, 256, 128, 128, 128],
    "accumulate": [1] * 6,
    "ema": [0.9999, 0.999, 0.9999, 0.9999, 0.9999, 0.9999],
    "num_images": [8, 8, 8, 8, 8, 7],
    "steps": [60_000, 660_000, 220_000, 200_000, 700_000, 800_000],
    "warmup": [1000] * 6,
    "decay": ["constant"] * 6,
    "clip": [1] * 6,
    "flip": [False, True, False, False, False, False],
    "encoder": [None, None, None, "bert", "bert", "bert"],
    "cond_dim": [0, 0, 0, 1024, 1024, 1024],
    "dataset": ["video_folder"] * 6,
}
SAMPLING = {
    "sampler": ["ancestral"] * 6,
    "steps": [256, 256, 128, 256, 256, 256],
    "gamma": [0.1, 0, 0, 0.3, 0.3, 0.3],
    "delta": [0, 0.1, 0.1, 0, 0, 0],
    "w_r": [None, 50, 9, None, None, None],
}


@pytest.mark.parametrize("number, preset", list(enumerate(COLUMNS)))
def test_a_papers_preset_is_its_column_of_the_appendix(number, preset):
    values = parsed("--preset", preset)
    for name, row in APPENDIX.items():
        assert row[number] is None or values[name] == row[number], name


@pytest.mark.parametrize("number, preset", list(enumerate(COLUMNS)))
def test_sampling_starts_from_the_papers_column(number, preset):
    carried = CARRIED[preset]
    values = parsed(owners=(SampleConfig,), defaults=lambda given: carried["all"] | carried.get("predict", {}))
    for name, row in SAMPLING.items():
        assert row[number] is None or values[name] == row[number], name


def test_presets_name_only_fields_that_exist():
    carried = [mode for modes in CARRIED.values() for mode in modes.values()]
    for presets, owners in ((PRESETS.values(), TRAIN), (carried, (SampleConfig,))):
        names = {field.name for owner in owners for field in dataclasses.fields(owner)}
        assert [name for preset in presets for name in preset if name not in names] == []
    assert set(CARRIED) == set(PRESETS) == {"cpu", "cuda", "films", "pixels", "autoencoder", *COLUMNS}
    assert {name for modes in CARRIED.values() for name in modes} <= {"all", *sample.MODES}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_a_network_that_can_be_built_and_attends_where_it_says(preset):
    s = read_settings(["--preset", preset, "--device", "cpu"])
    assert set(s.unet.attention_resolutions) <= set(s.network.heights())
    values = s.flat()
    choices = {field.name: typing.get_args(field.type)
               for owner in TRAIN for field in dataclasses.fields(owner) if kind(field) is Literal}
    assert all(values[name] in allowed_values for name, allowed_values in choices.items())

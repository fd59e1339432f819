"""The pages: commands run as typed, the map leads to code, tables are what the code counts, links are there."""
import ast
import hashlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

import checkpoint
import config
import data
import infill
import settings
import train
from experiments import cost
from presets import PRESETS
from settings import read_settings

HERE = Path(__file__).parent
TEXT = (HERE / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
TINY = ("--preset cpu --latent= --optimizer adam --frame_noise 0 --lr 0.001 "
        "--device cpu --size 16 --frames 16 --dim 16 --dim_mults 1,2 --head_dim 8 --emb_dim 16 "
        "--patch 1 --attention_resolutions 8 --cond_dim 8 --steps 2 --batch_size 1").split()


def rows(heading: str, text: str = TEXT) -> list[list[str]]:
    """The cells of the first table below a heading."""
    table = text.split(heading, 1)[1].split("|---", 1)[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]


MAP = [row for row in rows("## From the paper to the code")]


@pytest.mark.parametrize("row", MAP, ids=[row[0] for row in MAP])
def test_the_map_leads_to_functions_and_equations_that_are_there(row):
    section, files, names = row
    sources = [(HERE / file).read_text() for file in re.findall(r"`(.*?)`", files)]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    defined |= {getattr(node.target, "id", "") for node in nodes if isinstance(node, ast.AnnAssign)}
    assert set(re.findall(r"`(.*?)`", names)) <= defined
    comments = " ".join(re.findall(r"# (Eqs?\. .*)", "\n".join(sources)))
    for number in re.findall(r"Eqs?\. (\d)(?: and (\d))?", section):
        assert all(n in comments for n in number if n), comments


@pytest.mark.parametrize("number", range(1, 9))
def test_every_equation_has_its_line_in_the_code(number):
    lines = [line for path in HERE.glob("*.py") if not path.name.startswith("test_")
             for line in path.read_text().splitlines()
             if re.search(rf"\S  # (Eq\. {number}|Eqs\. [\d ,and]*\b{number}\b[\d ,and]*)$", line)]
    assert len(lines) == 1, lines


def run(command: list[str], folder: Path) -> str:
    result = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, (command, result.stderr[-2000:])
    return result.stdout


@pytest.mark.slow
def test_its_commands_run_as_typed(tmp_path):
    for path in [*HERE.glob("*.py"), HERE / "mnist"]:
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "CLIPS").mkdir()
    np.save(tmp_path / "CLIPS" / "clip.npy", np.zeros((20, 24, 24, 3), np.uint8))
    digits = "train.py --dataset moving_mnist"  # first: there are no weights of moving_mnist here
    for line in sorted(COMMANDS, key=lambda line: digits not in line):
        words = shlex.split(line.removeprefix("pip install -r requirements.txt && "), comments=True)
        assert words[0] == "python" or words == "pip install -r requirements.txt".split(), line
        if words[1] == "train.py":
            run([*words[1:], *TINY], tmp_path)
        elif words[1] == "sample.py":
            written = run([*words[1:], "--steps", "2"], tmp_path).splitlines()[-3:]
            assert all((tmp_path / path).is_file() for path in written), written
        else:
            assert words[0] == "pip" or words == ["python", "-m", "pytest", "-q"]  # this is it


PICTURES = {"generate": '--mode generate --num 6 --w 1 --text "a 2|a 3|a 5|a 6|a 7|a 9"',
            "interpolate": "--mode interpolate --num 6",
            "extend": '--mode extend --w 1 --text "a 3|a 5|a 6|a 8"'}


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_its_pictures_are_what_its_commands_draw(name, tmp_path):
    assert f"python sample.py {PICTURES[name]}" in COMMANDS and f"](assets/{name}.gif)" in TEXT
    (tmp_path / "pretrained").symlink_to(HERE / "pretrained")  # and no runs/
    # the first clip is enough: it is the same whatever --num is
    words = [word.partition("|")[0] for word in shlex.split(PICTURES[name])]
    run([str(HERE / "sample.py"), *words, "--num", "1", "--precision", "float32"], tmp_path)
    drawn = frames(tmp_path / "samples" / f"{name}_001.gif")
    shown = frames(HERE / "assets" / f"{name}.gif")[:, :drawn.shape[1], :drawn.shape[2]]
    assert shown.shape == drawn.shape
    # other digits would be 20 and more apart; another processor rounds otherwise
    assert np.abs(shown - drawn).mean() < 4


def frames(path: Path) -> np.ndarray:
    """A GIF's frames as grey levels (F, H, W)."""
    with Image.open(path) as image:
        return np.stack([np.asarray(frame.convert("L"), float) for frame in ImageSequence.Iterator(image)])


def test_every_mode_is_in_its_table_and_has_a_command():
    modes = [row[0].strip("`") for row in rows("## Sampling")]
    assert modes == ["generate", "predict", "extend", "interpolate", "super_resolve", "cascade"]
    shown = {mode for mode in modes if any(f"--mode {mode}" in line for line in COMMANDS)}
    assert shown == set(modes)


COSTS = rows("The presets, by", (HERE / "experiments" / "README.md").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("row", COSTS, ids=[row[0].strip("`") for row in COSTS])
def test_its_table_of_presets_is_what_cost_counts(row):
    s = read_settings(["--preset", row[0].strip("`"), "--device", "cpu"])
    parameters, flops = cost.step_cost(s)
    assert row[1] == f"{s.unet.frames}×{s.unet.size}×{s.unet.size}"
    assert row[2] == f"{parameters / 1e6:.1f} M"
    clips = s.train.batch_size * s.train.accumulate
    assert row[3] == f"{flops * clips / 1e12:.2f}" and row[4] == str(clips)
    gib = 4 * parameters / 2**30
    assert row[5] == f"{gib:.2f} + {gib:.2f} + {2 * gib:.2f} + {gib:.2f} GiB"


PEAKS = rows("at the peak of a training step", (HERE / "experiments" / "README.md").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("row", PEAKS[:2], ids=[row[0].strip("`") for row in PEAKS[:2]])
def test_its_table_of_memory_is_what_cost_counts(row):
    s = read_settings(["--preset", row[0].strip("`"), "--device", "cpu"])
    without, with_it = cost.memory(s, False), cost.memory(s, True)
    for text, peak in ((without, row[1]), (with_it, row[2])):
        one, each = peak.split(" + ")
        assert f"{one} GiB with one clip at a time and {each} with each more" in text
    for cell, card in zip(row[3:], cost.CARDS, strict=True):
        first, second = cell.split(", ")
        assert f" {first} in {card}" in without and f" {second} in {card}" in with_it


def test_all_presets_are_in_its_table():
    diffusing = [name for name in PRESETS if name != "autoencoder"]
    assert [row[0].strip("`") for row in COSTS] == diffusing


def test_the_weights_are_those_that_their_readme_names():
    text = (HERE / "pretrained" / "README.md").read_text()
    named = dict(re.findall(r"\| `(\w+\.pt)` \| `([0-9a-f]{64})`", text))
    assert set(named) == {path.name for path in (HERE / "pretrained").glob("*.pt")}
    for name, sha256 in named.items():
        path = HERE / "pretrained" / name
        assert checkpoint.load(path) and path.stat().st_size < 16 * 2**20
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256


PAGES = ("README.md", "GUIDE.md", "experiments/README.md", "pretrained/README.md")


def test_it_is_read_in_two_minutes():
    assert len(TEXT.splitlines()) <= 120 and len(TEXT) <= 9000


@pytest.mark.parametrize("page", PAGES)
def test_paragraphs_are_short_and_links_lead_somewhere(page):
    text = (HERE / page).read_text()
    for link, part in re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        target = (HERE / page).parent / link if link else HERE / page
        assert target.exists(), link
        titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if part else []
        assert not part or part in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, part
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    for paragraph in re.split(r"\n\s*\n|\n(?=[-*] )", prose):
        assert paragraph.lstrip().startswith("|") or len(paragraph.split()) <= 60, paragraph


@pytest.mark.parametrize("page", PAGES)
def test_the_tests_that_pages_name_are_there(page):
    tests = "\n".join(path.read_text() for path in [*HERE.glob("test_*.py"), *HERE.glob("experiments/test_*.py")])
    for name in re.findall(r"`(test_\w+)`", (HERE / page).read_text()):
        assert f"def {name}(" in tests, name


GUIDE = (HERE / "GUIDE.md").read_text()
EXCERPTS = re.findall(r"```python\n(.*?)```", GUIDE, re.S)


@pytest.mark.slow
def test_the_whole_in_ten_lines_runs():
    whole, *_ = EXCERPTS
    assert len([line for line in whole.splitlines() if line and "import" not in line]) <= 10
    exec(whole + "\nassert video.shape == (1, 1, 16, 32, 32) and video.abs().max() <= 1", {})


SQUARES, = [text for text in EXCERPTS if "SOURCES" in text]
SHOWN = [text for text in EXCERPTS[1:] if text != SQUARES]


@pytest.mark.slow
def test_the_data_set_in_ten_lines_trains(tmp_path, monkeypatch):
    assert len(SQUARES.splitlines()) == 10
    monkeypatch.setattr(data, "SOURCES", dict(data.SOURCES))
    exec(SQUARES, dict(vars(data)))  # as if it stood at the end of the file
    x, captions = next(data.batches(data.DataConfig("squares", size=32, num_images=1), 8, 0))
    assert ((x == 1).sum((1, 3, 4)) == 8 * 8).all() and captions == [["a bouncing square"] * 2] * 8
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "--dataset", "squares", "--out", str(tmp_path)])
    train.main()
    assert (tmp_path / "checkpoint_00000002.pt").exists()


@pytest.mark.parametrize("excerpt", SHOWN, ids=[text.split()[0] for text in SHOWN])
def test_what_the_guide_shows_of_the_code_is_the_code(excerpt):
    assert any(excerpt in path.read_text() for path in HERE.glob("*.py") if not path.name.startswith("test_"))


PLACES = [place for line in GUIDE.splitlines() if line.startswith("| ") for place in line.strip("| ").split(" | ")[-1:]]


def test_its_tables_name_functions_files_and_flags_that_are_there():
    flags = config.flags_of([*settings.PARTS, infill.SampleConfig])
    named = [place for place in PLACES if ".py`" in place]
    assert len(named) > 30
    for place in named:
        for names, file in re.findall(r"((?:`\w+`(?:, )?)+) in `(\w+\.py)`", place):
            defined = {getattr(node, "name", "") for node in ast.walk(ast.parse((HERE / file).read_text()))}
            assert set(re.findall(r"`(\w+)`", names)) <= defined, place
    for flag in re.findall(r"`--(\w+)", " ".join(PLACES)):
        assert flag in flags, flag


def test_the_guides_equations_are_balanced():
    equations = re.findall(r"```math\n(.*?)```", GUIDE, re.S) + re.findall(r"\$([^$\n]+)\$", GUIDE)
    assert len(equations) > 10 and "$$" not in GUIDE  # GitHub reads \\, and _ inside $$ as its own
    for equation in equations:
        plain = equation.replace(r"\{", "").replace(r"\}", "")
        assert plain.count("{") == plain.count("}"), equation
        assert len(re.findall(r"\\left\b", plain)) == len(re.findall(r"\\right\b", plain)), equation


def test_every_exercise_is_marked_by_tests_that_are_there():
    tests = {path.name: re.findall(r"def (test_\w+)", path.read_text()) for path in HERE.glob("test_*.py")}
    exercises = re.findall(r"python -m pytest (test_\w+\.py)(?: -k (\"[^\"]+\"|\w+))?", GUIDE)
    assert len(exercises) >= 10
    for file, words in exercises:
        assert not words or all(any(word in name for name in tests[file]) for word in words.strip('"').split(" or "))

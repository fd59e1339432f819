"""The arrows between files are those between the paper's ideas: who may import whom, how large a file is."""
import ast
import functools
import io
import sys
import tokenize
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = {path.stem: path for path in sorted(HERE.glob("*.py"))}
LAB = {path.stem: path for path in sorted((HERE / "experiments").glob("*.py")) if path.stem != "__init__"}
FILES = ROOT | LAB
PRODUCT = [name for name in FILES if not name.startswith("test_") and name != "conftest"]
TESTS = [name for name in FILES if name not in PRODUCT]
PAPER = ("unet3d", "diffusion", "guidance", "sampling")

LEAVES = {"config", "files", "text", "unet3d", "diffusion", "checkpoint", "machine"}
ARROWS = {  # file: neighbours it must import, neighbours it may import
    **{leaf: (set(), set()) for leaf in LEAVES},
    "clips": ({"files"}, {"checkpoint"}),
    "data": ({"files", "clips"}, set()),
    "guidance": ({"diffusion"}, set()),
    "sampling": ({"diffusion"}, set()),
    "magicvideo": ({"unet3d", "diffusion"}, set()),
    "autoencoder": ({"unet3d", "magicvideo"}, set()),
    "cost": ({"diffusion", "magicvideo"}, set()),
    "run": ({"config", "data", "text", "magicvideo", "autoencoder", "diffusion", "checkpoint"}, {"machine"}),
    "train": ({"config", "data", "text", "autoencoder", "diffusion", "run"},
              {"sampling", "machine", "cost", "checkpoint", "files", "magicvideo"}),
    "infill": ({"config", "data", "text", "unet3d", "magicvideo", "diffusion", "checkpoint", "guidance",
                "sampling", "autoencoder"}, set()),
    "sample": ({"infill", "config", "data", "files"}, {"machine", "checkpoint", "magicvideo"}),
    "pack": ({"clips", "files"}, {"config", "checkpoint"}),
    "bench": ({"unet3d", "diffusion", "guidance", "sampling"},
              {"config", "cost", "data", "machine", "run", "pack"}),
    "features": ({"data"}, {"checkpoint", "config", "machine"}),
    "metrics": ({"features"}, {"data", "diffusion"}),
    "lab": ({"sample", "infill", "metrics", "features", "data"}, {"machine"}),
    "ablations": ({"lab", "infill"}, {"autoencoder", "cost", "diffusion", "run", "text"}),
    "panels": (set(), set()),
    "plots": ({"panels", "lab"}, {"config"}),
    "figures": ({"panels", "lab", "features", "infill", "sample", "guidance", "sampling", "diffusion", "unet3d"},
                {"config", "data", "text"}),
    "evaluate": ({"sample", "infill", "metrics", "lab", "ablations"}, {"config", "data", "diffusion", "features"}),
}
PACKAGES = {"torch", "numpy", "einops", "tqdm", "PIL"}


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


def imported(node: ast.AST) -> set[str]:
    """Top-level names of everything imported anywhere inside a node; of experiments.x, x."""
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            names |= {alias.name for alias in part.names}
        elif isinstance(part, ast.ImportFrom):
            assert part.level == 0 and part.module, "relative import"
            package = part.module == "experiments"
            names |= {alias.name for alias in part.names} if package else {part.module}
    return {name.removeprefix("experiments.").split(".")[0] for name in names}


def outside_functions(name: str) -> set[str]:
    """What importing the file imports: everything but the imports inside functions."""
    top = tree(name)
    inside = [node for node in ast.walk(top) if isinstance(node, (ast.FunctionDef, ast.Lambda))]
    late = {id(part) for node in inside for part in ast.walk(node)}
    return set().union(*(imported(node) for node in ast.walk(top)
                         if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in late))


def neighbours(name: str) -> set[str]:
    return imported(tree(name)) & set(FILES)


def code_lines(name: str) -> int:
    """Lines that hold code: no blank lines, comments and docstrings."""
    source, lines = FILES[name].read_text(), set()
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
              tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if (isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
                and ast.get_docstring(node) is not None):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


@pytest.mark.parametrize("name", PRODUCT)
def test_a_file_imports_the_neighbours_of_the_design(name):
    must, may = ARROWS[name]
    assert must <= neighbours(name) <= must | may


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_a_leaf_imports_no_neighbour(name):
    assert name in FILES and neighbours(name) == set()


def test_guidance_and_sampling_never_meet_but_in_the_programs():
    assert "sampling" not in neighbours("guidance") and "guidance" not in neighbours("sampling")
    assert ({name for name in PRODUCT if {"guidance", "sampling"} <= neighbours(name)}
            == {"infill", "bench", "figures"})
    assert {"guidance", "sampling"} <= {name for name in PRODUCT if "diffusion" in neighbours(name)}


def test_the_network_is_imported_by_programs_alone():
    assert ({name for name in PRODUCT if "unet3d" in neighbours(name)}
            <= {"infill", "bench", "figures", "magicvideo", "autoencoder"})
    assert ({name for name in PRODUCT if "magicvideo" in neighbours(name)}
            <= {"run", "train", "infill", "sample", "cost", "autoencoder"})


def test_nothing_in_the_root_imports_the_experiments():
    assert [name for name in PRODUCT if name in ROOT and neighbours(name) & set(LAB)] == []


def test_the_papers_four_files_know_no_key_frames_masks_of_time_or_latents():
    words = {word for name in PAPER for node in ast.walk(tree(name)) for word in (
        getattr(node, "id", ""), getattr(node, "attr", ""), getattr(node, "arg", ""), getattr(node, "name", ""))}
    assert not words & {"keys", "reveal", "ends", "latent", "latent_factor", "latent_channels", "autoencoder"}


def test_no_import_points_in_a_circle():
    waiting = {name: neighbours(name) for name in PRODUCT}
    while free := [name for name, others in waiting.items() if not others & set(waiting)]:
        for name in free:
            del waiting[name]
    assert waiting == {}


def test_no_product_file_imports_a_test():
    assert [name for name in PRODUCT if neighbours(name) & set(TESTS)] == []


@pytest.mark.parametrize("name", FILES)
def test_a_file_needs_the_standard_library_and_the_five_packages_alone(name):
    allowed = set(sys.stdlib_module_names) | set(FILES) | PACKAGES | ({"pytest"} if name in TESTS else set())
    assert outside_functions(name) - allowed == set()


@pytest.mark.parametrize("name", [name for name in TESTS if name.startswith("test_")])
def test_a_test_file_mirrors_a_file(name):
    subject = name.removeprefix("test_")
    assert subject in neighbours(name) or subject in ("arrows", "faults", "gaussian", "readme", "key_frames")


@pytest.mark.parametrize("name", FILES)
def test_every_file_begins_with_a_docstring(name):
    assert len(ast.get_docstring(tree(name)) or "") > 30


@pytest.mark.parametrize("name", PRODUCT)
def test_every_public_function_is_typed_and_has_a_docstring(name):
    functions = [node for node in tree(name).body if isinstance(node, ast.FunctionDef)]
    for function in (f for f in functions if not f.name.startswith("_")):
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        assert ast.get_docstring(function) and function.returns, function.name
        assert all(argument.annotation for argument in arguments), function.name


@pytest.mark.parametrize("name", PRODUCT)
def test_no_file_has_more_than_250_lines_of_code(name):
    assert code_lines(name) <= 250


@pytest.mark.parametrize("files, most", [(PAPER, 350), ([name for name in PRODUCT if name in ROOT], 2181),
                                         ([name for name in PRODUCT if name in LAB], 1386)])
def test_paper_root_and_experiments_stay_small(files, most):
    assert sum(map(code_lines, files)) <= most


def test_the_root_is_flat_and_has_at_most_18_files_beside_tests():
    assert len([name for name in PRODUCT if name in ROOT]) <= 18
    assert list(HERE.glob("*/__init__.py")) == [HERE / "experiments" / "__init__.py"] and "utils" not in FILES

"""The arrows between files are those between the paper's ideas: who may import whom, how large a file is."""
import ast
import functools
import io
import sys
import tokenize
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = {path.stem: path for path in sorted(HERE.glob("*.py"))}
PRODUCT = [name for name in FILES if not name.startswith("test_") and name != "conftest"]
TESTS = [name for name in FILES if name not in PRODUCT]

LEAVES = {"config", "files", "text", "unet3d", "diffusion", "checkpoint", "machine", "record"}
ARROWS = {  # file: neighbours it must import, neighbours it may import
    **{leaf: (set(), set()) for leaf in LEAVES},
    "data": ({"files"}, set()),
    "guidance": ({"diffusion"}, set()),
    "sampling": ({"diffusion"}, set()),
    "magicvideo": ({"unet3d"}, set()),
    "autoencoder": ({"unet3d", "magicvideo"}, set()),
    "cost": ({"diffusion", "magicvideo", "unet3d"}, set()),
    "state": ({"config", "data", "text", "unet3d", "magicvideo", "autoencoder", "diffusion",
               "checkpoint"}, {"machine"}),
    "train": ({"config", "data", "text", "autoencoder", "diffusion", "state"},
              {"sampling", "machine", "cost", "record", "checkpoint", "files"}),
    "infill": ({"config", "data", "text", "unet3d", "magicvideo", "diffusion", "checkpoint", "guidance",
                "sampling", "autoencoder"}, set()),
    "sample": ({"infill", "config", "data", "files"}, {"machine", "checkpoint", "magicvideo"}),
    "bench": ({"unet3d", "diffusion", "guidance", "sampling"}, {"config", "cost", "data", "machine",
                                                                    "state"}),
    "features": ({"data"}, {"checkpoint", "config", "machine"}),
    "metrics": ({"features"}, set()),
    "lab": ({"sample", "infill", "metrics", "features", "data"}, {"machine"}),
    "ablations": ({"lab", "infill"}, {"autoencoder", "cost", "diffusion", "record", "state", "text"}),
    "evaluate": ({"sample", "infill", "metrics", "lab", "ablations"}, {"config", "data", "checkpoint",
                                                                        "features"}),
}
PACKAGES = {"torch", "numpy", "einops", "tqdm", "PIL"}


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


def imported(node: ast.AST) -> set[str]:
    """Top-level names of everything imported anywhere inside a node."""
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            names |= {alias.name.split(".")[0] for alias in part.names}
        elif isinstance(part, ast.ImportFrom):
            assert part.level == 0 and part.module, "relative import"
            names.add(part.module.split(".")[0])
    return names


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
    assert {name for name in PRODUCT if {"guidance", "sampling"} <= neighbours(name)} == {"infill", "bench"}
    assert {"guidance", "sampling"} <= {name for name in PRODUCT if "diffusion" in neighbours(name)}


def test_the_network_is_imported_by_programs_alone():
    assert ({name for name in PRODUCT if "unet3d" in neighbours(name)}
            <= {"state", "infill", "cost", "bench", "magicvideo", "autoencoder"})
    assert ({name for name in PRODUCT if "magicvideo" in neighbours(name)}
            <= {"state", "infill", "sample", "cost", "autoencoder"})


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


def test_the_project_has_at_most_2750_lines_of_code():
    # 2,500 for the paper and its evidence, of which about 2,430 are used, and 250 above that for MagicVideo's
    assert sum(map(code_lines, PRODUCT)) <= 2750


def test_the_project_is_flat():
    assert list(HERE.glob("*/__init__.py")) == [] and "utils" not in FILES

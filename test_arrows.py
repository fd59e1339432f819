"""The arrows between files are those between the paper's ideas: who may import whom.

Only files named in ARROWS are looked at. A new file, a sampler or a data set of your own, may import anything
and be imported by any file.
"""
import ast
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAPER = ("unet3d", "diffusion", "guidance", "sampling")
ARROWS = {  # file: the files named here that it may import
    "presets": "", "text": "", "unet3d": "", "diffusion": "", "checkpoint": "", "machine": "", "optimizer": "",
    "films": "", "files": "films",
    "config": "presets",
    "guidance": "diffusion",
    "sampling": "diffusion",
    "magicvideo": "unet3d",
    "autoencoder": "unet3d",
    "clips": "files checkpoint",
    "data": "files clips",
    "shard": "machine unet3d",
    "settings": "config presets data text magicvideo autoencoder diffusion checkpoint machine",
    "state": "config settings shard optimizer presets checkpoint machine data magicvideo autoencoder",
    "progress": "settings state data text diffusion sampling machine files",
    "train": "config settings state shard progress optimizer data clips text diffusion autoencoder machine checkpoint",
    "infill": "config data text unet3d magicvideo autoencoder diffusion guidance sampling checkpoint",
    "sample": "infill config data files machine autoencoder magicvideo checkpoint",
}


def imported(name: str) -> set[str]:
    """Top-level names of everything that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", ARROWS)
def test_a_file_imports_no_other_neighbours_than_those_of_the_design(name):
    assert imported(name) & set(ARROWS) <= set(ARROWS[name].split())


def test_guidance_and_sampling_meet_in_infill_alone():
    assert [name for name in ARROWS if {"guidance", "sampling"} <= imported(name)] == ["infill"]


@pytest.mark.parametrize("name", ARROWS)
def test_nothing_in_the_root_imports_the_experiments_or_a_test(name):
    assert not [other for other in imported(name) if other == "experiments" or other.startswith("test_")]


def test_the_papers_four_files_know_no_latents():
    for name in PAPER:
        words = set()
        for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text())):
            for attribute in ("id", "attr", "arg", "name"):
                words.add(getattr(node, attribute, ""))
        assert not words & {"latent", "latent_channels", "autoencoder"}


def test_no_import_points_in_a_circle():
    waiting = {name: imported(name) & set(ARROWS) for name in ARROWS}
    while waiting:
        free = [name for name, others in waiting.items() if not others & set(waiting)]
        assert free, f"a circle among {sorted(waiting)}"
        for name in free:
            del waiting[name]


@pytest.mark.parametrize("name", ARROWS)
def test_a_file_needs_the_standard_library_and_the_five_packages_alone(name):
    """Optional extras are imported inside the one function that needs them."""
    extras = set()
    for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text())):
        if isinstance(node, ast.FunctionDef):
            extras |= imported_inside(node)
    allowed = set(sys.stdlib_module_names) | set(ARROWS) | {"torch", "numpy", "einops", "tqdm", "PIL"}
    own = {path.stem for path in HERE.glob("*.py")}
    assert imported(name) - extras - own <= allowed


def imported_inside(function: ast.FunctionDef) -> set[str]:
    names = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names

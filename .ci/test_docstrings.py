"""What holds for the project's own code, and not for what a reader adds: so pytest does not collect it."""
import ast
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE))

from test_arrows import ARROWS  # noqa: E402


@pytest.mark.parametrize("name", ARROWS)
def test_every_public_function_is_typed_and_has_a_docstring(name):
    tree = ast.parse((HERE / f"{name}.py").read_text())
    assert len(ast.get_docstring(tree)) > 30
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node) and node.returns, node.name
            assert all(argument.annotation for argument in node.args.args + node.args.kwonlyargs), node.name

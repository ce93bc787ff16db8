"""The network stays something to be read in one sitting."""

import ast
from pathlib import Path

import llava_fast

MODEL = Path(llava_fast.__file__).parent / "model"
NETWORK = ("llava", "vision", "language")  # the projector is in vision.py


def functions() -> list[tuple[str, int]]:
    """(file:name, lines, decorators left out) of every function of the network."""
    found = []
    for name in NETWORK:
        for node in ast.walk(ast.parse((MODEL / f"{name}.py").read_text())):
            if isinstance(node, ast.ClassDef | ast.Module):
                owner = getattr(node, "name", name)
                for child in node.body:
                    if isinstance(child, ast.FunctionDef):
                        found.append((f"{owner}.{child.name}", child.end_lineno - child.lineno + 1))
    return found


def test_the_network_is_under_a_thousand_lines():
    assert sum(len((MODEL / f"{name}.py").read_text().splitlines()) for name in NETWORK) < 1000


def test_no_function_is_long():
    lengths = dict(functions())
    assert {name: length for name, length in lengths.items() if length > 60} == {}
    assert lengths["LlavaModel.forward"] <= 40

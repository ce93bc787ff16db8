"""Names of operations: what `llava_fast.ops` offers, and what one operation may know of another."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from llava_fast import ops

OPS = Path(__file__).resolve().parents[2] / "llava_fast/ops"
PACKAGE = "llava_fast.ops."


# An operation of the name of its own file or folder.
OWN_FILES = ("attention", "merge", "patch_embed", "projector", "rotary")


def test_importing_the_operations_imports_nothing_heavy():
    code = "import sys, llava_fast.ops; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "triton", "numpy", "llava_fast.ops.norm"} & set(done.stdout.split())


@pytest.mark.parametrize("name", [*ops.__all__, *OWN_FILES])
def test_public_functions_say_what_they_take_and_give(name: str):
    function = getattr(ops if name in ops.__all__ else import_module(f"llava_fast.ops.{name}"), name)
    assert callable(function)
    parts = function.__doc__.split("\n    ")
    assert {"Args:", "Returns:"} <= {part.strip() for part in parts}, name
    assert "Raises:" in function.__doc__ or "BackendUnavailable" in function.__doc__, name


def test_names_load_when_they_are_used():
    assert set(ops.__all__) == set(ops._HOME) <= set(dir(ops))
    for name in ops.__all__:
        assert getattr(ops, name) is getattr(import_module(f"llava_fast.ops.{ops._HOME[name]}"), name)
    with pytest.raises(AttributeError, match="no attribute 'softmax'"):
        _ = ops.softmax
    # A name is a module or a function, whatever was imported before.
    assert not set(ops.__all__) & {path.name.removesuffix(".py") for path in OPS.iterdir()}


def private_names(source: str, operation: str) -> Iterator[str]:
    """One line for each name with a leading underscore that the source takes from another operation."""
    modules = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and f"{node.module}.".startswith(PACKAGE):
            path = [*f"{node.module}."[len(PACKAGE) :].split(".")[:-1]]
            for alias in node.names:
                where = [*path, alias.name]
                other = where[0]
                if other.startswith("_") or other == operation:
                    continue
                modules[alias.asname or alias.name] = other
                if any(part.startswith("_") for part in where[1:]):
                    yield f"line {node.lineno} imports {'.'.join(where)}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            if isinstance(node.value, ast.Name) and node.value.id in modules:
                yield f"line {node.lineno} uses {node.value.id}.{node.attr}"


FILES = [path for path in sorted(OPS.rglob("*.py")) if not path.relative_to(OPS).parts[0].startswith("_")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(OPS)))
def test_an_operation_uses_public_names_of_others(file: Path):
    operation = file.relative_to(OPS).parts[0].removesuffix(".py")
    found = list(private_names(file.read_text(encoding="utf-8"), operation))
    assert not found, found


def test_what_operations_share_knows_none_of_them():
    for file in OPS.glob("_[a-z]*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module and f"{module}.".startswith(PACKAGE):
                assert module.removeprefix(PACKAGE).startswith("_"), f"{file.name}:{node.lineno} imports {module}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from llava_fast.ops.rotary import _rotated", ["line 1 imports rotary._rotated"]),
        ("from llava_fast.ops import norm\nnorm._forward(1)", ["line 2 uses norm._forward"]),
        ("from llava_fast.ops.attention.decode import _decode", ["line 1 imports attention.decode._decode"]),
        ("from llava_fast.ops import norm\nnorm.norm_forward(1)", []),
        ("from llava_fast.ops._gemm import tile_order\nfrom llava_fast.ops.merge import _forward", []),
    ],
)
def test_a_private_name_is_found(source: str, found: list[str]):
    assert list(private_names(source, "merge")) == found

"""The layers of the package: imports point down only, and each heavy dependency has its place."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import llava_fast

ROOT = Path(__file__).resolve().parents[1]

# Lowest first. Units of one layer do not import each other.
LAYERS = [
    {"backend", "errors"},
    {"ops", "hub"},
    {"sequence"},
    {"model"},
    {"checkpoint", "processor"},
    {"drop_in", "attention_interface"},
    {"train", "chat", "convert", "doctor", "auto", "benchmarks"},
    {"demo", "terminal"},
    {"cli"},
    {"__main__"},
]
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}

# Who may import what, by prefix of the importing module.
ONLY_IN = {
    "triton": ("llava_fast.ops",),
    "transformers": (
        "llava_fast.model",
        "llava_fast.checkpoint",
        "llava_fast.processor",
        "llava_fast.drop_in",
        "llava_fast.attention_interface",
        "llava_fast.auto",
        "llava_fast.train",
        "llava_fast.chat",
        "llava_fast.convert",
    ),
    "peft": ("llava_fast.train",),
    "accelerate": ("llava_fast.train",),
    "pydantic": ("llava_fast.train",),
    "huggingface_hub": ("llava_fast.hub",),
    "llava_fast._cuda": ("llava_fast.backend",),
}
# Merging an adapter needs peft, so its file may import it, inside a function only.
LAZILY = {("llava_fast.checkpoint.adapter", "peft")}


@dataclass(frozen=True)
class Import:
    """One name that a module imports, in full, and whether it does so while it is itself imported."""

    target: str
    line: int
    at_import: bool


def imports_of(source: str, module: str, is_package: bool) -> Iterator[Import]:
    """Every import in the source, `importlib.import_module("…")` with a literal name included."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_import)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package else -1]
                parents = parents[: len(parents) - (node.level - 1)]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, at_import)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__"):
                yield Import(str(node.args[0].value), node.lineno, at_import)
        inside = at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return visit(ast.parse(source), True)


def unit_of(module: str) -> str:
    """The layer unit a module belongs to: llava_fast.model.vision -> model."""
    parts = module.split(".")
    return parts[0] if parts[0] == "benchmarks" else parts[1] if len(parts) > 1 else "llava_fast"


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """One line for every import in the source that the layers forbid."""
    found = []
    for imported in imports_of(source, module, is_package):
        target = imported.target
        # A public name stands for the module it lives in; the version stands for nothing.
        package, _, name = target.partition(".")
        if package == "llava_fast":
            target = f"{llava_fast._HOME[name]}.{name}" if name in llava_fast._HOME else target
        where = f"{module}:{imported.line} imports {target}"
        for dependency, places in ONLY_IN.items():
            if within(target, dependency) and not any(within(module, place) for place in places):
                lazy = (module, dependency) in LAZILY and not imported.at_import
                if unit_of(module) != "benchmarks" and not lazy:
                    found.append(f"{where}; {dependency} belongs to {', '.join(places)}")
        source_unit, target_unit = unit_of(module), unit_of(target)
        if package not in ("llava_fast", "benchmarks") or target_unit not in RANK or source_unit == target_unit:
            continue
        if RANK[target_unit] >= RANK[source_unit]:
            found.append(f"{where}; {source_unit} may not import {target_unit}")
    return found


def modules() -> list[tuple[str, Path]]:
    files = [*ROOT.glob("llava_fast/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    return [
        (".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), file)
        for file in sorted(files)
    ]


def test_imports_point_down_only():
    found = []
    for module, file in modules():
        if module == "llava_fast":  # the façade: its own test is below
            continue
        found += violations(file.read_text(encoding="utf-8"), module, file.name == "__init__.py")
    assert not found, "\n".join(found)


def test_every_module_has_a_layer():
    units = {unit_of(module) for module, _ in modules()} - {"llava_fast"}
    assert units <= RANK.keys(), f"give these a layer: {sorted(units - RANK.keys())}"
    assert {unit for units in LAYERS for unit in units} == units


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("llava_fast.ops.norm", "from llava_fast.model import llava", "ops may not import model"),
        ("llava_fast.ops.norm", "from ..model.llava import LlavaModel", "ops may not import model"),
        ("llava_fast.backend", "def f():\n    import llava_fast.ops.norm", "backend may not import ops"),
        ("llava_fast.sequence", "from llava_fast import LlavaModel", "sequence may not import drop_in"),
        ("llava_fast.train.data", "from llava_fast.demo import world", "train may not import demo"),
        ("llava_fast.demo.run", "from llava_fast import cli", "demo may not import cli"),
        ("benchmarks.test_norm", "import llava_fast.train.trainer", "benchmarks may not import train"),
        ("llava_fast.model.llava", "import triton.language as tl", "triton belongs to llava_fast.ops"),
        ("llava_fast.ops.norm", "from transformers import LlavaConfig", "transformers belongs to"),
        ("llava_fast.cli", "import importlib\nimportlib.import_module('transformers')", "transformers belongs"),
        ("llava_fast.checkpoint.adapter", "import peft", "peft belongs to llava_fast.train"),
        ("llava_fast.model.llava", "def f():\n    import peft", "peft belongs to llava_fast.train"),
        ("llava_fast.ops.norm", "from llava_fast import _cuda", "llava_fast._cuda belongs to"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str, complaint: str):
    found = violations(source, module)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("llava_fast.cli", "from llava_fast.demo.run import run"),
        ("llava_fast.demo.run", "from llava_fast import LlavaProcessor, __version__"),
        ("llava_fast.checkpoint.adapter", "def merge():\n    from peft import PeftModel"),
        ("llava_fast.train.trainer", "import transformers, peft, accelerate\nfrom ..model import llava"),
        ("llava_fast.ops.norm", "import triton\nfrom llava_fast.backend import choose\nfrom . import rotary"),
        ("benchmarks.test_norm", "import transformers\nfrom llava_fast.ops.norm import rms_norm"),
    ],
)
def test_an_allowed_import_is_not(module: str, source: str):
    assert violations(source, module) == []


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, llava_fast; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    heavy = {"torch", "numpy", "PIL", "triton", "transformers", "peft", "accelerate", "typer"}
    assert "llava_fast" in loaded
    assert not loaded & heavy


def test_public_names_are_there():
    assert set(llava_fast.__all__) == {*llava_fast._HOME, "__version__"}
    assert set(llava_fast.__all__) <= set(dir(llava_fast))
    for name in llava_fast.__all__:
        assert getattr(llava_fast, name) is not None
    assert callable(llava_fast.attention)
    with pytest.raises(AttributeError, match="no attribute 'Llava'"):
        _ = llava_fast.Llava

"""docs/complaints.md names tests that exist, at least one for each of its fifteen complaints."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = re.findall(
    r"^\| (?!complaint)([^|-][^|]*) \| [^|]+ \| ([^|]+) \|$", (ROOT / "docs/complaints.md").read_text(), re.M
)


def functions(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_complaint_has_a_test_that_exists():
    assert len(ROWS) == 15
    for complaint, tests in ROWS:
        named = re.findall(r"`(tests/[^`:]+)(?:::(test_\w+))?`", tests)
        assert len(named) == tests.count("`") // 2 > 0, complaint
        for file, function in named:
            assert (ROOT / file).is_file(), f"{complaint}: no {file}"
            known = functions(ROOT / file)
            assert function in known if function else any(name.startswith("test_") for name in known), (file, function)

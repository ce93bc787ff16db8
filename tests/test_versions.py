"""The oldest versions that pyproject.toml allows are those that `make oldest` installs."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def number(version: str) -> tuple[int, ...]:
    """1.2.0 and 1.2 are the same version."""
    parts = [int(part) for part in version.split(".")]
    while parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def requirements(text: str, relation: str) -> dict[str, tuple[int, ...]]:
    found = re.findall(rf"^\W*([\w-]+){relation}([\d.]+)", text, re.MULTILINE)
    return {name: number(version) for name, version in found}


def test_the_oldest_versions_are_what_is_tested():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = [
        re.search(rf"^{name} = \[\n(.*?)^\]", project, re.MULTILINE | re.DOTALL) for name in ("dependencies", "train")
    ]
    allowed = requirements("".join(match[1] for match in needed if match), ">=")
    assert {"torch", "triton", "transformers", "peft"} <= allowed.keys()
    assert requirements((ROOT / "constraints-oldest.txt").read_text(encoding="utf-8"), "==") == allowed

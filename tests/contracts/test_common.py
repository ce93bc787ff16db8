"""The comparison that `make contracts` makes, and what it unpacks; the run itself needs a package index."""

import io
import tarfile
from pathlib import Path

import pytest

from tests.contracts import common

PAGE = """With transformers 9.9, 120 tests pass
with our classes, and 121 with its own.
| `test_strict` | why |
"""
TESTS = {f"test_{i}": "passed" for i in range(120)}


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ({}, {}, []),
        ({"test_3": "failure"}, {}, ["test_3 passes with transformers' classes", "count is old"]),
        ({"test_3": "skipped"}, {"test_3": "error"}, ["count is old"]),
        ({"test_strict": "passed"}, {}, ["test_strict is listed", "count is old"]),
        ({"test_strict": "failure"}, {"test_strict": "failure"}, ["test_strict is listed", "count is old"]),
        (dict.fromkeys(TESTS, "error"), dict.fromkeys(TESTS, "error"), ["0 tests pass, fewer than", "count is old"]),
    ],
)
def test_differences_are_reported(ours: dict[str, str], theirs: dict[str, str], said: list[str]) -> None:
    found = {
        "Ours": {**TESTS, "test_strict": "failure", **ours},
        "Theirs": {**TESTS, "test_strict": "passed", **theirs},
    }
    wrong = common.problems(found, PAGE, "9.9")
    assert len(wrong) == len(said)
    for line, part in zip(wrong, said):
        assert part in line


def test_only_the_common_tests_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, source = tmp_path / "a.tar.gz", tmp_path / "source"
    monkeypatch.setattr(common, "SOURCE", source)
    monkeypatch.setattr(common, "PACKAGE", source / "tests")
    names = ["test_modeling_common.py", "../../test_up.py", "test_x.sh", "deep/test_deep.py"]
    with tarfile.open(archive, "w:gz") as made:
        for name in names:
            made.addfile(tarfile.TarInfo(f"transformers-9.9/tests/{name}"), io.BytesIO())
        link = tarfile.TarInfo("transformers-9.9/tests/test_link.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        made.addfile(link)
    common.unpack(archive)
    files = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.py") if file.name != "__init__.py"}
    absent = {f"source/tests/{name}" for name in common.ABSENT}
    assert files == {"source/tests/test_modeling_common.py"} | absent


def test_no_package_index_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "BUILD", tmp_path)
    for name, value in {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_NO_INPUT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as raised:
        common.download("9.9")
    assert str(raised.value).startswith("contracts: the source of transformers 9.9 cannot be downloaded: ")
    assert "\n" not in str(raised.value)

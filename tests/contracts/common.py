"""Run transformers' common tests on our classes: `make contracts`, or `python tests/contracts/common.py`.

Downloads the source of the transformers that is installed (pip, 10 MB) into build/contracts/. Runs its
`ProcessorTesterMixin` on our processor (`common_processor.py`), and its `ModelTesterMixin` on our models and on its own
(`common_model.py`): a test that passes with theirs must pass with ours, or be in the table of
docs/transformers-tests.md with its reason; a test in that table must not pass. Exits with 1, and says why, when
anything differs.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build/contracts"
PAGE = ROOT / "docs/transformers-tests.md"
SOURCE = BUILD / "transformers_tests"
PACKAGE = SOURCE / "tests"
AT_LEAST = 106
# Imported by the common tests, and not in the source distribution.
ABSENT = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}


def download(version: str) -> Path:
    """The source distribution; pip compares it with the index's hash."""
    file = BUILD / f"transformers-{version}.tar.gz"
    if not file.is_file():
        wanted = ["--no-deps", "--no-binary", "transformers", f"transformers=={version}"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(BUILD), *wanted]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not file.is_file():
            why = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            sys.exit(f"contracts: the source of transformers {version} cannot be downloaded: {why}")
    return file


def unpack(archive: Path) -> None:
    """Its common tests, as the package `transformers_tests.tests`."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    PACKAGE.mkdir(parents=True)
    with tarfile.open(archive) as opened:
        for member in opened:
            if re.fullmatch(r"transformers-[\w.]+/tests/test_\w+\.py", member.name) and member.isreg():
                member.name = Path(member.name).name
                opened.extract(member, PACKAGE, filter="data")
    if not (PACKAGE / "test_modeling_common.py").is_file():
        sys.exit(f"contracts: {archive} has no tests/test_modeling_common.py")
    (PACKAGE / "__init__.py").touch()
    for name, mixin in ABSENT.items():
        file = PACKAGE / name
        file.parent.mkdir(exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(f"class {mixin}:\n    pass\n")


def pytest(name: str, *options: str) -> int:
    """Run a file of this folder, with output into a log file; 0 if all pass, 1 if some fail."""
    quiet = ["-q", "--tb=short", "-r", "f", "-p", "no:cacheprovider", "-W", "ignore"]
    markers = ["--override-ini", "addopts=--import-mode=importlib"]  # transformers' are not among ours
    path = os.pathsep.join([str(BUILD), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_SDIST": str(SOURCE)}
    command = [sys.executable, "-m", "pytest", str(Path(__file__).with_name(name)), *quiet, *markers, *options]
    with open(log := BUILD / f"{name}.log", "w") as file:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode > 1:
        sys.exit(f"contracts: pytest did not run {name}; see {log}")
    print(f"{name}: {log.read_text().strip().splitlines()[-1]} ({log.relative_to(ROOT)})")
    return done.returncode


def models() -> dict[str, dict[str, str]]:
    """For "Ours" and "Theirs": passed, skipped, failure or error, by test."""
    results = BUILD / "results.xml"
    pytest("common_model.py", "--junit-xml", str(results))
    found: dict[str, dict[str, str]] = {"Ours": {}, "Theirs": {}}
    for case in ElementTree.parse(results).iter("testcase"):
        outcomes = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        found[case.get("classname", "").rpartition(".")[2]][case.get("name", "")] = (outcomes or ["passed"])[0]
    return found


def problems(found: dict[str, dict[str, str]], page: str, version: str) -> list[str]:
    ours, theirs = ({test for test, outcome in of.items() if outcome == "passed"} for of in found.values())
    listed = set(re.findall(r"^\| `(test_\w+)` \|", page, re.MULTILINE))
    said = f"With transformers {version}, {len(ours)} tests pass with our classes, and {len(theirs)} with its own."
    about_this = f"transformers {version}," in page  # another version may have other tests
    wrong = [f"{test} passes with transformers' classes, not with ours" for test in sorted(theirs - ours - listed)]
    known = listed if about_this else listed & found["Ours"].keys()
    wrong += [f"{test} is listed, and passes or is not there" for test in sorted(known - (theirs - ours))]
    if len(ours) < AT_LEAST:
        wrong.append(f"{len(ours)} tests pass, fewer than {AT_LEAST}")
    if about_this and said not in " ".join(page.split()):
        wrong.append(f"the page's count is old; it is: {said}")
    return wrong


def main() -> None:
    version = importlib.metadata.version("transformers")
    BUILD.mkdir(parents=True, exist_ok=True)
    unpack(download(version))
    found = models()
    for whose, of in found.items():
        counts = {kind: list(of.values()).count(kind) for kind in ("passed", "skipped", "failure", "error")}
        print(f"{whose:6}", ", ".join(f"{count} {kind}" for kind, count in counts.items() if count))
    wrong = problems(found, PAGE.read_text(encoding="utf-8"), version)
    if pytest("common_processor.py"):
        wrong.append("a test of the processor differs from the lists in common_processor.py")
    if wrong:
        sys.exit("\n".join(f"contracts: {line}" for line in wrong))
    print(f"transformers {version}: its common tests pass, but for the exceptions that are listed")


if __name__ == "__main__":
    main()

"""Installs the wheel into an empty environment and uses it there as a stranger would, far from the repository.

    python tests/contracts/wheel.py WHEEL DEMO_OUT

DEMO_OUT is what `make demo` leaves: its model is asked a question of its exam. Needs a package index.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Environment:
    """A virtual environment with the wheel and its required dependencies, and an empty folder to work in."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.bin, self.cwd = folder / "venv" / "bin", folder / "work"
        self.cwd.mkdir()
        # Without pip: some Pythons have no ensurepip. That of this environment installs into the other one.
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "-qq"]
        subprocess.run([*pip, "-c", ROOT / "constraints.txt", wheel], check=True, cwd=self.cwd)
        self.variables = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))},
            "HF_HUB_OFFLINE": "1",
        }

    def run(self, *command: object, status: int = 0, typed: str = "") -> tuple[str, str]:
        """Standard output and error of a command of the environment, which must end with `status`."""
        program, *arguments = map(str, command)
        done = subprocess.run(
            [self.bin / program, *arguments],
            cwd=self.cwd,
            env=self.variables,
            input=typed,
            capture_output=True,
            text=True,
        )
        shown = " ".join([program, *arguments])
        if done.returncode != status:
            sys.exit(f"{shown}: exit status {done.returncode}, not {status}\n{done.stdout}{done.stderr}")
        print(f"ok  {shown}")
        return done.stdout, done.stderr


def expect(holds: bool, what: str) -> None:
    if not holds:
        sys.exit(f"the wheel in an empty environment: {what}")


def check(there: Environment, demo: Path) -> None:
    names = "import llava_fast; [getattr(llava_fast, name) for name in llava_fast.__all__]; print(llava_fast.__file__)"
    place, _ = there.run("python", "-c", names)
    expect(place.startswith(str(there.bin.parent)), f"llava_fast comes from {place}")
    version, _ = there.run("llava-fast", "--version")
    expect(bool(re.fullmatch(r"llava-fast \d+\.\d+\.\d+\n", version)), f"--version prints {version!r}")
    module, _ = there.run("python", "-m", "llava_fast", "--version")
    expect(module == version, f"python -m llava_fast --version prints {module!r}")
    there.run("llava-fast", "doctor")

    listed, _ = there.run("llava-fast", "recipes")
    for name in ("llava-1.5-7b-stage2-full", "accelerate/one-gpu"):
        expect(name in listed, f"`recipes` does not list {name}")
        there.run("llava-fast", "recipes", "copy", name)
        same = (there.cwd / f"train/{name}.yaml").read_text() == (ROOT / f"train/{name}.yaml").read_text()
        expect(same, f"the recipe {name} is not the repository's")

    data = [f"model={demo / 'stage1'}", f"data={demo / 'stage2.json'}", f"image_folder={demo}"]
    recipe = ["train/llava-1.5-7b-stage2-full.yaml", *data]
    for command in (
        ["llava-fast", "train", *recipe],
        ["python", "-m", "llava_fast.train", *recipe],
        ["llava-fast", "demo"],
    ):
        _, said = there.run(*command, status=2)
        expect(said.count("\n") == 1 and "pip install 'llava-fast[train]'" in said, f"{command} says {said}")

    row = json.loads((demo / "exam.json").read_text())[0]
    chat = ["llava-fast", "chat", demo / "model", "--image", demo / row["image"]]
    answer, _ = there.run(*chat, "--prompt", row["question"])
    expect(answer == f"{row['answer']}\n", f"asked {row['question']!r}, the demo's model says {answer!r}")
    answers, said = there.run(*chat, typed=f"{row['question']}\n/image no.png\n{row['question']}\n", status=2)
    expect(answers.startswith(answer) and answers.count("\n") == 2, f"two questions in a pipe get {answers!r}")
    expect("error: no image file no.png\n" in said, f"a bad turn in a pipe says {said!r}")


def main() -> None:
    wheel, demo = (Path(argument).resolve() for argument in sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="wheel-", dir=wheel.parent) as folder:
        started = time.perf_counter()
        there = Environment(Path(folder), wheel)
        print(f"installed in {time.perf_counter() - started:.0f} s")
        check(there, demo)
        print(f"the wheel works in an empty environment: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()

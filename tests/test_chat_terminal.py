"""`llava-fast chat` at a real terminal, with its keys; the model's answers are noise, the same for each prompt."""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pexpect
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

# prompt_toolkit begins and ends the reading of a line with these.
READING, READ = "\x1b[?2004h", "\x1b[?2004l"
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Terminal:
    """`llava-fast chat` in a terminal of 200 columns."""

    def __init__(self, state: Path, *arguments: object) -> None:
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "llava_fast", "chat", *map(str, arguments), "--device", "cpu"],
            env=os.environ
            | {"XDG_STATE_HOME": str(state), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1"},
            dimensions=(50, 200),
            encoding="utf-8",
            timeout=120,
        )
        self.greeting = self.until_prompt()

    def until_prompt(self) -> str:
        """What is printed until the next prompt."""
        self.child.expect_exact(READING)
        return CODES.sub("", self.child.before.rpartition(READ)[2]).strip("\n")

    def enter(self, line: str) -> str:
        self.child.send(line + "\r")
        return self.until_prompt()

    def ended(self) -> int:
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a picture.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    return path


def test_mistakes_and_ctrl_c_leave_the_conversation_alive(tiny_checkpoint: Path, picture: Path, tmp_path: Path):
    terminal = Terminal(tmp_path, tiny_checkpoint, "--max-new-tokens", 1500)
    assert "/help lists the commands; Ctrl-D leaves" in terminal.greeting
    assert "/image PATH" in terminal.enter("/help")
    assert terminal.enter("/sing") == "error: no command /sing; /help lists them"
    assert terminal.enter("/image nowhere.png") == "error: no image file nowhere.png"

    terminal.child.send("Go on.\r")
    terminal.child.expect_exact(READ)
    terminal.child.expect(r"word\d+ .*word\d+ ")  # an answer of 1500 tokens has begun
    started = time.monotonic()
    terminal.child.sendintr()
    stopped = terminal.until_prompt()
    assert stopped.endswith("\nstopped")
    assert time.monotonic() - started < 20
    assert terminal.enter("long? " * 400).startswith("error: the question is too long: ")
    assert terminal.enter("/reset") == "a new conversation, without images"
    assert terminal.enter(f"/image {picture}") == "an image comes with the next question"

    terminal.child.send("half a question")
    terminal.child.sendintr()  # drops it
    terminal.until_prompt()
    terminal.child.sendintr()  # nothing is typed: as when it comes just after the end of an answer
    assert terminal.until_prompt() == "Ctrl-D leaves"
    terminal.child.sendeof()
    assert terminal.ended() == 0


def test_the_same_question_gets_the_same_answer_whatever_failed_before(
    tiny_checkpoint: Path, picture: Path, tmp_path: Path
):
    terminal = Terminal(tmp_path, tiny_checkpoint, "--max-new-tokens", 12)
    first = terminal.enter("What is it?")
    assert first and "error" not in first
    terminal.enter("/reset")
    assert terminal.enter("What is <image>?").startswith("error: a question cannot contain <image>")
    assert terminal.enter("/image nowhere.png").startswith("error: no image file")
    assert terminal.enter("What is it?") == first
    second = terminal.enter("What is it?")
    assert second != first  # the first turn counts

    terminal.enter("/reset")
    assert terminal.enter(f"/image {picture}") == "an image comes with the next question"
    seen = terminal.enter("What is it?")
    assert seen != first
    terminal.child.sendeof()
    assert terminal.ended() == 0

    again = Terminal(tmp_path, tiny_checkpoint, "--max-new-tokens", 12, "--image", picture)
    assert again.greeting.endswith("\nan image comes with the next question")
    again.child.send("\x1b[A")  # arrow up: the last line of the chat before
    assert again.enter("") == seen
    again.child.send("/exit\r")
    assert again.ended() == 0
    history = tmp_path / "llava-fast" / "history"
    assert history.read_text().count("+What is it?") == 3  # not what repeats the line before
    assert history.stat().st_mode & 0o077 == 0


def test_a_full_context_is_trimmed_aloud(tiny_checkpoint: Path, picture: Path, tmp_path: Path):
    small = shutil.copytree(tiny_checkpoint, tmp_path / "small")
    settings = json.loads((small / "tokenizer_config.json").read_text())
    (small / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 300}))
    (tmp_path / "state").touch()  # no directory: there is no history, and no error
    terminal = Terminal(tmp_path / "state", small, "--max-new-tokens", 12, "--image", picture)
    answers = [terminal.enter(f"Question {i}?") for i in range(5)]
    full = "the context of 300 tokens is full; the oldest part is left out: "
    assert full not in answers[0]
    assert answers[-1].startswith(f"{full}1 turn\n")
    assert terminal.enter("long? " * 60).startswith("error: the question is too long: ")
    assert "error" not in terminal.enter("Question 6?")
    terminal.child.sendeof()
    assert terminal.ended() == 0

"""`llava-fast chat`: reads questions and commands, prints answers as they come, and goes on after a mistake.

Answers go to standard output; everything else to standard error.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from PIL import Image
from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from llava_fast.chat import Chat
from llava_fast.errors import one_line
from llava_fast.processor.processor import read_rgb

HELP = """\
/image PATH  show an image with the next question; several paths, or several times, for more images
/reset       forget what was said and shown
/help        this list
/exit        leave; so does Ctrl-D
Ctrl-C stops an answer; what was said until then stays in the conversation. Arrow up: earlier questions."""


def say(line: str) -> None:
    """Print a line that is no part of an answer."""
    print(line, file=sys.stderr, flush=True)


def open_image(name: str) -> Image.Image:
    """Read an image file; `~` is the home directory.

    Raises:
        FileNotFoundError, ValueError: in one line; also for a URL, which is not fetched.
    """
    if re.match(r"https?://", name, re.IGNORECASE):
        raise ValueError(f"{one_line(name)} is not fetched; download it, and give the file")
    return read_rgb(Path(os.path.expanduser(name)))


def answer(chat: Chat, question: str) -> None:
    """Print the answer as it comes. At a terminal control characters are left out: they would act on it."""
    begun = False
    with closing(chat.ask(question)) as pieces:
        try:
            for piece in pieces:
                begun = True
                sys.stdout.write(_printable(piece) if sys.stdout.isatty() else piece)
                sys.stdout.flush()
        except BaseException:
            if begun:
                print(flush=True)
            raise
    print(flush=True)


def converse(chat: Chat, *, debug: bool = False) -> int:
    """Answer until there are no more questions; a mistake is one line, and the next question follows.

    At a terminal Ctrl-C stops an answer; elsewhere it is raised.

    Args:
        debug: raise the error of a mistake instead.
    Returns:
        The exit status: 0, or 2 if questions did not come from a terminal and one of them failed.
    """
    at_terminal = sys.stdin.isatty()
    read, failed = _reader(), False
    if at_terminal:
        say("/help lists the commands; Ctrl-D leaves")
        if chat.images:
            say(_coming(chat))
    while (line := read()) is not None:
        try:
            if command := re.fullmatch(r"/(\w*)(?:\s+(.*))?", line):
                if _obey(chat, command[1], command[2] or "") == "exit":
                    break
            else:
                answer(chat, line)
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            say("stopped")
        except BrokenPipeError:  # the reader of the answers has gone
            raise
        except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: out of memory
            if debug:
                raise
            failed = True
            say(f"error: {one_line(error, 300)}")
    return 2 if failed and not at_terminal else 0


def _obey(chat: Chat, command: str, rest: str) -> str:
    """Do what a line such as `/image a.png` says, `rest` being what follows the command; returns the command."""
    if command == "image":
        if not rest:
            raise ValueError("which image? /image PATH")
        chat.images += [open_image(path) for path in _paths(rest)]
        say(_coming(chat))
    elif command == "reset":
        chat.reset()
        say("a new conversation, without images")
    elif command == "help":
        say(HELP)
    elif command != "exit":
        raise ValueError(f"no command /{one_line(command, 40)}; /help lists them")
    return command


def _coming(chat: Chat) -> str:
    number = len(chat.images)
    return f"{'an image comes' if number == 1 else f'{number} images come'} with the next question"


def _paths(text: str) -> list[str]:
    """Several paths, quoted as for a shell, if one of them exists; otherwise one, spaces and all."""
    try:
        paths = [] if _exists(text) else shlex.split(text)
    except ValueError:  # an apostrophe
        paths = []
    return paths if any(map(_exists, paths)) else [text]


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def _reader() -> Callable[[], str | None]:
    """A function that returns the next line that is not blank, None when there are no more."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return lambda: next((line.strip() for line in sys.stdin if line.strip()), None)
    session: PromptSession[str] = PromptSession(history=_history())

    def read() -> str | None:
        while True:
            try:
                line = session.prompt("> ").strip()
            except EOFError:
                return None
            except KeyboardInterrupt:  # drops what was typed; it may also be late for the answer that it was to stop
                if not session.default_buffer.text:
                    say("Ctrl-D leaves")
                continue
            if line:
                return line

    return read


class _QuietHistory(FileHistory):
    """A history file that may become unwritable, such as on a full disk."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def _history() -> History:
    """What was typed in earlier chats: `llava-fast/history` in XDG_STATE_HOME or ~/.local/state; else in memory."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    file = Path(state) / "llava-fast" / "history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()
    return _QuietHistory(file)

"""The command line: what it prints, what it returns, and that mistakes are one line."""

import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

import llava_fast
from llava_fast import cli
from llava_fast.errors import EXTRAS

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: object) -> int:
    """Run the command line here and return its exit status."""
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    return exit_.value.code or 0


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    return path


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]):
    assert run("--help") == 0
    out = capsys.readouterr().out
    for command in ("demo", "chat", "train", "recipes", "convert", "inspect", "doctor"):
        assert f"\n  {command} " in out


def test_the_console_script_is_installed():
    script = Path(sys.executable).with_name("llava-fast")
    done = subprocess.run([script, "doctor", "--json"], capture_output=True, text=True)
    assert json.loads(done.stdout)["llava_fast"] == llava_fast.__version__
    assert done.returncode == 0, done.stdout


def test_the_version(capsys: pytest.CaptureFixture[str]):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"llava-fast {llava_fast.__version__}\n"


def test_the_help_has_a_whole_line_per_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("--help") == 0
    commands = capsys.readouterr().out.partition("Commands:\n")[2].strip().splitlines()
    assert len(commands) == 7
    assert all(line.endswith(".") and not line.endswith("...") for line in commands)


def test_the_package_is_the_command():
    done = subprocess.run([sys.executable, "-m", "llava_fast", "sing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Usage: llava-fast" in done.stderr


def test_chat_answers_a_question(tiny_checkpoint: Path, picture: Path, capsys: pytest.CaptureFixture[str]):
    from llava_fast.chat import Turn, load, stream

    arguments = ["--prompt", "What is it?", "--max-new-tokens", 8, "--device", "cpu"]
    assert run("chat", tiny_checkpoint, "--image", picture, *arguments) == 0
    out = capsys.readouterr().out
    loaded = load(tiny_checkpoint, device="cpu")
    expected = "".join(stream(*loaded, [Turn("What is it?", (picture,))], do_sample=False, max_new_tokens=8))
    assert expected
    assert out == expected + "\n"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Replaces the model by one that answers `It is 1.`, `It is 2.`, ...; the turns that it is given are recorded: each
    as its question and the number of its images, `first?1`."""
    asked = []

    def answer(_: object, __: object, turns: list, **___: object) -> Iterator[str]:
        asked.append(tuple(f"{turn.question}{len(turn.images)}" for turn in turns))
        if "fail" in turns[-1].question:
            raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB")
        yield from ("It is ", f"{len(asked)}.")

    monkeypatch.setattr("llava_fast.chat.stream", answer)
    return asked


def test_chat_reads_questions_until_there_are_no_more(
    tiny_checkpoint: Path,
    picture: Path,
    asked: list[tuple[str, ...]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("first?\n\n  second?\n"))
    assert run("chat", tiny_checkpoint, "--image", picture, "--device", "cpu") == 0
    assert capsys.readouterr().out == "It is 1.\nIt is 2.\n"
    assert asked == [("first?1",), ("first?1", "second?0")]


def test_chat_goes_on_after_a_bad_turn(
    tiny_checkpoint: Path,
    picture: Path,
    asked: list[tuple[str, ...]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    spaced = picture.with_name("two words.png")
    spaced.write_bytes(picture.read_bytes())
    lines = [
        "first?",
        "fail?",
        "/image no picture's here.png",
        "/image https://host/my cat.png",
        "/image",
        "/sing",
        f"/image\t{spaced}",
        f"/image '{spaced}' {picture}",
        "/usr/bin holds what?",
        "long? " * 3000,
        "/reset",
        "last?",
        "/exit",
        "never?",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert run("chat", tiny_checkpoint, "--device", "cpu") == 2
    assert asked == [
        ("first?0",),
        ("first?0", "fail?0"),
        ("first?0", "/usr/bin holds what?3"),
        ("last?0",),
    ]
    captured = capsys.readouterr()
    assert captured.out == "It is 1.\nIt is 3.\nIt is 4.\n"
    said = [line for line in captured.err.splitlines() if line and "Loading weights" not in line]
    assert said[:8] == [
        "error: CUDA out of memory. Tried to allocate 2 GiB",
        "error: no image file no picture's here.png",
        "error: https://host/my cat.png is not fetched; download it, and give the file",
        "error: which image? /image PATH",
        "error: no command /sing; /help lists them",
        "an image comes with the next question",
        "3 images come with the next question",
        said[7],
    ]
    assert said[7].startswith("error: the question is too long: ")
    assert said[8:] == ["a new conversation, without images"]


def test_an_answer_that_nobody_reads_ends_chat(tiny_checkpoint: Path, asked: list, monkeypatch: pytest.MonkeyPatch):
    def closed(_: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdin", io.StringIO("first?\nsecond?\n"))
    monkeypatch.setattr(sys.stdout, "write", closed)
    assert run("chat", tiny_checkpoint, "--device", "cpu") != 0
    assert asked == [("first?0",)]


def test_out_of_memory_is_one_line(tiny_checkpoint: Path, asked: list, capsys: pytest.CaptureFixture[str]):
    assert run("chat", tiny_checkpoint, "--device", "cpu", "--prompt", "fail?") == 2
    assert capsys.readouterr().err.endswith("\nllava-fast: error: CUDA out of memory. Tried to allocate 2 GiB\n")


def test_debug_stops_chat_at_a_mistake(tiny_checkpoint: Path, asked: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("fail?\nnever?\n"))
    with pytest.raises(ValueError, match="CUDA out of memory"):
        cli.main(["--debug", "chat", str(tiny_checkpoint), "--device", "cpu"])
    assert asked == [("fail?0",)]


def test_ctrl_c_outside_of_a_terminal_ends_chat(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: object, **__: object) -> Iterator[str]:
        yield "It is"
        raise KeyboardInterrupt

    monkeypatch.setattr("llava_fast.chat.stream", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("first?\nsecond?\n"))
    assert run("chat", tiny_checkpoint, "--device", "cpu") == 130
    assert capsys.readouterr().out == "It is\n"
    assert run("chat", tiny_checkpoint, "--device", "cpu", "--prompt", "first?") == 130


def test_every_command_of_the_page(
    tiny_checkpoint: Path, picture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """docs/chat.md; what is asked comes from a pipe."""
    (commands,) = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/chat.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(picture.parent)
    Path("model").symlink_to(tiny_checkpoint)
    Path("other.png").write_bytes(picture.read_bytes())
    answers = []
    for line in commands.splitlines():
        writer, _, command = line.rpartition(" | ")
        typed = subprocess.run(["bash", "-c", writer], capture_output=True, text=True, check=True).stdout
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        program, *arguments = shlex.split(command)
        assert program == "llava-fast"
        assert run(*arguments, "--max-new-tokens", 4) == 0
        answers.append(capsys.readouterr().out.count("\n"))
    assert answers[:2] == [0, 1]
    assert answers[2] >= 2


def test_recipes_are_listed_and_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert run("recipes") == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.partition("\n\n")[0].splitlines())
    in_repository = {
        str(file.relative_to(ROOT / "train").with_suffix(""))
        for file in (ROOT / "train").rglob("*.yaml")
        if not file.name.startswith("demo-")
    }
    assert listed.keys() == in_repository
    assert listed["llava-1.5-7b-stage1"].startswith("LLaVA-1.5-7B, stage 1: ")

    assert run("recipes", "copy", "llava-1.5-7b-stage1", "accelerate/one-gpu") == 0
    assert capsys.readouterr().out == "train/llava-1.5-7b-stage1.yaml\ntrain/accelerate/one-gpu.yaml\n"
    for file in ("train/llava-1.5-7b-stage1.yaml", "train/accelerate/one-gpu.yaml"):
        assert (tmp_path / file).read_text() == (ROOT / file).read_text()

    Path("train/llava-1.5-7b-stage1.yaml").write_text("mine")
    assert run("recipes", "copy", "accelerate/ddp-8gpu", "llava-1.5-7b-stage1") == 2
    assert capsys.readouterr().err == (
        "llava-fast: error: train/llava-1.5-7b-stage1.yaml exists; it is not overwritten\n"
    )
    assert Path("train/llava-1.5-7b-stage1.yaml").read_text() == "mine"
    assert not Path("train/accelerate/ddp-8gpu.yaml").exists()
    assert run("recipes", "copy", "llava-1.5-7b-stage1", "--to", "mine/too") == 0
    assert Path("mine/too/llava-1.5-7b-stage1.yaml").is_file()
    assert run("recipes", "copy", "../train/x") == 2
    assert "no recipe '../train/x'; there are llava-1.5-7b-stage1, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["chat", "MODEL", "--image", "missing.png"], "no image file missing.png"),
        (["chat", "MODEL", "--image", __file__], f"cannot read image {__file__}"),
        (["chat", "MODEL", "--image", "http://host/cat.png"], "http://host/cat.png is not fetched"),
        (["chat", "nowhere"], "no directory nowhere"),
        (["chat", "MODEL", "--base-model", "no"], "--base-model is for adapters, and "),
        (["chat", "MODEL", "--vision-tower", "no"], "--vision-tower: no directory no"),
        (["chat", "MODEL", "--dtype", "int8"], "--dtype 'int8' is not a floating dtype"),
        (["chat", "MODEL", "--device", "warp"], "--device warp is not a device that PyTorch knows"),
        (["chat", "MODEL", "--device", "meta"], "--device meta is not on this machine, or not in its PyTorch: "),
        (["convert", "MODEL", "OUT", "--layout", "torch"], "--layout is 'torch'; expected 'hf' or 'original'"),
        (["convert", "MODEL", "OUT", "--layout", "hf", "--no-tower"], "--no-tower is for --layout original"),
        (["convert", "MODEL", "OUT", "--layout", "hf", "--max-shard-size", "big"], "--max-shard-size is 'big'; "),
        (["convert", "MODEL", "OUT", "--layout", "hf", "--mm-projector", "no.bin"], "--mm-projector: no file no.bin"),
        (["convert", "MODEL", "OUT", "--layout", "hf", "--vision-tower", "no"], "--vision-tower: no directory no"),
        (["convert", "MODEL", "OUT", "--layout", "hf", "--base-model", "no"], "--base-model is for adapters, and "),
    ],
)
def test_mistakes_are_one_line(
    tiny_checkpoint: Path, tmp_path: Path, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
):
    places = {"MODEL": tiny_checkpoint, "OUT": tmp_path / "out"}
    assert run(*[places.get(argument, argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"llava-fast: error: {complaint}")
    assert captured.err.count("\n") == 1


def test_debug_shows_where_it_came_from():
    with pytest.raises(FileNotFoundError, match="no directory nowhere"):
        cli.main(["--debug", "chat", "nowhere"])


def test_wrong_usage_is_explained(capsys: pytest.CaptureFixture[str]):
    assert run("chat") == 2
    assert run("sing") == 2
    assert "sing" in capsys.readouterr().err


def test_every_package_of_the_train_extra_is_known():
    (extra,) = re.findall(r"^train = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    installed_by = metadata.packages_distributions()
    known = {name.lower() for package in EXTRAS for name in installed_by[package]}
    assert known == set(re.findall(r'"([a-z-]+)[><=]', extra))


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def broken(_: Path) -> dict[str, object]:
        raise ModuleNotFoundError("No module named 'peft'", name="peft")

    monkeypatch.setitem(sys.modules, "llava_fast.demo.run", SimpleNamespace(run=broken))
    assert run("demo") == 2
    assert capsys.readouterr().err == (
        "llava-fast: error: peft is not installed; pip install 'llava-fast[train]' brings it\n"
    )


def test_demo_prints_its_summary(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    module = ModuleType("llava_fast.demo.run")
    module.run = lambda out: {"accuracy": 0.95, "accuracy_by_kind": {"colour": 1.0}, "out": str(out)}
    monkeypatch.setitem(sys.modules, "llava_fast.demo.run", module)
    assert run("demo", "--out", "somewhere") == 0
    out = capsys.readouterr().out
    assert "accuracy          0.95\n" in out
    assert 'accuracy_by_kind  {"colour": 1.0}\n' in out
    assert f"report  {Path('somewhere/report.html')}\n" in out


def test_train_hands_everything_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    import llava_fast.train.__main__ as training

    seen = []
    monkeypatch.setattr(training, "main", lambda arguments: seen.append(arguments) or 0)
    assert run("train", "recipe.yaml", "lora.r=64", "--print-config") == 0
    assert seen == [["recipe.yaml", "lora.r=64", "--print-config"]]
    monkeypatch.undo()
    assert run("train", "missing.yaml") == 2
    assert "missing.yaml" in capsys.readouterr().err

"""The command line: what it prints, what it returns, and that mistakes are one line."""

import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

import llava_fast
from llava_fast import cli


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
    for command in ("demo", "chat", "train", "doctor"):
        assert f"\n  {command} " in out


def test_the_console_script_is_installed():
    script = Path(sys.executable).with_name("llava-fast")
    done = subprocess.run([script, "doctor", "--json"], capture_output=True, text=True)
    assert json.loads(done.stdout)["llava_fast"] == llava_fast.__version__
    assert done.returncode == 0, done.stdout


def test_chat_answers_a_question(tiny_checkpoint: Path, picture: Path, capsys: pytest.CaptureFixture[str]):
    from llava_fast.chat import load, stream

    arguments = ["--prompt", "What is it?", "--max-new-tokens", 8, "--device", "cpu"]
    assert run("chat", tiny_checkpoint, "--image", picture, *arguments) == 0
    out = capsys.readouterr().out
    loaded = load(tiny_checkpoint, device="cpu")
    expected = "".join(stream(*loaded, [picture], "What is it?", do_sample=False, max_new_tokens=8))
    assert expected
    assert out == expected + "\n"


def test_chat_reads_questions_until_there_are_no_more(
    tiny_checkpoint: Path, picture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def answer(*arguments: object, turns: list[tuple[str, str]], **_: object) -> list[str]:
        asked.append((arguments[3], list(turns)))
        return ["It is ", f"{len(asked)}."]

    monkeypatch.setattr("llava_fast.chat.stream", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("first?\n\n  second?\n"))
    assert run("chat", tiny_checkpoint, "--image", picture, "--device", "cpu") == 0
    assert capsys.readouterr().out == "It is 1.\nIt is 2.\n"
    assert asked == [("first?", []), ("second?", [("first?", "It is 1.")])]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["chat", "MODEL", "--image", "missing.png"], "no image file missing.png"),
        (["chat", "MODEL", "--image", __file__], f"cannot read image {__file__}"),
        (["chat", "nowhere"], "no directory nowhere"),
        (["chat", "MODEL", "--dtype", "int8"], "dtype 'int8' is not a floating dtype"),
        (["chat", "MODEL", "--device", "warp"], "device 'warp' is not one that PyTorch knows"),
    ],
)
def test_mistakes_are_one_line(
    tiny_checkpoint: Path, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
):
    assert run(*[tiny_checkpoint if argument == "MODEL" else argument for argument in arguments]) == 2
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

"""The command line: llava-fast demo · chat · train · convert · inspect · doctor."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from llava_fast.backend import BackendUnavailable
from llava_fast.errors import missing_extra

app = typer.Typer(
    name="llava-fast",
    help="LLaVA with the same weights, logits and checkpoints, built to be fast.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_debug = False


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    global _debug
    _debug = debug


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the pictures, the model and the report.")] = Path("demo-out"),
) -> None:
    """Train a tiny LLaVA on a built-in picture world and ask it about scenes it has never seen."""
    from llava_fast.demo.run import run

    summary = run(out)
    width = max(map(len, summary))
    for key, value in summary.items():
        shown = json.dumps(value) if isinstance(value, dict | list) else value
        typer.echo(f"{key:<{width}}  {shown}")
    typer.echo(f"\nreport  {out / 'report.html'}\nmodel   {out / 'model'}")


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Directory of the checkpoint, or its id on the Hugging Face hub.")],
    image: Annotated[list[Path] | None, typer.Option(help="Image file; give it again for more images.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Ask this and stop; without it, questions are read line by line.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Talk to a model about images; the answer is printed as it comes."""
    from llava_fast.chat import load, stream
    from llava_fast.processor.processor import read_rgb

    images = [read_rgb(path) for path in image or ()]
    loaded, processor = load(model, device=device, dtype=dtype)
    sampling: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
    if temperature > 0:
        sampling["temperature"] = temperature

    turns: list[tuple[str, str]] = []
    while True:
        question = prompt if prompt is not None else _ask()
        if question is None:
            return
        answer = ""
        for piece in stream(loaded, processor, images, question, turns=turns, **sampling):
            typer.echo(piece, nl=False)
            sys.stdout.flush()
            answer += piece
        typer.echo()
        if prompt is not None:
            return
        turns.append((question, answer.strip()))


def _ask() -> str | None:
    """The next question from the terminal or a pipe; None when there are no more."""
    if sys.stdin.isatty():
        typer.echo("> ", nl=False)
        sys.stdout.flush()
    for line in sys.stdin:
        if line.strip():
            return line.strip()
    return None


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="YAML recipe; key=value after it overrides a key.")],
) -> None:
    """Train by a recipe: the same as `python -m llava_fast.train RECIPE [key=value …]`."""
    from llava_fast.train.__main__ import main as train_main

    raise typer.Exit(train_main([recipe, *context.args]) or 0)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Directory or hub id, in any layout; an adapter is merged.")],
    target: Annotated[Path, typer.Argument(help="New directory.")],
    layout: Annotated[str, typer.Option(help="hf (transformers) or original (the LLaVA code).")],
    vision_tower: Annotated[str | None, typer.Option(help="CLIP directory or hub id to take the tower from.")] = None,
    mm_projector: Annotated[
        str | None, typer.Option(help="Projector of stage 1: .bin or .safetensors, or a hub id.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Base model of an adapter, if not where it says.")] = None,
    tower: Annotated[bool, typer.Option(help="original: put the tower among the weights, or leave it out.")] = True,
    mm_vision_tower: Annotated[str | None, typer.Option(help="original: CLIP that its code shall name.")] = None,
    dtype: Annotated[
        str, typer.Option(help="auto leaves each tensor as it is; or float32, bfloat16, float16.")
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 5GB or 512MB.")] = "5GB",
) -> None:
    """Convert a checkpoint to another layout, in bounded memory; the result is verified before the target appears."""
    from llava_fast import convert as converter

    done = converter.convert(
        source,
        target,
        layout=layout,
        vision_tower=vision_tower,
        mm_projector=mm_projector,
        base_model=base_model,
        with_tower=tower,
        mm_vision_tower=mm_vision_tower,
        dtype=dtype,
        max_shard_size=max_shard_size,
    )
    size = f"{done['bytes'] / 2**20:.1f} MiB in {done['shards']} file{'s' if done['shards'] > 1 else ''}"
    typer.echo(f"{target}: {done['layout']} layout, {done['tensors']} tensors, {size}, verified")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def inspect(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="YAML recipe; key=value after it overrides a key.")],
    samples: Annotated[int, typer.Option(min=0, help="Samples to show token by token.")] = 3,
    problems: Annotated[int, typer.Option(min=0, help="Problems to list; 0 lists all.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what a model will see of a recipe's data, and check every row and image; exit status 1 if any is broken."""
    from rich.console import Console

    from llava_fast.train.inspect import inspect as inspect_recipe
    from llava_fast.train.inspect import show
    from llava_fast.train.recipe import load_recipe

    found = inspect_recipe(load_recipe(recipe, context.args), samples=samples)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        if isinstance(sys.stdout, io.TextIOWrapper):  # the terminal's encoding may lack characters of the data
            sys.stdout.reconfigure(errors="backslashreplace")
        show(found, Console(), problems)
    raise typer.Exit(0 if found.fine else 1)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Report versions, devices and the backend of every operation; exit status 1 if something is broken."""
    from llava_fast.doctor import diagnose, show

    report = diagnose()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        show(report)
    raise typer.Exit(1 if report["problems"] else 0)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit; for a user error (a wrong path, key, value) print one line, exit status 2."""
    global _debug
    _debug = False
    try:
        app(args=arguments, prog_name="llava-fast")
    except ModuleNotFoundError as error:
        hint = missing_extra(error)
        if _debug or not hint:
            raise
        _fail(hint)
    except (ValueError, OSError, BackendUnavailable) as error:
        if _debug:
            raise
        _fail(" ".join(str(error).split()) or type(error).__name__)


def _fail(message: str) -> NoReturn:
    typer.echo(f"llava-fast: error: {message}", err=True)
    raise SystemExit(2)


if __name__ == "__main__":
    main()

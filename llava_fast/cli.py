"""The command line: llava-fast demo · chat · train · recipes · convert · inspect · doctor."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer

import llava_fast
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
# The flags of the command that runs, by Python argument. A command's function and the functions it calls have the same
# names of arguments; errors use these, and `_fail` puts flags in their place. A switch is here as `name=False`, too.
_flags: dict[str, str] = {}


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"llava-fast {llava_fast.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and stop.")
    ] = False,
) -> None:
    global _debug, _flags
    _debug = debug
    command = cast(Any, context.command).commands[context.invoked_subcommand]
    options = [option for option in command.params if option.opts[0].startswith("--")]
    _flags = {f"{option.name}=False": option.secondary_opts[0] for option in options if option.secondary_opts}
    _flags |= {option.name: option.opts[0] for option in options}


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the pictures, the model and the report.")] = Path("demo-out"),
) -> None:
    """Train a tiny LLaVA in minutes, and ask it about new pictures."""
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
    image: Annotated[
        list[str] | None, typer.Option(help="Image file, shown with the first question; repeat it for more images.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Ask this and stop; without it, questions are read line by line.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    vision_tower: Annotated[str | None, typer.Option(help="CLIP directory or hub id to take the tower from.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Base model of an adapter, if not where it says.")] = None,
) -> None:
    """Ask a model about images. Answers are printed as they come; /help lists the commands of the prompt."""
    from llava_fast.chat import Chat, load
    from llava_fast.terminal import answer, converse, open_image, say

    images = [open_image(name) for name in image or ()]
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    try:
        loaded, processor = load(model, device=device, dtype=dtype, vision_tower=vision_tower, base_model=base_model)
        talk = Chat(loaded, processor, say=say, max_new_tokens=max_new_tokens, **sampling)
        talk.images += images
        if prompt is not None:
            answer(talk, prompt)
            return
        status = converse(talk, debug=_debug)
    except RuntimeError as error:  # out of memory
        raise ValueError(str(error)) from error
    raise typer.Exit(status)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="YAML recipe; key=value after it overrides a key.")],
) -> None:
    """Train by a recipe. The same as `python -m llava_fast.train RECIPE [key=value …]`."""
    from llava_fast.train.__main__ import main as train_main

    raise typer.Exit(train_main([recipe, *context.args]) or 0)


recipes = typer.Typer(help="List recipes and accelerate configs of the package, or copy them.")
app.add_typer(recipes, name="recipes", invoke_without_command=True)


@recipes.callback()
def _recipes(context: typer.Context) -> None:
    from llava_fast.train.shipped import shipped

    if context.invoked_subcommand is None:
        known = shipped()
        width = max(map(len, known))
        for name, line in known.items():
            typer.echo(f"{name:<{width}}  {line}")
        typer.echo("\nllava-fast recipes copy NAME …  puts them into train/; their paths are relative to that folder")


@recipes.command()
def copy(
    names: Annotated[list[str], typer.Argument(help="Names from `llava-fast recipes`.", metavar="NAME")],
    to: Annotated[Path, typer.Option(help="Folder; it is created if it does not exist.")] = Path("train"),
) -> None:
    """Copy recipes to a folder, where you can change them; an existing file is not overwritten."""
    from llava_fast.train.shipped import copy as copy_shipped

    for file in copy_shipped(names, to):
        typer.echo(file)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Directory or hub id, in any layout; an adapter is merged.")],
    target: Annotated[Path, typer.Argument(help="New directory.")],
    layout: Annotated[str, typer.Option(help="hf (transformers) or original (the LLaVA code).")],
    vision_tower: Annotated[str | None, typer.Option(help="CLIP directory or hub id to take the tower from.")] = None,
    mm_projector: Annotated[
        str | None, typer.Option(help="Projector of stage 1: .bin or .safetensors, or a hub id.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Base model of an adapter, if it names another.")] = None,
    with_tower: Annotated[
        bool, typer.Option("--tower/--no-tower", help="original: put the tower among the weights, or leave it out.")
    ] = True,
    mm_vision_tower: Annotated[str | None, typer.Option(help="original: CLIP model to name in the config.")] = None,
    dtype: Annotated[
        str, typer.Option(help="auto leaves each tensor as it is; or float32, bfloat16, float16.")
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 5GB or 512MB.")] = "5GB",
) -> None:
    """Convert a checkpoint to another layout. Needs little memory; the result is verified before the target appears."""
    from llava_fast import convert as converter

    done = converter.convert(
        source,
        target,
        layout=layout,
        vision_tower=vision_tower,
        mm_projector=mm_projector,
        base_model=base_model,
        with_tower=with_tower,
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
    """Show what training will see, and check its data. Every row and image is read; exit status 1 if any is broken."""
    from rich.console import Console

    from llava_fast.train.inspect import inspect as inspect_recipe
    from llava_fast.train.inspect import show
    from llava_fast.train.recipe import load_recipe

    found = inspect_recipe(load_recipe(recipe, context.args), samples=samples)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        show(found, Console(), problems)
    raise typer.Exit(0 if found.fine else 1)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Report versions, devices and the backend of every operation. Exit status 1 if something is broken."""
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
    _flags.clear()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # the terminal's encoding may lack characters of the data
            stream.reconfigure(errors="backslashreplace")
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
    """Print the message and exit. `name=value` of a Python argument, or its name as the first word, becomes a flag."""
    for name, flag in _flags.items():
        message = re.sub(rf"^{name}(?=:| '| is | goes )", flag, message)
        message = re.sub(rf"(?<![\w.\-/]){name}=", f"{flag} ", message)
    typer.echo(f"llava-fast: error: {message}", err=True)
    raise SystemExit(2)

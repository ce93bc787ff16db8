"""`python -m llava_fast.train RECIPE.yaml [key=value ...]`: train as a recipe says."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from llava_fast.errors import missing_extra

INTERRUPTED = 130  # the shell's exit status of a program that Ctrl-C has ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; an error is one line on standard error.

    Returns:
        0 on success, or if the run had already finished; 2 for a bad recipe or a missing package; 1 if writing fails;
        130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m llava_fast.train",
        description="Train LLaVA: stage 1 (projector), stage 2 (full or LoRA). "
        "Use torchrun or accelerate launch with -m llava_fast.train for more than one device.",
        epilog="example: python -m llava_fast.train train/llava-1.5-7b-stage1.yaml "
        "data=captions.json image_folder=images learning_rate=5e-4 resume=true",
    )
    parser.add_argument("recipe", help="a YAML recipe; paths in it are relative to the file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace a key, e.g. lora.r=64")
    parser.add_argument("--print-config", action="store_true", help="print the complete recipe and stop")
    options = parser.parse_intermixed_args(arguments)
    try:
        return _train(options)
    except ModuleNotFoundError as error:
        hint = missing_extra(error)
        if not hint:
            raise
        return _failed(hint, 2)
    except KeyboardInterrupt:  # before there is a recipe, whose run would say how to resume
        return INTERRUPTED


def _train(options: argparse.Namespace) -> int:
    from llava_fast.train.recipe import RecipeError, load_recipe

    recipe = None
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        if options.print_config:
            print(recipe.to_yaml(), end="")
            return 0
        recipe.check_files()  # before the slow imports
        from llava_fast.train.checkpoints import AlreadyFinished, CheckpointError
        from llava_fast.train.trainer import run

        try:
            result = run(recipe)
        except AlreadyFinished as finished:
            if _is_first():
                print(finished)
            return 0
        except CheckpointError as error:
            return _failed(str(error), 1)
    except RecipeError as error:
        return _failed(str(error), 2)
    except KeyboardInterrupt:
        if recipe is not None and _is_first():
            print(f"\ninterrupted; {recipe.how_to_resume()}", file=sys.stderr)
        return INTERRUPTED
    if _is_first():
        rate = f"{result['tokens_per_s']:.0f} tokens/s"
        print(f"{result['steps']} steps, {rate}, loss {result['train_loss']:.4f}: {result['output_dir']}")
    return 0


def _is_first() -> bool:
    """Whether this is the only process, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def _failed(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

"""`python -m llava_fast.train RECIPE.yaml [key=value ...]`: train as a recipe says."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from llava_fast.train.recipe import RecipeError, load_recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0 on success, 2 for a bad recipe, 1 if writing fails; the error is one line."""
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
        recipe = load_recipe(options.recipe, options.overrides)
        if options.print_config:
            print(recipe.to_yaml(), end="")
            return 0
        recipe.check_files()  # before the slow imports
        from llava_fast.train.checkpoints import CheckpointError
        from llava_fast.train.trainer import run

        try:
            result = run(recipe)
        except CheckpointError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if os.environ.get("RANK", "0") == "0":
        rate = f"{result['tokens_per_s']:.0f} tokens/s"
        print(f"{result['steps']} steps, {rate}, loss {result['train_loss']:.4f}: {result['output_dir']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes docs/recipes.md, the reference of recipe keys, from the source of `Recipe`: `make docs` runs it.

A key's meaning is the comment behind its line in llava_fast/train/recipe.py, or above it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "llava_fast" / "train" / "recipe.py"
PAGE = ROOT / "docs" / "recipes.md"

INTRO = """\
# Recipe keys

<!-- written by `make docs` from llava_fast/train/recipe.py; edits here are lost -->

A recipe is a YAML file with these keys. On the command line `key=value` after the recipe overrides one of them, and
`lora.r=64` a nested one. Paths in a file are relative to that file, on the command line to the working directory. An
unknown key, a wrong type or a contradiction is an error of one line, before anything is loaded.

The page on [training](training.md) has an example. `python -m llava_fast.train RECIPE --print-config` prints the values
of all keys. A key without a default is off, unless its description says otherwise."""

# The classes that are documented, and the beginnings of their tables.
TABLES = {
    "Recipe": "## All keys",
    "DataSource": "## Files of a mixture\n\nEach element of `data`, if that is a list: [mixtures](data.md#mixtures).",
    "Lora": "## LoRA\n\nKeys of `lora`, an adapter on every linear layer of the language model except `lm_head`.",
}
TYPES = {
    "PathLike": "path",
    "ModelName": "folder or hub id",
    "Text": "text",
    "Whole": "whole number",
    "PositiveWhole": "whole number",
    "Number": "number",
    "PositiveNumber": "number",
    "Flag": "`true` or `false`",
    "_ShareOrFile": "number below 1, or path",
    "DataSource": "[files](#files-of-a-mixture)",
    "Lora": "[keys](#lora)",
}


def type_words(node: ast.expr) -> str:
    """`Annotated[Whole, …] | Text | None` -> `whole number or text`."""
    if isinstance(node, ast.BinOp):
        return " or ".join(filter(None, (type_words(node.left), type_words(node.right))))
    if isinstance(node, ast.Subscript):
        members = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        match ast.unparse(node.value):
            case "Literal":
                return ", ".join(f"`{ast.literal_eval(member)}`" for member in members)
            case "list":
                return f"list of {type_words(members[0])}"
            case _:  # Annotated
                return type_words(members[0])
    return "" if ast.unparse(node) == "None" else TYPES[ast.unparse(node)]


def default_words(node: ast.expr | None) -> str:
    if node is None:
        return "required"
    value = ast.literal_eval(node)
    if value is None:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else ast.get_source_segment(TEXT, node).strip(chr(34))}`"


TEXT = SOURCE.read_text(encoding="utf-8")
LINES = TEXT.splitlines()


def meaning(field: ast.AnnAssign) -> str:
    """The comment on the lines of a field, or the one above it."""
    end = field.end_lineno
    if LINES[field.lineno - 1].endswith("("):  # the value stands in brackets
        end = next(i for i in range(field.lineno, len(LINES)) if LINES[i] == "    )")
    comments = [line.partition("  # ")[2] for line in LINES[field.lineno - 1 : end]]
    if LINES[field.lineno - 2].startswith("    # "):
        comments.insert(0, LINES[field.lineno - 2].strip().removeprefix("# "))
    return " ".join(filter(None, comments)).replace("|", r"\|")


def fields(cls: ast.ClassDef) -> Iterator[ast.AnnAssign]:
    return (node for node in cls.body if isinstance(node, ast.AnnAssign))


def page() -> str:
    """The text of docs/recipes.md."""
    classes = {node.name: node for node in ast.parse(TEXT).body if isinstance(node, ast.ClassDef)}
    parts = [INTRO]
    for name, beginning in TABLES.items():
        rows = ["| key | type | default | |", "|---|---|---|---|"]
        for field in fields(classes[name]):
            words = type_words(field.annotation), default_words(field.value), meaning(field)
            rows.append(f"| `{ast.unparse(field.target)}` | {' | '.join(words)} |")
        parts += [beginning, "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

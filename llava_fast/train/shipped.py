"""The recipes and accelerate configs that are installed with the package: those of `train/` in the repository.

`train/` is linked here as `recipes`, so a wheel contains its files and the repository has one copy of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

RECIPES = Path(__file__).parent / "recipes"


def shipped() -> dict[str, str]:
    """What each file is, by its name without `.yaml`: a recipe, or a config such as `accelerate/one-gpu`.

    The demo's two recipes are not among them; their paths are those of the repository.
    """
    files = [*sorted(RECIPES.glob("*.yaml")), *sorted(RECIPES.glob("accelerate/*.yaml"))]
    return {
        str(file.relative_to(RECIPES).with_suffix("")): file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        for file in files
        if not file.name.startswith("demo-")
    }


def copy(names: Iterable[str], folder: Path) -> list[Path]:
    """Copy files by name to `folder`, all of them or none; returns the new files.

    Raises:
        ValueError: for an unknown name.
        FileExistsError: if one of them is there already.
    """
    known = shipped()
    for name in names:
        if name not in known:
            raise ValueError(f"no recipe {name!r}; there are {', '.join(known)}")
    targets = {name: folder / f"{name}.yaml" for name in names}
    for target in targets.values():
        if target.exists():
            raise FileExistsError(f"{target} exists; it is not overwritten")
    for name, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(RECIPES / f"{name}.yaml", target)
    return list(targets.values())

"""torch.export of a model whose parameters require gradients: programs that compute what the model does, as those of
transformers' model do. (It is exported without a cache, too: a cache is no output that torch.export knows.)"""

from types import ModuleType
from typing import Any

import torch
from torch.export import Dim


def test_programs_compute_the_same(tiny: ModuleType) -> None:
    config = tiny.config({"use_cache": False})
    ours, theirs = tiny.pair(config)
    for rows in ([[9], [5]], [["image", 3], ["image", 1]]):
        inputs = tiny.prompt(tiny.batch(config, rows, side="left"))
        expected = ours(**inputs).logits
        assert expected.requires_grad
        for model in (theirs, ours):
            program = torch.export.export(model, (), inputs, strict=False)
            tiny.assert_near(program.module()(**inputs).logits, expected, what=type(model).__module__)


def test_a_strict_program(tiny: ModuleType) -> None:
    config = tiny.config({"use_cache": False})
    ours, _ = tiny.pair(config)
    inputs = tiny.prompt(tiny.batch(config, [["image", 3], ["image", 1]], side="left"))
    program = torch.export.export(ours, (), inputs, strict=True)
    tiny.assert_near(program.module()(**inputs).logits, ours(**inputs).logits)


def test_a_program_takes_other_batches_and_lengths(tiny: ModuleType) -> None:
    """Also with pictures, where transformers' model is exported for one number of images only."""
    config = tiny.config({"use_cache": False})
    ours, theirs = tiny.pair(config)

    def export(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
        free = {name: {0: Dim.DYNAMIC} for name in inputs}
        for name in ("input_ids", "attention_mask"):
            free[name][1] = Dim.DYNAMIC
        return torch.export.export(model, (), inputs, dynamic_shapes=free, strict=False).module()

    first, other = [["image", 3], [2, "image", 4]], [["image", 9], ["image", 2], [3, "image", 4, "image"]]
    inputs, others = (tiny.prompt(tiny.batch(config, rows, side="left")) for rows in (first, other))
    program = export(ours, inputs)
    for batch in (inputs, others):
        tiny.assert_near(program(**batch).logits, theirs(**batch).logits)

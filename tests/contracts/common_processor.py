"""Our processor in transformers' own processor tests: `ProcessorTesterMixin`, from the tests/ of transformers' sdist.

    PYTHONPATH=. TRANSFORMERS_SDIST=transformers-5.23.0 python -m pytest tests/contracts/common_processor.py

A test that is listed here as failing by intention must fail.
"""

import importlib.util
import os
import sys
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from llava_fast.processor.processor import LlavaProcessor
from llava_fast.processor.templates import TEMPLATES
from tests.processor.made import SKIMAGE, clip, word_tokenizer

BY_INTENTION = {
    "test_tokenizer_decode_defaults": "a processor without patch_size is refused: its image tokens cannot be counted",
    "test_init_arguments_not_in_class_attributes": "a rule of style: pad_to_square is an argument and a property",
}
BY_INTENTION_WITH_UINT8 = {
    **BY_INTENTION,
    "test_subprocessor_defaults_1_images": "expects the image processor's floats",
    "test_subprocessor_defaults_preserved_by_kwargs_0_images": "expects the image processor's floats",
}


def mixin() -> Any:
    """`ProcessorTesterMixin`; the pictures that its module would download are replaced by a local one."""
    fetch = ModuleType("fetch_hub_objects_for_ci")
    fetch.url_to_local_path = lambda url: str(SKIMAGE / "coffee.png")  # type: ignore[attr-defined]
    sys.modules[fetch.__name__] = fetch
    file = Path(os.environ["TRANSFORMERS_SDIST"]) / "tests" / "test_processing_common.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader, file
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module.ProcessorTesterMixin


class Parts:
    """What `ProcessorTesterMixin` builds a processor of."""

    processor_class = LlavaProcessor

    @classmethod
    def _setup_tokenizer(cls) -> Any:
        return word_tokenizer()

    @classmethod
    def _setup_image_processor(cls) -> Any:
        return clip()

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        return {
            "chat_template": TEMPLATES["hf"].chat_template,
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        }


def failing(test: str) -> Any:
    return unittest.expectedFailure(lambda self: getattr(Mixin, test)(self))


def case(name: str, by_intention: dict[str, str]) -> Any:
    return type(name, (Parts, Mixin, unittest.TestCase), {test: failing(test) for test in by_intention})


Mixin = mixin()
TestUint8Pixels = case("TestUint8Pixels", BY_INTENTION_WITH_UINT8)
TestFloatPixels = patch.object(LlavaProcessor, "pixels", "float")(case("TestFloatPixels", BY_INTENTION))

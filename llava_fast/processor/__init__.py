"""The processor: converts images and text to the model's inputs."""

from llava_fast.processor.processor import LlavaProcessor

__all__ = ["LlavaProcessor"]

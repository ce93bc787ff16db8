"""Which rows of a mixture a run uses, the order of samples in an epoch, and how samples become a batch: a pack.

The selection of rows depends only on the sources, their sizes and the seed; see docs/data.md. As in LLaVA-NeXT, counts
are of rows in the file, before any are dropped, and a percentage is rounded up. Unlike in LLaVA-NeXT, the random draw
uses the recipe's seed and keeps the order of the file; the sampler shuffles anyway.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from llava_fast.processor.processor import LlavaProcessor
from llava_fast.sequence import pack
from llava_fast.train.recipe import DataSource
from llava_fast.train.rows import IGNORE

if TYPE_CHECKING:
    from llava_fast.train.data import LlavaDataset


def choose_rows(sources: Sequence[DataSource], sizes: Sequence[int], seed: int) -> list[np.ndarray]:
    """The selected rows of each source: int64 [count] row numbers in the order of its file (`repeat`: pass by pass).

    Args:
        sizes: number of rows in each source's file.
    Raises:
        ValueError: for a source with fewer rows than its `count`.
    """
    counts = _counts(sources, sizes)
    return [
        _choose(source.sampling, size, count, np.random.default_rng([seed, i]))
        for i, (source, size, count) in enumerate(zip(sources, sizes, counts))
    ]


def _counts(sources: Sequence[DataSource], sizes: Sequence[int]) -> list[int]:
    weights = [source.weight for source in sources if source.weight is not None]  # all sources have one, or none
    if weights:
        total = sum(weights)
        wanted = [(size * total / weight, source) for size, weight, source in zip(sizes, weights, sources)]
        once = [rows for rows, source in wanted if source.sampling != "repeat"]
        rows = min(once) if once else max(rows for rows, _ in wanted)
        return [math.floor(rows * weight / total + 1e-9) for weight in weights]
    counts = []
    for source, size in zip(sources, sizes):
        count = _count(source.count, size)
        if source.sampling != "repeat" and count > size:
            raise ValueError(
                f"{source.path}: count {source.count} asks for {count} of {size} rows; sampling: repeat gives rows "
                "more than once"
            )
        counts.append(count)
    return counts


def _count(count: int | str | None, size: int) -> int:
    """The number of rows to select from a file of `size` rows; a percentage is rounded up."""
    if isinstance(count, str):
        return math.ceil(size * Fraction(count.removesuffix("%")) / 100)
    return size if count is None else count


def _choose(sampling: str, size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    if sampling == "last":
        return np.arange(size - count, size)
    if sampling == "first":
        return np.arange(count)
    if size == 0:
        return np.arange(0)
    whole, rest = divmod(count, size)  # whole passes, then some rows drawn at random
    passes = [np.arange(size)] * whole + [np.sort(rng.choice(size, rest, replace=False))]
    return np.concatenate(passes)


class GroupedSampler(Sampler[int]):
    """The order of samples in one epoch; depends only on `seed` and `epoch`.

    As in LLaVA, samples are grouped by optimiser step: with `modality` all samples of a step have images or none has,
    and with `length` the device batches of a step have about equally many tokens. Steps are shuffled; samples that do
    not fill a step of their modality come last, and then `n_filler` indices past the end.
    """

    def __init__(
        self,
        dataset: LlavaDataset,
        group_by: str,
        batch_size: int,
        step_size: int,
        seed: int,
        n_filler: int = 0,
    ) -> None:
        self.lengths = dataset.lengths
        self.kinds = dataset.modality if group_by == "modality" else [None] * len(dataset.lengths)
        self.grouped = group_by != "none"
        self.batch_size = batch_size
        self.step_size = step_size
        self.seed = seed
        self.n_filler = n_filler
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths) + self.n_filler

    def __iter__(self) -> Iterator[int]:
        yield from self._samples()
        yield from range(len(self.lengths), len(self))

    def _samples(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        if not self.grouped:
            yield from shuffled
            return
        by_kind = defaultdict(list)
        for index in shuffled:
            by_kind[self.kinds[index]].append(index)
        steps, rest = [], []
        for indices in by_kind.values():
            whole = len(indices) - len(indices) % self.step_size
            steps += _chunks(indices[:whole], self.step_size)
            rest += indices[whole:]
        steps = [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]
        for step in steps + _chunks(rest, self.step_size):
            yield from self._balanced(step)

    def _balanced(self, step: list[int]) -> list[int]:
        """A step reordered so that consecutive device batches have about equally many tokens."""
        room = [len(chunk) for chunk in _chunks(step, self.batch_size)]
        batches: list[list[int]] = [[] for _ in room]
        lightest = [(0, batch) for batch in range(len(room))]
        for index in sorted(step, key=lambda i: self.lengths[i], reverse=True):
            n_tokens, batch = heapq.heappop(lightest)
            batches[batch].append(index)
            if len(batches[batch]) < room[batch]:
                heapq.heappush(lightest, (n_tokens + self.lengths[index], batch))
        return [index for batch in batches for index in batch]


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


class FilledUp(Dataset):
    """A dataset padded with unlabelled samples, so that all processes have equally many full batches.

    accelerate would repeat samples instead, which would count them twice.
    """

    def __init__(self, dataset: LlavaDataset, multiple: int) -> None:
        self.dataset = dataset
        self.size = -(-len(dataset) // multiple) * multiple

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index < len(self.dataset):
            return self.dataset[index]
        filler = self.dataset[0]
        return {**filler, "labels": torch.full_like(filler["labels"], IGNORE)}


class PackedCollator:
    """Samples of a `LlavaDataset` laid end to end in one row, with key ranges in place of an attention mask.

    Shapes: T tokens, N images of the pack, H and W pixels.

    Args:
        processor: the one the samples were made with.
        bidirectional_images: let the tokens of one image see each other.
    """

    def __init__(self, processor: LlavaProcessor, *, bidirectional_images: bool = False) -> None:
        self.image_token_id = processor.image_token_id
        self.image_tokens = processor.num_image_tokens()
        self.bidirectional_images = bidirectional_images

    def __call__(self, samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
        """Pack samples.

        Returns:
            `input_ids`, `labels`, `position_ids` int64 [1, T]; `key_start`, `key_end` int32 [1, T]; `image_slots`
            int64, indices of the image tokens in the row; `target_rows` int64, indices of the tokens whose next token
            has a label; `sample_lengths`, the tokens of each sample, unless images see themselves; and `pixel_values`
            uint8 [N, H, W, 3] if there are images.
            The first label of each sample is −100: no sample predicts the next one's first token.
        Raises:
            ValueError: if a sample's image tokens do not match its images.
        """
        labels, spans = [], []
        for i, sample in enumerate(samples):
            slots = (sample["input_ids"] == self.image_token_id).nonzero().flatten()
            images = len(sample["pixel_values"])
            if len(slots) != images * self.image_tokens:
                raise ValueError(
                    f"sample {i} has {len(slots)} image tokens where its {images} images need "
                    f"{images * self.image_tokens}"
                )
            spans.append([(int(first), self.image_tokens) for first in slots[:: self.image_tokens]])
            labels.append(sample["labels"].clone())
            labels[-1][0] = IGNORE
        input_ids = torch.cat([sample["input_ids"] for sample in samples])
        ranges = pack(
            [len(sample["input_ids"]) for sample in samples],
            spans,
            bidirectional_images=self.bidirectional_images,
        )
        all_labels = torch.cat(labels)
        batch: dict[str, Any] = {
            "input_ids": input_ids[None],
            "labels": all_labels[None],
            "target_rows": (all_labels[1:] != IGNORE).nonzero().flatten(),
            "position_ids": ranges.position_ids,
            "key_start": ranges.key_start,
            "key_end": ranges.key_end,
            "image_slots": (input_ids == self.image_token_id).nonzero().flatten(),
        }
        if ranges.lengths is not None:
            batch["sample_lengths"] = ranges.lengths
        if any(map(len, spans)):
            batch["pixel_values"] = torch.cat([sample["pixel_values"] for sample in samples])
        return batch

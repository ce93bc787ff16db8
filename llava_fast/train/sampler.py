"""The order of samples in a training epoch, and padding of evaluation data to equal batch counts per process."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch.utils.data import Dataset, Sampler

from llava_fast.train.data import LlavaDataset


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
        return {**filler, "labels": torch.full_like(filler["labels"], -100)}

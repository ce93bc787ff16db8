"""Which rows of which file a run sees: a pure function of the sources, their sizes and the seed.

    data:
      - {path: instruct.json, image_folder: coco}                 # all of it, once
      - {path: vqa.jsonl, sampling: random, count: 10000}         # 10,000 rows drawn without repetition
      - {path: captions.json, sampling: first, count: 10%}        # the first tenth
      - {path: ours.json, sampling: repeat, count: 300%}          # three times over

LLaVA-NeXT's `sampling_strategy: first:10%` is `sampling: first, count: 10%`, `random:1000` is
`sampling: random, count: 1000` and `all` is neither key; `end:N` is `sampling: last, count: N`. As there, counts are
of rows in the file, before any are left out, and a percentage is rounded up. Unlike there the draw follows the
recipe's seed and the order of the file is kept: the sampler shuffles anyway.

With `weight` instead of `count` the sources' numbers of rows are in the proportions of their weights. Only `repeat`
gives a row twice, so the mixture is as large as the sources without it allow; if all repeat, as large as it takes to
see every row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from llava_fast.train.recipe import Source


def choose_rows(sources: Sequence[Source], sizes: Sequence[int], seed: int) -> list[np.ndarray]:
    """The rows each source gives, int64 [count] row numbers in the order of its file (`repeat`: pass by pass).

    Args:
        sizes: rows in each source's file.
    Raises:
        ValueError: for a source that is to give more rows than it has.
    """
    counts = _counts(sources, sizes)
    return [
        _choose(source.sampling, size, count, np.random.default_rng([seed, i]))
        for i, (source, size, count) in enumerate(zip(sources, sizes, counts))
    ]


def _counts(sources: Sequence[Source], sizes: Sequence[int]) -> list[int]:
    if sources[0].weight is not None:
        total = sum(source.weight for source in sources)
        wanted = [(size * total / source.weight, source) for source, size in zip(sources, sizes)]
        once = [rows for rows, source in wanted if source.sampling != "repeat"]
        rows = min(once) if once else max(rows for rows, _ in wanted)
        return [math.floor(rows * source.weight / total + 1e-9) for source in sources]
    counts = []
    for source, size in zip(sources, sizes):
        count = source.rows(size)
        if source.sampling != "repeat" and count > size:
            raise ValueError(
                f"{source.path}: count {source.count} asks for {count} of {size} rows; sampling: repeat gives rows "
                "more than once"
            )
        counts.append(count)
    return counts


def _choose(sampling: str, size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    if sampling == "last":
        return np.arange(size - count, size)
    if sampling == "first":
        return np.arange(count)
    if size == 0:
        return np.arange(0)
    whole, rest = divmod(count, size)  # whole passes and, for `random` as for a last pass, some rows drawn
    passes = [np.arange(size)] * whole + [np.sort(rng.choice(size, rest, replace=False))]
    return np.concatenate(passes)

"""`llava-fast inspect RECIPE`: shows samples as the model sees them, and lists every broken row and image.

Rows are read and tokenised as in training; then every image file is decoded and resized once, with one thread per core
(decoders and resizing release the GIL). Nothing is written, and no weights are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text
from tqdm import tqdm

from llava_fast.errors import one_line
from llava_fast.train.data import Embedded, LlavaDataset
from llava_fast.train.memory import Prediction, predict, read_config
from llava_fast.train.recipe import Recipe
from llava_fast.train.rows import ERRORS, IGNORE, NoRows, Problem
from llava_fast.train.trainer import GroupedSampler, load_data, load_processor

_SUPERVISION_SAMPLES = 1000  # samples from which the share of supervised tokens is computed
_SHOWN_TOKENS = 600  # of one sample
_BINS = 8
_STYLES = {"supervised": "bold green", "context": "dim", "image": "cyan"}


@dataclass(frozen=True)
class SourceShare:
    """The samples of an epoch that come from one data file; those with unreadable images are included."""

    path: str
    rows: int  # distinct ones
    samples: int
    with_images: int
    tokens: int


@dataclass(frozen=True)
class SampleView:
    """A sample as the model sees it.

    Attributes:
        runs: (kind, token texts) in order; kind is "context" (not supervised) or "supervised", or "image" with one
            text, the file name and its number of tokens.
    """

    where: str
    tokens: int
    supervised: int
    runs: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        problems: every dropped row and every row with an unreadable image, in training and validation data.
        memory: the prediction of `memory.py`, or one line why there is none.
        sources: one per data file of the recipe.
        samples: a few samples, token by token.
        validation_samples: number of samples that are held out, or in the validation file.
        images: number of images checked, each file once.
        lengths: tokens of each training sample, ascending; empty if no row can be used.
        truncated: number of training samples truncated to max_length.
        supervised_share: share of supervised tokens, in up to 1000 evenly spaced samples.
        image_share: share of image tokens in all tokens.
        packs: tokens of each device batch of the first epoch, in order.
        padded_share: share of padding if these batches were padded to their longest sample; packs have none.
    """

    problems: list[Problem]
    memory: Prediction | str
    sources: list[SourceShare] = field(default_factory=list)
    samples: list[SampleView] = field(default_factory=list)
    validation_samples: int = 0
    images: int = 0
    lengths: list[int] = field(default_factory=list)
    truncated: int = 0
    supervised_share: float = 0.0
    image_share: float = 0.0
    packs: list[int] = field(default_factory=list)
    padded_share: float = 0.0

    @property
    def fine(self) -> bool:
        """Whether training can start and no row is broken."""
        return not self.broken and bool(self.lengths)

    @property
    def broken(self) -> list[Problem]:
        """The problems that are errors in the data, without rows that are only too long or have no answer."""
        return [problem for problem in self.problems if problem.reason in ERRORS]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; the long lists as statistics."""
        memory = self.memory if isinstance(self.memory, str) else {**asdict(self.memory), "total": self.memory.total}
        return {
            "sources": [asdict(source) for source in self.sources],
            "samples": [asdict(sample) for sample in self.samples],
            "validation_samples": self.validation_samples,
            "images": self.images,
            "problems": [{**asdict(problem), "path": str(problem.path)} for problem in self.problems],
            "broken": len(self.broken),
            "lengths": statistics(self.lengths),
            "truncated": self.truncated,
            "supervised_share": self.supervised_share,
            "image_share": self.image_share,
            "packs": {"count": len(self.packs), **statistics(self.packs)},
            "padded_share": self.padded_share,
            "memory": memory,
        }


def statistics(values: Sequence[int]) -> dict[str, float]:
    """Minimum, mean, median, 95th percentile and maximum; an empty dict without values."""
    if not len(values):
        return {}
    array = np.asarray(values)
    quantiles = {"median": 0.5, "p95": 0.95}
    middle = {name: float(np.quantile(array, share)) for name, share in quantiles.items()}
    return {"min": int(array.min()), "mean": float(array.mean()), **middle, "max": int(array.max())}


def inspect(recipe: Recipe, *, samples: int = 3, threads: int | None = None) -> Inspection:
    """Read all data of a recipe as training would, and check every image.

    Args:
        samples: how many samples to show, evenly spaced.
        threads: number of threads that read images; default: one per core.
    Raises:
        RecipeError: a missing file or folder.
        ValueError: for data that cannot be read at all.
    """
    recipe.check_inputs()
    recipe = replace(recipe, on_error="skip", max_errors=None)
    processor = load_processor(recipe)
    try:
        train, validation = load_data(recipe, processor)
    except NoRows as error:
        return Inspection(problems=error.problems, memory=str(error))
    datasets = [train] if validation is None else [train, validation]
    problems = list(train.problems)
    if validation is not None and validation.sources is not train.sources:
        problems += validation.problems
    unreadable, n_images = check_images(datasets, threads or os.cpu_count() or 1)

    packs = list(_packs(recipe, train))
    padded = sum(len(pack) * max(pack) for pack in packs)
    n_tokens = sum(train.lengths)
    return Inspection(
        sources=_shares(train),
        samples=[_view(train, i) for i in _spread(len(train), samples)],
        validation_samples=0 if validation is None else len(validation),
        images=n_images,
        problems=sorted(problems + unreadable, key=lambda problem: (str(problem.path), problem.row)),
        lengths=sorted(train.lengths),
        truncated=train.report.truncated,
        supervised_share=_supervised_share(train),
        image_share=sum(train.n_images) * processor.num_image_tokens() / n_tokens,
        packs=[sum(pack) for pack in packs],
        padded_share=1 - n_tokens / padded,
        memory=_memory(recipe, max(map(sum, packs))),
    )


def check_images(datasets: Sequence[LlavaDataset], threads: int) -> tuple[list[Problem], int]:
    """Decode and resize every image once; returns the rows with unreadable images, and the number of images."""
    users: dict[str | Embedded, list[tuple[LlavaDataset, int, int]]] = {}
    for dataset in datasets:
        first = {dataset.place(i): i for i in range(len(dataset) - 1, -1, -1)}  # a repeated row is one row
        for _, i in sorted(first.items()):  # in the order of the files, in which tables are read
            images = dataset.images(i) if dataset.n_images[i] else []
            for image in dict.fromkeys(images):
                users.setdefault(image, []).append((dataset, i, images.index(image)))

    def failure(image: str | Embedded) -> str | None:
        dataset, i, k = users[image][0]
        try:
            dataset.pixels(i, k)
        except (OSError, ValueError) as error:
            return one_line(error, 500)
        return None

    problems = []
    with ThreadPoolExecutor(threads) as pool:
        bar = tqdm(users.items(), "Checking images", unit=" images", disable=None)
        for (_, rows), words in zip(bar, _map(pool, failure, users)):
            if words is not None:
                problems += [dataset.unreadable(i, words) for dataset, i, _ in rows]
    return problems, len(users)


def _map(pool: ThreadPoolExecutor, function: Any, items: Any, ahead: int = 4096) -> Iterator[Any]:
    """`pool.map`, in order, with at most `ahead` tasks queued."""
    items = list(items)
    for start in range(0, len(items), ahead):
        yield from pool.map(function, items[start : start + ahead])


def _shares(dataset: LlavaDataset) -> list[SourceShare]:
    shares = []
    places = np.array([dataset.place(i) for i in range(len(dataset))])
    lengths, n_images = np.array(dataset.lengths), np.array(dataset.n_images)
    for k, source in enumerate(dataset.sources):
        mine = places[:, 0] == k
        shares.append(
            SourceShare(
                path=str(source.path),
                rows=len(np.unique(places[mine, 1])),
                samples=int(mine.sum()),
                with_images=int((n_images[mine] > 0).sum()),
                tokens=int(lengths[mine].sum()),
            )
        )
    return shares


def _packs(recipe: Recipe, dataset: LlavaDataset) -> Iterator[list[int]]:
    """The lengths of the samples in each device batch of the first epoch, on one device."""
    size = recipe.per_device_batch_size
    order = list(GroupedSampler(dataset, recipe.group_by, size, recipe.global_batch_size, recipe.seed))
    for start in range(0, len(order), size):
        yield [dataset.lengths[i] for i in order[start : start + size]]


def _spread(n: int, count: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, n - 1, min(count, n))})


def _supervised_share(dataset: LlavaDataset) -> float:
    labels = [label for i in _spread(len(dataset), _SUPERVISION_SAMPLES) for label in dataset.tokens(i)[1]]
    return sum(label != IGNORE for label in labels) / len(labels)


def _view(dataset: LlavaDataset, index: int) -> SampleView:
    ids, labels = dataset.tokens(index)
    names = dataset.processor.tokenizer.convert_ids_to_tokens(ids)
    images, size = iter(dataset.images(index)), dataset.processor.num_image_tokens()
    runs: list[tuple[str, list[str]]] = []
    at = 0
    while at < len(ids):
        if ids[at] == dataset.processor.image_token_id:
            runs.append(("image", [f"{os.path.basename(str(next(images)))}: {size} tokens"]))
            at += size
            continue
        kind = "context" if labels[at] == IGNORE else "supervised"
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(names[at])
        at += 1
    where = dataset.unreadable(index, "").where
    return SampleView(where, len(ids), sum(label != IGNORE for label in labels), runs)


def _memory(recipe: Recipe, pack_tokens: int) -> Prediction | str:
    try:
        return predict(recipe, read_config(recipe), pack_tokens)
    except (OSError, ValueError) as error:
        return one_line(error, 500)


# Printing


def show(inspection: Inspection, console: Console, limit: int = 50) -> None:
    """Print an inspection; the output is also readable without colours, on a narrow terminal or in a file.

    Args:
        limit: at most so many problems are listed, the rest is counted; 0 lists all.
    """
    for sample in inspection.samples:
        _show_sample(sample, console)
    if inspection.lengths:
        _show_sources(inspection, console)
        _show_lengths(inspection, console)
    _show_memory(inspection.memory, console)
    _show_problems(inspection, console, limit)


def _say(console: Console, text: str | Text) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _show_sample(sample: SampleView, console: Console) -> None:
    colour = console.color_system is not None and not console.no_color
    _say(console, f"{sample.where}: {sample.tokens} tokens, {sample.supervised} of them supervised")
    line, room = Text(), _SHOWN_TOKENS
    for kind, names in sample.runs:
        if kind == "image":
            line.append(f"[{one_line(names[0])}] ", _STYLES[kind])
            continue
        shown = " ".join(one_line(name, 80) for name in names[:room])
        bracketed = kind == "supervised" and not colour
        line.append(f"»{shown}« " if bracketed else f"{shown} ", _STYLES[kind])
        room -= len(names)
        if room <= 0:
            line.append("…")
            break
    _say(console, line)
    _say(console, "")


def _show_sources(inspection: Inspection, console: Console) -> None:
    samples = sum(source.samples for source in inspection.sources)
    tokens = sum(source.tokens for source in inspection.sources)
    _say(console, "     rows   samples  with images  of samples  of tokens  file")
    for source in inspection.sources:
        counts = f"{source.rows:>9} {source.samples:>9} {source.with_images:>12}"
        shares = f"{source.samples / samples:>11.1%} {source.tokens / tokens:>10.1%}"
        _say(console, f"{counts} {shares}  {one_line(source.path)}")
    if inspection.validation_samples:
        _say(console, f"validation: {inspection.validation_samples} samples")
    _say(console, "")


def _show_lengths(inspection: Inspection, console: Console) -> None:
    lengths, packs = statistics(inspection.lengths), statistics(inspection.packs)
    _say(
        console,
        f"lengths: {lengths['min']} to {lengths['max']} tokens, median {lengths['median']:.0f}, "
        f"95 % up to {lengths['p95']:.0f}; {inspection.truncated} samples are cut at max_length",
    )
    counts, edges = np.histogram(inspection.lengths, bins=_BINS, range=(0, lengths["max"] + 1))
    for count, start, stop in zip(counts, edges, edges[1:]):
        bar = "#" * int(np.ceil(20 * count / counts.max()))
        _say(console, f"  {int(np.ceil(start)):>6} to {int(np.ceil(stop)) - 1:<6} {count:>8} {bar}".rstrip())
    _say(
        console,
        f"tokens: {inspection.image_share:.1%} stand for images, {inspection.supervised_share:.1%} are supervised",
    )
    _say(
        console,
        f"packs: {len(inspection.packs)} of {packs['min']} to {packs['max']} tokens, mean {packs['mean']:.0f}; no "
        f"padding (in padded batches {inspection.padded_share:.1%} of the tokens would be padding)",
    )


def _show_memory(memory: Prediction | str, console: Console) -> None:
    if isinstance(memory, str):
        _say(console, f"memory: not predicted, {memory}")
        return
    gb = {name: _bytes(value) for name, value in {**asdict(memory), "total": memory.total}.items()}
    _say(
        console,
        f"memory: predicted by a formula, not measured: at least {gb['total']} on a GPU that holds the whole model: "
        f"frozen weights {gb['frozen_weights']}, trained weights with gradients and optimiser state "
        f"{gb['trained_state']}, activations of the largest pack {gb['activations']}",
    )


def _bytes(n: int) -> str:
    return f"{n / 1e9:.4g} GB" if n >= 1e9 else f"{n / 1e6:.3g} MB"


def _show_problems(inspection: Inspection, console: Console, limit: int) -> None:
    broken, n_left_out = inspection.broken, len(inspection.problems) - len(inspection.broken)
    _say(console, "")
    for problem in inspection.problems[: limit or None]:
        _say(console, f"{problem.reason}: {problem}")
    if limit and len(inspection.problems) > limit:
        _say(console, f"… and {len(inspection.problems) - limit} more")
    _say(
        console,
        f"{len(broken)} broken rows, {n_left_out} rows left out as too long or without an answer, "
        f"{inspection.images} images read",
    )

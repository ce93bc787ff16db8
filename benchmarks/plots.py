"""Charts of stored results as SVG, in the look of the demo's report: bars, or lines where an operation has many sizes.

A chart is a light card with its own background, so it is legible on light and dark pages.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import names
from benchmarks.harness import OURS

Record = dict[str, Any]

INK, SOFT, LINE, CARD, BLUE, LIGHT_BLUE, GREY = "#1d2430 #667085 #e4e7ec #ffffff #2f5bd8 #84a5ff #c3cad6".split()
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
MANY = 4  # sizes along one dimension from which on they are an axis, not groups of bars
COLOURS = {"text.color": INK, "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelcolor": SOFT}
COLOUR_OF = {"reference": BLUE, "triton": BLUE, "cuda": LIGHT_BLUE}  # the others' bars are grey
PEERS = ["#667085", "#d9822b", "#12805c", "#b0487f", "#8a6fd1", "#1d2430"]  # their lines


@dataclass(frozen=True)
class Panel:
    """One quantity of the records.

    Attributes:
        show: a value as text.
        compare: `compare(ours, theirs)` says what our value is next to that of transformers.
        room: pixels that this takes beside a bar.
    """

    field: str
    title: str
    show: Callable[[float], str]
    compare: Callable[[float, float], str] | None = None
    room: int = 0


@dataclass(frozen=True)
class Group:
    """The records of one case, and what it is called."""

    title: str
    records: Sequence[Record]


def digits(value: float) -> str:
    """Three significant digits, never with an exponent: `0.0123`, `1.20`, `45.6`, `2048`."""
    decimals = 2 - math.floor(math.log10(value)) if value else 0
    return f"{value:.{max(0, decimals)}f}"


def duration(ms: float) -> str:
    """`12.3 µs`, `45.6 ms` or `1.7 s`."""
    if ms < 1:
        return f"{digits(1e3 * ms)} µs"
    return f"{digits(ms)} ms" if ms < 1e3 else f"{digits(ms / 1e3)} s"


def size(mib: float) -> str:
    return f"{digits(mib)} MiB" if mib < 1024 else f"{digits(mib / 1024)} GiB"


def faster(ours: float, theirs: float) -> str:
    """`1.7× faster`, `1.2× slower` or `as fast`."""
    ratio, word = (theirs / ours, "faster") if ours <= theirs else (ours / theirs, "slower")
    return "as fast" if round(ratio, 1) == 1 else f"{ratio:.1f}× {word}"


def share(ours: float, theirs: float) -> str:
    percent = round(100 * ours / theirs)
    return "as much" if percent == 100 else f"{percent} % of the memory"


PANELS = (
    Panel("ms_median", "Time", duration, faster, 95),
    Panel("peak_mib", "Peak memory", size, share, 165),
    Panel("pct_of_floor", "% of floor", lambda value: f"{value:.0f} %"),
)


def panels_of(records: Sequence[Record]) -> list[Panel]:
    return [panel for panel in PANELS if any(r[panel.field] is not None for r in records)]


def ordered(records: Sequence[Record]) -> list[str]:
    """The providers: ours first, each part by time."""
    best = {}
    for record in sorted(records, key=lambda r: r["ms_median"]):
        best.setdefault(record["provider"], record)
    return sorted(best, key=lambda name: name not in OURS)


@contextmanager
def _card(path: Path, width: float, height: float, title: str, subtitle: str) -> Iterator[Any]:
    """Axes in pixels from the upper left corner, on a card with these titles; written to `path` at the end."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import patches, pyplot

    with matplotlib.rc_context({"svg.hashsalt": "llava-fast", "svg.fonttype": "none", "font.size": 13, **COLOURS}):
        figure = pyplot.figure(figsize=(width / 72, height / 72), facecolor="none")
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        round_ = "round,pad=0,rounding_size=12"
        axes.add_patch(patches.FancyBboxPatch((1, 1), width - 2, height - 2, boxstyle=round_, fc=CARD, ec=LINE))
        axes.text(20, 24, title, weight="bold", size=16, va="center")
        axes.text(20, 47, subtitle, color=SOFT, va="center")
        yield axes
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    text = re.sub(r"font-family: [^;\"]+", f"font-family: {FONT}", path.read_text(encoding="utf-8"))
    path.write_text(re.sub(r'="(\d+)pt"', r'="\1"', text), encoding="utf-8")


def bars(path: Path, title: str, subtitle: str, groups: Sequence[Group]) -> None:
    """A bar per provider; of ours also what time and memory are next to transformers'."""
    records = [record for group in groups for record in group.records]
    panels = panels_of(records)
    column, left, top, pitch = 335, 160, 92, 30
    width = left + column * len(panels) + 10
    height = top + sum(pitch * (1 + len(group.records)) + 14 for group in groups)
    scales = {}  # pixels of a bar per unit
    for panel in panels:
        rooms = [(r[panel.field], 75 + panel.room * (r["provider"] in OURS)) for r in records if r[panel.field]]
        scales[panel] = min((column - room) / value for value, room in rooms)
    with _card(path, width, height, title, subtitle) as axes:
        for i, panel in enumerate(panels):
            axes.text(left + i * column, top - 18, panel.title, color=SOFT, va="center")
        y = top
        for group in groups:
            axes.text(20, y + 8, group.title, weight="bold", va="center")
            theirs = next((r for r in group.records if r["provider"] == "hf"), None)
            for provider in ordered(group.records):
                y += pitch
                record = next(r for r in group.records if r["provider"] == provider)
                ours = provider in OURS
                label = "\n".join(textwrap.wrap(names.provider(provider), 20))
                axes.text(left - 12, y + 6, label, ha="right", va="center", size=12, color=INK if ours else SOFT)
                for i, panel in enumerate(panels):
                    if record[panel.field] is None:
                        continue
                    length = max(2, scales[panel] * record[panel.field])
                    x = left + i * column
                    axes.barh(y + 6, length, 18, left=x, color=COLOUR_OF.get(provider, GREY))
                    text = axes.text(x + length + 8, y + 6, panel.show(record[panel.field]), va="center")
                    if ours and theirs and panel.compare:
                        said = panel.compare(record[panel.field], theirs[panel.field])
                        place = {"xycoords": text, "xytext": (8, 0), "textcoords": "offset pixels"}
                        axes.annotate(said, (1, 0.5), **place, va="center", color=BLUE, weight="bold")
            y += pitch + 14


def lines(path: Path, title: str, subtitle: str, groups: Sequence[Group]) -> None:
    """A line per provider over the sizes, in their order; time and memory on logarithmic axes."""
    from matplotlib import ticker

    records = [record for group in groups for record in group.records]
    panels = panels_of(records)
    width, top, panel_width = 840, 92, 820 / len(panels)
    height = top + 300 + 22 * len(groups)
    with _card(path, width, height, title, subtitle) as card:
        for i, panel in enumerate(panels):
            x0, x1 = 10 + i * panel_width + 52, 10 + (i + 1) * panel_width - 14
            axes = card.figure.add_axes((x0 / width, 1 - (top + 250) / height, (x1 - x0) / width, 240 / height))
            axes.set_facecolor("none")
            axes.set_prop_cycle(color=PEERS)
            for provider in ordered(records):
                points = [
                    (j + 1, r) for j, group in enumerate(groups) for r in group.records if r["provider"] == provider
                ]
                xs, ys = zip(*((j, r[panel.field]) for j, r in points if r[panel.field] is not None))
                strong = {"linewidth": 2.4, "zorder": 3} if provider in OURS else {"linewidth": 1.4}
                colour = COLOUR_OF.get(provider)
                axes.plot(xs, ys, marker="o", markersize=4, label=names.provider(provider), color=colour, **strong)
            if panel.compare:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_minor_locator(ticker.NullLocator())
            axes.yaxis.set_major_formatter(lambda value, _, show=panel.show: show(value))
            axes.set_xticks(range(1, len(groups) + 1))
            axes.set_title(panel.title, color=SOFT, size=13, loc="left")
            axes.tick_params(which="both", labelsize=10, length=0)
            axes.grid(color=LINE)
            axes.spines[:].set_visible(False)
        axes.legend(frameon=False, fontsize=11)
        for j, group in enumerate(groups):
            card.text(30, top + 290 + 22 * j, f"{j + 1}   {group.title}", size=12, color=SOFT, va="center")


def chart(path: Path, title: str, subtitle: str, groups: Sequence[Group]) -> None:
    """Bars, or lines where there are many sizes along one dimension."""
    dimensions = zip(*(group.records[0]["shape"].split("x") for group in groups))
    one_varies = sum(len(set(sizes)) > 1 for sizes in dimensions) == 1
    (lines if len(groups) >= MANY and one_varies else bars)(path, title, subtitle, groups)

"""report.html: one self-contained page with pictures, answers and loss curves, from the template of the same name."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llava_fast.demo.world import Question

Chat = tuple[Path, list[tuple[str, str, str]]]  # the picture, and (question, the model's answer, right answer)


@dataclass(frozen=True)
class Exam:
    """A question about a held-out picture, and the model's answers with the picture and with a grey one."""

    picture: Path
    question: Question
    answer: str
    answer_blanked: str


def write_report(
    out: Path,
    summary: Mapping[str, Any],
    exams: Sequence[Exam],
    chats: Sequence[Chat],
    histories: Mapping[str, Sequence[Mapping[str, float]]],
) -> None:
    """Write `out/report.html`.

    Args:
        summary: the result of `run`.
        histories: the Trainer's log of each stage, by the stage's name.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"percent": _percent, "data_uri": _data_uri}
    page = templates.get_template("report.html").render(
        numbers=[
            (
                _percent(summary["accuracy"]),
                f"right, of {summary['held_out']} questions on {summary['held_out_scenes']} unseen scenes",
            ),
            (_percent(summary["accuracy_blanked"]), "right when the pictures are blanked"),
            (f"{summary['seconds']:.0f} s", "for everything, from drawing to this report"),
            (f"{summary['tokens_per_s']:,}", "tokens per second in training"),
            (f"{summary['peak_mib']:,} MiB", f"peak memory · {summary['device']}"),
        ],
        kinds=[
            (kind, share, next(exam.question.text for exam in exams if exam.question.kind == kind))
            for kind, share in summary["accuracy_by_kind"].items()
        ],
        curves=list(_curves(histories)),
        chats=chats,
        shots=_shots(exams),
    )
    (out / "report.html").write_text(page, encoding="utf-8")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _data_uri(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def _curves(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> Iterator[dict[str, Any]]:
    """The training loss of each stage over the steps, in pixel coordinates of the template's 480 × 220 drawing."""
    for stage, history in histories.items():
        losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        if len(losses) < 2:
            continue
        last_step, top_loss = losses[-1][0], max(loss for _, loss in losses)
        points = [(40 + 430 * step / last_step, 10 + 184 * (1 - loss / top_loss)) for step, loss in losses]
        yield {
            "stage": stage,
            "last": losses[-1][1],
            "points": " ".join(f"{x:.1f},{y:.1f}" for x, y in points),
            "lines": [(194, "0"), (102, f"{top_loss / 2:.2g}"), (10, f"{top_loss:.2g}")],
            "ticks": [(40, "start", "0"), (255, "middle", f"{last_step / 2:.0f}"), (470, "end", f"{last_step:.0f}")],
        }


def _shots(exams: Sequence[Exam], count: int = 24) -> list[Exam]:
    """A random choice of exam questions, at most one per picture."""
    by_picture = {exam.picture: exam for exam in random.Random(0).sample(list(exams), len(exams))}
    return list(by_picture.values())[:count]

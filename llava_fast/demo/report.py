"""report.html: one self-contained page with pictures, answers and loss curves."""

from __future__ import annotations

import base64
import html
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_fast.demo.run import Exam

Chat = tuple[Path, list[tuple[str, str, str]]]  # the picture, and (question, said, right answer)

_STYLE = """
:root { --ink: #1d2430; --soft: #667085; --line: #e4e7ec; --paper: #f7f8fa; --card: #fff; --blue: #2f5bd8;
        --good: #12805c; --bad: #c0362c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaf0; --soft: #98a2b3; --line: #2c3442; --paper: #12161d;
        --card: #1a202a; --blue: #84a5ff; --good: #4cc38a; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; margin: 0 0 4px; letter-spacing: -.02em; }
h2 { font-size: 19px; margin: 44px 0 12px; }
p { max-width: 72ch; margin: 0 0 10px; }
.soft { color: var(--soft); }
.row { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px; }
.number { font-size: 27px; font-weight: 650; letter-spacing: -.02em; }
.bar { display: grid; grid-template-columns: 90px 1fr 72px; gap: 12px; align-items: center; margin: 7px 0; }
.track { background: var(--line); border-radius: 6px; height: 12px; overflow: hidden; position: relative; }
.fill { background: var(--blue); height: 100%; }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(235px, 1fr)); }
.shot { padding: 0; overflow: hidden; }
.shot img { width: 100%; display: block; aspect-ratio: 1; border-bottom: 1px solid var(--line); }
.shot div { padding: 10px 14px 12px; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.chat { display: grid; grid-template-columns: 190px 1fr; gap: 22px; margin-bottom: 14px; align-items: start; }
.chat img { width: 100%; border-radius: 8px; display: block; }
.asked, .told { border-radius: 12px; padding: 6px 12px; margin: 0 0 6px; width: fit-content; }
.asked { background: var(--paper); border: 1px solid var(--line); }
.told { background: var(--blue); color: var(--card); margin-left: 32px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
@media (max-width: 560px) { .chat { grid-template-columns: 1fr; } .chat img { max-width: 220px; } }
"""


def write_report(
    out: Path,
    summary: Mapping[str, Any],
    exams: Sequence[Exam],
    chats: Sequence[Chat],
    histories: Mapping[str, Sequence[Mapping[str, float]]],
) -> None:
    """Write `out/report.html`.

    Args:
        summary: what `run` returns.
        histories: the Trainer's log of each stage, by the stage's name.
    """
    parts = [
        "<h1>The llava-fast demo</h1>",
        "<p class=soft>A tiny LLaVA, trained on drawn pictures by the two stages of LLaVA-1.5, examined on scenes that "
        "appear nowhere in its training.</p>",
        _numbers(summary),
        "<h2>By kind of question</h2>",
        _kinds(summary, exams),
        "<h2>Training</h2>",
        "<div class=row style='grid-template-columns: repeat(auto-fit, minmax(340px, 1fr))'>",
        *(_curve(stage, history) for stage, history in histories.items()),
        "</div>",
        "<h2>A chat about unseen pictures</h2>",
        *(_chat(chat) for chat in chats),
        "<h2>From the exam</h2>",
        "<p class=soft>One picture each, drawn at random; below the answer is what the same model says when the "
        "picture is replaced by plain grey.</p>",
        _shots(exams),
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>llava-fast demo</title><style>{_STYLE}</style><main>{''.join(parts)}</main></html>\n"
    )
    (out / "report.html").write_text(page, encoding="utf-8")


def _numbers(summary: Mapping[str, Any]) -> str:
    cells = (
        (
            _percent(summary["accuracy"]),
            f"right, of {summary['held_out']} questions on {summary['held_out_scenes']} unseen scenes",
        ),
        (_percent(summary["accuracy_blanked"]), "right when the pictures are blanked"),
        (f"{summary['seconds']:.0f} s", "for everything, from drawing to this report"),
        (f"{summary['tokens_per_s']:,}", "tokens per second in training"),
        (f"{summary['peak_mib']:,} MiB", f"peak memory · {summary['device']}"),
    )
    cards = (
        f"<div class=card><div class=number>{html.escape(number)}</div><div class=soft>{html.escape(text)}</div></div>"
        for number, text in cells
    )
    return f"<div class=row style='margin-top: 22px'>{''.join(cards)}</div>"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _kinds(summary: Mapping[str, Any], exams: Sequence[Exam]) -> str:
    rows = []
    for kind, share in summary["accuracy_by_kind"].items():
        example = next(e.question.text for e in exams if e.question.kind == kind)
        rows.append(
            f"<div class=bar title='{html.escape(example, quote=True)}'><div>{kind}</div>"
            f"<div class=track><div class=fill style='width: {100 * share:.1f}%'></div></div>"
            f"<div>{_percent(share)}</div></div>"
            f"<div class=soft style='margin: -6px 0 10px 102px'>{html.escape(example)}</div>"
        )
    return f"<div class=card>{''.join(rows)}</div>"


def _curve(stage: str, history: Sequence[Mapping[str, float]]) -> str:
    """The training loss over the steps, as an inline SVG."""
    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if len(points) < 2:
        return ""
    width, height, left, bottom, top, right = 480, 220, 40, 26, 10, 10
    steps, top_loss = points[-1][0], max(loss for _, loss in points)

    def x(step: float) -> float:
        return left + (width - left - right) * step / steps

    def y(loss: float) -> float:
        return top + (height - top - bottom) * (1 - loss / top_loss)

    grid = "".join(
        f"<line x1={left} x2={width - right} y1={y(v):.1f} y2={y(v):.1f} stroke='var(--line)'/>"
        f"<text x={left - 6} y={y(v) + 4:.1f} text-anchor=end>{v:.2g}</text>"
        for v in (0, top_loss / 2, top_loss)
    )
    ticks = "".join(
        f"<text x={x(step):.1f} y={height - 8} text-anchor={anchor}>{step:.0f}</text>"
        for step, anchor in ((0, "start"), (steps / 2, "middle"), (steps, "end"))
    )
    path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
    return (
        f"<div class=card><b>{html.escape(stage)}</b> <span class=soft>loss by step, last {points[-1][1]:.3f}</span>"
        f"<svg viewBox='0 0 {width} {height}' role=img aria-label='loss of {html.escape(stage)}'>{grid}{ticks}"
        f"<polyline points='{path}' fill=none stroke='var(--blue)' stroke-width=2 stroke-linejoin=round />"
        "</svg></div>"
    )


def _chat(chat: Chat) -> str:
    picture, turns = chat
    lines = "".join(
        f"<div class=asked>{html.escape(asked)}</div><div class=told>{html.escape(told)}"
        + ("" if told == right else f" <small>(right: {html.escape(right)})</small>")
        + "</div>"
        for asked, told, right in turns
    )
    return f"<div class='card chat'><img src='{_data_uri(picture)}' alt=''><div>{lines}</div></div>"


def _shots(exams: Sequence[Exam], count: int = 24) -> str:
    """A random choice of exam questions, no picture twice."""
    by_picture = {e.picture: e for e in random.Random(0).sample(list(exams), len(exams))}
    return f"<div class=grid>{''.join(map(_shot, list(by_picture.values())[:count]))}</div>"


def _shot(exam: Exam) -> str:
    right = exam.answer == exam.question.answer
    verdict = "" if right else f" <span class=soft>(right: {html.escape(exam.question.answer)})</span>"
    return (
        f"<div class='card shot'><img src='{_data_uri(exam.picture)}' alt=''><div>{html.escape(exam.question.text)}<br>"
        f"<span class={'good' if right else 'bad'}>{html.escape(exam.answer)}</span>{verdict}<br>"
        f"<span class=soft>grey: {html.escape(exam.answer_blanked)}</span></div></div>"
    )


def _data_uri(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"

"""The complete demo: draws pictures, trains both stages, runs an exam on unseen scenes, chats and writes a report."""

import json
import platform
import random
import resource
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from llava_fast import LlavaForConditionalGeneration, LlavaProcessor
from llava_fast.chat import Chat as Conversation
from llava_fast.chat import Turn, load, prompt
from llava_fast.demo import world
from llava_fast.demo.report import Chat, Exam, write_report
from llava_fast.demo.world import Question, Scene
from llava_fast.processor.processor import read_rgb
from llava_fast.train import shipped
from llava_fast.train.recipe import load_recipe
from llava_fast.train.trainer import TrainResult
from llava_fast.train.trainer import run as train

WEIGHTS = Path(__file__).parent / "weights"
RECIPES = {"stage 1": shipped.RECIPES / "demo-stage1.yaml", "stage 2": shipped.RECIPES / "demo-stage2-lora.yaml"}


@dataclass(frozen=True)
class Size:
    """Sizes of the demo; smaller values than the defaults make a quick test."""

    captions: int = 1500  # pictures of stage 1, one caption each
    pictures: int = 3500  # pictures of stage 2
    questions: int = 8  # per picture of stage 2
    held_out: int = 120  # scenes of the exam, each with one question of every possible kind
    chats: int = 3
    overrides: tuple[str, ...] = ()  # key=value for both recipes


def run(out: Path, size: Size | None = None) -> dict[str, Any]:
    """Run the demo and leave pictures, data, models, `exam.json`, `summary.json` and `report.html` in `out`.

    Returns:
        The summary: accuracy, accuracy_blanked, accuracy_by_kind, held_out (questions of the exam), held_out_scenes,
        seconds, tokens_per_s (of training), peak_mib (of this process) and where it ran.
    """
    size = size or Size()
    out = Path(out)
    console = Console()
    started = time.perf_counter()
    console.print("[bold]1/5[/bold] drawing pictures")
    _, exam_scenes = draw(out, size)

    results: dict[str, TrainResult] = {}
    console.print("[bold]2/5[/bold] stage 1: the projector learns to caption")
    results["stage 1"] = train_stage("stage 1", out, size)
    console.print("[bold]3/5[/bold] stage 2: LoRA learns to answer")
    results["stage 2"] = train_stage("stage 2", out, size)

    console.print(f"[bold]4/5[/bold] exam on {len(exam_scenes)} scenes that training never saw")
    model, processor = load(out / "model")
    exams = examine(model, processor, out, exam_scenes)
    console.print("[bold]5/5[/bold] chat")
    chats = chat(model, processor, out, exam_scenes, size, console)

    seconds = time.perf_counter() - started
    summary = summarise(exams, results, len(exam_scenes), seconds)
    _write_json(out / "exam.json", [exam_row(exam) for exam in exams])
    _write_json(out / "summary.json", summary)
    write_report(out, summary, exams, chats, {stage: r["log_history"] for stage, r in results.items()})
    return summary


# ------------------------------------------------------------------------------------------------------- data


def draw(out: Path, size: Size) -> tuple[list[Scene], list[Scene]]:
    """Write all pictures, and stage1.json and stage2.json in LLaVA's format; return training and exam scenes."""
    images = out / "images"
    if images.exists():
        shutil.rmtree(images)
    images.mkdir(parents=True)
    training = world.scenes(11, size.captions + size.pictures, held=False)
    exam = world.scenes(12, size.held_out, held=True)
    if any(map(world.held_out, training)) or not all(map(world.held_out, exam)):
        raise RuntimeError("the scenes of the exam are not apart from those of training")
    for name, scenes in (("train", training), ("exam", exam)):
        for i, scene in enumerate(track(scenes, f"{name} pictures")):
            world.render(scene, seed=i).save(images / f"{name}-{i:05d}.png")
    world.blank().save(images / "blank.png")

    rng = random.Random(13)
    captions = [
        _row(f"train-{i:05d}", [("Describe the picture.", world.caption(scene, rng))])
        for i, scene in enumerate(training[: size.captions])
    ]
    questions = [
        _row(f"train-{i:05d}", [(q.text, q.answer) for q in world.ask(scene, rng, size.questions)])
        for i, scene in enumerate(training[size.captions :], size.captions)
    ]
    _write_json(out / "stage1.json", captions)
    _write_json(out / "stage2.json", questions)
    return training, exam


def _row(name: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    """One sample in the format of LLaVA's data files, with the `<image>` mark in the first question."""
    conversations = []
    for i, (question, answer) in enumerate(turns):
        conversations.append({"from": "human", "value": question if i else f"<image>\n{question}"})
        conversations.append({"from": "gpt", "value": answer})
    return {"id": name, "image": f"images/{name}.png", "conversations": conversations}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------- training


def train_stage(stage: str, out: Path, size: Size) -> TrainResult:
    """Train one stage by its recipe, with `train.trainer.run`."""
    models = {"vision_tower": WEIGHTS / "tower", "language_model": WEIGHTS / "text"}
    folders = {
        "stage 1": {**models, "output_dir": out / "stage1"},
        "stage 2": {"model": out / "stage1", "output_dir": out / "model"},
    }[stage]
    paths = {"data": out / f"{stage.replace(' ', '')}.json", "image_folder": out, **folders}
    overrides = [f"{key}={Path(path).absolute()}" for key, path in paths.items()]
    return train(load_recipe(RECIPES[stage], [*overrides, *size.overrides]))


# ------------------------------------------------------------------------------------------------------- exam


def exam_questions(scenes: list[Scene]) -> list[tuple[int, Question]]:
    """(index of the scene, question): one of every kind that can be asked about each scene."""
    rng = random.Random(14)
    return [(i, question) for i, scene in enumerate(scenes) for question in world.one_of_each_kind(scene, rng)]


def examine(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    out: Path,
    scenes: list[Scene],
    batch_size: int = 64,
) -> list[Exam]:
    """Ask every question twice, greedily and in batches: with the picture, and with a grey one."""
    questions = exam_questions(scenes)
    pictures = [out / "images" / f"exam-{i:05d}.png" for i, _ in questions]
    texts = [question.text for _, question in questions]
    seen = answer(model, processor, pictures, texts, batch_size, "with pictures")
    grey = answer(model, processor, [out / "images" / "blank.png"] * len(texts), texts, batch_size, "grey pictures")
    return [
        Exam(picture, question, told, told_blanked)
        for picture, (_, question), told, told_blanked in zip(pictures, questions, seen, grey, strict=True)
    ]


def exam_row(exam: Exam) -> dict[str, str]:
    return {
        "image": f"images/{exam.picture.name}",
        "kind": exam.question.kind,
        "question": exam.question.text,
        "right": exam.question.answer,
        "answer": exam.answer,
        "answer_blanked": exam.answer_blanked,
    }


def answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pictures: list[Path],
    questions: list[str],
    batch_size: int,
    title: str,
) -> list[str]:
    """Greedy answers to one question per picture."""
    answers: list[str] = []
    for first in track(range(0, len(questions), batch_size), title):
        batch = questions[first : first + batch_size]
        seen = pictures[first : first + batch_size]
        prompts = [prompt(processor, [Turn(question, (picture,))]) for question, picture in zip(batch, seen)]
        images = [Image.open(picture) for picture in seen]
        inputs = processor(images=images, text=prompts, return_tensors="pt").to(model.device)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        told = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [text.strip() for text in told]
    return answers


def chat(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    out: Path,
    scenes: list[Scene],
    size: Size,
    console: Console,
) -> list[Chat]:
    """Talk about a few exam pictures, streamed as `llava-fast chat` does: (picture, [(question, said, right)])."""
    rng = random.Random(15)
    chats = []
    for i, scene in list(enumerate(scenes))[: size.chats]:
        picture = out / "images" / f"exam-{i:05d}.png"
        console.print(f"\n{picture}", style="dim", highlight=False)
        talk = Conversation(model, processor, say=console.print, do_sample=False, max_new_tokens=16)
        talk.images = [read_rgb(picture)]
        turns: list[tuple[str, str, str]] = []
        for question in world.one_of_each_kind(scene, rng)[:4]:
            console.print(f"> {question.text}", highlight=False)
            for piece in talk.ask(question.text):
                console.print(piece, end="", highlight=False, style="bold")
            console.print()
            turns.append((question.text, talk.turns[-1].answer or "", question.answer))
        chats.append((picture, turns))
    return chats


# ---------------------------------------------------------------------------------------------------- summary


def accuracy(exams: list[Exam], *, blanked: bool = False) -> float:
    """Share of exact matches."""
    right = [(e.answer_blanked if blanked else e.answer) == e.question.answer for e in exams]
    return sum(right) / len(right)


def summarise(exams: list[Exam], results: dict[str, TrainResult], scenes: int, seconds: float) -> dict[str, Any]:
    by_kind: dict[str, list[Exam]] = defaultdict(list)
    for exam in exams:
        by_kind[exam.question.kind].append(exam)
    training_seconds = sum(result["seconds"] for result in results.values())
    return {
        "accuracy": round(accuracy(exams), 4),
        "accuracy_blanked": round(accuracy(exams, blanked=True), 4),
        "accuracy_by_kind": {kind: round(accuracy(by_kind[kind]), 4) for kind in world.KINDS if by_kind[kind]},
        "held_out": len(exams),
        "held_out_scenes": scenes,
        "seconds": round(seconds, 1),
        "tokens_per_s": round(sum(result["tokens"] for result in results.values()) / training_seconds),
        "peak_mib": round(peak_mib()),
        "device": device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def peak_mib() -> float:
    """Peak memory of this process: on the GPU if there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)

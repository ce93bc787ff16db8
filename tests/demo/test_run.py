"""A miniature of the whole demo: every part runs and every file is there, though too little is learned."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from llava_fast.chat import Turn, conversation
from llava_fast.demo import run as demo
from llava_fast.demo import world
from llava_fast.demo.report import write_report
from llava_fast.demo.world import Question

SIZE = demo.Size(
    captions=32, pictures=16, questions=4, held_out=6, chats=1, overrides=("max_steps=2", "logging_steps=1")
)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, demo.run(out, SIZE)


def test_summary_has_what_the_demo_promises(result):
    out, summary = result
    assert summary == json.loads((out / "summary.json").read_text())
    assert 0 <= summary["accuracy"] <= 1 and 0 <= summary["accuracy_blanked"] <= 1
    assert set(summary["accuracy_by_kind"]) == set(world.KINDS)
    assert summary["held_out_scenes"] == 6
    assert 6 * 6 <= summary["held_out"] <= 6 * 7
    assert summary["seconds"] > 0 and summary["tokens_per_s"] > 0 and 100 < summary["peak_mib"] < 10_000


def test_data_is_in_llava_format(result):
    out, _ = result
    for name, rows, turns in (("stage1", SIZE.captions, 2), ("stage2", SIZE.pictures, 2 * SIZE.questions)):
        data = json.loads((out / f"{name}.json").read_text())
        assert len(data) == rows
        for row in data:
            assert Image.open(out / row["image"]).size == (world.PICTURE_PX, world.PICTURE_PX)
            said = row["conversations"]
            assert [turn["from"] for turn in said] == ["human", "gpt"] * (turns // 2)
            assert [turn["value"].count("<image>") for turn in said] == [1] + [0] * (turns - 1)


def test_both_stages_went_through_their_recipes(result):
    out, _ = result
    for folder, stage in (("stage1", "projector"), ("model", "lora")):
        recipe = (out / folder / "recipe.yaml").read_text()
        assert re.search(rf"^stage: {stage}$", recipe, re.MULTILINE)
    assert (out / "model" / "adapter" / "adapter_config.json").is_file()


def test_recipes_are_those_of_the_train_folder():
    for name, path in demo.RECIPES.items():
        file = (
            Path(demo.__file__).parents[2]
            / "train"
            / f"demo-{name.replace(' ', '')}{'-lora' * (name == 'stage 2')}.yaml"
        )
        assert path.read_text() == file.read_text()


def test_exam_scenes_never_occur_in_training(result):
    out, _ = result
    train, exam = demo.draw(out, SIZE)
    assert set(train).isdisjoint(exam)
    assert all(map(world.held_out, exam)) and not any(map(world.held_out, train))


def test_stock_transformers_gives_the_same_answers(result):
    out, _ = result
    scenes = world.scenes(12, SIZE.held_out, held=True)
    questions = demo.exam_questions(scenes)[:12]
    ours, our_processor = demo.load(out / "model")
    pictures = [out / "images" / f"exam-{i:05d}.png" for i, _ in questions]
    answers = demo.answer(ours, our_processor, pictures, [q.text for _, q in questions], 5, "ours")

    model = transformers.LlavaForConditionalGeneration.from_pretrained(out / "model", dtype=torch.float32).eval()
    processor = transformers.LlavaProcessor.from_pretrained(out / "model")
    for picture, (_, question), answer in zip(pictures, questions, answers, strict=True):
        prompt = processor.apply_chat_template(
            conversation([Turn(question.text, (picture,))]), add_generation_prompt=True
        )
        inputs = processor(images=Image.open(picture), text=prompt, return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(tokens, skip_special_tokens=True).strip() == answer


def test_report_is_one_page_with_everything_inside(result):
    out, summary = result
    page = (out / "report.html").read_text()
    assert not re.search(r"(src|href)=['\"](?!data:)", page)
    assert "@import" not in page and "<script" not in page
    assert page.count("<polyline") == 2  # the loss of both stages
    assert page.count("data:image/png;base64,") == 6 + SIZE.chats
    assert f"{100 * summary['accuracy']:.1f} %" in page
    assert page.count("grey:") == 6


def test_report_shows_text_as_text(tmp_path):
    world.blank().save(tmp_path / "a.png")
    exam = demo.Exam(tmp_path / "a.png", Question("what", "a < b & c?", "<b>"), "<script>", "&amp;")
    summary = {
        "accuracy": 0.0, "accuracy_blanked": 0.0, "accuracy_by_kind": {"what": 0.0}, "held_out": 1,
        "held_out_scenes": 1, "seconds": 1.0, "tokens_per_s": 1, "peak_mib": 1, "device": "<CPU>",
    }  # fmt: skip
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "train_loss": 1.5}]
    write_report(tmp_path, summary, [exam], [(tmp_path / "a.png", [("<i>", "<u>", "x")])], {"stage 1": history})
    page = (tmp_path / "report.html").read_text()
    for tag in ("<script>", "<CPU>", "<i>", "<u>"):
        assert tag not in page
    assert "a &lt; b &amp; c?" in page and "&amp;amp;" in page


def test_accuracy_counts_exact_matches():
    def exam(answer: str, blanked: str) -> demo.Exam:
        return demo.Exam(Path("x.png"), Question("colour", "?", "red"), answer, blanked)

    exams = [exam("red", "red"), exam("red", "blue"), exam("Red", "blue"), exam("red circle", "blue")]
    assert demo.accuracy(exams) == 0.5
    assert demo.accuracy(exams, blanked=True) == 0.25

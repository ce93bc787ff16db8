"""Conversation styles: exact strings, and chat templates that prompt as training does."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llava_fast.processor.templates import TEMPLATES, Plain, get_template, marks_first

V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
TWO_ROUNDS = ["<image>\nWhat is it?", "A cat.", "Sure?", "Yes,\nI am."]


def joined(pieces) -> str:
    return "".join(text for text, _ in pieces)


def supervised(pieces) -> list[str]:
    return [text for text, flag in pieces if flag and text]


def render(name: str, messages: list[dict], **options) -> str:
    (prompt,), _ = render_jinja_template(
        conversations=[messages],
        chat_template=TEMPLATES[name].chat_template,
        bos_token="<s>",
        eos_token="</s>",
        **options,
    )
    return prompt


def as_messages(turns: list[str], as_list: bool) -> list[dict]:
    messages = []
    for i, turn in enumerate(turns):
        content: list | str = turn
        if as_list:
            marks = turn.count("<image>")
            content = [{"type": "image"}] * marks + [{"type": "text", "text": turn.replace("<image>", "").strip()}]
        messages.append({"role": ["user", "assistant"][i % 2], "content": content})
    return messages


def test_strings_of_each_style():
    v1 = get_template("v1").pieces(TWO_ROUNDS)
    assert joined(v1) == (
        V1_SYSTEM + " USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT: Yes,\nI am.</s>"
    )
    assert supervised(v1) == [" A cat.</s>", " Yes,\nI am.</s>"]

    llava_v1 = joined(get_template("llava_v1").pieces(["q", "a"]))
    assert llava_v1 == (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER: q ASSISTANT: a</s>"
    )

    llama2 = get_template("llava_llama_2").pieces(TWO_ROUNDS)
    assert joined(llama2) == (
        f"[INST] <<SYS>>\n{LLAMA2_SYSTEM}\n<</SYS>>\n\n<image>\nWhat is it? [/INST] A cat. </s>"
        "<s>[INST] Sure? [/INST] Yes,\nI am. </s>"
    )
    assert supervised(llama2) == [" A cat. </s>", " Yes,\nI am. </s>"]

    hf = get_template("hf").pieces(TWO_ROUNDS)
    assert joined(hf) == "USER: <image>\nWhat is it? ASSISTANT: A cat. USER: Sure? ASSISTANT: Yes,\nI am. "
    assert supervised(hf) == [" A cat.", " Yes,\nI am."]

    plain = get_template("plain").pieces(["Describe it.\n<image>", " a cat "])
    assert plain == [("<image>", False), (" a cat \n", True)]
    assert get_template("plain").chat_template is None


def test_empty_turns_are_written_as_in_the_original():
    pieces = get_template("v1").pieces(["", "a", "q", ""])
    assert joined(pieces) == V1_SYSTEM + " USER:ASSISTANT: a</s>USER: q ASSISTANT:"
    assert supervised(pieces) == [" a</s>"]
    assert supervised(get_template("llava_llama_2").pieces(["q", ""])) == []


def test_other_end_of_sequence_tokens():
    pieces = get_template("v1").pieces(["q", "a"], bos="", eos="<|im_end|>")
    assert supervised(pieces) == [" a<|im_end|>"]
    prompt = joined(get_template("llava_llama_2").pieces(["q", "a", "r", "b"], bos="", eos="<e>"))
    assert prompt.endswith("q [/INST] a <e>[INST] r [/INST] b <e>")


@pytest.mark.parametrize("turns", [["q"], ["q", "a", "q", "a"]])
def test_plain_takes_two_turns(turns):
    with pytest.raises(ValueError, match="exactly two turns"):
        get_template("plain").pieces(turns)


def test_plain_needs_an_image():
    with pytest.raises(ValueError, match="<image> in the first turn"):
        get_template("plain").pieces(["q", "a"])


@pytest.mark.parametrize(
    ("text", "moved"),
    [
        ("What?\n<image>", "<image>\nWhat?"),
        ("<image>\nWhat?", "<image>\nWhat?"),
        (" a <image> b ", "<image>\na  b"),
        ("<image>", "<image>"),
        ("one <image> two <image>", "<image>\n<image>\none  two"),
        (" no mark ", " no mark "),
    ],
)
def test_marks_first(text, moved):
    assert marks_first(text) == moved


@pytest.mark.parametrize("as_list", [True, False], ids=["entries", "strings"])
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "plain"])
@pytest.mark.parametrize(
    "turns",
    [TWO_ROUNDS, ["q", "a"], ["<image>\n<image>\nWhich?", "Both", "q\n\nr", 'ä 你好 \'s "x"'], ["<image>", "a"]],
)
def test_chat_template_is_the_training_prompt(name, turns, as_list):
    pieces = TEMPLATES[name].pieces(turns)
    messages = as_messages(turns, as_list)
    assert render(name, messages) == joined(pieces)
    for i in range(1, len(turns), 2):
        prefix = TEMPLATES[name].pieces(turns[: i + 1])
        while not prefix[-1][1]:
            prefix.pop()
        assert render(name, messages[:i], add_generation_prompt=True) == joined(prefix[:-1])


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "plain"])
def test_chat_template_leaves_user_text_alone(name):
    """Only image entries make marks; a mark typed by a user is not moved, so that sanitising can still find it."""
    prompt = render(name, [{"role": "user", "content": [{"type": "text", "text": "say <image> twice "}]}])
    assert "say <image> twice " in prompt


def test_system_message_replaces_the_default():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    assert render("v1", messages, add_generation_prompt=True) == "Be brief. USER: q ASSISTANT:"
    assert render("llava_llama_2", messages) == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nq [/INST]"
    assert render("hf", messages, add_generation_prompt=True) == "Be brief. USER: q ASSISTANT:"


def test_text_comes_after_images_as_in_llava_hf():
    content = [{"type": "text", "text": "What?"}, {"type": "image"}]
    prompt = render("hf", [{"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt == "USER: <image>\nWhat? ASSISTANT:"


def test_unknown_template_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown template 'v9'; known: v1, llava_v1, plain"):
        get_template("v9")
    own = Plain("own")
    assert get_template(own) is own

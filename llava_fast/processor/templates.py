"""Conversation templates: the exact strings with which a LLaVA is trained and prompted.

A template turns a conversation into *pieces*, a list of `(text, supervised)` whose texts joined are the training
prompt, and (except `plain`) has the Jinja chat template of the same style. A generation prompt ends where the first
supervised piece of a training sample starts, so a model is prompted exactly as it was trained.

A supervised piece starts after `ASSISTANT:`, before the space. With a SentencePiece vocabulary that space belongs to
the answer's first token or, before a newline or a CJK character, is a separate token, which the model must generate.
The original code supervises it too: it tokenises `... ASSISTANT: ` with the space and removes the last token again.

An empty turn is written as its role without space and `</s>` (`ASSISTANT:`), as in the original.

Strings: llava/conversation.py of haotian-liu/LLaVA and the chat template of llava-hf/llava-1.5-7b-hf.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

IMAGE_MARK = "<image>"

Piece = tuple[str, bool]

# Shared by all styles: `content` is a string, used unchanged, or transformers' list of entries, whose images come
# first, one per line, then its texts. `trim` strips like `marks_first`.
_FLATTEN = r"""
{%- macro flatten(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- set marks = content | selectattr('type', 'equalto', 'image') | list | length -%}
{%- set text = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') -%}
{{- (('<image>\n' * marks) ~ (text | trim)) | trim if marks else text -}}
{%- endif -%}
{%- endmacro -%}
"""

# Splits off a leading system message, which replaces the style's own.
_SYSTEM = r"""
{%- set system = @SYSTEM@ -%}
{%- set turns = messages -%}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set system = flatten(messages[0]['content']) -%}
{%- set turns = messages[1:] -%}
{%- endif -%}
"""

_VICUNA_CHAT = (
    _FLATTEN
    + _SYSTEM
    + r"""
{{- system ~ ' ' -}}
{%- for message in turns -%}
{%- set text = flatten(message['content']) -%}
{%- if message['role'] == 'user' -%}
{{- 'USER: ' ~ text ~ ' ' if text else 'USER:' -}}
{%- else -%}
{{- 'ASSISTANT:' -}}
{%- generation -%}{{- ' ' ~ text ~ eos_token if text else '' -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{{- 'ASSISTANT:' if add_generation_prompt else '' -}}
"""
).strip()

_LLAMA2_CHAT = (
    _FLATTEN
    + _SYSTEM
    + r"""
{%- for message in turns -%}
{%- set text = flatten(message['content']) -%}
{%- if loop.first -%}
{{- '[INST] ' ~ ('<<SYS>>\n' ~ system ~ '\n<</SYS>>\n\n' if system else '') ~ text ~ ' [/INST]' -}}
{%- elif text and message['role'] == 'user' -%}
{{- bos_token ~ '[INST] ' ~ text ~ ' [/INST]' -}}
{%- elif text -%}
{%- generation -%}{{- ' ' ~ text ~ ' ' ~ eos_token -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
"""
).strip()

_HF_CHAT = (
    _FLATTEN
    + r"""
{%- for message in messages -%}
{%- set text = flatten(message['content']) -%}
{%- if message['role'] == 'assistant' -%}
{{- 'ASSISTANT:' -}}{%- generation -%}{{- ' ' ~ text -}}{%- endgeneration -%}{{- ' ' -}}
{%- else -%}
{{- (message['role'].upper() ~ ': ' if message['role'] != 'system' else '') ~ text ~ ' ' -}}
{%- endif -%}
{%- endfor -%}
{{- 'ASSISTANT:' if add_generation_prompt else '' -}}
"""
).strip()


def marks_first(text: str) -> str:
    """Move a turn's `<image>` marks to its front, each followed by a newline, and strip the rest of the text.

    A turn without a mark is unchanged. Several marks are all kept, unlike in the original, which keeps one.
    """
    marks = text.count(IMAGE_MARK)
    if not marks:
        return text
    return ((IMAGE_MARK + "\n") * marks + text.replace(IMAGE_MARK, "").strip()).strip()


@dataclass(frozen=True)
class Template(ABC):
    """A conversation style. `chat_template` is Jinja for `processor.chat_template`, or None."""

    name: str
    system: str = ""

    @abstractmethod
    def pieces(
        self, turns: Sequence[str], system: str | None = None, *, bos: str = "<s>", eos: str = "</s>"
    ) -> list[Piece]:
        """The training prompt of a conversation, cut where supervision starts and stops.

        Args:
            turns: texts of human, assistant, human, ... in this order, with their `<image>` marks.
            system: replaces the style's own system prompt, as a system message does in the chat template.
            bos, eos: the tokenizer's BOS and EOS tokens, for styles that contain them as text.
        Returns:
            `(text, supervised)` pairs; the joined texts are the prompt, without a leading `bos`.
        Raises:
            ValueError: for turns that the style does not support.
        """

    @property
    def chat_template(self) -> str | None:
        return None


@dataclass(frozen=True)
class Vicuna(Template):
    """`{system} USER: {q} ASSISTANT: {a}</s>USER: ...`, the style of LLaVA-1.5."""

    def pieces(
        self, turns: Sequence[str], system: str | None = None, *, bos: str = "<s>", eos: str = "</s>"
    ) -> list[Piece]:
        pieces = [((self.system if system is None else system) + " ", False)]
        for i, text in enumerate(turns):
            if i % 2 == 0:
                pieces.append((f"USER: {text} " if text else "USER:", False))
            else:
                pieces.append(("ASSISTANT:", False))
                pieces.append((f" {text}{eos}" if text else "", True))
        return pieces

    @property
    def chat_template(self) -> str:
        return _VICUNA_CHAT.replace("@SYSTEM@", repr(self.system))


@dataclass(frozen=True)
class Plain(Template):
    """`<image>{caption}\\n`: captions after images, for aligning the projector. Not a chat: two turns, no system."""

    def pieces(
        self, turns: Sequence[str], system: str | None = None, *, bos: str = "<s>", eos: str = "</s>"
    ) -> list[Piece]:
        if len(turns) != 2:
            raise ValueError(f"template {self.name!r} takes exactly two turns, got {len(turns)}")
        if IMAGE_MARK not in turns[0]:
            raise ValueError(f"template {self.name!r} needs {IMAGE_MARK} in the first turn")
        return [(IMAGE_MARK * turns[0].count(IMAGE_MARK), False), (turns[1] + "\n", True)]


@dataclass(frozen=True)
class Llama2(Template):
    """`[INST] <<SYS>>\\n{system}\\n<</SYS>>\\n\\n{q} [/INST] {a} </s><s>[INST] ...`"""

    def pieces(
        self, turns: Sequence[str], system: str | None = None, *, bos: str = "<s>", eos: str = "</s>"
    ) -> list[Piece]:
        system = self.system if system is None else system
        block = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
        pieces: list[Piece] = []
        for i, text in enumerate(turns):
            if i == 0:
                pieces.append((f"[INST] {block}{text} [/INST]", False))
            elif text and i % 2 == 0:
                pieces.append((f"{bos}[INST] {text} [/INST]", False))
            elif text:
                pieces.append((f" {text} {eos}", True))
        return pieces

    @property
    def chat_template(self) -> str:
        return _LLAMA2_CHAT.replace("@SYSTEM@", repr(self.system))


@dataclass(frozen=True)
class HuggingFace(Template):
    """`USER: {q} ASSISTANT: {a} `, what llava-hf's own chat template prompts with: no system prompt, no `</s>`.

    A model trained with it does not learn to stop: train with `v1`, and use this style only to prompt.
    """

    def pieces(
        self, turns: Sequence[str], system: str | None = None, *, bos: str = "<s>", eos: str = "</s>"
    ) -> list[Piece]:
        pieces = [] if system is None else [(f"{system} ", False)]
        for i, text in enumerate(turns):
            if i % 2 == 0:
                pieces.append((f"USER: {text} ", False))
            else:
                pieces += [("ASSISTANT:", False), (f" {text}", True), (" ", False)]
        return pieces

    @property
    def chat_template(self) -> str:
        return _HF_CHAT


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Vicuna(
            "v1",
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        ),
        Vicuna(
            "llava_v1",
            "A chat between a curious human and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the human's questions.",
        ),
        Plain("plain"),
        Llama2(
            "llava_llama_2",
            "You are a helpful language and vision assistant. You are able to understand the visual content that "
            "the user provides, and assist the user with a variety of tasks using natural language.",
        ),
        HuggingFace("hf"),
    )
}


def get_template(name: str | Template) -> Template:
    """Look a template up by name.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    if isinstance(name, Template):
        return name
    if not isinstance(name, str) or name not in TEMPLATES:
        raise ValueError(f"unknown template {name!r}; known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]

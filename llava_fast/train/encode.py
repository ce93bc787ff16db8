"""A training prompt as token ids and labels.

The token ids are those of the original code: the prompt is cut at its `<image>` marks, every chunk is tokenised on its
own (so each has a SentencePiece vocabulary's leading space), one BOS is kept and every mark becomes its image tokens.
The labels are not the original's arithmetic on token counts, which gives up on a sample when the counts disagree: a
token is supervised if any of its characters is, by the tokenizer's own character offsets.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from llava_fast.processor.processor import LlavaProcessor
from llava_fast.processor.templates import IMAGE_MARK, Piece

IGNORE = -100  # the label of a token that is not supervised

_logger = logging.getLogger(__name__)


def encode(pieces: Sequence[Piece], processor: LlavaProcessor) -> tuple[list[int], list[int]]:
    """Tokenise a training prompt: input ids with images expanded, and labels (−100 where not supervised).

    Args:
        pieces: from `Template.pieces`.
    Raises:
        ValueError: for a tokenizer without character offsets.
    """
    tokenizer = processor.tokenizer
    text = "".join(piece for piece, _ in pieces)
    supervised = np.repeat([flag for _, flag in pieces], [len(piece) for piece, _ in pieces])
    n_before = np.concatenate([[0], np.cumsum(supervised)])  # supervised characters before each character
    chunks = text.split(IMAGE_MARK)
    encoded = tokenizer(chunks, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    ids = bos(tokenizer)
    labels = [IGNORE] * len(ids)
    image = [processor.image_token_id] * processor.num_image_tokens()
    start = 0
    for i, chunk in enumerate(chunks):
        if i:
            ids += image
            labels += [IGNORE] * len(image)
        tokens = encoded["input_ids"][i]
        first, last = np.array(encoded["offset_mapping"][i], dtype=np.int64).reshape(-1, 2).T
        # A token of no width, such as a lone leading space, goes with the character it stands before.
        last = np.minimum(np.maximum(last, first + 1), len(chunk))
        is_label = n_before[start + last] > n_before[start + first]
        ids += tokens
        labels += np.where(is_label, tokens, IGNORE).tolist()
        start += len(chunk) + len(IMAGE_MARK)
    return ids, labels


def bos(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts in front of a text: [BOS], or nothing."""
    ids = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def check_spaces(processor: LlavaProcessor) -> None:
    """Warn where a prompt's tokens after an image will differ from the ones trained on."""
    tokenizer, after = processor.tokenizer, "\nx"
    trained = [processor.image_token_id, *tokenizer(after, add_special_tokens=False)["input_ids"]]
    prompted = tokenizer(processor.image_token + after, add_special_tokens=False)["input_ids"]
    if prompted != trained:
        _logger.warning(
            "this tokenizer puts a leading space at the start of a text only, so after %s a prompt lacks the space "
            "token that LLaVA is trained with; loaded with legacy=True it has it",
            processor.image_token,
        )

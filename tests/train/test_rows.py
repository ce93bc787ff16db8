"""Rows: which ones a run takes of which file, and their prompts as tokens."""

import random

import numpy as np
import pytest

from llava_fast.processor.processor import LlavaProcessor
from llava_fast.processor.templates import TEMPLATES, Piece, get_template
from llava_fast.train.recipe import DataSource
from llava_fast.train.rows import IGNORE, expand, tokenise
from llava_fast.train.sampler import choose_rows
from tests.train.conftest import make_tokenizer
from tests.train.test_labels import GAPS, WORDS, make_processor


def chosen(sizes: list[int], *sources: dict, seed: int = 0) -> list[list[int]]:
    rows = choose_rows([DataSource("a.json", **source) for source in sources], sizes, seed)
    return [numbers.tolist() for numbers in rows]


@pytest.mark.parametrize(
    ("source", "rows"),
    [
        ({}, [*range(10)]),
        ({"count": 3}, [0, 1, 2]),
        ({"sampling": "last", "count": 3}, [7, 8, 9]),
        ({"count": "10%"}, [0]),
        ({"count": "11%"}, [0, 1]),  # rounded up, as in LLaVA-NeXT
        ({"count": "0.5%"}, [0]),
        ({"count": "100%"}, [*range(10)]),
        ({"sampling": "random"}, [*range(10)]),
        ({"sampling": "repeat", "count": "200%"}, [*range(10)] * 2),
        ({"sampling": "repeat", "count": 10}, [*range(10)]),
    ],
)
def test_rows_of_one_source(source, rows):
    assert chosen([10], source) == [rows]


def test_a_draw_follows_the_seed():
    (drawn,) = chosen([1000], {"sampling": "random", "count": 300})
    assert drawn == sorted(set(drawn)) and len(drawn) == 300
    assert 400 < np.mean(drawn) < 600
    assert chosen([1000], {"sampling": "random", "count": 300}) == [drawn]
    assert chosen([1000], {"sampling": "random", "count": 300}, seed=1) != [drawn]
    first, second = chosen([1000, 1000], *[{"sampling": "random", "count": 300}] * 2)
    assert first == drawn != second  # sources are drawn apart


def test_repetitions_are_whole_passes_and_a_draw():
    (rows,) = chosen([10], {"sampling": "repeat", "count": 24})
    assert rows[:20] == [*range(10)] * 2
    assert len(set(rows[20:])) == 4


def test_weights_are_proportions():
    # 0.5 : 0.25 : 0.25; the second source, of 10 rows, is the scarcest.
    sizes = [len(r) for r in chosen([100, 10, 50], {"weight": 2}, {"weight": 1, "sampling": "random"}, {"weight": 1})]
    assert sizes == [20, 10, 10]
    # Without it the first one is, and the second is repeated.
    sizes = [len(r) for r in chosen([100, 10, 50], {"weight": 2}, {"weight": 1, "sampling": "repeat"}, {"weight": 1})]
    assert sizes == [100, 50, 50]
    # If all repeat, every row is seen.
    sizes = [
        len(r) for r in chosen([100, 10], {"weight": 1, "sampling": "repeat"}, {"weight": 3, "sampling": "repeat"})
    ]
    assert sizes == [100, 300]


def test_more_rows_than_there_are():
    with pytest.raises(ValueError, match=r"a\.json: count 11 asks for 11 of 10 rows; sampling: repeat gives rows more"):
        chosen([10], {"sampling": "random", "count": 11})
    with pytest.raises(ValueError, match=r"count 101% asks for 11 of 10 rows"):
        chosen([10], {"count": "101%"})


# Tokens


@pytest.fixture(scope="module", params=["words", "bytes", "sentencepiece", "sentencepiece, legacy"])
def any_processor(request, processor, tmp_path_factory) -> LlavaProcessor:
    if request.param == "words":
        return processor
    if request.param == "bytes":
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        return LlavaProcessor(processor.image_processor, tokenizer, 14, "default")
    return make_processor(tmp_path_factory.mktemp("pictures"), legacy="legacy" in request.param)


def prompts(n: int, seed: int) -> list[list[Piece]]:
    """Prompts of all templates, and pieces that begin and end anywhere, empty ones and bare spaces among them."""
    rng = random.Random(seed)

    def text() -> str:
        words = "".join(rng.choice(WORDS) + rng.choice(GAPS) for _ in range(rng.randint(0, 9)))
        return rng.choice(["", " ", "\n", "<image>", "<image>\n"]) + words + rng.choice(["", "</s>", "<image>", "好"])

    made = []
    for _ in range(n):
        name = rng.choice([*TEMPLATES, "none"])
        if name == "none":
            made.append([(rng.choice([text(), "", " ", "é"]), rng.random() < 0.5) for _ in range(rng.randint(1, 9))])
        else:
            turns = ["<image>" + text(), text()] if name == "plain" else [text() for _ in range(2 * rng.randint(1, 4))]
            made.append(get_template(name).pieces(turns))
    return made


def tokens_and_labels(pieces: list[Piece], processor: LlavaProcessor) -> tuple[list[int], list[int]]:
    """The definition, character by character: a token is supervised if one of its characters is."""
    tokenizer, size = processor.tokenizer, processor.num_image_tokens()
    supervised = [flag for text, flag in pieces for _ in text]
    ids = tokenizer("")["input_ids"][:1]
    labels = [IGNORE] * len(ids)
    at = 0
    for i, chunk in enumerate("".join(text for text, _ in pieces).split("<image>")):
        if i:
            ids += [processor.image_token_id] * size
            labels += [IGNORE] * size
        encoded = tokenizer(chunk, add_special_tokens=False, return_offsets_mapping=True)
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"]):
            characters = range(start, min(max(end, start + 1), len(chunk)))
            ids.append(token)
            labels.append(token if any(supervised[at + character] for character in characters) else IGNORE)
        at += len(chunk) + len("<image>")
    return ids, labels


def test_tokens_and_labels_follow_the_definition(any_processor):
    made = prompts(150, seed=0)
    together = tokenise(made, any_processor)
    image, size = any_processor.image_token_id, any_processor.num_image_tokens()
    n_supervised = 0
    for pieces, tokens in zip(made, together, strict=True):
        ids, labels = expand(tokens, image, size)
        assert (ids.dtype, labels.dtype) == (np.int64, np.int64)
        assert (ids.tolist(), labels.tolist()) == tokens_and_labels(pieces, any_processor)
        n_supervised += int((labels != IGNORE).sum())
        (alone,) = tokenise([pieces], any_processor)
        assert np.array_equal(alone, tokens)  # neighbours change nothing
    assert n_supervised > 1000
    assert tokenise([], any_processor) == []


def test_ids_of_any_size_are_kept(any_processor):
    """`~id` of the first and the last token, in the smallest type that holds them."""
    last = max(any_processor.tokenizer.get_vocab().values())
    tokens = np.array([0, ~0, last, ~last], dtype=np.min_scalar_type(~last))
    ids, labels = expand(tokens, image_token_id=last + 1, n_image_tokens=4)
    assert ids.tolist() == [0, 0, last, last] and labels.tolist() == [0, IGNORE, last, IGNORE]

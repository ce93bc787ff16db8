"""`generate` in all its ways, against transformers' own model with the same weights."""

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from llava_fast.model.cache import Int8Cache

ROWS = [[4, "image", 6], [9], [2, "image", 3, "image", 7]]


@pytest.fixture
def asked(tiny: SimpleNamespace) -> SimpleNamespace:
    """Both models, and a left-padded prompt with and without images."""
    config = tiny.config({"num_key_value_heads": 2})
    ours, theirs = tiny.pair(config)
    batch = tiny.batch(config, ROWS, "left")
    return SimpleNamespace(
        config=config,
        ours=ours,
        theirs=theirs,
        batch=tiny.prompt(batch),
        one=tiny.prompt(tiny.single(batch, 2)),
        new=batch["input_ids"].shape[1],
    )


def same(asked: SimpleNamespace, tiny: SimpleNamespace, inputs: dict, **changes: object) -> torch.Tensor:
    """Sequences, checked to be those of transformers."""
    actual = asked.ours.generate(**inputs, generation_config=tiny.greedy(**changes))
    expected = asked.theirs.generate(**inputs, generation_config=tiny.greedy(**changes))
    assert torch.equal(actual.sequences, expected.sequences)
    for ours, theirs in zip(actual.logits, expected.logits, strict=True):
        tiny.assert_near(ours, theirs, 1e-5, "logits of a step")
    return actual.sequences


@pytest.mark.parametrize(
    "changes",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"use_cache": False},
        {"eos_token_id": 20, "max_new_tokens": 40},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
    ],
    ids=str,
)
def test_ways_of_decoding(asked: SimpleNamespace, tiny: SimpleNamespace, changes: dict) -> None:
    sequences = same(asked, tiny, asked.batch, **{"max_new_tokens": 16, **changes})
    assert sequences.shape[0] == 3 * changes.get("num_return_sequences", 1)


@pytest.mark.parametrize("changes", [{}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.7}], ids=str)
def test_sampling_with_a_seed(asked: SimpleNamespace, tiny: SimpleNamespace, changes: dict) -> None:
    drawn = []
    for seed in (1, 2):
        sequences = []
        for model in (asked.ours, asked.theirs):
            torch.manual_seed(seed)
            settings = tiny.greedy(do_sample=True, **{"top_k": 0, **changes})
            sequences.append(model.generate(**asked.batch, generation_config=settings).sequences)
        assert torch.equal(*sequences)
        drawn.append(sequences[0])
    assert not torch.equal(*drawn)


def test_a_row_that_ends_early_is_padded(asked: SimpleNamespace, tiny: SimpleNamespace) -> None:
    free = same(asked, tiny, asked.batch)[:, asked.new :]
    stop = int(free[0, 5])  # a token that row 0 writes early
    sequences = same(asked, tiny, asked.batch, eos_token_id=stop)[:, asked.new :]
    first = free[0].tolist().index(stop)
    assert sequences[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert not sequences[0, first + 1 :].any()


def test_without_an_attention_mask(asked: SimpleNamespace, tiny: SimpleNamespace) -> None:
    inputs = {name: value for name, value in asked.one.items() if name != "attention_mask"}
    assert torch.equal(same(asked, tiny, inputs), same(asked, tiny, asked.one))


def test_uint8_pixels(asked: SimpleNamespace, tiny: SimpleNamespace) -> None:
    from llava_fast.ops.patch_embed import CLIP_MEAN, CLIP_STD

    pixels = torch.randint(0, 256, (3, 12, 12, 3), dtype=torch.uint8)
    floats = ((pixels / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).permute(0, 3, 1, 2)
    ours = asked.ours.generate(**{**asked.batch, "pixel_values": pixels}, generation_config=tiny.greedy())
    theirs = asked.theirs.generate(**{**asked.batch, "pixel_values": floats}, generation_config=tiny.greedy())
    assert torch.equal(ours.sequences, theirs.sequences)


@pytest.mark.parametrize("premerged", [False, True])
def test_from_inputs_embeds(asked: SimpleNamespace, tiny: SimpleNamespace, premerged: bool) -> None:
    expected = asked.ours.generate(**asked.batch, generation_config=tiny.greedy()).sequences[:, asked.new :]
    ids, pixels = asked.batch["input_ids"], asked.batch["pixel_values"]
    embeds = asked.ours.get_input_embeddings()(ids).detach()
    inputs = {"attention_mask": asked.batch["attention_mask"]}
    if premerged:
        embeds[ids == tiny.IMAGE] = torch.cat(asked.ours.get_image_features(pixels).pooler_output)
    else:
        inputs["pixel_values"] = pixels
    actual = asked.ours.generate(inputs_embeds=embeds, **inputs, generation_config=tiny.greedy())
    assert torch.equal(actual.sequences, expected)


def test_only_the_first_step_sees_the_pixels(asked: SimpleNamespace, tiny: SimpleNamespace) -> None:
    calls = []
    asked.ours.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    lengths = []
    asked.ours.lm_head.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    asked.ours.generate(**asked.batch, generation_config=tiny.greedy(max_new_tokens=5))
    assert len(calls) == 1
    assert lengths == [1] * 5  # and logits are computed for the last token only


# Caches


@pytest.mark.parametrize("kind", ["dynamic", "sliding", "static"])
def test_a_cache_goes_on_where_it_stopped(tiny: SimpleNamespace, kind: str) -> None:
    """A second turn: the first prompt and its answer are in the cache, and only the rest is computed."""
    settings = {"num_key_value_heads": 2, **({"sliding_window": 6} if kind == "sliding" else {})}
    config = tiny.config(settings, kind="mistral" if kind == "sliding" else "llama")
    model = tiny.ours(config)
    inputs = tiny.prompt(tiny.batch(config, [[4, "image", 6]]))
    cache = {
        "dynamic": lambda: DynamicCache(),
        "sliding": lambda: DynamicCache(config=config.get_text_config()),
        "static": lambda: StaticCache(config=config.get_text_config(), max_cache_len=80),
    }[kind]()
    first = model.generate(**inputs, past_key_values=cache, generation_config=tiny.greedy(max_new_tokens=8))
    question = torch.randint(tiny.FIRST_TEXT_TOKEN, tiny.IMAGE, (1, 7))
    ids = torch.cat((first.sequences, question), 1)
    longer = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seen = int(cache.get_seq_length())
    assert seen == first.sequences.shape[1] - 1

    computed = []
    model.model.language_model.layers[0].register_forward_pre_hook(lambda _, args: computed.append(args[0].shape[1]))
    continued = {name: value for name, value in longer.items() if name != "pixel_values"}
    second = model.generate(**continued, past_key_values=cache, generation_config=tiny.greedy(max_new_tokens=8))
    assert computed[0] == ids.shape[1] - seen
    fresh = model.generate(**longer, generation_config=tiny.greedy(max_new_tokens=8))
    assert torch.equal(second.sequences, fresh.sequences)
    tiny.assert_near(torch.stack(second.logits), torch.stack(fresh.logits))


def test_a_cropped_cache(asked: SimpleNamespace, tiny: SimpleNamespace) -> None:
    cache = DynamicCache()
    ids = asked.one["input_ids"]
    asked.ours(**asked.one, past_key_values=cache, use_cache=True)
    cache.crop(-5)
    rest = asked.ours(input_ids=ids[:, -5:], past_key_values=cache, use_cache=True)
    whole = asked.theirs(**asked.one).logits
    tiny.assert_near(rest.logits, whole[:, -5:])
    assert cache.get_seq_length() == ids.shape[1]


def test_transformers_and_we_read_each_others_caches(asked: SimpleNamespace, tiny: SimpleNamespace) -> None:
    ids = asked.one["input_ids"]
    expected = asked.theirs(**asked.one).logits[:, -4:]
    start = {**asked.one, "input_ids": ids[:, :-4], "attention_mask": asked.one["attention_mask"][:, :-4]}
    for writer, reader in ((asked.ours, asked.theirs), (asked.theirs, asked.ours)):
        cache = writer(**start, use_cache=True).past_key_values
        tiny.assert_near(reader(input_ids=ids[:, -4:], past_key_values=cache, use_cache=True).logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_static_cache_in_pieces(asked: SimpleNamespace, tiny: SimpleNamespace, side: str) -> None:
    inputs = tiny.prompt(tiny.batch(asked.config, ROWS, side))
    ids, mask, total = inputs["input_ids"], inputs["attention_mask"], inputs["input_ids"].shape[1]
    embeds = asked.ours.get_input_embeddings()(ids).detach()
    embeds[ids == tiny.IMAGE] = torch.cat(asked.ours.get_image_features(inputs["pixel_values"]).pooler_output)
    cache = StaticCache(config=asked.config.get_text_config(), max_cache_len=total + 9)
    pieces, seen = [], 0
    while seen < total:
        step = min(total - seen, 1 if seen % 3 else 7)
        outputs = asked.ours(
            inputs_embeds=embeds[:, seen : seen + step],
            attention_mask=mask[:, : seen + step],
            past_key_values=cache,
            use_cache=True,
        )
        pieces.append(outputs.logits)
        seen += step
    expected = asked.theirs(**inputs).logits
    tiny.assert_near(torch.cat(pieces, 1)[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("window", [6, 200])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_sliding_windows(tiny: SimpleNamespace, window: int, cache: str) -> None:
    config = tiny.config({"sliding_window": window, "num_key_value_heads": 2}, kind="mistral")
    ours, theirs = tiny.pair(config)
    asked = SimpleNamespace(ours=ours, theirs=theirs)
    same(asked, tiny, tiny.prompt(tiny.batch(config, ROWS, "left")), cache_implementation=cache)


@pytest.mark.parametrize("make", [Int8Cache, StaticCache])
def test_a_padded_batch_too_long_for_a_static_cache_is_an_error(
    asked: SimpleNamespace, tiny: SimpleNamespace, make
) -> None:
    """With kernels, too, which drop a token without a slot."""
    inputs = tiny.prompt(tiny.batch(asked.config, [[4], [2]], "left"))
    settings = tiny.greedy(max_new_tokens=3)  # 6 tokens are written
    asked.ours.generate(**inputs, past_key_values=make(asked.config, max_cache_len=6), generation_config=settings)
    with pytest.raises(ValueError, match="6 tokens for a static cache of 5 slots"):
        asked.ours.generate(**inputs, past_key_values=make(asked.config, max_cache_len=5), generation_config=settings)


# The compiled decoding step of a static cache


class Counting:
    """A backend of torch.compile that compiles without Inductor, and counts the graphs that it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        self.graphs += 1
        return lookup_backend("aot_eager")(graph, inputs)

    def __deepcopy__(self, _: dict) -> "Counting":
        return self  # generate copies its settings

    def settings(self, tiny: SimpleNamespace, **changes: object) -> GenerationConfig:
        compiling = CompileConfig(backend=self, mode=None, fullgraph=True)
        compiling._compile_all_devices = True  # a CPU, too
        return tiny.greedy(compile_config=compiling, max_length=SLOTS, max_new_tokens=None, **changes)


SLOTS = 48
PROMPTS = {
    "left-padded": ROWS,
    "not padded": [[4, "image", 6]] * 3,
    "longer": [[20], [25, "image"], [1]],
    "text, left-padded": [[9], [4], [1]],
    "text, not padded": [[7]] * 3,
}


@pytest.fixture
def prompts(asked: SimpleNamespace, tiny: SimpleNamespace) -> Iterator[list[dict]]:
    """Prompts of several kinds. Compiling a second time for what has been compiled is an error."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield [tiny.prompt(tiny.batch(asked.config, rows, "left")) for rows in PROMPTS.values()]
    torch._dynamo.reset()


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_a_static_cache_is_compiled_for_once(
    asked: SimpleNamespace, tiny: SimpleNamespace, prompts: list[dict], whose: str
) -> None:
    """One graph for all steps of all prompts: for our model as for transformers', with the same answers."""
    counting = Counting()
    settings = counting.settings(tiny, cache_implementation="static")
    for prompt in prompts:
        actual = getattr(asked, whose).generate(**prompt, generation_config=settings)
        expected = asked.theirs.generate(**prompt, generation_config=tiny.greedy(max_length=SLOTS, max_new_tokens=None))
        assert torch.equal(actual.sequences, expected.sequences)
        tiny.assert_near(torch.stack(actual.logits), torch.stack(expected.logits))
    assert counting.graphs == counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_an_int8_cache_is_compiled_for_once(asked: SimpleNamespace, tiny: SimpleNamespace, prompts: list[dict]) -> None:
    counting = Counting()
    for prompt in prompts:
        answers = [
            asked.ours.generate(**prompt, past_key_values=Int8Cache(asked.config, SLOTS), generation_config=settings)
            for settings in (counting.settings(tiny), tiny.greedy(max_length=SLOTS, max_new_tokens=None))
        ]
        assert torch.equal(answers[0].sequences, answers[1].sequences)
    assert counting.graphs == 1


def test_a_prompt_in_chunks_is_compiled_for_once(
    asked: SimpleNamespace, tiny: SimpleNamespace, prompts: list[dict]
) -> None:
    """`generate` compiles the chunks, too: one graph for them, and one for the steps."""
    counting = Counting()
    inputs = tiny.prompt(tiny.batch(asked.config, [[18], [5]], "left"))
    settings = counting.settings(tiny, cache_implementation="static", prefill_chunk_size=6)
    with torch._dynamo.config.patch(error_on_recompile=False):
        actual = asked.ours.generate(**inputs, generation_config=settings)
    expected = asked.theirs.generate(**inputs, generation_config=tiny.greedy(max_length=SLOTS, max_new_tokens=None))
    assert torch.equal(actual.sequences, expected.sequences)
    assert counting.graphs == 2


# Streams


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value)

    def end(self) -> None:
        self.ended = True


class Letters:
    """As much of a tokenizer as streamers use: a token is a word of its number."""

    def decode(self, tokens: list[int] | torch.Tensor, **_: object) -> str:
        return "".join(f"<{int(token)}> " for token in tokens)


def test_streamers_get_every_token(asked: SimpleNamespace, tiny: SimpleNamespace) -> None:
    recorder = Recorder()
    result = asked.ours.generate(**asked.one, streamer=recorder, generation_config=tiny.greedy())
    assert recorder.ended
    assert len(recorder.pieces) == 33  # the prompt, then one at a time
    assert torch.equal(torch.cat([piece.flatten() for piece in recorder.pieces]), result.sequences[0])


def test_text_streamer(asked: SimpleNamespace, tiny: SimpleNamespace, capsys: pytest.CaptureFixture) -> None:
    result = asked.ours.generate(
        **asked.one, streamer=TextStreamer(Letters(), skip_prompt=True), generation_config=tiny.greedy()
    )
    new = result.sequences[0, asked.one["input_ids"].shape[1] :]
    assert capsys.readouterr().out.strip() == Letters().decode(new).strip()


def test_text_iterator_streamer(asked: SimpleNamespace, tiny: SimpleNamespace) -> None:
    expected = asked.ours.generate(**asked.one, generation_config=tiny.greedy()).sequences[0]
    streamer = TextIteratorStreamer(Letters(), skip_prompt=True, timeout=30)
    worker = threading.Thread(
        target=asked.ours.generate,
        kwargs={**asked.one, "streamer": streamer, "generation_config": tiny.greedy()},
    )
    worker.start()
    pieces = list(streamer)
    worker.join()
    assert len(pieces) > 10
    assert "".join(pieces) == Letters().decode(expected[asked.one["input_ids"].shape[1] :])


# Speculation


def test_prompt_lookup(asked: SimpleNamespace, tiny: SimpleNamespace) -> None:
    expected = asked.ours.generate(**asked.one, generation_config=tiny.greedy()).sequences
    actual = asked.ours.generate(**asked.one, generation_config=tiny.greedy(prompt_lookup_num_tokens=3))
    assert torch.equal(actual.sequences, expected)


def test_assisted_generation(asked: SimpleNamespace, tiny: SimpleNamespace) -> None:
    expected = asked.ours.generate(**asked.one, generation_config=tiny.greedy()).sequences
    for assistant in (tiny.ours(asked.config, 0), tiny.ours(asked.config, 1)):  # the same mind, and another
        actual = asked.ours.generate(**asked.one, assistant_model=assistant, generation_config=tiny.greedy())
        assert torch.equal(actual.sequences, expected)


# What is refused


@pytest.mark.parametrize("as_keyword", [True, False])
def test_right_padding_is_refused(asked: SimpleNamespace, tiny: SimpleNamespace, as_keyword: bool) -> None:
    inputs = tiny.prompt(tiny.batch(asked.config, ROWS, "right"))
    with pytest.raises(ValueError, match=r"attention_mask row 0 ends in padding; .*padding_side = 'left'") as caught:
        if as_keyword:
            asked.ours.generate(**inputs, generation_config=tiny.greedy())
        else:
            ids = inputs.pop("input_ids")
            asked.ours.generate(ids, tiny.greedy(), **inputs)
    assert "\n" not in str(caught.value)


def test_misspelt_arguments_are_refused(asked: SimpleNamespace, tiny: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="pixel_vals"):
        asked.ours.generate(**asked.one, pixel_vals=torch.zeros(1), generation_config=tiny.greedy())


def test_wrong_number_of_images(asked: SimpleNamespace, tiny: SimpleNamespace) -> None:
    inputs = {**asked.batch, "pixel_values": asked.batch["pixel_values"][:1]}
    with pytest.raises(ValueError, match="tokens: 27, features: 9"):
        asked.ours.generate(**inputs, generation_config=tiny.greedy())

"""What users of transformers' LLaVA class rely on: every call is made on both classes, and the results compared."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import Cache
from transformers.utils import find_labels, output_capturing

from llava_fast import LlavaForConditionalGeneration, LlavaModel

EVEN = [[3, "image", 4], [2, "image", 5]]  # no padding, of which the two models return different hidden states
PADDED = [[3, "image", 4], [2, "image", 9], [5]]

# Before 5.23, `get_image_features` also returned the hidden states that were neither features nor asked for.
STATES_OF_ALL_LAYERS = not hasattr(output_capturing, "select_hidden_states")


def assert_alike(actual: Any, expected: Any, what: str = "outputs") -> None:
    """The same types, lengths, keys, shapes and dtypes; floating values to 1e-5 of the tensor's largest."""
    if actual is None and STATES_OF_ALL_LAYERS and isinstance(expected, torch.Tensor):
        return
    if not isinstance(expected, torch.Tensor):
        assert type(actual) is type(expected), f"{what}: {type(actual)}, expected {type(expected)}"
    if isinstance(expected, dict):
        assert list(actual) == list(expected), f"{what}: {list(actual)}, expected {list(expected)}"
        actual, expected = list(actual.values()), list(expected.values())
    if isinstance(expected, tuple | list):
        assert len(actual) == len(expected), f"{what}: {len(actual)} entries, expected {len(expected)}"
        for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            assert_alike(ours, theirs, f"{what}[{i}]")
    elif isinstance(expected, torch.Tensor):
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
        if expected.is_floating_point():
            assert torch.equal(actual.isinf(), expected.isinf()), what  # suppressed tokens
            actual, expected = (values.masked_fill(values.isinf(), 0) for values in (actual, expected))
            assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max(), what
        else:
            assert torch.equal(actual, expected), what
    elif not isinstance(expected, Cache):
        assert actual == expected, what


def on_both(tiny: SimpleNamespace, call: Callable[[Any], Any], **config: Any) -> tuple[Any, Any]:
    """The call's results on our model and on transformers', with the same weights."""
    return tuple(call(model) for model in tiny.pair(tiny.config(**config), attn_implementation="eager"))


# Signatures


@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "LlavaModel"])
def test_labels_found_in_the_signature(name: str) -> None:
    ours = {"LlavaForConditionalGeneration": LlavaForConditionalGeneration, "LlavaModel": LlavaModel}[name]
    assert find_labels(ours) == find_labels(getattr(transformers, name))


@pytest.mark.parametrize("of", ["model", "whole"])
def test_arguments_of_other_models_are_ignored(tiny: SimpleNamespace, of: str) -> None:
    inputs = {**tiny.prompt(tiny.batch(tiny.config(), EVEN)), "token_types": [1], "use_cache": False}
    assert_alike(*on_both(tiny, lambda model: (model.model if of == "model" else model)(**inputs)))


# The loss


@pytest.mark.parametrize("changes", [{"shift_labels": True}, {"ignore_index": 5}, {"num_items_in_batch": 7}], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_arguments_of_the_loss(tiny: SimpleNamespace, changes: dict, training: bool) -> None:
    inputs = {**tiny.batch(tiny.config(), EVEN), **changes}
    if "shift_labels" in changes:
        inputs["shift_labels"] = inputs["labels"].flip(1)
    if "ignore_index" in changes:
        inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == -100, 5)
    assert_alike(*on_both(tiny, lambda model: model.train(training)(**inputs).loss))


def test_a_loss_function_of_the_users_own(tiny: SimpleNamespace) -> None:
    inputs = tiny.batch(tiny.config(), EVEN)

    def call(model: Any) -> Any:
        model.loss_function = lambda logits, labels, **_: (logits.logsumexp(-1) * (labels >= 0)).sum()
        return model.train()(**inputs).loss

    assert_alike(*on_both(tiny, call))


@pytest.mark.parametrize("need", ["shift_labels", "a loss of the user's own", "a head with a hook"])
def test_a_loss_that_needs_logits_gets_them(tiny: SimpleNamespace, need: str) -> None:
    """Even if they are not to be returned."""
    inputs = tiny.batch(tiny.config(), EVEN)
    if need == "shift_labels":
        inputs["shift_labels"] = inputs["labels"].flip(1)

    def call(model: Any) -> Any:
        if need == "a loss of the user's own":
            model.loss_function = lambda logits, labels, **_: (logits.logsumexp(-1) * (labels >= 0)).sum()
        elif need == "a head with a hook":
            model.lm_head.register_forward_hook(lambda module, inputs, output: output / 2)
        wanted = {"return_logits": False} if isinstance(model, LlavaForConditionalGeneration) else {}
        return model.train()(**inputs, **wanted).loss

    assert_alike(*on_both(tiny, call))


# Gradient checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("asked", [{}, {"output_hidden_states": True, "output_attentions": True}, {"use_cache": True}])
def test_gradient_checkpointing(tiny: SimpleNamespace, asked: dict, reentrant: bool) -> None:
    inputs = {**tiny.batch(tiny.config(), EVEN), **asked}

    def call(model: Any) -> Any:
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        outputs = model(**inputs)
        outputs.loss.backward()
        kept = outputs.past_key_values, outputs.hidden_states, outputs.attentions
        return outputs.loss, *kept, model.lm_head.weight.grad, model.get_input_embeddings().weight.grad

    assert_alike(*on_both(tiny, call))


def test_gradient_checkpointing_cannot_read_a_cache(tiny: SimpleNamespace) -> None:
    ids = torch.arange(5, 15)[None]

    def call(model: Any) -> None:
        cache = model(input_ids=ids, use_cache=True).past_key_values
        model.train().gradient_checkpointing_enable()
        with pytest.raises(ValueError if isinstance(model, LlavaForConditionalGeneration) else RuntimeError) as caught:
            model(input_ids=ids[:, :4], past_key_values=cache)
        assert "\n" not in str(caught.value)

    on_both(tiny, call)


# Hidden states and attentions


@pytest.mark.parametrize("part", ["top", "text", "vision"])
@pytest.mark.parametrize("flag", ["output_hidden_states", "output_attentions"])
def test_output_flags_of_the_configs(tiny: SimpleNamespace, part: str, flag: str) -> None:
    config = tiny.config()
    setattr(config if part == "top" else getattr(config, f"{part}_config"), flag, True)
    inputs = tiny.batch(config, EVEN)
    ours, theirs = tiny.pair(config, attn_implementation="eager")
    assert_alike(ours(**inputs), theirs(**inputs))
    actual, expected = (model.get_image_features(inputs["pixel_values"]) for model in (ours, theirs))
    assert_alike(actual.hidden_states, expected.hidden_states)
    assert_alike(actual.attentions, expected.attentions)


@pytest.mark.parametrize("of", ["model", "whole"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"output_hidden_states": True, "output_attentions": True, "return_dict": False},
        {"vision_feature_layer": -1, "output_hidden_states": False},
        {"vision_feature_layer": 3, "vision_feature_select_strategy": "full", "return_dict": False},
        {"output_hidden_states": True, "image_tokens": 3},
    ],
    ids=str,
)
def test_image_features(tiny: SimpleNamespace, of: str, arguments: dict) -> None:
    """Whenever something of the whole tower is asked for, so that it runs to its end, all outputs are transformers'."""
    pixels = torch.randn(2, 3, 12, 12)
    assert_alike(
        *on_both(tiny, lambda model: (model.model if of == "model" else model).get_image_features(pixels, **arguments))
    )


def test_image_features_when_only_they_are_asked_for(tiny: SimpleNamespace) -> None:
    """The tower stops at the feature layer, so the last hidden state is that layer's; the rest is transformers'."""
    pixels = torch.randn(2, 3, 12, 12)
    actual, expected = on_both(tiny, lambda model: model.get_image_features(pixels))
    assert_alike(actual.last_hidden_state, expected.hidden_states[-2])
    expected.last_hidden_state = actual.last_hidden_state
    assert_alike(actual, expected)


def test_gradients_of_hidden_states_and_attentions(tiny: SimpleNamespace) -> None:
    inputs = tiny.batch(tiny.config({"num_key_value_heads": 2}), EVEN)

    def gradients(model: Any) -> list[torch.Tensor]:
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True, use_cache=False)
        kept = [*outputs.hidden_states[:-1], *outputs.attentions, outputs.image_hidden_states]
        features = model.get_image_features(
            inputs["pixel_values"], output_hidden_states=True, output_attentions=True, vision_feature_layer=-1
        )
        kept += [*features.hidden_states, *features.attentions]
        for tensor in kept:
            tensor.retain_grad()
        (outputs.loss + sum(rows.square().sum() for rows in features.pooler_output)).backward()
        return [tensor.grad for tensor in kept]

    assert_alike(*on_both(tiny, gradients, text={"num_key_value_heads": 2}))


# Generation

STATES = {
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "guided": {"guidance_scale": 1.5},
    "prefill in chunks": {"prefill_chunk_size": 4},
    "another feature layer": {"vision_feature_layer": -1},
}


def generated(tiny: SimpleNamespace, inputs: dict, **changes: Any) -> tuple[Any, Any]:
    """What `generate` returns, from equal random states."""

    def call(model: Any) -> Any:
        torch.manual_seed(1)
        return model.generate(**inputs, generation_config=tiny.greedy(**{"max_new_tokens": 5, **changes}))

    return on_both(tiny, call)


@pytest.mark.parametrize("way", WAYS)
def test_generate_returns_states(tiny: SimpleNamespace, way: str) -> None:
    changes = dict(WAYS[way])
    inputs = tiny.prompt(tiny.batch(tiny.config(), EVEN))
    if "vision_feature_layer" in changes:
        inputs["vision_feature_layer"] = changes.pop("vision_feature_layer")
    assert_alike(*generated(tiny, inputs, **STATES, **changes))


@pytest.mark.parametrize("way", ["greedy", "beams", "static cache", "prefill in chunks"])
def test_generate_from_padded_prompts(tiny: SimpleNamespace, way: str) -> None:
    inputs = tiny.prompt(tiny.batch(tiny.config(), PADDED, "left"))
    assert_alike(*generated(tiny, inputs, output_scores=True, **WAYS[way]))


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
def test_generate_with_drafted_tokens(tiny: SimpleNamespace, how: str) -> None:
    config, smaller = tiny.config(), tiny.config({"num_hidden_layers": 1})
    inputs = tiny.prompt(tiny.batch(config, [[3, "image", 6]]))
    results = []
    for model, assistant in zip(
        tiny.pair(config, attn_implementation="eager"),
        tiny.pair(smaller, seed=3, attn_implementation="eager"),
        strict=True,
    ):
        drafts = {"prompt_lookup_num_tokens": 2} if how == "prompt lookup" else {"assistant_model": assistant}
        results.append(model.generate(**inputs, **drafts, generation_config=tiny.greedy(max_new_tokens=8, **STATES)))
    assert_alike(*results)


@pytest.mark.parametrize("given", ["ids too", "pixels too", "alone"])
def test_generate_from_embeddings(tiny: SimpleNamespace, given: str) -> None:
    inputs = tiny.prompt(tiny.batch(tiny.config(), EVEN))
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]

    def call(model: Any) -> Any:
        embeds = model.get_input_embeddings()(ids).detach().clone()
        more = {"pixel_values": pixels} if given == "pixels too" else {}
        if given != "pixels too":
            embeds[ids == tiny.IMAGE] = torch.cat(model.get_image_features(pixels).pooler_output).detach()
        if given == "ids too":
            more["input_ids"] = ids
        return model.generate(inputs_embeds=embeds, **more, generation_config=tiny.greedy(max_new_tokens=5))

    assert_alike(*on_both(tiny, call))


def test_a_second_turn_and_the_scores_of_a_first(tiny: SimpleNamespace) -> None:
    inputs = tiny.prompt(tiny.batch(tiny.config(), EVEN))

    def call(model: Any) -> Any:
        settings = tiny.greedy(max_new_tokens=5, output_scores=True)
        first = model.generate(**inputs, generation_config=settings)
        ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7], [8, 9, 10]])], dim=1)
        second = model.generate(ids, past_key_values=first.past_key_values, generation_config=settings)
        beams = model.generate(**inputs, generation_config=tiny.greedy(num_beams=2, output_scores=True))
        return second, model.compute_transition_scores(beams.sequences, beams.scores, beams.beam_indices)

    assert_alike(*on_both(tiny, call))


def test_a_misspelt_argument_of_generate(tiny: SimpleNamespace) -> None:
    inputs = tiny.prompt(tiny.batch(tiny.config(), EVEN))

    def call(model: Any) -> str:
        with pytest.raises(ValueError, match="max_new_tokes") as caught:
            model.generate(**inputs, max_new_tokes=3)
        return str(caught.value)

    ours, theirs = on_both(tiny, call)
    assert ours == theirs


# The module


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("of", ["model", "whole"])
@pytest.mark.parametrize("size", [{"new_num_tokens": 120}, {"new_num_tokens": 100}, {"pad_to_multiple_of": 8}], ids=str)
def test_embeddings_of_another_size(tiny: SimpleNamespace, tied: bool, of: str, size: dict) -> None:
    inputs = tiny.batch(tiny.config(), EVEN)

    def call(model: Any) -> Any:
        resized = (model.model if of == "model" else model).resize_token_embeddings(**size, mean_resizing=False)
        config = model.config.get_text_config()
        rows = min(tiny.VOCABULARY, config.vocab_size)  # the others are random
        if of == "model":
            return config.vocab_size, tuple(resized.weight.shape), model.model(**inputs).last_hidden_state
        found = model(**inputs, use_cache=False).logits
        tied = model.lm_head.weight is resized.weight
        return config.vocab_size, tuple(resized.weight.shape), tied, found.shape, found[..., :rows]

    assert_alike(*on_both(tiny, call, text={"tie_word_embeddings": tied}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_another_dtype(tiny: SimpleNamespace, dtype: torch.dtype) -> None:
    inputs = tiny.batch(tiny.config(), EVEN)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    ours, theirs = on_both(tiny, lambda model: model.to(dtype)(**inputs, use_cache=False))
    assert [value.dtype for value in ours.values()] == [value.dtype for value in theirs.values()]
    inputs["pixel_values"] = inputs["pixel_values"].double()
    exact = tiny.stock(tiny.config()).double()(**inputs).logits
    errors = [float((found.logits - exact).abs().mean()) for found in (ours, theirs)]
    assert errors[0] <= 1.5 * errors[1] + 1e-12


@pytest.mark.parametrize("recorded", [True, False], ids=["with gradients", "without"])
def test_autocast(tiny: SimpleNamespace, recorded: bool) -> None:
    """Both compute the same but for rounding, so their errors are alike: the mean over many tokens, to 1 %."""
    config = tiny.config({"num_hidden_layers": 4})
    inputs = tiny.prompt(tiny.batch(config, [[30, "image", 40], [35, "image", 35]]))
    ours, theirs = tiny.pair(config)
    with torch.set_grad_enabled(recorded):
        exact = theirs(**inputs).logits
        with torch.autocast("cpu", torch.bfloat16):
            found = [model(**inputs).logits for model in (ours, theirs)]
    actual, expected = (float((logits - exact).detach().abs().mean()) for logits in found)
    assert actual == pytest.approx(expected, rel=0.01)


def test_inputs_that_require_gradients(tiny: SimpleNamespace) -> None:
    inputs = tiny.batch(tiny.config(), EVEN)

    def call(model: Any) -> list[bool]:
        model.requires_grad_(False).train()
        model.enable_input_require_grads()
        with_it = model(**inputs).loss.requires_grad
        model.disable_input_require_grads()
        return [with_it, model(**inputs).loss.requires_grad]

    ours, theirs = on_both(tiny, call)
    assert ours == theirs == [True, False]


def test_parts_are_found_under_the_same_names(tiny: SimpleNamespace) -> None:
    def call(model: Any) -> dict[str, str]:
        names = {id(module): name for name, module in model.named_modules()}
        return {
            "decoder": names[id(model.get_decoder())],
            "image encoder": names[id(model.get_encoder("image"))],
            "base": names[id(model.base_model)],
            "embeddings": names[id(model.get_input_embeddings())],
            "embeddings of the base": names[id(model.model.get_input_embeddings())],
            "head": names[id(model.get_output_embeddings())],
            "loss": model.loss_function.__name__,
            "decoder config": type(model.config.get_text_config(decoder=True)).__name__,
        }

    ours, theirs = on_both(tiny, call)
    assert ours == theirs


def test_outputs_by_position_and_name(tiny: SimpleNamespace) -> None:
    asked = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    inputs = {**tiny.batch(tiny.config(), EVEN), **asked}

    def call(model: Any) -> Any:
        outputs = model(**inputs)
        return list(outputs), outputs.to_tuple(), outputs[:2], model(**inputs, return_dict=False)

    assert_alike(*on_both(tiny, call))


# Saving


@pytest.mark.parametrize("save_original_format", [True, False])
def test_names_in_the_file(tiny: SimpleNamespace, tmp_path: Path, save_original_format: bool) -> None:
    tiny.ours(tiny.config()).save_pretrained(tmp_path / "released")  # in the layout of the released checkpoints
    for kind in (LlavaForConditionalGeneration, transformers.LlavaForConditionalGeneration):
        model = kind.from_pretrained(tmp_path / "released")
        name = "ours" if kind is LlavaForConditionalGeneration else "theirs"
        model.save_pretrained(tmp_path / name, save_original_format=save_original_format)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for read_by in (transformers.LlavaForConditionalGeneration, LlavaForConditionalGeneration):
        again, info = read_by.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        for name, weight in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], weight), name


@pytest.mark.parametrize("save_original_format", [True, False])
def test_the_base_model_alone(tiny: SimpleNamespace, tmp_path: Path, save_original_format: bool) -> None:
    tiny.ours(tiny.config()).save_pretrained(tmp_path / "released")
    inputs = tiny.prompt(tiny.batch(tiny.config(), EVEN))
    found = []
    for kind in (LlavaModel, transformers.LlavaModel):
        model = kind.from_pretrained(tmp_path / "released")
        folder = tmp_path / kind.__module__
        model.save_pretrained(folder, save_original_format=save_original_format)
        names = load_file(folder / "model.safetensors").keys()
        found.append([sorted(names), *(m(**inputs).last_hidden_state for m in (model, kind.from_pretrained(folder)))])
    assert_alike(*found)


@pytest.mark.parametrize("of", ["model", "whole"])
def test_adapters_that_transformers_adds(tiny: SimpleNamespace, tmp_path: Path, of: str) -> None:
    """On the tower and the decoder."""
    inputs = tiny.prompt(tiny.batch(tiny.config(), EVEN))

    def call(whole: Any) -> Any:
        folder = tmp_path / type(whole).__module__
        model = whole.model if of == "model" else whole
        plain = model(**inputs)[0]
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
        adapted = model(**inputs)[0]
        assert not torch.equal(adapted, plain)
        model.save_pretrained(folder)
        model.delete_adapter("default")
        model.load_adapter(folder)
        assert torch.equal(model(**inputs)[0], adapted)
        return adapted, load_file(folder / "adapter_model.safetensors"), sorted(file.name for file in folder.iterdir())

    assert_alike(*on_both(tiny, call))


def test_memory_names_do_not_go_with_the_original_layout(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = tiny.ours(tiny.config())
    with pytest.raises(ValueError, match=r"save_original_format=False goes with layout='hf'") as caught:
        model.save_pretrained(tmp_path, layout="original", mm_vision_tower="a/clip", save_original_format=False)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())

"""transformers' face of the model: what its common model tests check of every model."""

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, LlavaConfig

from llava_fast.drop_in import LlavaForConditionalGeneration

ROWS = [[4, "image", 6], [9], [2, "image", 3, "image", 7]]


# Construction


def test_from_config_makes_the_same_model(tiny: SimpleNamespace) -> None:
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration._from_config(tiny.config())
    torch.manual_seed(1)
    other = LlavaForConditionalGeneration(tiny.config())
    assert model.state_dict().keys() == other.state_dict().keys() == tiny.stock(tiny.config()).state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
    assert LlavaForConditionalGeneration._from_config(tiny.config(), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_fresh_weights_are_distributed_as_in_transformers(tiny: SimpleNamespace) -> None:
    # Wide enough that a standard deviation is known to a few percent.
    config = tiny.config(
        {"hidden_size": 128, "intermediate_size": 192, "initializer_range": 0.03},
        {"hidden_size": 96, "intermediate_size": 160, "initializer_factor": 2.0},
    )
    ours = LlavaForConditionalGeneration(config).state_dict()
    theirs = type(tiny.stock(tiny.config()))(config).state_dict()
    for name, weight in theirs.items():
        assert ours[name].shape == weight.shape
        if weight.dim() == 1 and "class_embedding" not in name:
            assert torch.equal(ours[name], weight), name  # zeros and ones
        else:
            few = weight.numel() < 1000
            assert float(ours[name].std()) == pytest.approx(float(weight.std()), rel=0.3 if few else 0.1), name
            assert abs(float(ours[name].mean())) < 4 * float(weight.std()) * weight.numel() ** -0.5, name


def test_config_round_trip(tiny: SimpleNamespace, tmp_path) -> None:
    config = tiny.config(mm_projector_type="mlp3x_gelu", image_attention="bidirectional")
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is LlavaConfig
    assert (again.mm_projector_type, again.image_attention) == ("mlp3x_gelu", "bidirectional")
    assert LlavaForConditionalGeneration(again).state_dict().keys() == tiny.ours(config).state_dict().keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "mlp0x_gelu"}, "mm_projector_type is 'mlp0x_gelu'"),
        ({"mm_projector_type": "mlpx_gelu"}, "mm_projector_type is 'mlpx_gelu'"),
        ({"mm_projector_type": "resampler"}, "mm_projector_type is 'resampler'"),
        ({"mm_projector_type": "identity"}, "identity projector needs equal widths"),
        ({"image_attention": "full"}, "image_attention is 'full'"),
        ({"vision_feature_layer": 4}, "vision_feature_layer 4 is out of range"),
        ({"vision_feature_layer": -5}, "vision_feature_layer -5 is out of range"),
        ({"vision_feature_layer": [-2, 9]}, "vision_feature_layer 9 is out of range"),
        ({"text": {"attention_dropout": 0.1}}, "text_config.attention_dropout is 0.1"),
        ({"vision": {"attention_dropout": 0.1}}, "vision_config.attention_dropout is 0.1"),
    ],
)
def test_configs_that_cannot_be_built(tiny: SimpleNamespace, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        LlavaForConditionalGeneration(tiny.config(**changes))
    assert "\n" not in str(caught.value)


def test_unsupported_towers_and_language_models(tiny: SimpleNamespace) -> None:
    parts = {"vision_config": tiny.config().vision_config, "text_config": tiny.config().text_config}
    siglip = AutoConfig.for_model("siglip_vision_model")
    with pytest.raises(ValueError, match=r"vision_config.model_type is 'siglip_vision_model'"):
        LlavaForConditionalGeneration(LlavaConfig(**{**parts, "vision_config": siglip}))
    gpt2 = AutoConfig.for_model("gpt2")
    with pytest.raises(ValueError, match=r"text_config.model_type is 'gpt2'; supported: llama, mistral"):
        LlavaForConditionalGeneration(LlavaConfig(**{**parts, "text_config": gpt2}))


# Outputs


def test_image_features_with_states_and_attentions(tiny: SimpleNamespace) -> None:
    config = tiny.config(vision_feature_layer=[1, -1])
    model, theirs = tiny.pair(config, attn_implementation="eager")
    pixels = torch.randn(3, 3, 12, 12)
    asked = {"output_hidden_states": True, "output_attentions": True}
    actual, expected = model.get_image_features(pixels, **asked), theirs.get_image_features(pixels, **asked)
    for ours, reference in zip(actual.pooler_output, expected.pooler_output, strict=True):
        tiny.assert_near(ours, reference)
    for field in ("hidden_states", "attentions"):
        for ours, reference in zip(actual[field], expected[field], strict=True):
            tiny.assert_near(ours, reference, what=field)
    tiny.assert_near(actual.last_hidden_state, expected.last_hidden_state)
    assert isinstance(model.get_image_features(pixels, return_dict=False), tuple)


def test_return_dict_false(tiny: SimpleNamespace) -> None:
    config = tiny.config()
    model = tiny.ours(config)
    inputs = tiny.batch(config, ROWS)
    as_dict = model(**inputs, use_cache=False)
    as_tuple = model(**inputs, use_cache=False, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == 3  # loss, logits, image features
    for ours, reference in zip(as_tuple, as_dict.to_tuple(), strict=True):
        assert torch.equal(ours, reference)
    assert torch.equal(model.model(**tiny.prompt(inputs), return_dict=False)[0], model.model(**tiny.prompt(inputs))[0])


def test_outputs_pickle_and_copy(tiny: SimpleNamespace) -> None:
    config = tiny.config()
    model = tiny.ours(config)
    with torch.no_grad():
        outputs = model(**tiny.batch(config, ROWS), output_hidden_states=True)
    for again in (pickle.loads(pickle.dumps(outputs)), copy.deepcopy(outputs)):
        assert type(again) is type(outputs)
        assert torch.equal(again.logits, outputs.logits)
        assert torch.equal(again.hidden_states[1], outputs.hidden_states[1])
        assert torch.equal(again.past_key_values.layers[0].keys, outputs.past_key_values.layers[0].keys)


def test_model_copies_and_its_state_dict_saves(tiny: SimpleNamespace) -> None:
    config = tiny.config({"tie_word_embeddings": True})
    model = tiny.ours(config)
    inputs = tiny.batch(config, ROWS)
    again = copy.deepcopy(model)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = LlavaForConditionalGeneration(config).eval()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    "keep", [0, 1, 5, torch.tensor([2, 7]), torch.tensor([[1, 4], [0, 3], [8, 2]]), "mask"], ids=str
)
def test_logits_to_keep(tiny: SimpleNamespace, keep: int | str | torch.Tensor) -> None:
    config = tiny.config()
    model, theirs = tiny.pair(config)
    inputs = tiny.prompt(tiny.batch(config, ROWS))
    if isinstance(keep, str):
        keep = inputs["attention_mask"].bool()
    actual, expected = model(**inputs, logits_to_keep=keep), theirs(**inputs, logits_to_keep=keep)
    if isinstance(keep, torch.Tensor):
        tiny.assert_near(actual.logits, expected.logits)
    else:
        real = inputs["attention_mask"].bool()[:, -keep:]
        assert actual.logits.shape == expected.logits.shape
        tiny.assert_near(actual.logits[real], expected.logits[real])


def test_loss_divided_by_num_items_in_batch(tiny: SimpleNamespace) -> None:
    config = tiny.config()
    model, theirs = tiny.pair(config)
    inputs = tiny.batch(config, ROWS)
    actual, expected = (m(**inputs, num_items_in_batch=torch.tensor(37)) for m in (model, theirs))
    tiny.assert_near(actual.loss, expected.loss)
    assert not torch.isclose(actual.loss, model(**inputs).loss)


# Training


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(tiny: SimpleNamespace, use_reentrant: bool) -> None:
    config = tiny.config({"num_key_value_heads": 2})
    plain, saving = tiny.ours(config).train(), tiny.ours(config).train()
    assert not saving.is_gradient_checkpointing
    saving.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert saving.is_gradient_checkpointing
    if use_reentrant:  # it needs an input that requires a gradient
        saving.enable_input_require_grads()
    calls = []
    for layer in (saving.model.language_model.layers[0], saving.model.vision_tower.encoder.layers[0]):
        layer.mlp.register_forward_pre_hook(lambda module, _: calls.append(module))
    inputs = tiny.batch(config, ROWS)
    expected, actual = plain(**inputs), saving(**inputs)
    expected.loss.backward()
    actual.loss.backward()
    assert torch.equal(actual.loss, expected.loss)
    ours, reference = tiny.gradients(saving), tiny.gradients(plain)
    for name in reference:
        assert torch.equal(ours[name], reference[name]), name
    assert len(calls) == 4  # each layer once more in the backward pass
    saving.gradient_checkpointing_disable()
    assert not saving.is_gradient_checkpointing


def test_training_mode_changes_nothing_but_the_cache(tiny: SimpleNamespace) -> None:
    config = tiny.config()
    model = tiny.ours(config)
    inputs = tiny.batch(config, ROWS)
    evaluated, trained = model(**inputs), model.train()(**inputs, return_logits=True)
    assert torch.equal(evaluated.logits, trained.logits)
    assert torch.equal(evaluated.loss, trained.loss)
    assert evaluated.past_key_values is not None
    assert trained.past_key_values is None
    assert model(**inputs, use_cache=True).past_key_values.get_seq_length() == inputs["input_ids"].shape[1]


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(tiny: SimpleNamespace, dtype: torch.dtype) -> None:
    config = tiny.config()
    exact = tiny.ours(config).double()
    model, theirs = (m.to(dtype) for m in tiny.pair(config))
    inputs = tiny.batch(config, ROWS)
    real = inputs["attention_mask"].bool()
    truth = exact(**inputs).logits[real]
    actual, expected = model(**inputs), theirs(**inputs)  # float32 pixels into another dtype
    assert actual.logits.dtype == expected.logits.dtype == dtype
    assert actual.loss.dtype == expected.loss.dtype
    ours, reference = ((o.logits[real].double() - truth).abs().max() for o in (actual, expected))
    if dtype == torch.float64:
        tiny.assert_near(actual.logits[real], expected.logits[real], 1e-6)  # the angles and norms are float32 in both
    else:
        assert ours <= 2 * reference, f"off by {ours:.3g}, transformers by {reference:.3g}"
        assert reference > 0
    actual.loss.backward()
    assert all(p.grad is None or p.grad.dtype == dtype for p in model.parameters())


def test_mixed_dtypes_of_pixels_and_model(tiny: SimpleNamespace) -> None:
    config = tiny.config()
    model = tiny.ours(config)
    inputs = tiny.batch(config, ROWS)
    rounded = {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}
    expected = model(**{**inputs, "pixel_values": rounded["pixel_values"].float()})
    assert torch.equal(model(**rounded).logits, expected.logits)
    assert model.half().lm_head.weight.dtype == torch.float16
    pixels = torch.randint(0, 256, (3, 12, 12, 3), dtype=torch.uint8)
    assert model(**{**inputs, "pixel_values": pixels}).logits.dtype == torch.float16


def test_autocast(tiny: SimpleNamespace) -> None:
    config = tiny.config()
    model, theirs = tiny.pair(config)
    inputs = tiny.batch(config, ROWS)
    real = inputs["attention_mask"].bool()
    truth = model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = model(**inputs), theirs(**inputs)
    ours, reference = ((o.logits.float() - truth.logits)[real].abs().max() for o in (actual, expected))
    assert 0 < reference
    assert ours <= 2 * reference
    actual.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


# Embeddings


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("size", "multiple", "result"), [(150, None, 150), (105, 64, 128), (100, None, 100)])
def test_resize_token_embeddings(
    tiny: SimpleNamespace, tied: bool, size: int, multiple: int | None, result: int, tmp_path
) -> None:
    config = tiny.config({"tie_word_embeddings": tied})
    model = tiny.ours(config)
    before = model.get_input_embeddings().weight.detach().clone()
    head = model.lm_head.weight.detach().clone()
    inputs = tiny.batch(config, ROWS)
    with torch.no_grad():
        old = model(**inputs).logits
    resized = model.resize_token_embeddings(size, pad_to_multiple_of=multiple)
    kept = min(result, tiny.VOCABULARY)
    assert resized is model.get_input_embeddings()
    assert model.config.text_config.vocab_size == model.get_input_embeddings().num_embeddings == result
    assert model.lm_head.out_features == model.lm_head.weight.shape[0] == result
    assert torch.equal(model.get_input_embeddings().weight[:kept], before[:kept])
    assert torch.equal(model.lm_head.weight[:kept], head[:kept])
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    inputs["input_ids"].clamp_(max=result - 1)
    inputs["labels"].clamp_(max=result - 1)
    outputs = model(**inputs)
    assert outputs.logits.shape[-1] == result
    tiny.assert_near(outputs.logits[..., :kept], old[..., :kept])
    outputs.loss.backward()
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, outputs.logits)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) is tied


def test_embeddings_get_and_set(tiny: SimpleNamespace) -> None:
    model = tiny.ours(tiny.config())
    embeddings, head = torch.nn.Embedding(7, 32), torch.nn.Linear(32, 7, bias=False)
    model.set_input_embeddings(embeddings)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is model.model.language_model.embed_tokens is embeddings
    assert model.get_output_embeddings() is model.lm_head is head


# Compilation


@pytest.mark.parametrize("return_logits", [True, False])
def test_compiles_in_one_graph(tiny: SimpleNamespace, return_logits: bool) -> None:
    config = tiny.config()
    model = tiny.ours(config).train()
    rows = [[4, "image", 6], [9], [2, "image", 3]]
    inputs = {**tiny.batch(config, rows), "return_logits": return_logits}
    expected = model(**inputs)
    expected.loss.backward()
    gradients = tiny.gradients(model)
    model.zero_grad()
    torch._dynamo.reset()
    actual = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
    actual.loss.backward()
    tiny.assert_near(actual.loss, expected.loss)
    if return_logits:
        real = inputs["attention_mask"].bool()
        tiny.assert_near(actual.logits[real], expected.logits[real])
    for name, gradient in tiny.gradients(model).items():
        if gradients[name].abs().max() > 1e-5:
            tiny.assert_near(gradient, gradients[name], 1e-4, name)

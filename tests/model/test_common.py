"""What transformers' common model tests check of every model, and what is ours alone: uint8 pixels, packed rows,
bidirectional images, key ranges given by the caller."""

import copy
import io
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, DynamicCache, LlavaConfig

from llava_fast.drop_in import LlavaForConditionalGeneration
from llava_fast.model.vision import CLIP_MEAN, CLIP_STD
from llava_fast.sequence import pack

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
    ("kind", "layers"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3), ("identity", 0)]
)
def test_projector_types(tiny: SimpleNamespace, kind: str, layers: int) -> None:
    config = tiny.config({"hidden_size": 24}, mm_projector_type=kind)
    model = tiny.ours(config)
    names = {name for name in model.state_dict() if "projector" in name}
    expected = {f"model.multi_modal_projector.linear_{i + 1}.{p}" for i in range(layers) for p in ("weight", "bias")}
    assert names == expected
    pixels = torch.randn(2, 3, 12, 12)
    states, _ = model.model.vision_tower(pixels, 2, mean=CLIP_MEAN, std=CLIP_STD)
    features = states[2][:, 1:]
    for i in range(layers):
        layer = getattr(model.model.multi_modal_projector, f"linear_{i + 1}")
        features = layer(F.gelu(features) if i else features)
    tiny.assert_near(torch.stack(model.get_image_features(pixels).pooler_output), features)


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


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_and_attentions(tiny: SimpleNamespace, kind: str, side: str) -> None:
    text = {"num_key_value_heads": 2, **({"sliding_window": 6} if kind == "mistral" else {})}
    config = tiny.config(text, kind=kind)
    model, theirs = tiny.pair(config, attn_implementation="eager")
    inputs = tiny.batch(config, ROWS, side)
    asked = {"output_hidden_states": True, "output_attentions": True}
    actual, expected = model(**inputs, **asked), theirs(**inputs, **asked)
    real = inputs["attention_mask"].bool()
    assert len(actual.hidden_states) == len(expected.hidden_states) == 3
    for ours, reference in zip(actual.hidden_states, expected.hidden_states):
        assert ours.shape == reference.shape
        tiny.assert_near(ours[real], reference[real], what="hidden state")
    assert len(actual.attentions) == len(expected.attentions) == 2
    for ours, reference in zip(actual.attentions, expected.attentions):
        assert ours.shape == reference.shape
        tiny.assert_near(ours.transpose(1, 2)[real], reference.transpose(1, 2)[real], what="attention")
    plain = model(**inputs)
    assert plain.hidden_states is None
    assert plain.attentions is None
    tiny.assert_near(plain.logits[real], actual.logits[real])


def test_hidden_states_asked_for_in_the_config(tiny: SimpleNamespace) -> None:
    config = tiny.config()
    inputs = tiny.batch(config, ROWS)
    config.output_hidden_states = True
    outputs = tiny.ours(config)(**inputs)
    assert len(outputs.hidden_states) == 3


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


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [1, -1, 3])
def test_feature_layer_and_strategy_as_arguments(tiny: SimpleNamespace, layer: int, strategy: str) -> None:
    model, theirs = tiny.pair(tiny.config())
    pixels = torch.randn(2, 3, 12, 12)
    actual = model.get_image_features(pixels, layer, strategy)
    expected = theirs.get_image_features(pixels, vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    tiny.assert_near(torch.stack(actual.pooler_output), torch.stack(expected.pooler_output))


def test_only_the_layers_that_are_read_are_run(tiny: SimpleNamespace) -> None:
    model = tiny.ours(tiny.config(vision_feature_layer=-3))
    ran = []
    for i, layer in enumerate(model.model.vision_tower.encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.get_image_features(torch.randn(1, 3, 12, 12))
    assert ran == [0]


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


# Inputs


@pytest.mark.parametrize("with_pixels", [True, False])
def test_inputs_embeds_equal_input_ids(tiny: SimpleNamespace, with_pixels: bool) -> None:
    config = tiny.config()
    model = tiny.ours(config)
    inputs = tiny.batch(config, ROWS)
    expected = model(**inputs)
    ids, pixels = inputs.pop("input_ids"), inputs.pop("pixel_values")
    embeds = model.get_input_embeddings()(ids)
    if with_pixels:  # image tokens are recognised by their embedding
        actual = model(inputs_embeds=embeds, pixel_values=pixels, **inputs)
    else:
        embeds = embeds.clone()
        embeds[ids == tiny.IMAGE] = torch.cat(model.get_image_features(pixels).pooler_output)
        actual = model(inputs_embeds=embeds, **inputs)
    tiny.assert_near(actual.logits, expected.logits)
    tiny.assert_near(actual.loss, expected.loss)


def test_encoded_images_instead_of_pixels(tiny: SimpleNamespace) -> None:
    config = tiny.config()
    model = tiny.ours(config)
    inputs = tiny.batch(config, ROWS)
    expected = model(**inputs)
    pixels = inputs.pop("pixel_values")
    encoded = model.get_image_features(pixels)
    actual = model(**inputs, mm_encoder_outputs={"image": encoded})
    assert torch.equal(actual.logits, expected.logits)
    with pytest.raises(ValueError, match="at most one of pixel_values and mm_encoder_outputs"):
        model(**inputs, pixel_values=pixels, mm_encoder_outputs={"image": encoded})


def test_image_slots_equal_image_tokens(tiny: SimpleNamespace) -> None:
    config = tiny.config()
    model = tiny.ours(config)
    inputs = tiny.batch(config, ROWS, "left")
    slots = (inputs["input_ids"].view(-1) == tiny.IMAGE).nonzero().flatten()
    assert torch.equal(model(**inputs, image_slots=slots).logits, model(**inputs).logits)


def test_uint8_pixels_equal_normalised_floats(tiny: SimpleNamespace) -> None:
    config = tiny.config()
    inputs = tiny.batch(config, ROWS)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 12, 12, 3), dtype=np.uint8))
    for mean, std in ((CLIP_MEAN, CLIP_STD), ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))):
        if mean != CLIP_MEAN:
            config.image_mean, config.image_std = list(mean), list(std)
        model, theirs = tiny.pair(config)
        floats = ((pixels.double() / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2).float()
        actual = model(**{**inputs, "pixel_values": pixels})
        expected = theirs(**{**inputs, "pixel_values": floats})
        real = inputs["attention_mask"].bool()
        tiny.assert_near(actual.logits[real], expected.logits[real])


@pytest.mark.parametrize("size", [(12, 12), (16, 16), (8, 20), (21, 14)])
@pytest.mark.parametrize("as_uint8", [False, True])
def test_interpolated_positions(tiny: SimpleNamespace, size: tuple[int, int], as_uint8: bool) -> None:
    model, theirs = tiny.pair(tiny.config())
    pixels = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8)
    floats = ((pixels / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).permute(0, 3, 1, 2)
    tokens = (size[0] // 4) * (size[1] // 4)
    ids = torch.tensor([[5, *[tiny.IMAGE] * tokens, 6], [*[tiny.IMAGE] * tokens, 7, 8]])
    actual = model(input_ids=ids, pixel_values=pixels if as_uint8 else floats, interpolate_pos_encoding=True)
    encoded = theirs.get_image_features(floats, interpolate_pos_encoding=True)
    expected = theirs(input_ids=ids, mm_encoder_outputs={"image": encoded})
    tiny.assert_near(actual.logits, expected.logits)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("ranges", ["positions", "given", "given-with-slots"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_packed_rows_equal_each_sample_alone(tiny: SimpleNamespace, cached: bool, ranges: str, kind: str) -> None:
    if kind == "mistral":
        config = tiny.config({"sliding_window": 8 if ranges == "positions" else None}, kind=kind)
    else:
        config = tiny.config()
    model, theirs = tiny.pair(config)
    rows = [[4, "image", 6], [1], [9], ["image", 2, "image", 7], [2]]
    inputs = tiny.batch(config, rows)
    samples = [tiny.single(inputs, row) for row in range(len(rows))]
    packed = pack([sample["input_ids"].shape[1] for sample in samples])
    ids, labels = (torch.cat([sample[name] for sample in samples], 1) for name in ("input_ids", "labels"))
    arguments = {"input_ids": ids, "labels": labels, "position_ids": packed.position_ids, "use_cache": cached}
    arguments["pixel_values"] = inputs["pixel_values"]
    if ranges != "positions":
        arguments.update(key_start=packed.key_start, key_end=packed.key_end)
    if ranges == "given-with-slots":
        arguments["image_slots"] = (ids[0] == tiny.IMAGE).nonzero().flatten()
    actual = model(**arguments)
    # The first label of each sample is −100, so that no sample predicts the next one's.
    total, count = 0, 0
    offset = 0
    for sample in samples:
        length = sample["input_ids"].shape[1]
        expected = theirs(**sample)
        tiny.assert_near(actual.logits[:, offset : offset + length], expected.logits)
        offset += length
        labelled = int((sample["labels"] != -100).sum())
        if labelled:
            total, count = total + expected.loss * labelled, count + labelled
    tiny.assert_near(actual.loss, total / count)
    model.zero_grad()
    actual.loss.backward()
    (total / count).backward()
    tiny.assert_gradients_near(model, theirs)


def bidirectional_oracle(tiny: SimpleNamespace, theirs, inputs: dict, tokens: int) -> torch.Tensor:
    """transformers' logits with a dense mask: causal, real tokens only, and each image sees all of itself."""
    mask = inputs["attention_mask"].bool()
    batch, length = mask.shape
    visible = torch.ones(length, length).tril().bool().repeat(batch, 1, 1)
    for b in range(batch):
        slots = (inputs["input_ids"][b] == tiny.IMAGE).nonzero().flatten()
        for image in slots.split(tokens) if len(slots) else ():
            visible[b, image[0] : image[-1] + 1, image[0] : image[-1] + 1] = True
    visible &= mask[:, None, :]
    visible |= torch.eye(length).bool()  # a padding token sees itself, lest its softmax be empty
    bias = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None]
    positions = torch.arange(length)[None].expand(batch, -1)
    return theirs(
        input_ids=inputs["input_ids"],
        pixel_values=inputs["pixel_values"],
        attention_mask=bias,
        position_ids=positions,
        use_cache=False,
    ).logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("image_seq_length", [9, 576])
def test_bidirectional_images(tiny: SimpleNamespace, side: str, image_seq_length: int) -> None:
    rows = [[4, "image", 6], [9], [2, "image", "image", 7]]  # two images side by side do not see each other
    config = tiny.config(image_attention="bidirectional", image_seq_length=image_seq_length)
    model, theirs = tiny.pair(config)
    inputs = tiny.prompt(tiny.batch(config, rows, side))
    actual = model(**inputs).logits
    expected = bidirectional_oracle(tiny, theirs, inputs, 9)
    real = inputs["attention_mask"].bool()
    tiny.assert_near(actual[real], expected[real])
    config.image_attention = "causal"
    causal = tiny.ours(config)(**inputs).logits
    assert (causal - actual)[real].abs().max() > 0.1  # it makes a difference


def test_bidirectional_images_packed(tiny: SimpleNamespace) -> None:
    rows = [[4, "image", 6], [9], ["image", 2, "image", "image", 7]]
    config = tiny.config(image_attention="bidirectional")
    model, theirs = tiny.pair(config)
    inputs = tiny.prompt(tiny.batch(config, rows))
    samples = [tiny.single({**inputs, "labels": inputs["input_ids"]}, row) for row in range(3)]
    packed = pack([19, 9, 36], [[(4, 9)], [], [(0, 9), (11, 9), (20, 9)]], bidirectional_images=True)
    ids = torch.cat([sample["input_ids"] for sample in samples], 1)
    given = {"input_ids": ids, "pixel_values": inputs["pixel_values"], "position_ids": packed.position_ids}
    from_positions = model(**given).logits
    from_ranges = model(**given, key_start=packed.key_start, key_end=packed.key_end).logits
    tiny.assert_near(from_positions, from_ranges)
    for sample, actual in zip((samples[0], samples[2]), (from_ranges[:, :19], from_ranges[:, 28:])):
        tiny.assert_near(actual, bidirectional_oracle(tiny, theirs, sample, 9))


def test_bidirectional_generation_equals_without_cache(tiny: SimpleNamespace) -> None:
    config = tiny.config(image_attention="bidirectional")
    model = tiny.ours(config)
    inputs = tiny.prompt(tiny.batch(config, [[4, "image", 6], [9], [2, "image", "image", 7]], "left"))
    cached = model.generate(**inputs, generation_config=tiny.greedy(max_new_tokens=12))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for step in range(12):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=inputs["pixel_values"],
            position_ids=positions,
            use_cache=False,
        ).logits[:, -1]
        tiny.assert_near(cached.logits[step], logits)
        logits[:, tiny.SUPPRESSED] = float("-inf")
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
        mask = F.pad(mask, (0, 1), value=1)
    assert torch.equal(ids, cached.sequences)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: {"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
        (lambda i: {"inputs_embeds": torch.zeros(3, 30, 32)}, "exactly one of input_ids and inputs_embeds"),
        (lambda i: {"pixel_values": i["pixel_values"][:2]}, "tokens: 27, features: 18"),
        (lambda i: {"vision_feature_select_strategy": "full"}, "tokens: 27, features: 30"),
        (lambda i: {"image_slots": torch.arange(5)}, "tokens: 5, features: 27"),
        (lambda i: {"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy is 'cls'"),
        (lambda i: {"vision_feature_layer": 7}, "vision_feature_layer 7 is out of range for a tower of 3 layers"),
        (lambda i: {"pixel_values": torch.zeros(3, 3, 16, 16)}, "16×16, but the vision tower takes 12×12"),
        (lambda i: {"pixel_values": torch.zeros(3, 12, 12)}, "pixel_values"),
        (lambda i: {"pixel_values": torch.zeros(3, 1, 12, 12)}, "pixel_values"),
        (lambda i: {"pixel_values": torch.zeros(3, 3, 12, 12, dtype=torch.uint8)}, "pixel_values"),
        (lambda i: {"pixel_values": torch.zeros(1, 3, 3, 12, 12)}, "pixel_values"),
        (lambda i: {"attention_mask": holed(i["attention_mask"])}, "padding between real tokens"),
        (lambda i: {"attention_mask": i["attention_mask"][:, :-1]}, "attention_mask covers"),
        (lambda i: {"attention_mask": i["attention_mask"][:2]}, "attention_mask has shape"),
        (lambda i: {"attention_mask": i["attention_mask"][:, None, None]}, "4-D masks are not accepted"),
        (lambda i: {"key_start": torch.zeros(3, 30, dtype=torch.int32)}, "both of key_start and key_end"),
        (lambda i: {"key_start": torch.zeros(1, 9).int(), "key_end": torch.ones(1, 9).int()}, "key ranges"),
    ],
)
def test_inputs_that_are_refused(tiny: SimpleNamespace, change, message: str) -> None:
    config = tiny.config()
    model = tiny.ours(config)
    inputs = tiny.prompt(tiny.batch(config, ROWS))
    with pytest.raises(ValueError, match=message) as caught:
        model(**{**inputs, **change(inputs)})
    assert "\n" not in str(caught.value)


def holed(mask: torch.Tensor) -> torch.Tensor:
    mask = mask.clone()
    mask[0, 3] = 0
    return mask


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


def test_gradient_checkpointing_of_packed_rows(tiny: SimpleNamespace) -> None:
    config = tiny.config()
    model = tiny.ours(config).train()
    packed = pack([10, 7, 14])
    inputs = {"input_ids": torch.randint(3, 99, (1, 31)), "position_ids": packed.position_ids}
    inputs["labels"] = inputs["input_ids"]
    model(**inputs).loss.backward()
    expected = tiny.gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**inputs).loss.backward()
    for name, gradient in tiny.gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


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


def test_unused_tower_layers_are_frozen(tiny: SimpleNamespace) -> None:
    model = tiny.ours(tiny.config(vision_feature_layer=-2))
    tower = model.model.vision_tower
    frozen = {name for name, parameter in tower.named_parameters() if not parameter.requires_grad}
    unused = {name for name, _ in tower.named_parameters() if name.startswith(("encoder.layers.2.", "post_layernorm"))}
    assert frozen == unused
    whole = tiny.ours(tiny.config(vision_feature_layer=[0 - 4, -1])).model.vision_tower
    assert {name for name, p in whole.named_parameters() if not p.requires_grad} == {
        "post_layernorm.weight",
        "post_layernorm.bias",
    }


@pytest.mark.parametrize("trained", ["projector", "language_model", "vision_tower"])
def test_frozen_parts_get_no_gradient(tiny: SimpleNamespace, trained: str) -> None:
    config = tiny.config()
    model, theirs = tiny.pair(config)
    for m in (model, theirs):
        for name, parameter in m.named_parameters():
            parameter.requires_grad_(trained in name)
    inputs = tiny.batch(config, ROWS)
    for m in (model, theirs):
        m.train()(**inputs).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in theirs.named_parameters() if p.grad is not None
    }
    tiny.assert_gradients_near(model, theirs)


def test_text_alone_reaches_the_projector_with_zero_gradients(tiny: SimpleNamespace) -> None:
    config = tiny.config()
    model = tiny.ours(config).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("projector" in name)
    inputs = tiny.batch(config, [[7], [12]])
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        if "projector" in name:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


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


# Caches


def test_cache_in_chunks(tiny: SimpleNamespace) -> None:
    for config in (tiny.config(), tiny.config({"sliding_window": 6}, kind="mistral")):
        model, theirs = tiny.pair(config)
        inputs = tiny.prompt(tiny.batch(config, [[3, "image", 9, "image", 8], [20, "image", 9]]))
        inputs.pop("attention_mask")  # the rows are of one length
        inputs["input_ids"] = inputs["input_ids"][:, :38]
        whole = theirs(**inputs, use_cache=False).logits
        for cache in (DynamicCache(), DynamicCache(config=config.get_text_config())):
            ids, embeds = inputs["input_ids"], None
            embeds = model.get_input_embeddings()(ids).detach()
            features = torch.cat(model.get_image_features(inputs["pixel_values"]).pooler_output)
            embeds[ids == tiny.IMAGE] = features
            pieces, seen = [], 0
            for step in (5, 1, 1, 11, 2, 18):
                outputs = model(inputs_embeds=embeds[:, seen : seen + step], past_key_values=cache, use_cache=True)
                assert outputs.past_key_values is cache
                pieces.append(outputs.logits)
                seen += step
                assert cache.get_seq_length() == seen
            tiny.assert_near(torch.cat(pieces, 1), whole)

"""What goes into `LlavaModel`: ids or embeddings, pixels or features, packed rows, bidirectional images, key ranges
given by the caller; and where gradients go."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llava_fast.model import llava
from llava_fast.ops.patch_embed import CLIP_MEAN, CLIP_STD
from llava_fast.sequence import pack

ROWS = [[4, "image", 6], [9], [2, "image", 3, "image", 7]]


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
        (
            lambda i: {**dict.fromkeys(("key_start", "key_end"), torch.zeros(1, 9).int()), "sample_lengths": [4, 4]},
            r"samples of 8 tokens in all, but key ranges \(1, 9\)",
        ),
        (
            lambda i: {**dict.fromkeys(("key_start", "key_end"), torch.zeros(1, 9).int()), "sample_lengths": [10, -1]},
            "a sample of -1 tokens; every sample needs at least one",
        ),
        (lambda i: {"sample_lengths": [30, 30, 30]}, "sample_lengths describes key_start and key_end; pass them too"),
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


# Packed rows and bidirectional images


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
        arguments["sample_lengths"] = list(packed.lengths)
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


@pytest.mark.parametrize("lengths", [[2, 3], torch.tensor([2, 3]), np.array([2, 3])], ids=["list", "tensor", "array"])
def test_sample_lengths_become_numbers(lengths) -> None:
    """Attention looks its choice up by them, and calls int's methods."""
    packed = pack([2, 3])
    ranges = llava._given(packed.key_start, packed.key_end, lengths)
    assert ranges is not None and ranges.lengths == (2, 3) and {type(n) for n in ranges.lengths} == {int}


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


# Training


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

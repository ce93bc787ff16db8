"""Rows that nobody reads are not computed, and nothing else changes: loss, gradients, logits and cache."""

import pytest
import torch
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as Stock

from llava_fast.drop_in import LlavaForConditionalGeneration
from llava_fast.model.language import MLP
from llava_fast.sequence import pack
from tests.tiny import TEXT, VISION

IMAGE = 63


@pytest.fixture(params=["untied", "tied"])
def model(request: pytest.FixtureRequest) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(
            **{**TEXT, "num_hidden_layers": 3},
            vocab_size=64,
            initializer_range=0.2,
            tie_word_embeddings=request.param == "tied",
        ),
        image_token_index=IMAGE,
        image_seq_length=4,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).train()


def batch(labelled: str) -> dict[str, torch.Tensor]:
    input_ids = torch.randint(0, 60, (3, 20))
    input_ids[:, 3:7] = IMAGE
    labels = torch.full_like(input_ids, -100)
    if labelled == "all":
        labels = input_ids.clone()
    elif labelled == "one":
        labels[1, 12] = 5
    elif labelled == "one sample":
        labels[2, 9:] = input_ids[2, 9:]
    elif labelled == "answers":
        labels[:, 14:] = input_ids[:, 14:]
    return {
        "input_ids": input_ids,
        "pixel_values": torch.randn(3, 3, 28, 28),
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
    }


def loss_and_gradients(model, inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return {"loss": loss.detach(), **gradients}


def assert_equal(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    # Both are off by a few 1e-6 of a tensor's largest value from the gradients in float64. Where all is rounding (the
    # bias of a key has no gradient), 1e-6 is nothing.
    largest = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=max(1e-6, 1e-5 * largest), msg=name)


@pytest.mark.parametrize("labelled", ["all", "one", "one sample", "answers"])
def test_loss_and_gradients_equal_those_of_all_logits(model, labelled):
    inputs = batch(labelled)
    found = loss_and_gradients(model, inputs)
    expected = loss_and_gradients(model, {**inputs, "return_logits": True})
    for name, value in expected.items():
        assert_equal(found[name], value, name)
    stock = Stock(model.config)
    stock.load_state_dict(model.state_dict())
    for name, value in loss_and_gradients(stock, inputs).items():
        if name in found:
            assert_equal(found[name], value, name)


def test_no_labels_at_all(model):
    found = loss_and_gradients(model, batch("none"))
    assert all(not value.any() for value in found.values())
    # Zeros, not None: beside other processes everybody waits for the gradients of the same parameters.
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    loss_and_gradients(model, batch("answers"))
    assert reached == {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_num_items_divides_the_sum(model):
    inputs = batch("answers")
    mean, count = model(**inputs).loss, (inputs["labels"][:, 1:] != -100).sum()
    for items in (torch.tensor(50), 50):
        torch.testing.assert_close(model(**inputs, num_items_in_batch=items).loss, mean * count / 50)


def test_padding_on_either_side(model):
    inputs = batch("answers")
    for side in (slice(None, 3), slice(17, None)):
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, side] = 0
        inputs["labels"][1, side] = -100
        found = loss_and_gradients(model, inputs)
        for name, value in loss_and_gradients(model, {**inputs, "return_logits": True}).items():
            assert_equal(found[name], value, name)


def test_packed_samples_and_rows_that_the_caller_knows(model):
    inputs = batch("answers")
    packed = pack([20, 20, 20])
    labels = inputs["labels"].clone()
    labels[:, 0] = -100
    flat = {
        "input_ids": inputs["input_ids"].view(1, -1),
        "labels": labels.view(1, -1),
        "pixel_values": inputs["pixel_values"],
        **vars(packed),
    }
    expected = loss_and_gradients(model, {**inputs, "labels": labels})
    rows = (flat["labels"][0, 1:] != -100).nonzero().flatten()
    for known in ({}, {"target_rows": rows}):
        found = loss_and_gradients(model, {**flat, **known})
        for name, value in expected.items():
            assert_equal(found[name], value, name)


def test_logits_when_they_are_wanted(model):
    inputs = batch("answers")
    assert model(**inputs).logits is None
    assert model(**inputs, return_logits=True).logits.shape == (3, 20, 64)
    assert model.eval()(**inputs).logits.shape == (3, 20, 64)
    assert model(**inputs, return_logits=False).logits is None


@pytest.mark.parametrize("keep", [1, 3, 20, 25])
def test_prefill_computes_the_last_rows_only(model, keep):
    """Logits and the whole cache as if everything had been computed; the last MLP sees only rows that are read."""
    model.eval()
    inputs = {name: value for name, value in batch("all").items() if name != "labels"}
    inputs["attention_mask"][0, :2] = 0
    caches = DynamicCache(), DynamicCache()
    seen = []
    mlp = model.model.language_model.layers[-1].mlp
    assert isinstance(mlp, MLP)
    handle = mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    with torch.no_grad():
        found = model(**inputs, logits_to_keep=keep, past_key_values=caches[0]).logits
        expected = model(**inputs, past_key_values=caches[1]).logits[:, -keep:]
    handle.remove()
    assert seen == [min(keep, 20), 20]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(caches[0].layers, caches[1].layers):
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)


def test_everything_is_computed_where_everything_is_wanted(model):
    inputs = batch("answers")
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    full = model(**inputs, return_logits=True, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(out.loss, full.loss)
    for ours, theirs in zip(out.hidden_states + out.attentions, full.hidden_states + full.attentions):
        torch.testing.assert_close(ours, theirs)


def test_checkpointed_layers_skip_the_same_rows(model):
    inputs = batch("answers")
    expected = loss_and_gradients(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, value in loss_and_gradients(model, inputs).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)

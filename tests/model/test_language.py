"""The language model: what each layer hands out, and a cache filled in chunks of any length."""

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

ROWS = [[4, "image", 6], [9], [2, "image", 3, "image", 7]]


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

"""The language model: what each layer hands out, and a cache filled in chunks of any length."""

from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from llava_fast.model.language import MLP, Attention

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


def test_hooks_read_what_they_read_in_transformers(tiny: SimpleNamespace) -> None:
    """Input and output of a layer, and the input of the last norm, though adds wait for the next norm elsewhere."""
    config = tiny.config({"num_hidden_layers": 4})
    inputs = tiny.batch(config, [["image", 3], [2, "image", 2]])
    seen: list[list[torch.Tensor]] = []
    for model in tiny.pair(config):
        found: list[torch.Tensor] = []
        text = model.model.language_model

        def output(module, args, out, found=found) -> None:
            found.append(out[0] if isinstance(out, tuple) else out)

        text.layers[1].register_forward_hook(output)
        text.layers[3].register_forward_pre_hook(lambda module, args, found=found: found.append(args[0]))
        text.norm.register_forward_pre_hook(lambda module, args, found=found: found.append(args[0]))
        with torch.no_grad():
            logits = model(**inputs).logits
        seen.append([*found, logits])
    real = inputs["attention_mask"].bool()
    for ours, theirs in zip(*seen, strict=True):
        tiny.assert_near(ours[real], theirs[real])


def test_a_hook_that_replaces_an_output_is_followed(tiny: SimpleNamespace) -> None:
    config = tiny.config({"num_hidden_layers": 3})
    inputs, logits = tiny.batch(config, [["image", 3]]), []
    for model in tiny.pair(config):

        def doubled(module, args, out):
            return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out

        model.model.language_model.layers[1].register_forward_hook(doubled)
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    tiny.assert_near(*logits)


def joined(model: nn.Module) -> dict[type, set[bool]]:
    """Whether the joined projections of the language model lie in one storage: of attention, of the MLP."""
    found: dict[type, set[bool]] = {Attention: set(), MLP: set()}
    for module in model.modules():
        if type(module) in found:
            of = nn.ModuleList(getattr(module, name) for name in module.joins).parameters()
            places = {p.untyped_storage().data_ptr() for p in of if p.requires_grad or p.dim() > 1}
            found[type(module)].add(len(places) == 1)
    return found


@pytest.mark.parametrize("bias", [False, True])
def test_one_product_for_q_k_v_and_one_for_gate_and_up(
    tiny: SimpleNamespace, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config({"num_key_value_heads": 1, "attention_bias": bias, "mlp_bias": bias})
    model, theirs = tiny.pair(config)
    shapes, linear = [], nn.functional.linear

    def spy(x, weight, bias=None):
        shapes.append(tuple(weight.shape))
        return linear(x, weight, bias)

    ids = torch.ones(1, 6, dtype=torch.int64)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(nn.functional, "linear", spy)
        found = model(input_ids=ids).logits
    text = config.text_config
    width, layers, head = text.hidden_size, text.num_hidden_layers, text.hidden_size // text.num_attention_heads
    assert shapes.count((width + 2 * head, width)) == shapes.count((2 * text.intermediate_size, width)) == layers
    with torch.no_grad():
        tiny.assert_near(found, theirs(input_ids=ids).logits)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()  # gradients in evaluation mode
    model(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad.any()
    assert model.model.language_model.layers[0].mlp.up_proj.weight.grad.any()


def test_wrapped_layers_are_parted_too(tiny: SimpleNamespace, tmp_path) -> None:
    """By PEFT after `eval()`: training and saving find a storage for each weight."""
    model = tiny.ours(tiny.config()).eval()
    assert joined(model) == {Attention: {True}, MLP: {True}}
    expected = model(input_ids=torch.ones(1, 5, dtype=torch.int64)).logits
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*language_model.*(q|up)_proj"))
    with torch.no_grad():
        tiny.assert_near(tuned.eval()(input_ids=torch.ones(1, 5, dtype=torch.int64)).logits, expected)
    tuned.train()
    weights = [p for name, p in tuned.named_parameters() if "language_model.layers" in name]
    assert len({p.untyped_storage().data_ptr() for p in weights}) == len(weights)
    merged = tuned.merge_and_unload().eval()
    assert joined(merged) == {Attention: {True}, MLP: {True}}
    merged.save_pretrained(tmp_path)
    with torch.no_grad():
        tiny.assert_near(merged(input_ids=torch.ones(1, 5, dtype=torch.int64)).logits, expected)


def test_a_storage_that_one_weight_has_left_is_parted_too(tiny: SimpleNamespace) -> None:
    """As PEFT's safe merge does: it gives the merged weight a storage of its own."""
    model, ids = tiny.ours(tiny.config()).eval(), torch.ones(1, 5, dtype=torch.int64)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*language_model.*(q|up)_proj"))
    merged = tuned.merge_and_unload(safe_merge=True)
    weights = merged.model.language_model.layers.state_dict()
    assert len({x.untyped_storage().data_ptr() for x in weights.values()}) == len(weights)
    merged.eval()
    merged.model.language_model.layers[0].self_attn.q_proj.weight.data = weights["0.self_attn.q_proj.weight"].clone()
    assert joined(merged.eval()) == {Attention: {True}, MLP: {True}}
    with torch.no_grad():
        tiny.assert_near(merged(input_ids=ids).logits, expected)


def test_autocast_converts_weights_once(tiny: SimpleNamespace) -> None:
    """It keeps what it converts to 16 bits, but of parameters only: so they are not joined then."""
    model, converted = tiny.ours(tiny.config()).eval(), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function._schema.name == "aten::_to_copy" and args[0].dim() == 2 and args[0].shape[1] > 1:
                converted.append(tuple(args[0].shape))
            return function(*args, **(kwargs or {}))

    ids = torch.ones(1, 1, dtype=torch.int64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids)
        with Watch():
            model(input_ids=ids)
    assert converted == []


def test_weights_of_several_models_at_once(tiny: SimpleNamespace) -> None:
    """Under `torch.func.vmap` weights have no address."""
    mlp, x = tiny.ours(tiny.config()).eval().model.language_model.layers[0].mlp, torch.randn(1, 3, 32)
    weights = {name: torch.stack([w, 2 * w]) for name, w in mlp.named_parameters()}
    with torch.no_grad():
        once, twice = torch.func.vmap(lambda of_one: torch.func.functional_call(mlp, of_one, (x,)))(weights)
        tiny.assert_near(once, mlp(x))
        for parameter in mlp.parameters():
            parameter.mul_(2)
        tiny.assert_near(twice, mlp(x))


def test_a_pass_that_fails_leaves_the_lengths_of_a_static_cache(tiny: SimpleNamespace) -> None:
    """So it can be repeated; and transformers' own model goes on with the cache."""
    config = tiny.config({"num_hidden_layers": 3})
    model, theirs = tiny.pair(config)
    ids = torch.tensor([[1, 4, 6, 2, 5]])
    kept = StaticCache(config.get_text_config(), max_cache_len=8)
    with torch.no_grad():
        hook = model.model.language_model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=ids[:, :4], past_key_values=kept)
        hook.remove()
        assert [int(layer.cumulative_length) for layer in kept.layers] == [0, 0, 0]
        model(input_ids=ids[:, :4], past_key_values=kept)
        assert [int(layer.cumulative_length) for layer in kept.layers] == [4, 4, 4]
        found = theirs(input_ids=ids[:, 4:], past_key_values=kept, position_ids=torch.tensor([[4]])).logits
        tiny.assert_near(found, theirs(input_ids=ids).logits[:, 4:])

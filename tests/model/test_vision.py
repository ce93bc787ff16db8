"""The tower's wiring: q, k and v in one storage and one GEMM, residuals in the norms."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from llava_fast.backend import is_plain, use_backend
from llava_fast.drop_in import LlavaForConditionalGeneration
from llava_fast.model.llava import is_plain_lookup
from llava_fast.ops._launch import recorded
from llava_fast.ops.patch_embed import CLIP_MEAN, CLIP_STD

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def attentions(model: nn.Module) -> list[nn.Module]:
    return [layer.self_attn for layer in model.model.vision_tower.encoder.layers]


def joined(model: nn.Module) -> set[bool]:
    """Whether q, k and v lie in one storage: of all layers."""
    storages = [{getattr(a, p).weight.untyped_storage().data_ptr() for p in PROJECTIONS} for a in attentions(model)]
    assert [a._joined() is not None for a in attentions(model)] == [len(s) == 1 for s in storages]
    return {len(s) == 1 for s in storages}


def pixels(model: nn.Module, images: int = 2) -> torch.Tensor:
    size = model.config.vision_config.image_size
    return torch.randint(0, 256, (images, size, size, 3), dtype=torch.uint8)


def features(model: nn.Module, images: torch.Tensor, **how: bool) -> torch.Tensor:
    return torch.stack(model.get_image_features(images, **how).pooler_output)


@pytest.fixture
def linears(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that products were made with."""
    shapes, linear = [], F.linear

    def spy(x, weight, bias=None):
        shapes.append(tuple(weight.shape))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", spy)
    return shapes


def test_inference_multiplies_once_for_q_k_and_v(tiny: SimpleNamespace, linears: list) -> None:
    model = tiny.ours(tiny.config()).eval()
    width = model.config.vision_config.hidden_size
    images = pixels(model)
    with torch.no_grad():
        found = features(model, images)
        assert linears.count((3 * width, width)) == len(attentions(model)) - 1  # the last layer never runs
        linears.clear()
        apart = features(model.train(), images)
    expected = features(model, images)  # with gradients
    assert (3 * width, width) not in linears
    tiny.assert_near(found, expected.detach())
    assert torch.equal(apart, expected)


def test_one_storage_in_evaluation_mode_only(tiny: SimpleNamespace) -> None:
    model = tiny.ours(tiny.config()).train()
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    for mode, expected in ((False, True), (False, True), (True, False), (True, False), (False, True)):
        model.train(mode)
        assert joined(model) == {expected}
        for name, parameter in model.named_parameters():
            assert parameter is before[name][0], name
            assert torch.equal(parameter, before[name][1]), name
    assert model.state_dict().keys() == tiny.stock(tiny.config()).state_dict().keys()


def test_conversions_keep_one_storage(tiny: SimpleNamespace) -> None:
    model = tiny.ours(tiny.config()).train()
    expected = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    model.eval().to(torch.bfloat16)
    assert joined(model) == {True}
    assert all(torch.equal(weight, expected[name]) for name, weight in model.named_parameters())
    assert joined(model.share_memory()) == {True}
    assert attentions(model)[0].q_proj.weight.is_shared()
    assert joined(model.train().double()) == {False}
    assert all(attention._joined() is None for attention in attentions(model.eval().to("meta")))


def test_a_state_dict_has_no_shared_storage(tiny: SimpleNamespace, tmp_path) -> None:
    model = tiny.ours(tiny.config()).eval()
    assert joined(model) == {True}
    weights = model.state_dict()
    assert joined(model) == {False}
    save_file(weights, tmp_path / "model.safetensors")
    key = "model.vision_tower.encoder.layers.0.self_attn.k_proj.weight"
    assert weights[key].data_ptr() == model.get_parameter(key).data_ptr()  # and are the parameters themselves
    assert joined(model.eval()) == {True}


def test_parameters_parted_in_inference_mode_can_be_trained(tiny: SimpleNamespace) -> None:
    model = tiny.ours(tiny.config()).eval()
    with torch.inference_mode():
        model.state_dict()
    assert joined(model) == {False}
    assert not any(weight.is_inference() for weight in model.parameters())


def test_checkpoints_and_copies_are_as_before(tiny: SimpleNamespace, tmp_path) -> None:
    model = tiny.ours(tiny.config()).eval()
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.eval().save_pretrained(tmp_path)
    assert sum(weight.nbytes for weight in load_file(tmp_path / "model.safetensors").values()) == sum(
        weight.nbytes for weight in expected.values()
    )
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert joined(loaded) == {True}  # transformers calls eval()
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(weight, expected[name]) for name, weight in other.state_dict().items())
    model.eval()
    images = pixels(model)
    with torch.no_grad():
        tiny.assert_near(features(copy.deepcopy(model), images), features(model, images))
        # Loading writes into the one storage; assigning leaves it.
        changed = {name: 2 * weight for name, weight in expected.items()}
        twice = tiny.ours(tiny.config()).eval()
        twice.load_state_dict(changed)
        assert joined(twice) == {True}
        model.load_state_dict(changed, assign=True)
        assert joined(model) == {False}
        tiny.assert_near(features(model, images), features(twice, images))


def test_a_parameter_in_a_larger_buffer_stays_there(tiny: SimpleNamespace) -> None:
    """As sharded optimisers keep them: whoever moves one loses its updates."""
    model = tiny.ours(tiny.config()).train()
    weight = attentions(model)[0].k_proj.weight
    buffer = torch.cat((weight.detach().flatten(), torch.zeros(3)))
    weight.data = buffer[:-3].view_as(weight)
    model.eval()
    buffer.zero_()
    assert not weight.any()
    assert attentions(model)[0]._joined() is None
    assert attentions(model)[1]._joined() is not None


def test_wrapped_and_hooked_projections_are_called(tiny: SimpleNamespace) -> None:
    model = tiny.ours(tiny.config()).eval()
    images, called = pixels(model), []
    with torch.no_grad():
        expected = features(model, images)
        hook = attentions(model)[0].k_proj.register_forward_hook(lambda *_: called.append("k_proj"))
        tiny.assert_near(features(model, images), expected)
        assert called == ["k_proj"]
        hook.remove()
        attentions(model)[0].k_proj = nn.Sequential(attentions(model)[0].k_proj)
        tiny.assert_near(features(model, images), expected)


@pytest.mark.parametrize(
    "name",
    ["", ".patch_embedding", ".position_embedding", "pre_layrnorm", "encoder.layers.0.layer_norm1"],
)
def test_a_hooked_part_of_the_tower_is_called(tiny: SimpleNamespace, name: str) -> None:
    model = tiny.ours(tiny.config()).eval()
    tower, called = model.model.vision_tower, []
    images = torch.randint(256, (2, 12, 12, 3), dtype=torch.uint8)
    larger = torch.randint(256, (1, 16, 20, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected = features(model, images), features(model, larger, interpolate_pos_encoding=True)
        tower.get_submodule(name if "norm" in name else f"embeddings{name}").register_forward_hook(
            lambda *_: called.append(name)
        )
        found = features(model, images), features(model, larger, interpolate_pos_encoding=True)
    assert called == [name, name]
    for one, other in zip(found, expected):
        tiny.assert_near(one, other)


def test_embeddings_with_a_hook_are_called(tiny: SimpleNamespace) -> None:
    model = tiny.ours(tiny.config()).eval()
    inputs = tiny.batch(model.config, [[3, "image", 4]])
    expected = model(**inputs).logits
    called = []
    model.get_input_embeddings().register_forward_hook(lambda *_: called.append("embed"))
    tiny.assert_near(model(**inputs).logits, expected)
    assert called == ["embed"]


def test_plain_modules() -> None:
    class Other(nn.Linear):
        pass

    class Tensor(torch.Tensor):
        pass

    plain = nn.Linear(2, 3)
    assert is_plain(plain, nn.Linear)
    assert is_plain(nn.Linear(2, 3, bias=False), nn.Linear)
    assert not is_plain(Other(2, 3), nn.Linear)
    own = nn.Linear(2, 3)
    own.forward = lambda x: x
    assert not is_plain(own, nn.Linear)
    quantised = nn.Linear(2, 3)
    quantised.weight = nn.Parameter(torch.zeros(3, 2).as_subclass(Tensor))
    assert not is_plain(quantised, nn.Linear)
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        hooked = nn.Linear(2, 3)
        getattr(hooked, register)(lambda *_: None)
        assert not is_plain(hooked, nn.Linear)
    assert is_plain_lookup(nn.Embedding(4, 2, padding_idx=1))
    for option in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}):
        assert not is_plain_lookup(nn.Embedding(4, 2, **option))


def test_both_residuals_of_a_layer_are_in_a_norm(tiny: SimpleNamespace) -> None:
    model = tiny.ours(tiny.config()).eval()
    with torch.no_grad(), use_backend("triton", "layer_norm"), recorded() as launched:
        features(model, pixels(model, 1))
    residuals = [launch.constexprs["HAS_RESIDUAL"] for launch in launched if launch.name == "_norm_fwd_kernel"]
    layers = len(attentions(model)) - 1
    assert residuals == [False, True] + [True, True] * (layers - 1)


def test_every_hidden_state_is_the_sum(tiny: SimpleNamespace) -> None:
    ours, theirs = tiny.pair(tiny.config())
    size = ours.config.vision_config.image_size
    images = torch.randn(2, 3, size, size)
    found = ours.get_image_features(images, vision_feature_layer=[-1], output_hidden_states=True).hidden_states
    expected = theirs.model.vision_tower(images, output_hidden_states=True).hidden_states
    assert len(found) == len(expected)
    for ours_state, theirs_state in zip(found, expected):
        tiny.assert_near(ours_state, theirs_state)


def test_hidden_states_that_nobody_wants_are_not_kept(tiny: SimpleNamespace) -> None:
    model = tiny.ours(tiny.config()).eval()
    tower, images = model.model.vision_tower, pixels(model)
    last = tower.resolve(-1)
    settings = {"mean": CLIP_MEAN, "std": CLIP_STD}
    everything, _ = tower(images, last, **settings)
    some, _ = tower(images, last, keep=[1], **settings)
    assert [state is not None for state in some] == [i in (1, last) for i in range(last + 1)]
    assert torch.equal(some[1], everything[1])
    assert torch.equal(some[last], everything[last])


# ---- feature layers and positions


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

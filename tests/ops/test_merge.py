"""Image features between token embeddings: the reference by its definition, the kernels by the kit's rules."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import ALSO_HALF, DEVICES, DTYPES, check_kernel
from torch.nn import functional as F

from llava_fast.backend import use_backend
from llava_fast.ops import merge as module
from llava_fast.ops._launch import forced_tile
from llava_fast.ops.merge import embed_merge, merge

KERNELS = ["merge_fwd_kernel", "merge_bwd_kernel"]
VOCABULARY, IMAGE = 11, 7


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.booleans(), st.booleans(), st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_values_and_gradients(
    batch: int, tokens: int, width: int, by_slots: bool, strided: bool, data: st.DataObject
) -> None:
    flat = data.draw(st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens))
    mask = torch.tensor(flat).view(batch, tokens)
    count = int(mask.sum())
    embeds = torch.randn(tokens, batch, width).transpose(0, 1) if strided else torch.randn(batch, tokens, width)
    features = torch.randn(count, width)
    ours = [embeds.clone().requires_grad_(), features.clone().requires_grad_()]
    where = {"slots_M": mask.flatten().nonzero().flatten()} if by_slots else {"mask_BT": mask}
    actual = merge(*ours, **where)
    expected = embeds.clone()
    rows = iter(features)
    for b in range(batch):
        for t in range(tokens):
            if mask[b, t]:
                expected[b, t] = next(rows)
    assert torch.equal(actual, expected)
    assert torch.equal(ours[0], embeds)  # not written to

    weight = torch.randn(actual.shape)
    actual.backward(weight)
    assert torch.equal(ours[0].grad, weight.masked_fill(mask[..., None], 0))
    if count:
        assert torch.equal(ours[1].grad, weight[mask])


def test_slots_in_any_order() -> None:
    features = torch.randn(3, 4)
    out = merge(torch.zeros(2, 5, 4), features, slots_M=torch.tensor([7, 0, 3]))
    assert torch.equal(out.view(10, 4)[[7, 0, 3]], features)
    assert int((out != 0).any(-1).sum()) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_is_that_of_the_embeddings(dtype: torch.dtype) -> None:
    features = torch.randn(2, 4, dtype=dtype)
    mask = torch.tensor([[True, False, True]])
    out = merge(torch.zeros(1, 3, 4), features, mask_BT=mask)
    assert out.dtype == torch.float32
    assert torch.equal(out[mask], features.float())


@pytest.mark.parametrize("features", [0, 1, 3])
def test_counts_that_differ(features: int) -> None:
    embeds = torch.zeros(1, 4, 8)
    message = f"tokens: 2, features: {features}"
    with pytest.raises(ValueError, match=message):
        merge(embeds, torch.zeros(features, 8), mask_BT=torch.tensor([[True, True, False, False]]))
    with pytest.raises(ValueError, match=message):
        merge(embeds, torch.zeros(features, 8), slots_M=torch.tensor([0, 3]))


def test_no_images_at_all() -> None:
    embeds = torch.randn(2, 3, 4)
    nothing = torch.zeros(0, 4)
    assert torch.equal(merge(embeds, nothing, mask_BT=torch.zeros(2, 3, dtype=torch.bool)), embeds)
    assert torch.equal(merge(embeds, nothing, slots_M=torch.zeros(0, dtype=torch.int64)), embeds)


def sequence(batch: int, tokens: int, images: float, device: str) -> dict[str, torch.Tensor]:
    """ids with so large a share of image tokens, where those are, and how many."""
    ids = torch.randint(0, VOCABULARY, (batch, tokens))
    ids[ids == IMAGE] = 0
    ids[torch.rand(batch, tokens) < images] = IMAGE
    return {"ids": ids.to(device), "mask": (ids == IMAGE).to(device)}


def places(mask: torch.Tensor, by_slots: bool) -> dict[str, torch.Tensor]:
    return {"slots_M": mask.flatten().nonzero().flatten()} if by_slots else {"mask_BT": mask}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("by_slots", [False, True], ids=["mask", "slots"])
@pytest.mark.parametrize(
    ("batch", "tokens", "width", "images"), [(1, 1, 1, 1.0), (1, 17, 40, 0.5), (3, 5, 123, 0.4), (1, 577, 9, 0.6)]
)
def test_kernels(batch, tokens, width, images, by_slots, device):
    """From ids and a table, and over embeddings."""
    tensors = sequence(batch, tokens, images, device)
    count = int(tensors["mask"].sum())
    for dtype in DTYPES if tokens < 100 else DTYPES[:1]:
        features, table = (torch.randn(rows, width, device=device).to(dtype) for rows in (count, VOCABULARY))
        check_kernel(
            lambda ids, mask, table, features: embed_merge(ids, table, features, **places(mask, by_slots)),
            {**tensors, "table": table, "features": features},
            op="merge",
            kernels=KERNELS,
        )
        if tokens < 100:
            embeds = torch.randn(batch, tokens, width, device=device).to(dtype)
            check_kernel(
                lambda mask, embeds, features: merge(embeds, features, **places(mask, by_slots)),
                {"mask": tensors["mask"], "embeds": embeds, "features": features},
                op="merge",
                kernels=KERNELS,
            )


def from_ids(ids, mask, table, features, padding_id=None):
    return embed_merge(ids, table, features, mask_BT=mask, padding_id=padding_id)


def draw(device: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    tensors = sequence(2, 9, 0.5, device)
    tensors["table"] = torch.randn(VOCABULARY, 20, device=device, dtype=dtype)
    tensors["features"] = torch.randn(int(tensors["mask"].sum()), 20, device=device, dtype=dtype)
    return tensors


@pytest.mark.parametrize("dtype", ALSO_HALF, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("frozen", "kernels"),
    [({"table"}, KERNELS), ({"features"}, KERNELS[:1]), ({"table", "features"}, KERNELS[:1])],
    ids=lambda value: "-".join(sorted(value)),
)
def test_frozen(frozen, kernels, dtype, device):
    """A table that is frozen, as in stage 1, costs no pass; and its own gradient is the library's."""
    check_kernel(from_ids, draw(device, dtype), op="merge", kernels=kernels, frozen=frozen)


@pytest.mark.parametrize("dtype", ALSO_HALF, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_neither_images_nor_padding_teach_the_table(dtype, device):
    tensors = draw(device, dtype)
    for padding_id in (3, 3 - VOCABULARY):
        found = check_kernel(partial(from_ids, padding_id=padding_id), tensors, op="merge", kernels=KERNELS)
        assert not found["dtable"][[IMAGE, 3]].any()
        assert found["dtable"][0].any()


@pytest.mark.parametrize("dtype", ALSO_HALF, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_strided_and_nothing(dtype, device):
    tensors = draw(device, dtype)
    wide = torch.randn(2, 9, 30, device=device, dtype=dtype)
    tensors["features"] = wide.flatten(0, 1)[: tensors["features"].shape[0], 3:23]
    tensors["table"] = torch.randn(20, VOCABULARY, device=device).t()
    check_kernel(from_ids, tensors, op="merge", kernels=KERNELS)
    over = {"mask": tensors["mask"], "embeds": wide[..., :20], "features": tensors["features"]}
    check_kernel(
        lambda mask, embeds, features: merge(embeds, features, mask_BT=mask), over, op="merge", kernels=KERNELS
    )
    none = {
        **tensors,
        "mask": torch.zeros_like(tensors["mask"]),
        "features": torch.zeros(0, 20, device=device, dtype=dtype),
    }
    check_kernel(from_ids, none, op="merge", kernels=KERNELS[:1])
    empty = {**none, "ids": tensors["ids"][:0], "mask": tensors["mask"][:0]}
    check_kernel(from_ids, empty, op="merge", kernels=[])


@pytest.mark.parametrize("dtype", ALSO_HALF, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_several_programs_per_row(dtype, device):
    with (
        forced_tile("merge_fwd", {"BLOCK": 8, "num_warps": 1}),
        forced_tile("merge_bwd", {"BLOCK": 16, "num_warps": 1}),
    ):
        check_kernel(from_ids, draw(device, dtype), op="merge", kernels=KERNELS)


@pytest.mark.parametrize("device", DEVICES)
def test_features_keep_their_dtype(device):
    tensors = draw(device)
    tensors["table"] = tensors["table"].half()
    found = check_kernel(from_ids, tensors, op="merge", kernels=KERNELS)
    assert (found["out0"].dtype, found["dfeatures"].dtype) == (torch.float16, torch.float32)


def test_the_kernel_reads_no_embedding_of_an_image_token():
    """An image token may be beyond the vocabulary; any other such token gives NaN."""
    ids, mask = torch.tensor([[0, 99, 4, 99]]), torch.tensor([[False, True, False, False]])
    table, feature = torch.randn(VOCABULARY, 6), torch.randn(1, 6)
    with use_backend("triton", "merge"):
        out = embed_merge(ids, table, feature, mask_BT=mask)
    assert torch.equal(out[0, :3], torch.stack((table[0], feature[0], table[4])))
    assert out[0, 3].isnan().all()
    with use_backend("reference"), pytest.raises(IndexError):
        embed_merge(ids, table, feature, mask_BT=mask)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_embed_merge_counts_too(backend):
    ids, table = torch.zeros(1, 4, dtype=torch.int64), torch.randn(VOCABULARY, 6)
    mask = torch.tensor([[True, True, False, False]])
    with use_backend(backend, "merge"), pytest.raises(ValueError, match="tokens: 2, features: 3"):
        embed_merge(ids, table, torch.zeros(3, 6), mask_BT=mask)
    with use_backend(backend, "merge"), pytest.raises(ValueError, match="tokens: 1, features: 3"):
        embed_merge(ids, table, torch.zeros(3, 6), slots_M=torch.tensor([0]))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_mismatch_on_a_gpu_is_asserted_there(backend):
    """In a process of its own: a device assert is the end of one."""
    code = (
        "import torch\n"
        "from llava_fast.ops.merge import embed_merge\n"
        "ids = torch.zeros(1, 4, dtype=torch.int64, device='cuda')\n"
        "out = embed_merge(ids, torch.randn(9, 6, device='cuda'), torch.zeros(3, 6, device='cuda'), mask_BT=ids == 0)\n"
        "print('queued', flush=True)\n"
        "torch.cuda.synchronize()\n"
        "print('passed')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout.split() == ["queued"], done.stderr


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    tensors = draw(device)
    source = module._sources(None, tensors["mask"], 18, torch.device(device))
    table, features = tensors["table"].requires_grad_(), tensors["features"].requires_grad_()
    embeds = torch.randn(2, 9, 20, device=device, requires_grad=True)
    torch.library.opcheck(module._merge_op, (table, tensors["ids"], features, source, 3))
    torch.library.opcheck(module._merge_op, (embeds, None, features, source, -1))
    with torch.no_grad():
        for wanted in ((True, True), (False, True)):
            arguments = (embeds.detach(), source, features.shape[0], torch.float32, *wanted)
            torch.library.opcheck(module._merge_backward_op, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break(device):
    tensors = draw(device)
    table, features = tensors.pop("table").requires_grad_(), tensors.pop("features").requires_grad_()
    expected = F.embedding(tensors["ids"], table).clone()
    expected[tensors["mask"]] = features
    with use_backend("triton", "merge"):
        compiled = torch.compile(from_ids, fullgraph=True, backend="aot_eager")
        found = compiled(**tensors, table=table, features=features)
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(found)
    for ours, theirs in zip(*(torch.autograd.grad(y, (table, features), cotangent) for y in (found, expected))):
        torch.testing.assert_close(ours, theirs)


def test_the_gradient_of_a_feature_that_is_missing_goes_nowhere():
    memory = torch.full((4, 8), 7.0)
    source = torch.arange(4, dtype=torch.int32)
    module._backward(torch.ones(4, 8), source, None, memory[:2])
    assert torch.equal(memory, torch.tensor([1.0, 1.0, 7.0, 7.0])[:, None].expand(4, 8))

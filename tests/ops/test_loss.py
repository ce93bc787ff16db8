"""The head with its loss: labelled rows only, in chunks, against all logits at once by PyTorch."""

from functools import partial

import kit
import pytest
import torch
from kit import ALSO_HALF, DEVICES, DTYPES, check_kernel, poisoned, run
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llava_fast.backend import BackendUnavailable, requested, use_backend
from llava_fast.ops import loss
from llava_fast.ops._launch import recorded
from llava_fast.ops.loss import linear_cross_entropy

OP = "linear_cross_entropy"
PATTERNS = ["all", "one", "some", "one sample", "none"]
# With the number of labelled rows the library multiplies; without it kernels do, which read it on the device.
KNOWN = ["loss_kernel"]
UNKNOWN = ["gemm_kernel", "loss_kernel", "gemm_kernel", "gemm_kernel"]


def full_logits(hidden, weight, labels, *, num_items=None):
    """What transformers does."""
    z = F.linear(hidden, weight).view(-1, weight.shape[0])
    z, labels_N = z.to(torch.promote_types(z.dtype, torch.float32)), labels.reshape(-1)
    items = (labels_N != -100).sum().clamp(min=1) if num_items is None else num_items
    return F.cross_entropy(z, labels_N, reduction="sum") / items


def either(**tensors_and_options):
    """All logits where the kit asks for the reference, else the operation."""
    if requested(OP) == "reference":
        tensors_and_options.pop("num_labelled", None)
        return full_logits(**tensors_and_options)
    return linear_cross_entropy(**tensors_and_options)


def inputs(
    pattern="some", shape=(2, 7), width=16, vocabulary=37, dtype=torch.float32, device="cpu"
) -> dict[str, torch.Tensor]:
    labels = torch.randint(0, vocabulary, shape)
    keep = {
        "all": torch.ones(shape, dtype=torch.bool),
        "one": torch.arange(labels.numel()).view(shape) == labels.numel() // 2,
        "some": torch.rand(shape) < 0.4,
        "one sample": torch.arange(labels.numel()).view(shape) >= labels.numel() // 2,
        "none": torch.zeros(shape, dtype=torch.bool),
    }[pattern]
    return {
        "hidden": torch.randn(*shape, width).to(device, dtype),
        "weight": torch.randn(vocabulary, width).to(device, dtype),
        "labels": labels.masked_fill(~keep, -100).to(device),
    }


def count(tensors) -> int:
    return int((tensors["labels"] != -100).sum())


def check_reference(function, *draws, frozen=()) -> None:
    """As `check_kernel`, of the reference.

    PyTorch's error is the larger of two: of the logits of all rows, and of those of the labelled rows alone. For a few
    rows and two threads the library's product is several times less exact, whoever calls it.
    """
    errors: dict[str, list[tuple[float, float, float]]] = {}
    for tensors in draws:
        labelled = tensors["labels"] != -100
        few = {**tensors, "hidden": tensors["hidden"][labelled], "labels": tensors["labels"][labelled]}
        with use_backend("reference"):
            cotangents = [torch.randn_like(full_logits(**tensors))]
            doubles = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
            truth = run(full_logits, doubles, [c.double() for c in cotangents], frozen)
            torchs = run(full_logits, tensors, cotangents, frozen)
            of_few = run(full_logits, few, cotangents, frozen)
            with poisoned():
                found = run(function, tensors, cotangents, frozen)
        assert found.keys() == truth.keys()
        for name, value in found.items():
            assert value.dtype == torchs[name].dtype and value.shape == torchs[name].shape, name
            assert torch.isfinite(value).all(), name
            truth_of_few = truth[name][labelled] if name == "dhidden" else truth[name]
            ours, theirs, ulp = kit.errors(value, torchs[name], truth[name])
            errors.setdefault(name, []).append(
                (ours, max(theirs, kit.errors(of_few[name], of_few[name], truth_of_few)[0]), ulp)
            )
    for name, of_draws in errors.items():
        ours, theirs, ulp = (max(column) for column in zip(*of_draws))
        assert ours <= 2 * theirs + ulp, f"{name}: error {ours:.3e}, PyTorch's is {theirs:.3e}"


@pytest.fixture
def small_chunks(monkeypatch):
    """Three rows to a chunk."""
    monkeypatch.setattr(loss, "MIN_CHUNK_ROWS", 3)
    monkeypatch.setattr(loss, "CHUNK_BYTES", {"cpu": 1, "cuda": 1})


# ---- the reference


@pytest.mark.parametrize("pattern", PATTERNS)
def test_reference(pattern):
    check_reference(linear_cross_entropy, *[inputs(pattern) for _ in range(32)])
    tensors = {n: t.double() if t.is_floating_point() else t for n, t in inputs(pattern).items()}
    cotangent = [torch.randn((), dtype=torch.float64)]
    found, expected = run(linear_cross_entropy, tensors, cotangent), run(full_logits, tensors, cotangent)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [5, 1000, 32003])
def test_reference_is_as_precise_as_all_logits(vocabulary, dtype):
    draws = [inputs("some", (3, 9), 24, vocabulary, dtype) for _ in range(32 if vocabulary < 9999 else 4)]
    check_reference(linear_cross_entropy, *draws)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_in_several_chunks(dtype, small_chunks):
    for pattern in PATTERNS:
        check_reference(linear_cross_entropy, *[inputs(pattern, (2, 10), dtype=dtype) for _ in range(32)])


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("known", [False, True])
def test_unlabelled_rows_are_never_multiplied(known, backend, small_chunks):
    tensors = inputs("some", (3, 8))
    labelled = tensors["labels"] != -100
    tensors["hidden"][~labelled] = float("nan")
    function = partial(linear_cross_entropy, num_labelled=count(tensors) if known else None)
    with use_backend(backend), poisoned():
        found = run(function, tensors, [torch.tensor(1.0)])
    assert found["out0"].isfinite() and found["dweight"].isfinite().all()
    assert not found["dhidden"][~labelled].any()
    only = {**tensors, "hidden": tensors["hidden"][labelled], "labels": tensors["labels"][labelled]}
    expected = run(full_logits, only, [torch.tensor(1.0)])
    torch.testing.assert_close(found["dhidden"][labelled], expected["dhidden"])
    torch.testing.assert_close(found["dweight"], expected["dweight"])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_nothing_of_the_size_of_the_logits_is_kept(backend):
    tensors = inputs("all", (1, 50), 8, 100)
    leaves = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in tensors.items()}
    kept = []
    with use_backend(backend), torch.autograd.graph.saved_tensors_hooks(kept.append, id):
        linear_cross_entropy(**leaves)
    assert 0 < max(t.numel() for t in kept) <= 100 * 8


# ---- the kernels


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("known", [False, True], ids=["count on the device", "count known"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_kernel(pattern, known, device):
    for dtype in DTYPES:
        draws = [inputs(pattern, dtype=dtype, device=device) for _ in range(8)]
        if known and pattern == "some":
            first = draws[0]["labels"]
            draws = [{**draw, "labels": first} for draw in draws]
        function = partial(either, num_labelled=count(draws[0]) if known else None)
        check_kernel(
            function, *draws, op=OP, kernels=[] if known and pattern == "none" else KNOWN if known else UNKNOWN
        )


@pytest.mark.gpu
@pytest.mark.parametrize("known", [False, True])
def test_kernel_in_bfloat16_at_full_size(known):
    tensors = inputs("some", (2, 416), 1024, 32003, torch.bfloat16, "cuda")
    kernels = KNOWN if known else UNKNOWN
    check_kernel(partial(either, num_labelled=count(tensors) if known else None), tensors, op=OP, kernels=kernels)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocabulary", [5, 1000, 32003])
def test_kernel_with_odd_vocabularies(vocabulary, device):
    for dtype in DTYPES:
        draws = [inputs("all", (1, 5), 8, vocabulary, dtype, device) for _ in range(16 if vocabulary < 9999 else 4)]
        check_kernel(partial(either, num_labelled=5), *draws, op=OP, kernels=KNOWN)
    check_kernel(either, inputs("some", (1, 5), 8, min(vocabulary, 1003), device=device), op=OP, kernels=UNKNOWN)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("known", [False, True])
def test_kernel_in_several_chunks(known, device, small_chunks):
    for dtype in DTYPES:
        draws = [inputs("one sample", (2, 7), dtype=dtype, device=device) for _ in range(8)]
        function = partial(either, num_labelled=7 if known else None)
        check_kernel(function, *draws, op=OP, kernels=KNOWN * 3 if known else UNKNOWN * 5)


@pytest.mark.parametrize("dtype", ALSO_HALF, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_kernel_on_strided_tensors(dtype, device):
    wide = inputs("some", (6, 4), 40, 30, dtype=dtype, device=device)
    tensors = {
        "hidden": wide["hidden"].transpose(0, 1)[:, ::2, 3:20],
        "weight": wide["weight"].t()[3:20].t(),
        "labels": wide["labels"].t()[:, ::2],
    }
    assert not any(t.is_contiguous() for t in tensors.values())
    check_kernel(either, tensors, op=OP, kernels=UNKNOWN)
    check_kernel(partial(either, num_labelled=count(tensors)), tensors, op=OP, kernels=KNOWN)
    check_reference(linear_cross_entropy, tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_no_rows(backend, device):
    for shape in ((0,), (2, 0)):
        tensors = {"hidden": torch.randn(*shape, 4), "weight": torch.randn(9, 4), "labels": torch.zeros(shape).long()}
        tensors = {name: t.to(device) for name, t in tensors.items()}
        with use_backend(backend), poisoned():
            found = run(linear_cross_entropy, tensors, [torch.tensor(1.0, device=device)])
        assert found["out0"] == 0 and not found["dweight"].any() and found["dhidden"].shape == (*shape, 4)


@pytest.mark.parametrize("dtype", ALSO_HALF, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_costs_nothing(frozen, dtype, device):
    tensors = inputs("some", dtype=dtype, device=device)
    check_kernel(either, tensors, op=OP, kernels=["gemm_kernel", "loss_kernel", "gemm_kernel"], frozen=[frozen])
    check_reference(linear_cross_entropy, tensors, frozen=[frozen])


@pytest.mark.parametrize("device", DEVICES)
def test_without_gradients_the_logits_are_only_read(device):
    tensors = inputs("some", device=device)
    with use_backend("triton", OP), recorded() as launched, poisoned(), torch.no_grad():
        found = linear_cross_entropy(**tensors)
    assert [launch.constexprs.get("GRADIENT") for launch in launched] == [None, False]
    torch.testing.assert_close(found, full_logits(**tensors))


# ---- both


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_no_labels_are_a_loss_of_zero(backend):
    with use_backend(backend), poisoned():
        for known in (None, 0):
            function = partial(linear_cross_entropy, num_labelled=known)
            found = run(function, inputs("none"), [torch.tensor(1.0)])
            assert all(not value.any() for value in found.values())


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("items", [13, torch.tensor(13), torch.tensor(13.0)], ids=str)
def test_num_items_divide_the_sum(items, backend):
    tensors = inputs("some")
    with use_backend(backend):
        found = run(partial(linear_cross_entropy, num_items=items), tensors, [torch.tensor(2.0)])
    expected = run(partial(full_logits, num_items=items), tensors, [torch.tensor(2.0)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_another_ignore_index(backend):
    tensors = inputs("some")
    labels = tensors["labels"].masked_fill(tensors["labels"] == -100, 3)
    moved = {**tensors, "labels": labels}
    expected = full_logits(**{**tensors, "labels": labels.masked_fill(labels == 3, -100)})
    with use_backend(backend):
        torch.testing.assert_close(linear_cross_entropy(**moved, ignore_index=3), expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_tied_head(backend):
    def step(function):
        torch.manual_seed(1)
        embedding = torch.randn(19, 8, requires_grad=True)
        ids = torch.randint(0, 19, (2, 6))
        function(hidden=F.embedding(ids, embedding).tanh(), weight=embedding, labels=ids.roll(1)).backward()
        return embedding.grad

    with use_backend(backend):
        torch.testing.assert_close(step(linear_cross_entropy), step(full_logits))


def test_backward_twice_and_under_a_checkpoint():
    tensors = inputs("some")
    leaves = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in tensors.items()}
    wanted = [leaves["hidden"], leaves["weight"]]
    output = linear_cross_entropy(**leaves)
    once, again, doubled = (
        torch.autograd.grad(output, wanted, torch.tensor(factor), retain_graph=True) for factor in (1.0, 1.0, 2.0)
    )
    torch.testing.assert_close(again, once)
    torch.testing.assert_close(doubled, tuple(2 * gradient for gradient in once))
    output = checkpoint(linear_cross_entropy, *leaves.values(), use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(output, wanted), once)
    # Gradients that were accumulated in place leave alone what is saved.
    output = linear_cross_entropy(**leaves)
    output.backward(retain_graph=True)
    output.backward()
    torch.testing.assert_close(leaves["weight"].grad, 2 * once[1])


def test_small_gradients_survive_in_float16():
    """Divided by 3,000 rows before it is rounded, much of dz would be below what float16 can hold."""
    tensors = inputs("all", (3000,), 8, 500, torch.float16)
    found = run(linear_cross_entropy, tensors, [torch.tensor(2.0**14)])
    doubles = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    expected = run(full_logits, doubles, [torch.tensor(2.0**14, dtype=torch.float64)])
    error = (found["dhidden"] - expected["dhidden"]).norm() / expected["dhidden"].norm()
    assert error < 1e-3


def test_second_derivatives_are_refused():
    tensors = inputs("some")
    hidden = tensors.pop("hidden").requires_grad_()
    output = linear_cross_entropy(hidden, **tensors)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(output, hidden, create_graph=True)


def test_under_autocast_as_a_linear_layer():
    tensors = inputs("some")
    with torch.autocast("cpu", torch.bfloat16):
        check_reference(linear_cross_entropy, *[inputs("some") for _ in range(32)])
        tensors["hidden"] = tensors["hidden"].bfloat16()  # what a norm in autocast may give
        assert run(linear_cross_entropy, tensors, [torch.tensor(1.0)])["dweight"].dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernels", [False, True])
def test_opcheck(kernels, device):
    tensors = inputs("some", device=device)
    hidden, weight = (tensors[name].requires_grad_() for name in ("hidden", "weight"))
    labels, scale = tensors["labels"], torch.tensor(0.5, device=device)
    for num_labelled in (None, count(tensors)):
        arguments = (labels, scale, num_labelled, -100, [True, True], kernels)
        torch.library.opcheck(loss._op, (hidden, weight, *arguments))
    torch.library.opcheck(loss._op, (hidden, weight.detach(), labels, scale, None, -100, [True, False], kernels))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiles_without_a_graph_break(backend):
    torch.compiler.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for shape in ((2, 7), (3, 5)):
        tensors = inputs("some", shape)
        with use_backend(backend):
            cotangent = [torch.randn(())]
            for known in (None, count(tensors)):
                found = run(partial(compiled, num_labelled=known), tensors, cotangent)
                torch.testing.assert_close(found, run(linear_cross_entropy, tensors, cotangent))


OUTSIDE = [37, 2**40, -1, -5, -101, -(2**40)]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("wrong", OUTSIDE)
def test_labels_outside_the_vocabulary(wrong, backend, known):
    """On a CPU the error is PyTorch's."""
    for pattern in ("all", "some"):
        tensors = inputs(pattern)
        tensors["labels"][1, 3] = wrong
        with pytest.raises(IndexError):
            full_logits(**tensors)
        with use_backend(backend), pytest.raises(IndexError, match=f"label {wrong} is outside the vocabulary of 37"):
            linear_cross_entropy(**tensors, num_labelled=count(tensors) if known else None)
        with use_backend(backend), pytest.raises(IndexError), torch.no_grad():
            linear_cross_entropy(**tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wrong", OUTSIDE)
def test_the_kernel_reads_no_logit_for_a_label_outside(wrong, device):
    """Some are so far away that there is no memory. The row's loss and gradient are NaN; those of others are right."""
    logits = torch.randn(4, 37).to(device)
    labels = torch.tensor([5, wrong, -100, 0], device=device)
    losses, rows, dz = torch.zeros(4, device=device), torch.arange(4, device=device), logits.clone()
    loss._chunk_loss(dz, rows, labels, None, losses, -100, gradient=True, zero_rest=True)
    torch.testing.assert_close(losses[[0, 3]], F.cross_entropy(logits[[0, 3]], labels[[0, 3]], reduction="none"))
    one_hot = F.one_hot(labels[[0, 3]], 37)
    torch.testing.assert_close(dz[[0, 3]], logits[[0, 3]].softmax(1) - one_hot)
    assert losses[1].isnan() and dz[1].isnan().all() and losses[2] == 0 and not dz[2].any()


def test_errors():
    tensors = inputs("some")
    for kwargs, message in (
        ({"weight": tensors["weight"].double()}, r"must have one dtype, not torch.float32, torch.float64"),
        ({"labels": tensors["labels"][:, 1:]}, r"do not fit: \[\(2, 7, 16\), \(37, 16\), \(2, 6\)\]"),
        ({"weight": tensors["weight"][:, 1:]}, r"do not fit: \[\(2, 7, 16\), \(37, 15\), \(2, 7\)\]"),
        ({"num_labelled": 99}, f"num_labelled is 99, but {count(tensors)} labels are not -100"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(**{**tensors, **kwargs})
    with use_backend("triton", OP), pytest.raises(BackendUnavailable, match=r"torch\.float64 is not one of"):
        linear_cross_entropy(tensors["hidden"].double(), tensors["weight"].double(), tensors["labels"])

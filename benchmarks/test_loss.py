"""The head and its loss over one LLaVA turn: 576 rows of the image without labels, and labelled text.

With backward, the gradients of the hidden states and of the weight; a frozen head, as in stage 1 and with LoRA, needs
only the first. `hf` is transformers' loss on all logits, in float32; `torch` is cross entropy on logits in their own
dtype. `triton` gets the number of labelled rows, as from a collator; `triton-count` reads it on the device.

On a CPU the peak of `reference` covers only its results: the harness does not see memory inside an operator.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F
from transformers.loss.loss_utils import fixed_cross_entropy

from benchmarks.harness import Case, Tensors, benchmark_of, function, report
from benchmarks.records import DEVICE
from llava_fast import backend
from llava_fast.ops.loss import linear_cross_entropy

try:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
except ImportError:
    liger_fused_linear_cross_entropy = None


def cases(gpu: bool) -> list[Case]:
    """Rows, labelled rows, vocabulary, width: LLaVA-1.5-7B's on a GPU, one sample and sixteen; in small on a CPU."""
    dtype = torch.bfloat16 if gpu else torch.float32
    sizes = [(832, 256, 32000, 4096), (13312, 4096, 32000, 4096)] if gpu else [(640, 64, 32000, 512)]
    return [
        loss_case(*size, dtype, frozen, backward)
        for size in sizes
        for frozen, backward in ((False, False), (False, True), (True, True))
    ]


def loss_case(
    rows: int, labelled: int, vocabulary: int, width: int, dtype: torch.dtype, frozen: bool, backward: bool
) -> Case:
    weight = (torch.randn(vocabulary, width, device=DEVICE) * width**-0.5).to(dtype)

    def inputs() -> Tensors:
        labels = torch.full((rows,), -100)
        labels[torch.randperm(rows)[:labelled]] = torch.randint(0, vocabulary, (labelled,))
        tensors = {"hidden": torch.randn(rows, width, device=DEVICE).to(dtype), "labels": labels.to(DEVICE)}
        return tensors if frozen else {**tensors, "weight": weight.clone()}

    def with_head(fn: Callable) -> Callable:
        # Only tensors in `inputs` get gradients.
        def call(hidden, labels, weight=weight):
            return (fn(hidden, weight.to(hidden.dtype), labels),)

        return call

    found = {name: function(with_head(fn)) for name, fn in providers(labelled).items()}
    products = 1 + (2 - frozen) * backward
    # The weight is read by two products and its gradient written once; hidden states and logits are small beside it.
    passes = 1 + (2 - frozen) * backward
    return Case(
        op="loss_frozen_head" if frozen else "loss",
        shape=(rows, labelled, vocabulary, width),
        dtype=dtype,
        backward=backward,
        inputs=inputs,
        reference=with_head(_hf),
        providers=found,
        bytes_moved=(passes * vocabulary + (1 + backward) * labelled) * width * dtype.itemsize,
        flops=products * 2 * labelled * vocabulary * width,
    )


def providers(labelled: int) -> dict[str, Callable]:
    found = {"torch": _torch, "hf": _hf}
    if not torch.cuda.is_available():
        return {**found, "reference": partial(_ours, "reference", None)}
    found["compile"] = torch.compile(_hf)
    if liger_fused_linear_cross_entropy is not None:
        found["liger"] = liger_fused_linear_cross_entropy
    if not backend.unavailable("triton"):
        found["triton"] = partial(_ours, "triton", labelled)
        found["triton-count"] = partial(_ours, "triton", None)
    return found


def _torch(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight), labels).to(torch.promote_types(hidden.dtype, torch.float32))


def _hf(hidden, weight, labels):
    logits = F.linear(hidden, weight)
    return fixed_cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


def _ours(name, num_labelled, hidden, weight, labels):
    with backend.use_backend(name, "linear_cross_entropy"):
        return linear_cross_entropy(hidden, weight, labels, num_labelled=num_labelled)


@benchmark_of(cases(gpu=torch.cuda.is_available()))
def test_loss(benchmark, case: Case, provider: str):
    report(benchmark, case, provider)

"""Which attention "auto" takes for plain ranges: from records to the table that ships."""

from typing import Any

import pytest

from benchmarks import plain, test_attention


def records(op: str, shape: str, direction: str = "forward", dtype: str = "bf16", **ms: float) -> list[dict[str, Any]]:
    case = {"op": op, "shape": shape, "direction": direction, "dtype": dtype}
    return [{**case, "provider": provider, "ms_median": median} for provider, median in ms.items()]


def chosen(*found: list[dict[str, Any]], device: str = "nvidia-h100") -> dict[str, str]:
    table = plain.table({device: [record for some in found for record in some]}, {device: "a GPU, 2030-01-01"})
    return table[plain.ARCHITECTURES[device]]["fastest"]


def test_without_measurements_nothing_is_stored() -> None:
    entry = {"source": "not measured: PyTorch's kernels until a timing shows ours ahead", "fastest": {}}
    assert plain.table({}, {}) == {"sm_80": entry, "sm_90": entry}


def test_the_fastest_of_a_case_is_stored() -> None:
    tower = "attention_tower", "1x577x16x64"
    assert chosen(records(*tower, triton=2.0, sdpa_flash=1.5, sdpa_cudnn=1.0, torch=0.1, flash_attn_3=0.2)) == {
        "full, forward, d 64, up to 1024": "sdpa_cudnn"
    }
    assert chosen(records(*tower, "forward+backward", triton=1.0, sdpa_flash=1.5)) == {
        "full, forward+backward, d 64, up to 1024": "triton"
    }
    # On an A100 there is no cuDNN kernel that "auto" would try.
    assert chosen(records(*tower, triton=2.0, sdpa_cudnn=1.0, sdpa_flash=3.0), device="nvidia-a100") == {
        "full, forward, d 64, up to 1024": "triton"
    }
    assert chosen(records("attention_sample", "1x300x32x128", triton=2.0, sdpa_flash=1.0)) == {
        "causal, forward, d 128, up to 512": "sdpa_flash"
    }


def test_ours_is_taken_only_where_it_is_the_fastest_of_all_shapes() -> None:
    five, ten = (f"1x{sum(lengths)}x32x128" for lengths in test_attention.PACKS[True])
    name = "causal pack, forward, d 128, up to 1024"
    ahead = records("attention", five, triton=1.0, varlen=2.0)
    assert chosen(ahead) == {name: "triton"}
    assert chosen(ahead, records("attention", ten, triton=1.0, varlen=1.1)) == {name: "triton"}
    assert chosen(ahead, records("attention", ten, triton=1.1, varlen=1.0)) == {name: "varlen"}
    grouped = five.replace("x32x", "x32x8x")
    assert chosen(ahead, records("attention_gqa", grouped, triton=1.1, varlen=1.0)) == {name: "varlen"}
    assert chosen(ahead, records("attention", ten, varlen=1.0)) == {name: "varlen"}  # ours failed there
    assert chosen(records("attention", five, triton=1.0)) == {}  # nobody to compare with


def test_other_records_do_not_count() -> None:
    five = f"1x{sum(test_attention.PACKS[True][0])}x32x128"
    for other in (
        records("attention_images", five, triton=1.0, varlen=2.0),
        records("attention_build", five, triton=1.0, varlen=2.0),
        records("attention", "1x77x32x128", triton=1.0, varlen=2.0),  # a pack of unknown lengths
        records("attention", five, dtype="fp32", triton=1.0, varlen=2.0),
        records("rms_norm", "832x4096", triton=1.0, torch=2.0),
    ):
        assert chosen(other) == {}


def test_two_gpus_of_an_architecture_are_one_entry() -> None:
    found = {
        "nvidia-h100": records("attention_tower", "1x577x16x64", triton=1.0, sdpa_flash=2.0),
        "nvidia-h200": records("attention_tower", "1x577x16x64", triton=3.0, sdpa_flash=2.0),
    }
    content = plain.table(found, {"nvidia-h100": "H100, 2030-01-01", "nvidia-h200": "H200, 2030-01-02"})
    assert content["sm_90"] == {
        "source": "measured on H100, 2030-01-01, H200, 2030-01-02; other cases: PyTorch's kernels until a timing shows "
        "ours ahead",
        "fastest": {"full, forward, d 64, up to 1024": "sdpa_flash"},
    }
    assert content["sm_80"]["source"].startswith("not measured: ")


@pytest.mark.parametrize("backward", [False, True])
def test_the_benchmark_s_own_cases_have_names(backward: bool) -> None:
    """What `benchmarks/test_attention.py` measures on a GPU fills every kind of case but packs of full samples."""
    cases = [case.identity for case in test_attention.cases(gpu=True) if case.backward == backward]
    found = {plain.plain_case(case["op"], case["shape"]) for case in cases} - {None}
    assert found == {("full", 64, 577), ("causal", 128, 832), ("causal pack", 128, 832)}

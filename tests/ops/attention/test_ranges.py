"""`KeyRanges`: what follows from two vectors is worked out once, and is right."""

import pytest
import torch

from llava_fast.ops.attention import KeyRanges
from llava_fast.ops.attention import ranges as module
from llava_fast.sequence import key_ranges, pack

CPU = torch.device("cpu")


def of_pack(*lengths: int) -> KeyRanges:
    packed = pack(lengths)
    return KeyRanges(packed.key_start, packed.key_end)


def test_first_rows_of_samples_and_the_queries_that_see_a_key() -> None:
    ranges = of_pack(5, 4, 9)
    assert ranges.first_BT.tolist() == [[0] * 5 + [5] * 4 + [9] * 9]
    first, _, to = ranges.seen_by(18)
    assert first.tolist() == ranges.first_BT.tolist()
    assert to.tolist() == [[5] * 5 + [9] * 4 + [18] * 9]
    gaps = KeyRanges(torch.tensor([[0, 1, 2, 2, 5, 6]]).int(), torch.tensor([[0, 1, 4, 5, 5, 6]]).int())
    assert gaps.first_BT.tolist() == [[0, 0, 2, 2, 4, 4]]
    assert gaps.seen_by(6)[:, 0].tolist() == [[0, 1, 2, 2, 2, 5], [1, 2, 2, 2, 3, 5], [1, 2, 4, 4, 4, 5]]


@pytest.mark.parametrize("known", [key_ranges(2, 7, CPU), KeyRanges.full(2, 7, CPU)], ids=["causal", "full"])
def test_what_the_host_knows_is_what_the_vectors_say(known: KeyRanges) -> None:
    told = KeyRanges(known.start, known.end)
    assert known.kind is not None and told.kind is None
    assert torch.equal(known.first_BT, told.first_BT)
    assert torch.equal(known.seen_by(7), told.seen_by(7))
    assert known.groups(7) == told.groups(7) == module.Groups(known.kind, ())
    longer = known.groups(9), told.groups(9)  # slots of a static cache that nobody sees
    assert longer == (None, None)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 7)], ids=["no mask", "a mask without padding"])
def test_a_step_of_decoding_is_known_to_see_all_keys(mask: torch.Tensor | None) -> None:
    known = key_ranges(2, 1, CPU, past=6, attention_mask=mask, position_ids=torch.full((2, 1), 6))
    told = KeyRanges(known.start, known.end)
    assert (known.kind, known.keys, told.kind) == ("full", 7, None)
    assert (known.start.tolist(), known.end.tolist()) == ([[0], [0]], [[7], [7]])
    assert known.groups(7) == told.groups(7) == module.Groups("full", ())
    assert known.groups(9) is told.groups(9) is None
    assert torch.equal(known.first_BT, told.first_BT)


def test_a_pack_of_known_lengths() -> None:
    packed = pack([3, 1, 4])
    known = KeyRanges(packed.key_start, packed.key_end, "causal", lengths=packed.lengths)
    told = KeyRanges(packed.key_start, packed.key_end)
    assert torch.equal(known.first_BT, told.first_BT) and known.first_BT is known.start
    assert torch.equal(known.seen_by(8), told.seen_by(8))
    assert len(known.groups(8).groups) == len(told.groups(8).groups) > 0
    assert known.to("meta").lengths == (3, 1, 4)
    assert known.last(1).kind is known.last(1).lengths is known.shifted(1).kind is None
    assert KeyRanges(*key_ranges(1, 8, CPU), "causal", lengths=(8,)).lengths is None  # one sample
    with pytest.raises(ValueError, match=r"samples of 9 tokens in all, but key ranges \(1, 8\)"):
        KeyRanges(packed.key_start, packed.key_end, "causal", lengths=(3, 1, 5))


def test_only_plain_ranges_are_known_to_be() -> None:
    padded, position = torch.tensor([[0, 1, 1, 1]]), torch.arange(4)[None]
    others = [{"past": 3}, {"attention_mask": padded}, {"position_ids": position}, {"sliding_window": 2}]
    assert [key_ranges(1, 4, CPU, **given).kind for given in others] == [None] * 4
    assert key_ranges(1, 4, CPU, attention_mask=torch.ones(1, 4), position_ids=position).kind == "causal"
    longer = torch.tensor([[0, 1, 1, 1, 1]])
    others = [{"attention_mask": longer}, {"sliding_window": 2}, {"image_mask": torch.ones(1, 1, dtype=torch.bool)}]
    assert [key_ranges(1, 1, CPU, past=4, **given).kind for given in others] == [None] * 3
    assert key_ranges(1, 1, CPU, past=torch.tensor(4)).kind is None


def test_the_last_queries_of_known_ranges() -> None:
    for known in (key_ranges(2, 7, CPU), KeyRanges.full(2, 7, CPU), KeyRanges.full(2, 7, CPU, keys=9)):
        for rows in (1, 3):
            last = known.last(rows)
            told = KeyRanges(known.start[:, -rows:], known.end[:, -rows:])
            assert torch.equal(last.start, told.start) and torch.equal(last.end, told.end)
            assert (last.kind is None) == (known.kind == "causal" and rows > 1)
            assert last.groups(known.keys) == told.groups(known.keys)


def test_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for name in ("_first_of_sample", "_seen_by", "_groups_of"):
        real = getattr(module, name)

        def spy(ranges, keys, name=name, real=real):
            made.append((name, keys))
            return real(ranges, keys)

        monkeypatch.setattr(module, name, spy)
    ranges = of_pack(3, 4)
    for _ in range(3):
        with torch.inference_mode():
            _ = ranges.first_BT
        ranges.seen_by(7), ranges.groups(7), ranges.seen_by(9)
    assert sorted(made) == sorted([("_first_of_sample", 0), ("_seen_by", 7), ("_groups_of", 7), ("_seen_by", 9)])
    assert not ranges.first_BT.is_inference()  # a backward pass may save it


@pytest.mark.parametrize("made_inside", [True, False])
def test_what_a_capture_makes_is_kept_by_its_own_ranges(made_inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = made_inside
    monkeypatch.setattr(KeyRanges, "_capturing", lambda self: capturing)
    ranges = of_pack(3, 4)
    capturing = True
    assert (ranges.first_BT is ranges.first_BT) == made_inside
    capturing = False
    first = ranges.first_BT
    assert ranges.first_BT is first


def test_shifted_and_elsewhere() -> None:
    ranges = key_ranges(1, 3, CPU, past=4)
    assert [x.tolist() for x in ranges.shifted(2)] == [[[0, 0, 0]], [[3, 4, 5]]]
    assert ranges.shifted(0) is ranges
    assert ranges.to("cpu") is ranges
    there = ranges.to("meta")
    assert there.start.device.type == there.end.device.type == "meta"
    assert ranges.to("meta") is there


def test_vectors_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"key ranges \(1, 3\) and \(1, 2\)"):
        KeyRanges(torch.zeros(1, 3).int(), torch.zeros(1, 2).int())

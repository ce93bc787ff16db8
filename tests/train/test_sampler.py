"""The order of samples: whole epochs, steps of one modality, device batches of about equally many tokens."""

from types import SimpleNamespace

import pytest
import torch

from llava_fast.train.sampler import GroupedSampler


def fake_data(n_images: int, n_texts: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(10, 500, (n_images + n_texts,), generator=generator).tolist()
    modality = ["image"] * n_images + ["text"] * n_texts
    data = SimpleNamespace(lengths=lengths, modality=modality)
    return data


@pytest.mark.parametrize("group_by", ["none", "length", "modality"])
@pytest.mark.parametrize(("n_images", "n_texts"), [(100, 37), (64, 0), (5, 3), (0, 1)])
def test_an_epoch_is_a_permutation_from_seed_and_epoch(group_by, n_images, n_texts):
    data = fake_data(n_images, n_texts)
    sampler = GroupedSampler(data, group_by, batch_size=4, step_size=16, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(n_images + n_texts)) and len(sampler) == len(first)
    assert first == list(GroupedSampler(data, group_by, batch_size=4, step_size=16, seed=1))
    sampler.epoch = 1
    if n_images > 5:
        assert list(sampler) != first
        assert list(GroupedSampler(data, group_by, batch_size=4, step_size=16, seed=5)) != first


def test_steps_are_of_one_modality_and_balanced():
    data = fake_data(160, 70)
    order = list(GroupedSampler(data, "modality", batch_size=4, step_size=16, seed=0))
    steps = [order[start : start + 16] for start in range(0, len(order), 16)]
    kinds = [{data.modality[index] for index in step} for step in steps]
    n_whole = 160 // 16 + 70 // 16
    assert all(len(kind) == 1 for kind in kinds[:n_whole])
    assert [kind.pop() for kind in kinds[:n_whole]] != ["image"] * 10 + ["text"] * 4  # steps are shuffled
    random = list(GroupedSampler(data, "none", batch_size=4, step_size=16, seed=0))

    def spread(order: list[int]) -> float:
        """Mean over steps of the largest difference in tokens between the batches of a step."""
        batches = [order[start : start + 4] for start in range(0, n_whole * 16, 4)]
        tokens = torch.tensor([sum(data.lengths[i] for i in batch) for batch in batches]).view(-1, 4)
        return (tokens.amax(1) - tokens.amin(1)).float().mean().item()

    assert spread(order) < 0.25 * spread(random)

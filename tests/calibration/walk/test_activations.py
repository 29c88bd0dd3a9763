"""States in files come back as they were put there."""

from __future__ import annotations

import pytest
import torch

from pocketvlm.calibration.walk.activations import ActivationStore, join_batches

BATCHES = [
    torch.randn(count, 3, 5, generator=torch.Generator().manual_seed(count)) for count in (2, 1, 4)
]


@pytest.mark.parametrize("budget", [0, 100, 10_000])
def test_batches_are_joined_wherever_they_are(tmp_path, budget):
    with ActivationStore(tmp_path, budget=budget) as store:
        store.extend(BATCHES)
        joined = join_batches(store, tmp_path)
    assert torch.equal(joined, torch.cat(BATCHES))
    assert not list(tmp_path.iterdir()), "the file has no name"


def test_parts_that_are_not_contiguous_are_joined(tmp_path):
    turned = [batch.transpose(1, 2) for batch in BATCHES]
    assert torch.equal(join_batches(turned, tmp_path), torch.cat(turned))


def test_what_is_joined_may_be_changed(tmp_path):
    joined = join_batches(BATCHES, tmp_path)
    joined += 1
    assert torch.equal(joined, torch.cat(BATCHES) + 1)

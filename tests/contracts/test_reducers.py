"""What every score of visual tokens promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.options import ReducerOptions
from pocketvlm.compress.tokens.stage import SCORES
from pocketvlm.reference_graph.forward import encode_images

KEPT = 4


@pytest.mark.parametrize("positions", ["original", "consecutive"])
@pytest.mark.parametrize("score", SCORES)
def test_a_reducer_keeps_as_many_tokens_as_it_says(score, positions, tiny_paths):
    """The tower of this family has a [CLS] token, so that every score suits it."""
    checkpoint = Checkpoint.load(tiny_paths["llava"])
    spec = checkpoint.spec
    reducer = SCORES[score](spec, ReducerOptions(keep=KEPT, positions=positions, seed=3))
    again = SCORES[score](spec, ReducerOptions(keep=KEPT, positions=positions, seed=3))
    assert (reducer.keep, reducer.positions) == (KEPT, positions)
    side = spec.tower.patches_per_side * spec.tower.patch_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    found = encode_images(reduced(checkpoint, reducer), pixels)
    assert found.embeds.shape == (2, KEPT, spec.decoder.hidden_size)
    assert found.indices.shape == (2, KEPT)
    assert bool((found.indices >= 0).all() and (found.indices < spec.visual_tokens).all())
    assert bool((found.indices.diff(dim=1) > 0).all()), "each token once, in order"
    same = encode_images(reduced(checkpoint, again), pixels)
    assert torch.equal(found.embeds, same.embeds)
    assert torch.equal(found.indices, same.indices)
    alone = encode_images(reduced(checkpoint, reducer), pixels[1:])
    assert torch.equal(found.indices[1:], alone.indices), "a picture is not judged by its batch"


def reduced(checkpoint, reducer):
    return replace(checkpoint, reducer=reducer.eval())

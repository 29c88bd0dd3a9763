"""Dense weights that are kept for many passes, and what they may take."""

from __future__ import annotations

import math

import pytest
import torch

from pocketvlm.weights.modules import FormEmbedding, FormLinear, cache_dense_weights


def kept(model) -> dict[str, torch.Tensor]:
    return {
        name: module.cached
        for name, module in model.named_modules()
        if isinstance(module, FormLinear | FormEmbedding) and module.cached is not None
    }


def kept_bytes(model) -> int:
    """Of what is kept; a tied table counts once."""
    return sum({each.data_ptr(): each.nbytes for each in kept(model).values()}.values())


def test_everything_is_kept_without_a_budget(tiny_checkpoint):
    model = tiny_checkpoint.model
    with cache_dense_weights(model):
        for linear, form in tiny_checkpoint.forms().items():
            assert torch.equal(kept(model)[linear.name], form.dequantize())
    assert not kept(model)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99, 1.0])
def test_a_budget_is_held_and_filled(tiny_checkpoint, share):
    model, spec = tiny_checkpoint.model, tiny_checkpoint.spec
    with cache_dense_weights(model):
        every = kept_bytes(model)
    budget = int(every * share)
    with cache_dense_weights(model, budget=budget):
        assert kept_bytes(model) <= budget
        left = [
            4 * math.prod(form.shape)
            for linear, form in tiny_checkpoint.forms().items()
            if linear.name not in kept(model)
        ]
        assert all(size > budget - kept_bytes(model) for size in left)
        if 0 < share < 1:  # it runs for every token
            assert any(name.startswith(spec.decoder.prefix) for name in kept(model))
    assert not kept(model)


def test_what_is_not_kept_computes_the_same(tiny_checkpoint):
    layer = tiny_checkpoint.layer(tiny_checkpoint.spec.decoder.blocks[0].ffn.output)
    inputs = torch.randn(3, layer.form.shape[1], generator=torch.Generator().manual_seed(0))
    with cache_dense_weights(layer, budget=0):
        unpacked = layer(inputs)
    with cache_dense_weights(layer):
        assert torch.equal(layer(inputs), unpacked)

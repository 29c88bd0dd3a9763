"""Rotary positions are those of the stock decoder, bit for bit."""

from __future__ import annotations

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from pocketvlm.graph.rotary import rotary_angles, rotate_by_position


def test_the_stock_decoder_rotates_the_same(tiny_checkpoint):
    decoder = tiny_checkpoint.spec.decoder
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, decoder.heads, 7, decoder.head_dim, generator=generator)
    keys = torch.randn(2, decoder.kv_heads, 7, decoder.head_dim, generator=generator)
    positions = torch.tensor([[0, 1, 2, 5, 9, 10, 30]]).expand(2, -1)
    config = LlamaConfig(
        head_dim=decoder.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": decoder.rope.theta},
    )
    expected_angles = LlamaRotaryEmbedding(config)(queries, position_ids=positions)
    angles = rotary_angles(decoder.rope, positions)
    for ours, stock in zip(angles, expected_angles, strict=True):
        assert torch.equal(ours, stock)
    expected = apply_rotary_pos_emb(queries, keys, *angles)
    for states, stock in zip((queries, keys), expected, strict=True):
        assert torch.equal(rotate_by_position(states, *angles), stock)

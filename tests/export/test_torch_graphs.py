"""The graphs as torch modules compute what `forward` defines, and can be traced whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.export.signatures import cache_names, decoder_signatures, vision_signatures
from pocketvlm.export.torch_graphs import DecoderGraph, EmbeddingGraph, VisionGraph
from pocketvlm.reference_graph.forward import DecoderInputs, decode_logits, new_cache
from pocketvlm.weights.modules import cache_dense_weights
from tests.export.rig import ReceivedAttention, make_prompt


def test_vision_and_embedding(tiny_checkpoint: Checkpoint) -> None:
    for reducer in (None, ReceivedAttention(keep=5, positions="original")):
        checkpoint = replace(tiny_checkpoint, reducer=reducer)
        pixels, visual, _ = make_prompt(checkpoint)
        with torch.inference_mode():
            embeds, indices = VisionGraph(checkpoint)(pixels)
        torch.testing.assert_close(embeds, visual.embeds, rtol=1e-5, atol=1e-5)
        assert torch.equal(indices, visual.indices)
        _, outputs = vision_signatures(checkpoint.spec, embeds.shape[1])
        assert [s.shape for s in outputs] == [tuple(embeds.shape), tuple(indices.shape)]
    ids = torch.tensor([[3, 1, 300]])
    table = tiny_checkpoint.layer(tiny_checkpoint.spec.decoder.embedding)
    assert torch.equal(EmbeddingGraph(tiny_checkpoint)(ids), table(ids))


def test_decoder_with_gaps_and_a_second_turn(tiny_checkpoint: Checkpoint) -> None:
    spec = tiny_checkpoint.spec
    _, _, prompt = make_prompt(tiny_checkpoint)
    shape = (1, spec.decoder.kv_heads, 48, spec.decoder.head_dim)
    past = [torch.full(shape, 1e4) for _ in cache_names(spec, "past")]
    graph, cache, length = DecoderGraph(tiny_checkpoint), new_cache(tiny_checkpoint), 0
    prompt = replace(prompt, positions=prompt.positions * 2)
    turn = DecoderInputs(
        embeds=torch.randn(1, 4, spec.decoder.hidden_size),
        positions=torch.tensor([[90, 93, 94, 99]]),
        is_visual=torch.zeros(1, 4, dtype=torch.bool),
        next_position=torch.tensor([100]),
    )
    with torch.inference_mode():
        for step in (prompt, turn):
            expected = decode_logits(tiny_checkpoint, step, cache, last_only=True)
            logits, *past = graph(step.embeds, step.positions, torch.tensor([length]), *past)
            length += step.embeds.shape[1]
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    _, outputs = decoder_signatures(spec)
    assert len(outputs) == 1 + len(past)


def test_torch_export_takes_all_graphs(tiny_paths: dict[str, Path]) -> None:
    checkpoint = Checkpoint.load(tiny_paths["smolvlm"])
    checkpoint = replace(checkpoint, reducer=ReceivedAttention(keep=5, positions="original"))
    spec = checkpoint.spec
    pixels, _, prompt = make_prompt(checkpoint)
    cache = torch.zeros(1, spec.decoder.kv_heads, 48, spec.decoder.head_dim)
    past = [cache.clone() for _ in cache_names(spec, "past")]
    arguments = (prompt.embeds, prompt.positions, torch.tensor([0]), *past)
    with cache_dense_weights(checkpoint.model):
        for graph, inputs in (
            (VisionGraph(checkpoint), (pixels,)),
            (DecoderGraph(checkpoint), arguments),
        ):
            program = torch.export.export(graph, inputs, strict=False)
            traced, expected = program.module()(*inputs), graph(*inputs)
            torch.testing.assert_close(traced[0], expected[0])

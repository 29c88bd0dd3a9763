"""The methods in torch, before anything is lowered: what `forward` defines, with gaps and turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.baseline.fixed import FixedReducer
from pocketvlm.export.executorch.layers import Kernels
from pocketvlm.export.executorch.methods import DecoderMethod, EmbeddingMethod, VisionMethod
from pocketvlm.reference_graph.forward import DecoderInputs, decode_logits, new_cache
from pocketvlm.runtime.executorch.program import register_operators
from tests.export.rig import make_prompt

KEPT = (1, 4, 6, 11, 14)


@pytest.fixture(autouse=True)
def operators() -> Iterator[None]:
    register_operators()
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("policy", [None, "original", "consecutive"])
def test_methods_compute_what_forward_defines(
    tiny_checkpoint: Checkpoint, policy: str | None
) -> None:
    reducer = None if policy is None else FixedReducer(KEPT, positions=policy)
    checkpoint = replace(tiny_checkpoint, reducer=reducer)
    model, spec = checkpoint.model, checkpoint.spec
    width = spec.decoder.hidden_size
    pixels, visual, prompt = make_prompt(checkpoint)
    picture, indices = VisionMethod(Kernels(model), spec, reducer)(pixels)
    torch.testing.assert_close(picture[..., :width], visual.embeds, rtol=1e-4, atol=1e-4)
    assert torch.equal(indices, visual.indices)
    embed = EmbeddingMethod(Kernels(model), spec, reducer)
    decode = DecoderMethod(Kernels(model), spec, reducer, capacity=64)
    # A call a piece, as ExecuTorch's own runner makes them, and then token by token.
    cache, length = new_cache(checkpoint), 0
    expected = decode_logits(checkpoint, prompt, cache, last_only=True)
    for rows in (embed(torch.tensor([[5, 6]])), picture, embed(torch.tensor([[7, 8, 9]]))):
        logits = decode(rows, torch.tensor([length]))
        length += rows.shape[1]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    for step, token in enumerate((11, 12)):
        ids = torch.tensor([[token]])
        single = DecoderInputs(
            embeds=embed(ids)[..., :width],
            positions=prompt.next_position[:, None] + step,
            is_visual=ids < 0,
            next_position=prompt.next_position + step + 1,
        )
        expected = decode_logits(checkpoint, single, cache, last_only=True)
        found = decode(embed(ids), torch.tensor([length + step]))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_conversation_can_be_cut_back_anywhere(tiny_checkpoint: Checkpoint) -> None:
    reducer = FixedReducer(KEPT, positions="original")
    checkpoint = replace(tiny_checkpoint, reducer=reducer)
    model, spec = checkpoint.model, checkpoint.spec
    pixels, _, _ = make_prompt(checkpoint)
    picture, _ = VisionMethod(Kernels(model), spec, reducer)(pixels)
    text = EmbeddingMethod(Kernels(model), spec, reducer)(torch.tensor([[5, 6, 7, 8]]))
    rows = torch.cat([text[:, :2], picture, text[:, 2:]], dim=1)
    decode = DecoderMethod(Kernels(model), spec, reducer, capacity=64)
    at_once = decode(rows, torch.tensor([0]))
    for cut in (1, 3, 6, 8):
        decode(text, torch.tensor([rows.shape[1]]))  # something else was said, and is forgotten
        torch.testing.assert_close(
            decode(rows[:, cut:], torch.tensor([cut])), at_once, rtol=1e-3, atol=1e-4
        )
    # The same rows at other positions are another prompt.
    moved = rows.clone()
    moved[0, 3, -2] += 3
    assert not torch.allclose(decode(moved, torch.tensor([0])), at_once, rtol=1e-3, atol=1e-4)

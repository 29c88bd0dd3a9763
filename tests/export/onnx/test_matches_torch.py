"""What ONNX Runtime computes is what `forward` defines, in both families and every precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.export.onnx.accuracy import agreement_of_levels
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.reference_graph.forward import (
    DecoderInputs,
    decode_logits,
    greedy_generate,
    new_cache,
)
from tests.export.rig import (
    Decoder,
    ReceivedAttention,
    make_prompt,
    open_session,
    quantize_checkpoint,
)

# No group: int8 around zero with one scale per row.
PRECISIONS: list[tuple[int, int | None] | None] = [
    None,
    (8, None),
    (8, 32),
    (4, 32),
    (4, 64),
    (3, 32),
    (2, 32),
]


def prepare(checkpoint: Checkpoint, precision: tuple[int, int | None] | None) -> Checkpoint:
    if precision is None:  # tracing a reducer takes a second
        return replace(checkpoint, reducer=ReceivedAttention(keep=5, positions="original"))
    return quantize_checkpoint(
        checkpoint, precision[0], precision[1], symmetric=precision[1] is None
    )


def relative_error(found: np.ndarray, expected: torch.Tensor) -> float:
    reference = expected.numpy().astype(np.float64)
    return float(np.abs(found - reference).max() / np.abs(reference).max())


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_all_graphs(
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    exact: ToOnnx,
    ctx: RunContext,
    precision: tuple[int, int | None] | None,
) -> None:
    checkpoint = prepare(tiny_checkpoint, precision)
    exact.export(checkpoint, tmp_path, ctx)
    pixels, visual, prompt = make_prompt(checkpoint)

    embeds, indices = open_session(tmp_path, "vision").run(None, {"pixel_values": pixels.numpy()})
    assert relative_error(embeds, visual.embeds) < 2e-5
    np.testing.assert_array_equal(indices, visual.indices)

    ids = np.array([[5, 6, 259, 319, 0]])
    (rows,) = open_session(tmp_path, "embedding").run(None, {"input_ids": ids})
    table = checkpoint.layer(checkpoint.spec.decoder.embedding)
    np.testing.assert_array_equal(rows, table(torch.from_numpy(ids)))

    if checkpoint.reducer is None:
        prompt = replace(prompt, positions=prompt.positions * 2)
    # The positions of the prompt have gaps, such as those of visual tokens that were removed.
    assert int(prompt.positions[0, -1]) >= prompt.embeds.shape[1]
    decoder, cache = Decoder(tmp_path, checkpoint.spec), new_cache(checkpoint)
    with torch.inference_mode():
        expected = decode_logits(checkpoint, prompt, cache, last_only=True)
        found = decoder(prompt.embeds.numpy(), prompt.positions.numpy())
        assert relative_error(found, expected[0, 0]) < 2e-5
        # Two steps of one token, then a second turn of four after a filled cache.
        position = int(prompt.positions[0, -1]) + 1
        for length in (1, 1, 4):
            step = DecoderInputs(
                embeds=torch.randn(1, length, checkpoint.spec.decoder.hidden_size),
                positions=torch.arange(position, position + 2 * length, 2)[None],
                is_visual=torch.zeros(1, length, dtype=torch.bool),
                next_position=torch.tensor([position + 2 * length]),
            )
            position += 2 * length
            expected = decode_logits(checkpoint, step, cache, last_only=True)
            found = decoder(step.embeds.numpy(), step.positions.numpy())
            assert relative_error(found, expected[0, 0]) < 2e-5


@pytest.mark.parametrize("precision", [None, (4, 32)], ids=str)
def test_greedy_tokens(
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    exact: ToOnnx,
    ctx: RunContext,
    precision: tuple[int, int | None] | None,
) -> None:
    checkpoint = quantize_checkpoint(tiny_checkpoint, *precision) if precision else tiny_checkpoint
    exact.export(checkpoint, tmp_path, ctx)
    _, _, prompt = make_prompt(checkpoint)
    expected = greedy_generate(checkpoint, prompt, max_new_tokens=12)[0]
    decoder, embedding = Decoder(tmp_path, checkpoint.spec), open_session(tmp_path, "embedding")
    logits = decoder(prompt.embeds.numpy(), prompt.positions.numpy())
    tokens: list[int] = []
    for position in range(int(prompt.next_position[0]), int(prompt.next_position[0]) + 12):
        tokens.append(int(logits.argmax()))
        (row,) = embedding.run(None, {"input_ids": np.array([[tokens[-1]]])})
        logits = decoder(row, np.array([[position]]))
    assert tokens == expected


def test_without_reducer_every_token_is_kept(
    tiny_checkpoint: Checkpoint, tmp_path: Path, exact: ToOnnx, ctx: RunContext
) -> None:
    exact.export(tiny_checkpoint, tmp_path, ctx)
    pixels, visual, _ = make_prompt(tiny_checkpoint)
    embeds, indices = open_session(tmp_path, "vision").run(None, {"pixel_values": pixels.numpy()})
    assert relative_error(embeds, visual.embeds) < 2e-5
    assert indices.tolist() == [list(range(tiny_checkpoint.spec.visual_tokens))]


def test_layers_of_one_input_may_have_different_forms(
    tiny_checkpoint: Checkpoint, tmp_path: Path, exact: ToOnnx, ctx: RunContext
) -> None:
    kept = tiny_checkpoint.form(f"{tiny_checkpoint.spec.decoder.stack}.0.self_attn.k_proj")
    checkpoint = quantize_checkpoint(tiny_checkpoint, 8)
    checkpoint.set_form(f"{checkpoint.spec.decoder.stack}.0.self_attn.k_proj", kept)
    components = exact.export(checkpoint, tmp_path, ctx)
    assert "float32 (1 layers)" in components[2].precision["decoder"]
    _, _, prompt = make_prompt(checkpoint)
    with torch.inference_mode():
        expected = decode_logits(checkpoint, prompt, last_only=True)
    decoder = Decoder(tmp_path, checkpoint.spec)
    found = decoder(prompt.embeds.numpy(), prompt.positions.numpy())
    assert relative_error(found, expected[0, 0]) < 2e-5


def test_biases_of_the_decoder(tmp_path: Path, exact: ToOnnx, ctx: RunContext) -> None:
    from pocketvlm.reference.random_models import tiny_config, write_random_model

    config = tiny_config("llava")
    config["text_config"] |= {"attention_bias": True, "mlp_bias": True}
    write_random_model(config, tmp_path / "model")
    for precision in (None, (4, 32)):
        checkpoint = Checkpoint.load(tmp_path / "model")
        if precision is not None:
            checkpoint = quantize_checkpoint(checkpoint, *precision)
        for linear in checkpoint.spec.linears():
            bias = getattr(checkpoint.layer(linear.name), "bias", None)
            assert (bias is not None) == linear.has_bias
            if bias is not None:
                bias.copy_(torch.randn(bias.shape))
        exact.export(checkpoint, tmp_path, ctx)
        _, _, prompt = make_prompt(checkpoint)
        with torch.inference_mode():
            expected = decode_logits(checkpoint, prompt, last_only=True)
        found = Decoder(tmp_path, checkpoint.spec)(prompt.embeds.numpy(), prompt.positions.numpy())
        assert relative_error(found, expected[0, 0]) < 2e-5


def test_agreement_of_accuracy_levels(tiny_checkpoint: Checkpoint, ctx: RunContext) -> None:
    checkpoint = quantize_checkpoint(tiny_checkpoint, 4)
    prompts = [make_prompt(checkpoint, seed)[2] for seed in range(3)]
    agreement = agreement_of_levels(checkpoint, prompts, ctx)
    assert agreement.positions == sum(p.embeds.shape[1] for p in prompts)
    assert 0.8 < agreement.same_token <= 1.0
    # Rounding activations is visible, and far smaller than the logits.
    assert 0 < agreement.relative_error < 0.1

"""What each decoder layer still reads from the image, and what its answers lose without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketvlm.calibration.data.prompts import BATCH_TOKENS, Prompt
from pocketvlm.calibration.gradients.backward import enter_samples
from pocketvlm.calibration.gradients.divergence import mean_divergence
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.errors import CalibrationError
from pocketvlm.machine import available_memory_bytes
from pocketvlm.reference_graph.decoder_rows import DecoderRows, take_columns, text_columns
from pocketvlm.reference_graph.sublayers import Sublayer, decoder_sublayers
from pocketvlm.reference_graph.torch_ops import TorchOps
from pocketvlm.weights.modules import cache_dense_weights

__all__ = ["LayerUse", "attention_ratios", "measure_visual_use"]


Report = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerUse:
    """One decoder layer on a calibration set.

    Attributes:
        ratios: float64 [samples, kv_heads]: attention that rows of text after the image pay to
            visual keys, over what they pay to keys of text, all heads of a KV group together.
        divergence: Mean KL divergence, in nats, of the answers' next tokens if visual rows ended
            after this layer's attention; `None` for the last layer, after which they end anyway.
    """

    ratios: Tensor
    divergence: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    prompts: tuple[Prompt, ...]
    rows: DecoderRows
    is_visual: Tensor


@torch.no_grad()
def measure_visual_use(
    checkpoint: Checkpoint, samples: CalibrationSet, report: Report = lambda _done, _total: None
) -> tuple[LayerUse, ...]:
    """Measures every decoder layer, the first one first.

    One forward pass whose rows of text leave it behind every layer and run to the end alone: with
    few of them beside the image, little more than the pass itself. Costs the hidden states of all
    samples, the logits of all answers, and, where there is room, the decoder's weights in float32.

    Args:
        checkpoint: The model; visual tokens run through all of its layers.
        samples: Pictures with questions and answers.
        report: Called with the layers that are done and their number.

    Raises:
        CalibrationError: A sample cannot be used or has no answer, or an output is not finite.
    """
    model, spec = checkpoint.model, checkpoint.spec
    batches, states = [], []
    entered = enter_samples(
        checkpoint,
        samples,
        batch_tokens=BATCH_TOKENS,
        reason="what an answer loses is measured at its tokens",
    )
    for one in entered:
        is_visual = one.inputs.is_visual
        batches.append(_Batch(prompts=one.prompts, rows=one.rows, is_visual=is_visual))
        states.append(one.inputs.embeds)
    blocks = [decoder_sublayers(model, spec, block) for block in range(spec.decoder.depth)]
    found: list[LayerUse] = []
    decoder, spare = model.get_submodule(spec.decoder.prefix), available_memory_bytes() // 2
    with cache_dense_weights(decoder, budget=spare):
        reference = [
            _answers(checkpoint, batch, _run(blocks, hidden, batch.rows))
            for batch, hidden in zip(batches, states, strict=True)
        ]
        if not all(bool(torch.isfinite(part).all()) for part in reference):
            raise CalibrationError("the model's outputs are not finite on the calibration data")
        for number, (attention, ffn) in enumerate(blocks):
            ratios, changed = [], []
            for index, batch in enumerate(batches):
                hidden = states[index]
                rows, flags = batch.rows, batch.is_visual
                ratios.append(
                    attention_ratios(checkpoint, number, attention.norm(hidden), rows, flags)
                )
                middle = attention.run(hidden, rows)
                if number < len(blocks) - 1:
                    columns = text_columns(flags)
                    text = ffn.run(take_columns(middle, columns), None)
                    beside = rows.take(columns)
                    behind = _run(blocks[number + 1 :], text, beside)
                    changed.append(_answers(checkpoint, batch, behind))
                states[index] = ffn.run(middle, None)
            divergence = None
            if changed:
                divergence = max(0.0, mean_divergence(torch.cat(reference), torch.cat(changed)))
            found.append(LayerUse(ratios=torch.cat(ratios), divergence=divergence))
            report(number + 1, len(blocks))
    return tuple(found)


def attention_ratios(
    checkpoint: Checkpoint, block: int, normed: Tensor, rows: DecoderRows, is_visual: Tensor
) -> Tensor:
    """Attention paid to visual keys over that to keys of text, float64 [batch, kv_heads].

    Args:
        checkpoint: The model.
        block: Index of a decoder layer.
        normed: What its attention reads, [batch, length, width].
        rows: The rows that it has.
        is_visual: bool [batch, length], the same in every row.
    """
    decoder, (batch, length) = checkpoint.spec.decoder, normed.shape[:2]
    names = decoder.attention(block).inputs
    ops = TorchOps(checkpoint.model, checkpoint.spec, context=rows)
    queries, keys, _ = ops.decoder_heads(ops.linear(normed, *names), block, *names)
    flags = is_visual[0]
    # Only rows after the first visual one can see any.
    first = int(flags.to(torch.uint8).argmax())
    readers = (~flags & (torch.arange(length) > first)).nonzero().flatten()
    keys = keys.repeat_interleave(decoder.heads // decoder.kv_heads, dim=1)
    scores = queries[:, :, readers].double() @ keys.double().transpose(-1, -2)
    scores = scores * decoder.head_dim**-0.5
    hides = torch.arange(length) > readers[:, None]
    weights = scores.masked_fill(hides, float("-inf")).softmax(dim=-1)
    masses = torch.stack([weights[..., flags].sum(dim=-1), weights[..., ~flags].sum(dim=-1)])
    grouped = masses.view(2, batch, decoder.kv_heads, -1).sum(dim=-1)
    return grouped[0] / grouped[1]


def _run(blocks: Sequence[tuple[Sublayer, Sublayer]], hidden: Tensor, rows: DecoderRows) -> Tensor:
    for attention, ffn in blocks:
        hidden = ffn.run(attention.run(hidden, rows), None)
    return hidden


def _answers(checkpoint: Checkpoint, batch: _Batch, hidden: Tensor) -> Tensor:
    """Logarithms of probabilities of the answers' tokens, [tokens, vocabulary]."""
    model, decoder = checkpoint.model, checkpoint.spec.decoder
    rows = [
        states[prompt.predicting(hidden.shape[1])]
        for prompt, states in zip(batch.prompts, hidden, strict=True)
    ]
    normed = model.get_submodule(decoder.norm)(torch.cat(rows))
    logits: Tensor = model.get_submodule(decoder.head)(normed)
    return logits.double().log_softmax(dim=-1)

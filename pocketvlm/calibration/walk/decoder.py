"""The steps of the decoder, whose rows may leave it on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from pocketvlm.calibration.data.decoder_inputs import embed_samples, tokens_of
from pocketvlm.calibration.data.modality import ModalityWeighting, TokenCounts, token_weights
from pocketvlm.calibration.data.prompts import Prompt, PromptBatch
from pocketvlm.calibration.gradients.token_weights import gradient_weights
from pocketvlm.calibration.walk.activations import join_batches
from pocketvlm.calibration.walk.context import WalkContext
from pocketvlm.calibration.walk.paired_activations import PairedActivations, measure_moments
from pocketvlm.calibration.walk.projector import PairedTokens
from pocketvlm.calibration.walk.shared_batches import SharedBatches
from pocketvlm.calibration.walk.steps import LinearGroup, Step
from pocketvlm.calibration.walk.sublayers import walk_sublayer
from pocketvlm.reference_graph.forward import VisualTokens
from pocketvlm.reference_graph.sublayers import Sublayer, SublayerKind, decoder_sublayers
from pocketvlm.reference_graph.visual_schedule import DroppedRows, RowsLeft, drop_rows

__all__ = ["DecoderWeights", "decoder_weights", "walk_decoder"]

DecoderWeights = Callable[
    [int, SublayerKind, Sequence[RowsLeft], Literal["first", "last"], int], Tensor | None
]
"""Weights of rows at a linear: block, sublayer, what every batch has left, place, and batch."""


def decoder_weights(
    ctx: WalkContext,
    weighting: ModalityWeighting,
    counts: TokenCounts,
    prompts: Sequence[Prompt],
    batches: Sequence[PromptBatch],
    visual: VisualTokens,
) -> DecoderWeights:
    """How much the rows that a sublayer of the decoder runs count.

    Args:
        ctx: The walk.
        weighting: How much visual tokens count.
        counts: Tokens that enter the decoder.
        prompts: Token ids of every sample.
        batches: This process' batches.
        visual: Visual tokens of all samples.
    """
    if weighting == "gradient":
        importance = gradient_weights(
            ctx.checkpoint, prompts, batches, visual, spill_folder=ctx.spill_folder
        )
        return lambda block, kind, left, position, index: importance.weights(
            block, kind, index, position
        ).gather(1, left[index].columns)
    return lambda _block, _kind, left, _position, index: token_weights(
        weighting, counts, left[index].is_visual
    )


def walk_decoder(
    ctx: WalkContext,
    prompts: Sequence[Prompt],
    every: Sequence[PromptBatch],
    tokens: PairedTokens,
    weights_of: DecoderWeights,
) -> Iterator[Step]:
    """Yields the steps of the decoder's blocks, and of its head.

    Args:
        ctx: The walk.
        prompts: Token ids of every sample.
        every: Which samples a batch holds, of all processes.
        tokens: Visual tokens of all samples.
        weights_of: How much rows count.
    """
    checkpoint, decoder = ctx.checkpoint, ctx.checkpoint.spec.decoder
    batches = SharedBatches(every=every, ranks=ctx.ranks)
    path, left = _enter(ctx, prompts, ctx.ranks.own(every), tokens)
    for block in range(decoder.depth):
        attention, ffn = decoder_sublayers(checkpoint.model, checkpoint.spec, block)
        before = [
            drop_rows(checkpoint, block, path.now[index], rows, after_attention=False)
            for index, rows in enumerate(left)
        ]
        path.drop(before)
        left = [
            rows if drop is None else drop.left for drop, rows in zip(before, left, strict=True)
        ]
        yield from _walk_attention(ctx, attention, block, path, batches, left, weights_of)
        weights_at = partial(weights_of, block, "ffn", left)
        yield from walk_sublayer(ctx, ffn, path, batches, weights_at, [each.rows for each in left])
    norm = checkpoint.model.get_submodule(decoder.norm)
    yield LinearGroup(
        names=(decoder.embedding if decoder.tied_head else decoder.head,),
        moments=partial(
            measure_moments,
            path,
            batches,
            lambda states, _: norm(states),
            # No logits are ever read at the image's tokens.
            lambda index: (~left[index].is_visual).to(torch.float32),
            width=decoder.hidden_size,
        ),
    )
    path.close()


@torch.no_grad()
def _enter(
    ctx: WalkContext,
    prompts: Sequence[Prompt],
    batches: Sequence[PromptBatch],
    tokens: PairedTokens,
) -> tuple[PairedActivations, list[RowsLeft]]:
    """States before the first block, and what their rows are."""
    checkpoint, (visual, ideal) = ctx.checkpoint, tokens
    path, left = ctx.paired(), []
    for batch in batches:
        own = tokens_of(prompts, batch.samples, visual)
        inputs = embed_samples(checkpoint, prompts, batch.samples, own)
        path.now.append(inputs.embeds)
        if path.ideal is not None and ideal is not None:
            own = tokens_of(prompts, batch.samples, ideal)
            path.ideal.append(embed_samples(checkpoint, prompts, batch.samples, own).embeds)
        rows = inputs.rows(checkpoint.spec.decoder)
        if rows.added is not None:
            rows = replace(rows, added=join_batches([rows.added], ctx.spill_folder))
        left.append(RowsLeft.of(rows, inputs.is_visual, inputs.reader))
    return path, left


def _walk_attention(
    ctx: WalkContext,
    sublayer: Sublayer,
    block: int,
    path: PairedActivations,
    batches: SharedBatches,
    left: list[RowsLeft],
    weights_of: DecoderWeights,
) -> Iterator[Step]:
    """The steps of a decoder block's attention; `left` is then what stands after its drops."""
    rows = tuple(left)

    def drops_of(index: int) -> DroppedRows | None:
        # Asked each time: queries and keys that rank may have been replaced meanwhile.
        states = path.now[index]
        return drop_rows(ctx.checkpoint, block, states, rows[index], after_attention=True)

    def weights_at(position: Literal["first", "last"], index: int) -> Tensor | None:
        weights = weights_of(block, "attention", rows, position, index)
        drop = drops_of(index) if position == "last" else None
        if drop is None:
            return weights
        own = drop.is_left(path.now[index].shape[1]).to(torch.float32)
        return own if weights is None else weights * own

    def note(index: int) -> DroppedRows | None:
        drop = drops_of(index)
        left[index] = rows[index] if drop is None else drop.left
        return drop

    beside = [each.rows for each in rows]
    yield from walk_sublayer(ctx, sublayer, path, batches, weights_at, beside, note)

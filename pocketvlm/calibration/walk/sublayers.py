"""The steps of one sublayer: its first linears, its last one, and what it hands on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from pocketvlm.calibration.walk.context import WalkContext
from pocketvlm.calibration.walk.paired_activations import (
    PairedActivations,
    advance,
    forms_in_place,
    measure_moments,
)
from pocketvlm.calibration.walk.shared_batches import SharedBatches
from pocketvlm.calibration.walk.steps import (
    FinishedSublayer,
    InputMoments,
    LinearGroup,
    Step,
    TokenWeights,
)
from pocketvlm.reference_graph.sublayers import Sublayer, SublayerRows
from pocketvlm.reference_graph.visual_schedule import DroppedRows
from pocketvlm.weights.modules import cache_dense_weights

__all__ = ["DropsOf", "walk_sublayer"]

_NOTHING = torch.zeros(0)

DropsOf = Callable[[int], DroppedRows | None]
"""What is dropped after a sublayer, by batch."""


def walk_sublayer(
    ctx: WalkContext,
    sublayer: Sublayer,
    path: PairedActivations,
    batches: SharedBatches,
    weights_at: TokenWeights,
    rows: Sequence[SublayerRows] = (),
    drops_of: DropsOf = lambda _: None,
) -> Iterator[Step]:
    """Yields the steps of a sublayer.

    Args:
        ctx: The walk.
        sublayer: What is walked.
        path: States before it; at the end those after it, and after its drops.
        batches: Which samples a batch holds.
        weights_at: Weights of a batch's tokens at its first and its last linears.
        rows: What its body takes beside the hidden state, batch by batch; empty for nothing.
        drops_of: What is dropped after it.
    """
    checkpoint = ctx.checkpoint
    originals = ctx.originals((*sublayer.first, sublayer.last))

    def rows_of(index: int) -> SublayerRows | None:
        return rows[index] if rows else None

    def moments_of_last(block: int | None) -> InputMoments:
        def inputs_of(states: Tensor, index: int) -> Tensor:
            return sublayer.inputs_of_last(states, rows_of(index))

        with ctx.store() as ideal:
            if path.ideal is not None:
                # All at once: each pass wants the weights dense, in one of two forms.
                with forms_in_place(checkpoint, originals), cache_dense_weights(sublayer.linears):
                    for index, batch in enumerate(path.ideal):
                        is_used = batches.own[index] is not None
                        ideal.append(inputs_of(batch, index) if is_used else _NOTHING)
            with cache_dense_weights(sublayer.linears):
                return measure_moments(
                    path,
                    batches,
                    inputs_of,
                    partial(weights_at, "last"),
                    block,
                    width=ctx.width(sublayer.last),
                    ideal_inputs=ideal if path.ideal is not None else None,
                )

    yield LinearGroup(
        names=sublayer.first,
        moments=partial(
            measure_moments,
            path,
            batches,
            lambda states, _: sublayer.normed(states),
            partial(weights_at, "first"),
            width=ctx.width(*sublayer.first),
        ),
    )
    yield LinearGroup(names=(sublayer.last,), moments=moments_of_last)
    if path.ideal is not None:
        with forms_in_place(checkpoint, originals):
            advance(sublayer, path.ideal, rows_of)
        yield FinishedSublayer(
            sublayer=sublayer,
            inputs=path.now,
            targets=path.ideal,
            rows=rows,
            batches=batches.own,
            weights_of=partial(weights_at, "last"),
        )
    drops = [drops_of(index) for index in range(len(path.now))]
    advance(sublayer, path.now, rows_of)
    path.drop(drops)

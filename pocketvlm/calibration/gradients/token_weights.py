"""How much each token matters to the answer, by the length of the loss's gradient at a linear.

A layer's error at token t changes the loss by about g_t . (dW x_t), with g_t the gradient at the
layer's output. Its length is the token's weight in H = sum_t w_t x_t x_t^T, after VLMQ (arXiv
2508.03351, which weighs GPTQ's Hessian by a block-wise backward pass) and MBQ (arXiv 2412.19509,
whose sensitivities are mean gradients by modality). Both take one gradient per block, after its
sublayers. Here every linear has its own: a key of the last block is read by the answer, although
nothing reads that token's output, so what weighs it is the gradient at the key itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pocketvlm.calibration.data.prompts import Prompt, PromptBatch
from pocketvlm.calibration.gradients.backward import answer_loss, walk_back
from pocketvlm.calibration.walk.activations import float64_device
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.errors import CalibrationError
from pocketvlm.reference_graph.forward import VisualTokens
from pocketvlm.reference_graph.sublayers import Sublayer, decoder_sublayers

__all__ = ["FLOOR", "Place", "TokenImportance", "gradient_weights"]

FLOOR = 0.01
"""Weight of a token that no answer depends on, where the mean token weighs one.

At zero, a layer whose outputs few tokens feed into the answer would have a Hessian of their few
directions. The floor is GPTQ's usual damping, one hundredth of the mean: what lies below it would
be covered by that."""

Place = tuple[int, Literal["attention", "ffn"], Literal["first", "last"]]
"""Block, sublayer, and whether the linears at the start of the sublayer or the one at its end."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenImportance:
    """Weights of every token, by where in the decoder an error would be made.

    Of each sample and place they have the mean one: a sample that the model answers without doubt
    has hardly a gradient, but is no less worth answering.

    Attributes:
        by_place: float32 [batch, length] of each batch, by place; NaN for rows that were dropped
            before it.
        is_visual: bool [batch, length] of each batch.
        loss: Mean loss of the samples' answers.
        still: By place, samples whose gradients are all zero; their tokens weigh one.
    """

    by_place: Mapping[Place, tuple[Tensor, ...]]
    is_visual: tuple[Tensor, ...]
    loss: float
    still: Mapping[Place, int]

    def weights(
        self,
        block: int,
        kind: Literal["attention", "ffn"],
        batch_index: int,
        position: Literal["first", "last"] = "last",
    ) -> Tensor:
        """Weights of one batch, float32 [batch, length]; `FLOOR` for rows that were dropped.

        Args:
            block: The decoder block.
            kind: The sublayer of the block.
            batch_index: The batch, in the order that was given to `gradient_weights`.
            position: `first` for the linears that read the sublayer's norm (q, k, v; gate, up),
                `last` for the one that ends it, whose output joins the residual.
        """
        return self.by_place[block, kind, position][batch_index].nan_to_num(FLOOR)

    def summary(self) -> list[dict[str, Any]]:
        """Mean weights of visual and of text tokens, one row per place, for a stage's record."""
        rows = []
        for place, batches in sorted(self.by_place.items()):
            weights = torch.cat([batch.flatten() for batch in batches]).double()
            flags = torch.cat([seen.flatten() for seen in self.is_visual])
            is_there = weights.isfinite()
            visual, text = weights[flags & is_there], weights[~flags & is_there]
            rows.append(
                {
                    "block": place[0],
                    "half": place[1],
                    "linears": place[2],
                    "visual_weight": float(visual.mean()) if len(visual) else None,
                    "text_weight": float(text.mean()) if len(text) else None,
                    "samples_without_gradient": self.still[place],
                }
            )
        return rows


def gradient_weights(
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    batches: Sequence[PromptBatch],
    visual: VisualTokens,
    spill_folder: Path | None = None,
) -> TokenImportance:
    """Weighs the tokens of calibration prompts by the gradients at the decoder's linears.

    Args:
        checkpoint: The model as it is now.
        prompts: Prompts with their answers.
        batches: Which of them run together.
        visual: Visual tokens of every sample, in order.
        spill_folder: Where activations go that do not fit into memory.

    Raises:
        CalibrationError: A sample has no answer, its answer was cut off, or its loss or a
            gradient is not finite.
    """
    spec = checkpoint.spec
    found: dict[Place, list[Tensor]] = {}
    still: dict[Place, int] = {}
    places = {
        name: (block, sublayer.kind, position)
        for block in range(spec.decoder.depth)
        for sublayer in decoder_sublayers(checkpoint.model, spec, block)
        for position, names in _positions(sublayer)
        for name in names
    }
    with answer_loss(checkpoint, prompts, batches, visual, spill_folder) as loss:
        for gradients in walk_back(checkpoint, loss):
            squares: dict[Place, Tensor] = {}
            for name, gradient in gradients.outputs.items():
                place = places[name]
                wide = gradient.to(float64_device(gradient.device), torch.float64)
                squares[place] = wide.square().sum(-1) + squares.get(place, 0.0)
            for place, total in squares.items():
                weights, unmoved = _normalize(total.sqrt())
                if not bool(torch.isfinite(weights).all()):
                    raise CalibrationError(
                        f"a gradient at decoder block {place[0]} is not finite on the calibration "
                        "data"
                    )
                rows = loss.rows_at(gradients.block, gradients.batch, place[1])
                weights = weights.to(rows.columns.device)
                whole = weights.new_full(loss.is_visual[gradients.batch].shape, math.nan)
                found.setdefault(place, []).append(whole.scatter(1, rows.columns, weights))
                still[place] = still.get(place, 0) + unmoved
        return TokenImportance(
            by_place={place: tuple(weights) for place, weights in found.items()},
            is_visual=loss.is_visual,
            loss=loss.mean,
            still=still,
        )


def _positions(sublayer: Sublayer) -> tuple[tuple[Literal["first", "last"], tuple[str, ...]], ...]:
    return (("first", sublayer.first), ("last", (sublayer.last,)))


def _normalize(lengths: Tensor) -> tuple[Tensor, int]:
    """Lengths [batch, tokens] to weights of mean one and at least `FLOOR`; and rows of zeros."""
    mean = lengths.mean(dim=-1, keepdim=True)
    shares = torch.where(mean == 0, 1.0, lengths / mean)
    return (FLOOR + (1 - FLOOR) * shares).to(torch.float32), int((mean == 0).sum())

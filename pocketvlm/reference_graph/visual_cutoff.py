"""The decoder when visual tokens run through its first layers only.

Visual rows end after the attention of layer `visual_layers - 1`: no later layer computes them,
and none keeps keys or values of them. What remains equals, for every row of text, a decoder that
hides visual keys from layer `visual_layers` on and never reads what visual rows would become there.
Rows keep the rotary positions that they had.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from pocketvlm.models.spec import DecoderSpec
from pocketvlm.reference_graph.kv_cache import cache_argument

__all__ = ["run_decoder", "take_columns", "text_columns"]


def text_columns(is_visual: Tensor) -> Tensor:
    """The columns of text, int64 [batch, most], ascending.

    Rows with less text than the others are filled up with visual columns, after their text: no row
    of text sees them there.
    """
    most = int((~is_visual).sum(dim=1).max())
    return is_visual.to(torch.uint8).argsort(dim=1, stable=True)[:, :most]


def take_columns(states: Tensor, columns: Tensor) -> Tensor:
    """The given columns [batch, m] of states [batch, length, width]."""
    return states.gather(1, columns[..., None].expand(-1, -1, states.shape[-1]))


def run_decoder(
    model: nn.Module,
    spec: DecoderSpec,
    embeds: Tensor,
    positions: Tensor,
    is_visual: Tensor,
    *,
    visual_layers: int,
    cache: Any = None,
) -> Tensor:
    """Hidden states after the decoder's last norm, [batch, length, width]; zero at visual columns.

    Args:
        model: The stock model.
        spec: Where the parts of its decoder are.
        embeds: float32 [batch, length, width].
        positions: Rotary positions, int64 [batch, length].
        is_visual: bool [batch, length].
        visual_layers: Layers whose cache holds visual rows.
        cache: A transformers cache, extended in place; its later layers hold text alone.

    Raises:
        ValueError: There is a cache, and rows differ in how much text they have.
    """
    columns = text_columns(is_visual)
    hides_rows = columns.shape[1] < is_visual.shape[1]
    is_filled = is_visual.gather(1, columns)
    if cache is not None and bool(is_filled.any()):
        raise ValueError("rows of one batch must have equally much text to share a cache")
    hidden = embeds
    angles = cast("Any", model.get_submodule(spec.rotary))(hidden, position_ids=positions)
    for index, block in enumerate(spec.blocks):
        attention = model.get_submodule(block.attention.module)
        attended, _ = attention(
            hidden_states=model.get_submodule(block.attention.norm)(hidden),
            position_embeddings=angles,
            attention_mask=_causal_mask(hidden.shape[1], _held_rows(cache, index)),
            **cache_argument(attention, cache),
        )
        hidden = hidden + attended
        if hides_rows and index == visual_layers - 1:
            if columns.shape[1] == 0:
                return hidden.new_zeros(embeds.shape)  # no later layer has anything to compute
            hidden = take_columns(hidden, columns)
            angles = tuple(
                take_columns(part.expand(len(columns), -1, -1), columns) for part in angles
            )
        normed = model.get_submodule(block.ffn.norm)(hidden)
        hidden = hidden + model.get_submodule(block.ffn.module)(normed)
    hidden = model.get_submodule(spec.norm)(hidden)
    if not hides_rows:
        return cast("Tensor", hidden)
    hidden = hidden.masked_fill(is_filled[..., None], 0.0)
    places = columns[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.new_zeros(embeds.shape).scatter(1, places, hidden)


def _held_rows(cache: Any, layer: int) -> int:
    return 0 if cache is None else int(cache.get_seq_length(layer))


def _causal_mask(rows: int, held: int) -> Tensor | None:
    """What new rows see of all there are, bool [1, 1, rows, held + rows].

    `None` where attention's own causal rule is right: for one row, and without a past.
    """
    if rows == 1 or held == 0:
        return None
    return torch.ones(rows, held + rows, dtype=torch.bool).tril(held)[None, None]

"""What attention takes beside the hidden state, in one call of the decoder."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from pocketvlm.graph.rotary import rotary_angles, rotate_by_position
from pocketvlm.models.spec import DecoderSpec
from pocketvlm.reference_graph.kv_cache import KVCache

__all__ = ["DecoderRows", "take_columns", "text_columns"]


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderRows:
    """The rows of one call: their rotary angles, and the cache that they extend.

    Every row sees the rows before it and itself, whatever gaps their positions have.

    Attributes:
        cosine: float32 [batch, length, head_dim].
        sine: Likewise.
        cache: Rows of earlier calls, extended in place; `None` for a call that stands alone.
    """

    cosine: Tensor
    sine: Tensor
    cache: KVCache | None = None

    @classmethod
    def at(
        cls, decoder: DecoderSpec, positions: Tensor, cache: KVCache | None = None
    ) -> DecoderRows:
        """Rows at rotary positions, int64 [batch, length] or [axes, batch, length]."""
        cosine, sine = rotary_angles(decoder.rope, positions)
        return cls(cosine=cosine, sine=sine, cache=cache)

    def take(self, columns: Tensor) -> DecoderRows:
        """The rows in the given columns, int64 [batch, m]."""
        return replace(
            self,
            cosine=take_columns(self.cosine.expand(len(columns), -1, -1), columns),
            sine=take_columns(self.sine.expand(len(columns), -1, -1), columns),
        )

    def rotate(self, heads: Tensor) -> Tensor:
        """Rotary embedding of [batch, heads, length, head_dim]."""
        return rotate_by_position(heads, self.cosine, self.sine)

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention to the rows before and to these, [batch, heads, length, head_dim]."""
        rows, held = query.shape[2], 0
        if self.cache is not None:
            held = self.cache.length(block)
            key, value = self.cache.extend(block, key, value)
        mask = None
        if rows > 1 and held > 0:
            mask = torch.ones(rows, held + rows, dtype=torch.bool).tril(held)
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and rows > 1,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def after_past(self, block: int, values: Tensor, rows: int) -> Tensor:
        """The last `rows` rows of a state, zeros at the start, and values after them."""
        if self.cache is not None:
            return self.cache.after_past(block, values, rows)
        return functional.pad(values, (0, 0, rows, 0))


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

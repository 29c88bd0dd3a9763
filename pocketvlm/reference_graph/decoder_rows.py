"""What attention takes beside the hidden state, in one call of the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from pocketvlm.graph.rotary import rotary_angles, rotate_by_position
from pocketvlm.graph.visibility import capped_attention, visible_rows
from pocketvlm.models.decoder import DecoderSpec, RopeSpec
from pocketvlm.reference_graph.kv_cache import KVCache

__all__ = ["DecoderRows", "take_columns", "text_columns"]


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderRows:
    """The rows of one call: where they are, what they see, and the cache that they extend.

    Every row sees the rows before it and itself, whatever gaps their positions have, unless the
    decoder says otherwise (`graph.visibility`).

    Attributes:
        decoder: The decoder.
        angles: Cosines and sines by kind of position, each float32 [batch, length, head_dim].
        mutual: int64 [batch, length], as `visible_rows` takes it; `None` for no such rows.
        cache: Rows of earlier calls, extended in place; `None` for a call that stands alone.
        added: What the tower adds to the hidden state after the first blocks, side by side,
            [batch, length, blocks * width]; `None` for nothing.
    """

    decoder: DecoderSpec
    angles: Mapping[RopeSpec, tuple[Tensor, Tensor]]
    mutual: Tensor | None = None
    cache: KVCache | None = None
    added: Tensor | None = None

    @classmethod
    def at(
        cls,
        decoder: DecoderSpec,
        positions: Tensor,
        cache: KVCache | None = None,
        *,
        mutual: Tensor | None = None,
        added: Tensor | None = None,
    ) -> DecoderRows:
        """Rows at rotary positions, int64 [batch, length] or [axes, batch, length]."""
        ropes = {decoder.rope_of(block) for block in range(decoder.depth)}
        angles = {rope: rotary_angles(rope, positions) for rope in ropes}
        return cls(decoder=decoder, angles=angles, mutual=mutual, cache=cache, added=added)

    def add(self, block: int, inner: Tensor) -> Tensor:
        """What a block's last sublayer adds to the hidden state, and what the tower adds to it."""
        width = self.decoder.hidden_size
        if self.added is None or (block + 1) * width > self.added.shape[-1]:
            return inner
        # They may lie in a file.
        return inner + self.added[..., block * width : (block + 1) * width].to(inner.device)

    def take(self, columns: Tensor) -> DecoderRows:
        """The rows in the given columns, int64 [batch, m], to which the tower adds nothing."""

        def taken(angle: Tensor) -> Tensor:
            return take_columns(angle.expand(len(columns), -1, -1), columns)

        return replace(
            self,
            added=None,
            angles={rope: (taken(cos), taken(sin)) for rope, (cos, sin) in self.angles.items()},
            mutual=None if self.mutual is None else self.mutual.gather(1, columns),
        )

    def numbered_from(self, first: int) -> DecoderRows:
        """The same rows at positions that count on from `first`."""
        (cosine, _), *_ = self.angles.values()
        places = torch.arange(first, first + cosine.shape[1], device=cosine.device)[None]
        return replace(self, angles={rope: rotary_angles(rope, places) for rope in self.angles})

    def held(self, block: int) -> int:
        """Rows of earlier calls in the cache of a block."""
        return 0 if self.cache is None else self.cache.length(block)

    def past_keys(self, block: int) -> Tensor | None:
        """Their keys, [batch, kv_heads, rows, head_dim]; `None` where there are none."""
        if self.cache is None or not self.cache.length(block):
            return None
        return self.cache.rows(block)[0]

    def rotate(self, block: int, heads: Tensor) -> Tensor:
        """Rotary embedding of [batch, heads, length, head_dim]."""
        return rotate_by_position(heads, *self.angles[self.decoder.rope_of(block)])

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention to the rows before and to these, [batch, heads, length, head_dim]."""
        rows, held = query.shape[2], 0
        if self.cache is not None:
            held = self.cache.length(block)
            key, value = self.cache.extend(block, key, value)
        softcap = self.decoder.score_softcap
        if softcap is not None:
            return capped_attention(query, key, value, self._visible(block, held, rows), softcap)
        mask = None
        if self.decoder.has_masks:
            mask = self._visible(block, held, rows)
        elif rows > 1 and held > 0:
            mask = torch.ones(rows, held + rows, dtype=torch.bool, device=query.device).tril(held)
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

    def _visible(self, block: int, held: int, rows: int) -> Tensor:
        """What these rows may see, bool [batch, 1, rows, held + rows]."""
        sliding = self.decoder.sliding_of(block)
        (cosine, _), *_ = self.angles.values()
        return visible_rows(
            torch.arange(held, held + rows, device=cosine.device),
            held + rows,
            window=None if sliding is None else sliding.window,
            mutual=self.mutual,
        )[:, None]


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

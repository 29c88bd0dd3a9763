"""Which rows a decoder's row may see, and bounded scores: attention that is more than causal."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["capped_attention", "visible_rows"]


def visible_rows(
    slots: Tensor, total: int, *, window: int | None = None, mutual: Tensor | None = None
) -> Tensor:
    """What each row of a call may see, bool [batch, length, total].

    A row sees itself and the past, no further back than a window; rows with the same number see
    each other however far apart they are. What is seen is told by slots of the cache, not by
    positions, which may have gaps.

    Args:
        slots: int64 [length]: where the rows of the call are, one after another.
        total: Slots that there are.
        window: Rows that a row sees, itself included; `None` for all.
        mutual: int64 [batch, length]: a number for each row, -1 for rows that see the past alone.
            A call holds all rows of a number.
    """
    columns = torch.arange(total, device=slots.device)
    behind = slots[:, None] - columns[None]
    visible = behind >= 0
    if window is not None:
        visible = visible & (behind < window)
    if mutual is None:
        return visible[None]
    numbers = mutual.new_full((mutual.shape[0], total), -1).index_copy(1, slots, mutual)
    together = (mutual[:, :, None] == numbers[:, None]) & (mutual[:, :, None] >= 0)
    return visible[None] | together


def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, softcap: float
) -> Tensor:
    """Attention whose scores s become softcap tanh(s / softcap) (Gemma 2, arXiv 2408.00118).

    Args:
        query: [batch, heads, length, head_dim].
        key: [batch, kv_heads, total, head_dim].
        value: Likewise.
        visible: bool [batch, 1, length, total].
        softcap: The bound.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    scores = torch.tanh(scores / softcap) * softcap
    return scores.masked_fill(~visible, float("-inf")).softmax(dim=-1) @ value

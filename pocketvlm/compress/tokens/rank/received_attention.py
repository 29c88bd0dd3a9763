"""Received attention: for towers without [CLS], keep the patches that others attend to most.

The score of patch j is the mean over queries and heads of softmax(q k^T)[., j] in the block whose
output is the feature, as VisPruner (ICCV 2025) does for encoders without [CLS].
Where the projector merges patches, their scores are averaged the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pocketvlm.compress.tokens.rank.ranking import Ranking, pool_merge_cells
from pocketvlm.models.reducer import ReducerInputs

__all__ = ["QUERY_CHUNK", "ReceivedAttention", "received_attention"]

QUERY_CHUNK = 256
"""Queries whose attention rows exist at the same time."""


def received_attention(queries: Tensor, keys: Tensor, *, chunk: int = QUERY_CHUNK) -> Tensor:
    """Attention that every token receives, averaged over queries and heads.

    Args:
        queries: Scaled queries [B, H, T, d].
        keys: Keys of the same shape.
        chunk: Queries a step; memory is B * H * chunk * T numbers instead of B * H * T * T. A
            traced graph holds one copy of the step for each chunk.

    Returns:
        [B, T]; a row sums to one.
    """
    tokens = queries.shape[2]
    transposed = keys.transpose(2, 3)
    total = None
    for start in range(0, tokens, chunk):
        rows = (queries[:, :, start : start + chunk] @ transposed).softmax(dim=-1)
        part = rows.sum(dim=2)
        total = part if total is None else total + part
    if total is None:
        raise ValueError("there are no queries")
    return total.mean(dim=1) / tokens


@dataclass(frozen=True, kw_only=True)
class ReceivedAttention(Ranking):
    """Keeps the k visual tokens that receive the most attention."""

    kind: Literal["received_attention"] = "received_attention"

    def score(self, inputs: ReducerInputs) -> Tensor:
        """Received attention of each visual token, [B, N]."""
        received = received_attention(inputs.queries, inputs.keys)
        patches = received[:, 1:] if inputs.has_cls else received
        return pool_merge_cells(patches, inputs.merge_factor, inputs.patch_rows)

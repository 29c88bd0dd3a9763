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
from pocketvlm.graph.token_scores import received_attention
from pocketvlm.models.reducer import ReducerInputs

__all__ = ["ReceivedAttention"]


@dataclass(frozen=True, kw_only=True)
class ReceivedAttention(Ranking):
    """Keeps the k visual tokens that receive the most attention."""

    kind: Literal["received_attention"] = "received_attention"

    def score(self, inputs: ReducerInputs) -> Tensor:
        """Received attention of each visual token, [B, N]."""
        received = received_attention(inputs.queries, inputs.keys)
        patches = received[:, 1:] if inputs.has_cls else received
        return pool_merge_cells(patches, inputs.merge_factor, inputs.patch_rows)

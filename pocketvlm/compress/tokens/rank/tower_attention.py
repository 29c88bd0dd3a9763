"""The attention that a tower pays to its patches: from [CLS] where there is one, else from all."""

from __future__ import annotations

from torch import Tensor

from pocketvlm.compress.tokens.rank.ranking import pool_merge_cells
from pocketvlm.graph.token_scores import cls_attention, received_attention
from pocketvlm.models.reducer import ReducerInputs

__all__ = ["tower_attention"]


def tower_attention(inputs: ReducerInputs) -> Tensor:
    """The attention to each visual token in the feature block, [B, N].

    VisPruner and VisionZip take the same two sources, the second for SigLIP.
    """
    if inputs.has_cls:
        attention = cls_attention(inputs.queries, inputs.keys)
    else:
        attention = received_attention(inputs.queries, inputs.keys)
    return pool_merge_cells(attention, inputs.merge_factor, inputs.patch_rows)

"""Similarity merging, and Turbo's variant of it, which spares what the tower attends to.

`similar`: AIM (Zhong et al., arXiv 2412.03248), stage 1, merges the tokens that leave the vision
encoder with ToMe's matching. AIM merges after the projector, this before it, so that the projector
runs on k tokens; AIM merges half of them per step, this a quarter, so that which tokens merge is a
choice. `semantic_weight` above 0 is Turbo (Ju et al., "Turbo:
Informativity-Driven Acceleration Plug-In for Vision-Language Large Models", arXiv 2407.11717,
eq. 3): what speaks for merging a token is its likeness to another, minus its semantic value, the
attention that the tower pays to it. Turbo does so in every block of the tower; this does it once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pocketvlm.compress.tokens.merge.bipartite import MergedTokens, merge_to
from pocketvlm.compress.tokens.rank.tower_attention import tower_attention
from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.graph.token_scores import semantic_value
from pocketvlm.models.reducer import PositionPolicy, ReducerInputs, TokenReducer
from pocketvlm.models.spec import ModelSpec
from pocketvlm.models.token_merging import check_semantic_weight

__all__ = ["Similar", "SimilarReducer"]


class SimilarReducer(TokenReducer):
    """Merges tokens that are alike until k remain."""

    def __init__(self, *, semantic_weight: float, keep: int, positions: PositionPolicy) -> None:
        super().__init__(keep=keep, positions=positions)
        self._semantic_weight = semantic_weight

    def forward(self, inputs: ReducerInputs) -> tuple[Tensor, Tensor]:
        """Returns the merged features [B, k, C] and their indices [B, k] (int64, ascending)."""
        worth = None
        if self._semantic_weight:
            worth = semantic_value(tower_attention(inputs), self._semantic_weight)
        merged = merge_to(MergedTokens.unmerged(inputs.features, worth), self.keep)
        return merged.features, merged.indices


@dataclass(frozen=True, kw_only=True)
class Similar(Reducer):
    """Merges the visual tokens that are most alike.

    Attributes:
        semantic_weight: How much attention speaks against merging a token, in units of cosine for
            a token of average attention; 0 looks at likeness alone. Turbo's constants are 0.75.
    """

    kind: Literal["similar"] = "similar"
    semantic_weight: float = 0.0

    def __post_init__(self) -> None:
        check_semantic_weight(self.semantic_weight)

    def build(self, spec: ModelSpec, *, keep: int, positions: PositionPolicy) -> TokenReducer:
        """The module of one model."""
        return SimilarReducer(semantic_weight=self.semantic_weight, keep=keep, positions=positions)

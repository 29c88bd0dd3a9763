"""FasterVLM: keep the patches that the [CLS] token of the vision tower attends to most.

Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM
Inference Faster" (arXiv 2412.01818), section 4. The score of patch i is the attention that [CLS]
pays to it in the block whose output is the feature, averaged over heads. One softmax row is all
that is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pocketvlm.compress.tokens.rank.ranking import Ranking, pool_merge_cells
from pocketvlm.errors import UnsupportedError
from pocketvlm.graph.token_scores import cls_attention
from pocketvlm.models.reducer import PositionPolicy, ReducerInputs, TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = ["ClsAttention", "require_cls"]


def require_cls(spec: ModelSpec, kind: str) -> None:
    """Checks that a tower has a [CLS] token.

    Raises:
        UnsupportedError: It has none; the message names the reducer.
    """
    if not spec.tower.has_cls:
        raise UnsupportedError(
            f"reduce_tokens: reducer {kind} needs a tower with a [CLS] token, which "
            f"{spec.model_type} does not have; use distinct_features or auto"
        )


@dataclass(frozen=True, kw_only=True)
class ClsAttention(Ranking):
    """Keeps the k visual tokens with the highest [CLS] attention."""

    kind: Literal["cls_attention"] = "cls_attention"

    def score(self, inputs: ReducerInputs) -> Tensor:
        """[CLS] attention of each visual token, [B, N]."""
        attention = cls_attention(inputs.queries, inputs.keys)
        return pool_merge_cells(attention, inputs.merge_factor, inputs.patch_rows)

    def build(self, spec: ModelSpec, *, keep: int, positions: PositionPolicy) -> TokenReducer:
        """The module of one model.

        Raises:
            UnsupportedError: The tower has no [CLS] token.
        """
        require_cls(spec, self.kind)
        return super().build(spec, keep=keep, positions=positions)

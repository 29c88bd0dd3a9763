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
from pocketvlm.models.reducer import PositionPolicy, ReducerInputs, TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = ["ClsAttention", "cls_attention"]


def cls_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention from [CLS] to every patch, averaged over heads.

    The softmax runs over all tokens, [CLS] included; its own column is then left out, so that a
    row sums to less than one.

    Args:
        queries: Scaled queries [B, H, 1 + patches, d], [CLS] first.
        keys: Keys of the same shape.

    Returns:
        [B, patches].
    """
    row = queries[:, :, :1] @ keys.transpose(2, 3)
    return row.softmax(dim=-1).mean(dim=1)[:, 0, 1:]


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
        if not spec.tower.has_cls:
            raise UnsupportedError(
                f"reduce_tokens: reducer cls_attention needs a tower with a [CLS] token, which "
                f"{spec.model_type} does not have; use distinct_features or auto"
            )
        return super().build(spec, keep=keep, positions=positions)

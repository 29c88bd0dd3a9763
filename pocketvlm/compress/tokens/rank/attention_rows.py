"""FoPru's row strategy: keep whole rows of the picture, those that draw the most attention.

Jiang et al., "FoPru: Focal Pruning for Efficient Large Vision-Language Models" (arXiv 2411.14164).
Significance is the attention of the vision encoder; a row's is the sum of its tokens'. Neighbours
stay neighbours, and what is gathered is contiguous memory. Its other strategy, the rank over all
tokens, is `cls_attention` here, or `received_attention` where there is no [CLS]. The paper does not
say what it does without [CLS]; we take the attention that a token receives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pocketvlm.compress.tokens.rank.tower_attention import tower_attention
from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.errors import RecipeError
from pocketvlm.graph.selection import gather_tokens, top_indices
from pocketvlm.models.reducer import PositionPolicy, ReducerInputs, TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = ["AttentionRows", "AttentionRowsReducer"]


class AttentionRowsReducer(TokenReducer):
    """Keeps whole rows of a grid of tokens."""

    within: Tensor

    def __init__(self, *, columns: int, keep: int, positions: PositionPolicy) -> None:
        super().__init__(keep=keep, positions=positions)
        self._columns = columns
        self.register_buffer("within", torch.arange(columns), persistent=False)

    def forward(self, inputs: ReducerInputs) -> tuple[Tensor, Tensor]:
        """Returns the kept features [B, k, C] and their indices [B, k] (int64, ascending)."""
        attention = tower_attention(inputs)
        rows = attention.view(attention.shape[0], -1, self._columns).sum(dim=-1)
        chosen = top_indices(rows, self.keep // self._columns)
        indices = (chosen[..., None] * self._columns + self.within).flatten(1)
        return gather_tokens(inputs.features, indices), indices


@dataclass(frozen=True, kw_only=True)
class AttentionRows(Reducer):
    """Keeps the rows of visual tokens that draw the most attention.

    A share is rounded to the nearest number of whole rows.
    """

    kind: Literal["attention_rows"] = "attention_rows"

    def nearest_count(self, spec: ModelSpec, count: int) -> int:
        """The number of tokens of whole rows that is closest to `count`."""
        return max(1, round(count / spec.visual_columns)) * spec.visual_columns

    def build(self, spec: ModelSpec, *, keep: int, positions: PositionPolicy) -> TokenReducer:
        """The module of one model.

        Raises:
            RecipeError: `keep` is not a number of whole rows.
        """
        columns = spec.visual_columns
        if keep % columns:
            raise RecipeError(
                f"reduce_tokens: keep {keep}: attention_rows keeps whole rows of {columns} visual "
                f"tokens; the nearest count is {self.nearest_count(spec, keep)}"
            )
        return AttentionRowsReducer(columns=columns, keep=keep, positions=positions)

"""VTC-CLS: [CLS] attention summed over blocks of the tower, not read in the last one alone.

Wang et al., "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs" (arXiv
2412.05819): which patches [CLS] attends to wavers from block to block, and the sum over blocks is
steadier. The authors choose the first block for each benchmark; here it is an option, and by
default the middle of the blocks that are run. Costs one softmax row per block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Literal

from torch import Tensor

from pocketvlm.compress.tokens.rank.cls_attention import require_cls
from pocketvlm.compress.tokens.rank.ranking import Ranking, pool_merge_cells
from pocketvlm.errors import RecipeError
from pocketvlm.graph.token_scores import cls_attention
from pocketvlm.models.reducer import PositionPolicy, ReducerInputs, TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = ["ClsEnsemble"]


@dataclass(frozen=True, kw_only=True)
class ClsEnsemble(Ranking):
    """Keeps the k visual tokens with the highest [CLS] attention over several blocks.

    Attributes:
        first_block: The first block of the tower whose attention counts; the last is the one whose
            output is the feature. `None` is the middle of the blocks that are run.
    """

    kind: Literal["cls_ensemble"] = "cls_ensemble"
    first_block: int | None = None

    def __post_init__(self) -> None:
        if self.first_block is not None and self.first_block < 0:
            raise ValueError(f"first_block is {self.first_block}; allowed are blocks from 0")

    def score(self, inputs: ReducerInputs) -> Tensor:
        """[CLS] attention of each visual token summed over the blocks, [B, N]."""
        rows = [cls_attention(block.queries, block.keys) for block in inputs.earlier]
        total = reduce(add, rows, cls_attention(inputs.queries, inputs.keys))
        return pool_merge_cells(total, inputs.merge_factor, inputs.patch_rows)

    def earlier_blocks(self, spec: ModelSpec) -> tuple[int, ...]:
        """The blocks from the first to the one before the feature block.

        Raises:
            RecipeError: The first block comes after the feature block.
        """
        last = spec.tower.feature_block
        first = (last + 1) // 2 if self.first_block is None else self.first_block
        if first > last:
            raise RecipeError(
                f"reduce_tokens: reducer cls_ensemble: first_block is {first}; the blocks of this "
                f"tower that are run are 0 to {last}"
            )
        return tuple(range(first, last))

    def build(self, spec: ModelSpec, *, keep: int, positions: PositionPolicy) -> TokenReducer:
        """The module of one model.

        Raises:
            RecipeError: There is no such first block.
            UnsupportedError: The tower has no [CLS] token.
        """
        require_cls(spec, self.kind)
        return super().build(spec, keep=keep, positions=positions)

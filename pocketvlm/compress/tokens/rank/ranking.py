"""A reducer that is nothing but its score, and scores of patches as scores of visual tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from torch import Tensor

from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.graph.selection import gather_tokens, top_indices
from pocketvlm.graph.tensor_ops import merge_patches
from pocketvlm.models.reducer import PositionPolicy, ReducerInputs, TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = ["Ranking", "RankingReducer", "pool_merge_cells"]


def pool_merge_cells(scores: Tensor, merge_factor: int, rows: int) -> Tensor:
    """Mean score of the patches that make up each visual token.

    Args:
        scores: One score per patch, [B, rows * columns].
        merge_factor: Side of the square of patches that the projector merges.
        rows: Patches of an image from top to bottom.

    Returns:
        [B, rows * columns / merge_factor**2], in the order of `forward.merge_patches`.
    """
    if merge_factor == 1:
        return scores
    return merge_patches(scores[..., None], merge_factor, rows).mean(dim=-1)


class RankingReducer(TokenReducer):
    """Keeps the k tokens of the highest score, in raster order.

    Args:
        score: The score of each visual token, [B, N]; the larger, the more it is worth.
        keep: Features that are returned, k.
        positions: Which rotary positions they get.
        earlier_blocks: Blocks of the tower before the feature block that the score reads.
    """

    def __init__(
        self,
        score: Callable[[ReducerInputs], Tensor],
        *,
        keep: int,
        positions: PositionPolicy,
        earlier_blocks: tuple[int, ...] = (),
    ) -> None:
        super().__init__(keep=keep, positions=positions, earlier_blocks=earlier_blocks)
        self._score = score

    def forward(self, inputs: ReducerInputs) -> tuple[Tensor, Tensor]:
        """Returns the kept features [B, k, C] and their indices [B, k] (int64, ascending)."""
        indices = top_indices(self._score(inputs), self.keep)
        return gather_tokens(inputs.features, indices), indices


class Ranking(Reducer):
    """A reducer that is nothing but its score."""

    @abstractmethod
    def score(self, inputs: ReducerInputs) -> Tensor:
        """The score of each visual token, [B, N]; the larger, the more it is worth."""

    def earlier_blocks(self, spec: ModelSpec) -> tuple[int, ...]:
        """Blocks of the tower before the feature block that the score reads; by default none.

        Raises:
            RecipeError: There is no such block.
        """
        return ()

    def build(self, spec: ModelSpec, *, keep: int, positions: PositionPolicy) -> TokenReducer:
        """The module of one model."""
        return RankingReducer(
            self.score, keep=keep, positions=positions, earlier_blocks=self.earlier_blocks(spec)
        )

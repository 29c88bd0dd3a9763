"""What the scoring methods share: exact top-k in raster order, gathering, pooling over merge cells.

Only `topk`, `gather` and comparisons appear: ExecuTorch's portable kernels have no sort, and
boolean indexing gives no static shape on any target.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from torch import Tensor

from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.graph.tensor_ops import merge_patches
from pocketvlm.models.reducer import PositionPolicy, ReducerInputs, TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = [
    "Ranking",
    "RankingReducer",
    "gather_tokens",
    "order_tokens",
    "pool_merge_cells",
    "split_indices",
    "top_indices",
]


def top_indices(scores: Tensor, keep: int) -> Tensor:
    """Indices of the `keep` largest scores, ascending; of equal scores the earlier index wins.

    Runtimes break ties inside `topk` in different ways. So the k-th largest score is only used as
    a threshold; what is ranked are integers that no two tokens share, exact in float32 up to five
    million tokens and in float16 up to 682.

    Args:
        scores: [B, N], finite.
        keep: k, at most N.

    Returns:
        int64 [B, k], ascending: raster order.
    """
    return _ascending(_rank(scores, keep).topk(keep, dim=-1).indices, scores)


def split_indices(scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """What `top_indices` returns, and the indices of all other tokens.

    Args:
        scores: [B, N], finite.
        keep: k, at least 1 and less than N.

    Returns:
        int64 [B, k] and [B, N - k], ascending; no token is in both.
    """
    rank = _rank(scores, keep)
    kept, rest = rank.topk(keep, dim=-1), (-rank).topk(scores.shape[-1] - keep, dim=-1)
    return _ascending(kept.indices, scores), _ascending(rest.indices, scores)


def _rank(scores: Tensor, keep: int) -> Tensor:
    """Integers that no two tokens share; the `keep` largest are those of the tokens to keep."""
    count = scores.shape[-1]
    threshold = scores.topk(keep, dim=-1).values[..., -1:]
    above, equal = (scores > threshold).to(scores.dtype), (scores == threshold).to(scores.dtype)
    countdown = scores.new_tensor(list(range(count, 0, -1)))
    return (2 * above + equal) * count + countdown


def _ascending(indices: Tensor, like: Tensor) -> Tensor:
    """Indices in raster order."""
    # The largest negated index is the first token: a second topk instead of a sort.
    ordered = (-indices.to(like.dtype)).topk(indices.shape[-1], dim=-1).values
    return -ordered.to(indices.dtype)


def order_tokens(features: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Features [B, k, C] and their indices [B, k], both in raster order."""
    ordered = (-indices.to(features.dtype)).topk(indices.shape[-1], dim=-1)
    return gather_tokens(features, ordered.indices), -ordered.values.to(indices.dtype)


def gather_tokens(features: Tensor, indices: Tensor) -> Tensor:
    """Features [B, N, C] at indices [B, k], as [B, k, C]."""
    return features.gather(1, indices[..., None].expand(-1, -1, features.shape[-1]))


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
    """

    def __init__(
        self, score: Callable[[ReducerInputs], Tensor], *, keep: int, positions: PositionPolicy
    ) -> None:
        super().__init__(keep=keep, positions=positions)
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

    def build(self, spec: ModelSpec, *, keep: int, positions: PositionPolicy) -> TokenReducer:
        """The module of one model."""
        return RankingReducer(self.score, keep=keep, positions=positions)

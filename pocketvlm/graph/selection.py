"""Choosing tokens exactly and in raster order, as every runtime can.

Only `topk`, `gather` and comparisons appear: ExecuTorch's portable kernels have no sort, and
boolean indexing gives no static shape on any target.
"""

from __future__ import annotations

from torch import Tensor

__all__ = [
    "cosine_similarity",
    "count_after_step",
    "gather_tokens",
    "order_tokens",
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


def count_after_step(count: int, keep: int) -> int:
    """Tokens that remain of `count` after one step of a matching of even with odd tokens.

    A step takes up to a quarter of them. Half of them could go; then every even token would,
    whatever it is like.
    """
    return max(keep, count - max(1, count // 4))


def order_tokens(features: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Features [B, k, C] and their indices [B, k], both in raster order."""
    ordered = (-indices.to(features.dtype)).topk(indices.shape[-1], dim=-1)
    return gather_tokens(features, ordered.indices), -ordered.values.to(indices.dtype)


def gather_tokens(features: Tensor, indices: Tensor) -> Tensor:
    """Features [B, N, C] at indices [B, k], as [B, k, C]."""
    return features.gather(1, indices[..., None].expand(-1, -1, features.shape[-1]))


def cosine_similarity(rows: Tensor, columns: Tensor) -> Tensor:
    """Cosine of every pair of features [B, n, C] and [B, m, C], as [B, n, m]."""
    return _unit(rows) @ _unit(columns).transpose(1, 2)


def _unit(features: Tensor) -> Tensor:
    return features / features.square().sum(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)

"""Bipartite soft matching: tokens of one half are averaged into the most similar of the other.

Bolya et al., "Token Merging: Your ViT But Faster" (arXiv 2210.09461), section 3; written from the
paper. Tokens are split into even and odd ones; each even token finds the odd one of highest
cosine, and the pairs that are most alike are merged, weighted by the patches that each stands for.
Assignment is a product with one-hot rows: scattering is silently wrong or missing in mobile
runtimes. A merged token takes the place of the odd one, so that raster order is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pocketvlm.graph.selection import (
    cosine_similarity,
    count_after_step,
    gather_tokens,
    order_tokens,
    split_indices,
)

__all__ = ["MergedTokens", "merge_similar", "merge_to"]


@dataclass(frozen=True, kw_only=True, eq=False)
class MergedTokens:
    """Tokens, some of which stand for several.

    Attributes:
        features: [B, n, C].
        indices: Their places in the picture, int64 [B, n], ascending.
        sizes: Visual tokens that each stands for, [B, n, 1].
        worth: What speaks against merging each, [B, n, 1], in units of cosine.
    """

    features: Tensor
    indices: Tensor
    sizes: Tensor
    worth: Tensor

    @classmethod
    def unmerged(cls, features: Tensor, worth: Tensor | None = None) -> MergedTokens:
        """Every token alone."""
        batch, count, _ = features.shape
        ones = torch.ones(batch, count, 1, dtype=features.dtype, device=features.device)
        return cls(
            features=features,
            indices=torch.arange(count, device=features.device).expand(batch, -1),
            sizes=ones,
            worth=torch.zeros_like(ones) if worth is None else worth[..., None],
        )


def merge_to(tokens: MergedTokens, keep: int) -> MergedTokens:
    """Merges until `keep` tokens remain."""
    while (count := tokens.features.shape[1]) > keep:
        tokens = merge_similar(tokens, count_after_step(count, keep))
    return tokens


def merge_similar(tokens: MergedTokens, keep: int) -> MergedTokens:
    """One step.

    Args:
        tokens: n tokens.
        keep: Tokens that remain, at least n // 2 and less than n.
    """
    even, odd = _part(tokens, 0), _part(tokens, 1)
    best = cosine_similarity(even.features, odd.features).topk(1, dim=-1)
    # int64 [B, evens, 1] against the places of the odd ones: a row of zeros and a single one.
    places = torch.arange(odd.features.shape[1], device=odd.features.device)
    one_hot = (best.indices == places).to(odd.features.dtype)
    staying = keep - odd.features.shape[1]
    if staying:
        apart = even.worth[..., 0] - best.values[..., 0]
        stay, leave = split_indices(apart, staying)
        leaving, one_hot = _take(even, leave), gather_tokens(one_hot, leave)
    else:
        leaving = even
    into = one_hot.transpose(1, 2)
    sizes = odd.sizes + into @ leaving.sizes
    merged = MergedTokens(
        features=(odd.features * odd.sizes + into @ (leaving.features * leaving.sizes)) / sizes,
        indices=odd.indices,
        sizes=sizes,
        worth=(odd.worth * odd.sizes + into @ (leaving.worth * leaving.sizes)) / sizes,
    )
    if not staying:
        return merged
    return _ordered(_join(merged, _take(even, stay)))


def _part(tokens: MergedTokens, first: int) -> MergedTokens:
    return MergedTokens(
        features=tokens.features[:, first::2],
        indices=tokens.indices[:, first::2],
        sizes=tokens.sizes[:, first::2],
        worth=tokens.worth[:, first::2],
    )


def _take(tokens: MergedTokens, places: Tensor) -> MergedTokens:
    return MergedTokens(
        features=gather_tokens(tokens.features, places),
        indices=tokens.indices.gather(1, places),
        sizes=gather_tokens(tokens.sizes, places),
        worth=gather_tokens(tokens.worth, places),
    )


def _join(first: MergedTokens, second: MergedTokens) -> MergedTokens:
    return MergedTokens(
        features=torch.cat([first.features, second.features], dim=1),
        indices=torch.cat([first.indices, second.indices], dim=1),
        sizes=torch.cat([first.sizes, second.sizes], dim=1),
        worth=torch.cat([first.worth, second.worth], dim=1),
    )


def _ordered(tokens: MergedTokens) -> MergedTokens:
    width = tokens.features.shape[-1]
    columns = torch.cat([tokens.features, tokens.sizes, tokens.worth], dim=-1)
    columns, indices = order_tokens(columns, tokens.indices)
    return MergedTokens(
        features=columns[..., :width],
        indices=indices,
        sizes=columns[..., width : width + 1],
        worth=columns[..., width + 1 :],
    )

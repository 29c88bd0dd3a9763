"""Merging tokens between the blocks of a vision tower, as a product with one-hot rows.

Three rules say which token becomes part of which; what follows is the same for all. A token that
stands for several is their mean, weighted by the patches that each stands for, and attention counts
it that often (`attention` of the operators takes sizes).

Bolya et al., "Token Merging: Your ViT But Faster" (arXiv 2210.09461), section 3: bipartite matching
of keys, merging between attention and the feed-forward network, proportional attention; written
from the paper. What is different: tokens are restored after the tower, so that the projector finds
its grid of patches; and the merge is a product with one-hot rows, because scattering is silently
wrong or missing in mobile runtimes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pocketvlm.graph.selection import cosine_similarity, top_indices
from pocketvlm.graph.token_scores import (
    cls_attention,
    distinctness,
    received_attention,
    semantic_value,
)
from pocketvlm.models.reducer import BlockRows
from pocketvlm.models.token_merging import ImportantTokens, NeighbourTokens, SimilarTokens
from pocketvlm.models.tower import TowerSpec

__all__ = [
    "TowerTokens",
    "join_important",
    "join_neighbours",
    "join_similar",
    "match_tokens",
    "merge_tokens",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class TowerTokens:
    """What the tokens of a tower stand for, once some were merged.

    Attributes:
        sizes: Patches that each stands for, float32 [images, tokens, 1].
        places: Which of them stands for each token that the tower began with, int64 [images, all].
    """

    sizes: Tensor
    places: Tensor

    def restore(self, states: Tensor) -> Tensor:
        """States [images, tokens, C] of all tokens that the tower began with."""
        return states.gather(1, self.places[..., None].expand(-1, -1, states.shape[-1]))


def merge_tokens(
    hidden: Tensor, target: Tensor, count: int, before: TowerTokens | None = None
) -> tuple[Tensor, TowerTokens]:
    """Merges tokens.

    Args:
        hidden: [images, n, C].
        target: The token that each becomes part of, int64 [images, n]; each of `count` is the
            target of one at least.
        count: Tokens that there are then.
        before: What they stood for; `None` where each stands for itself.

    Returns:
        [images, count, C], and what these stand for.
    """
    places = torch.arange(count, device=hidden.device)
    one_hot = (target[:, None] == places[None, :, None]).to(hidden.dtype)
    if before is None:
        sizes = one_hot.sum(dim=-1, keepdim=True)
        return one_hot @ hidden / sizes, TowerTokens(sizes=sizes, places=target)
    sizes = one_hot @ before.sizes
    merged = one_hot @ (hidden * before.sizes) / sizes
    return merged, TowerTokens(sizes=sizes, places=target.gather(1, before.places))


def match_tokens(
    merge: SimilarTokens | NeighbourTokens | ImportantTokens,
    tower: TowerSpec,
    hidden: Tensor,
    rows: BlockRows,
) -> Tensor:
    """The token that each token of the tower becomes part of, int64 [images, tokens].

    [CLS] stays the first, and nothing becomes part of it.

    Args:
        merge: The rule.
        tower: The tower.
        hidden: What attention has left, [images, tokens, hidden].
        rows: Queries and keys of that attention.
    """
    patches = hidden[:, 1:] if tower.has_cls else hidden
    if isinstance(merge, NeighbourTokens):
        target = join_neighbours(tower.rows, tower.columns, merge.rows, merge.columns)
        target = target.to(hidden.device).expand(hidden.shape[0], -1)
    elif isinstance(merge, SimilarTokens):
        metric = rows.keys.mean(dim=1)
        worth = None
        if merge.semantic_weight:
            worth = semantic_value(_attention(rows, tower), merge.semantic_weight)
        metric = metric[:, 1:] if tower.has_cls else metric
        target = join_similar(metric, merge.patches, worth)
    elif merge.score == "distinct":
        target = join_important(distinctness(patches), merge.patches)
    else:
        target = join_important(_attention(rows, tower), merge.patches)
    if not tower.has_cls:
        return target
    return torch.cat([torch.zeros_like(target[:, :1]), target + 1], dim=1)


def join_similar(metric: Tensor, count: int, worth: Tensor | None = None) -> Tensor:
    """ToMe's bipartite soft matching (arXiv 2210.09461, section 3).

    Every second token may become part of the one of the others that is most like it; of these the
    most alike do. The others come first in the new order.

    Args:
        metric: What is compared, [B, n, C].
        count: Tokens that remain, at least n // 2.
        worth: What speaks against merging each, [B, n], in units of cosine; `None` for nothing.

    Returns:
        int64 [B, n].
    """
    total = metric.shape[1]
    evens, odds = metric[:, ::2], metric[:, 1::2]
    best = cosine_similarity(evens, odds).topk(1, dim=-1)
    target = best.indices[..., 0]
    staying = count - total // 2
    if staying:
        apart = -best.values[..., 0]
        stays = top_indices(apart if worth is None else apart + worth[:, ::2], staying)
        target = _renumber(target, stays, first=total // 2)
    own = torch.arange(total // 2, device=metric.device).expand(metric.shape[0], -1)
    pairs = torch.stack([target[:, : total // 2], own], dim=-1).flatten(1)
    return torch.cat([pairs, target[:, total // 2 :]], dim=1) if total % 2 else pairs


def join_neighbours(rows: int, columns: int, high: int, wide: int) -> Tensor:
    """Rectangles of a grid of patches, numbered in raster order, int64 [1, rows * columns].

    MiniCPM-V (arXiv 2408.01800) trains a merge of neighbours within its tower; this is the mean of
    them, without training.
    """
    across = columns // wide
    grid = [
        row // high * across + column // wide for row in range(rows) for column in range(columns)
    ]
    return torch.tensor([grid])


def join_important(score: Tensor, count: int) -> Tensor:
    """All but the tokens of highest score become one, the last.

    Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token
    Reorganizations" (EViT, arXiv 2202.07800), section 3.2. What is different: the tokens that
    become one weigh the same, by patches, and not by their attention.

    Args:
        score: [B, n].
        count: Tokens that remain, that of all others included.

    Returns:
        int64 [B, n].
    """
    others = torch.full_like(score, count - 1).to(torch.int64)
    if count == 1:
        return others
    return _renumber(others, top_indices(score, count - 1), first=0)


def _renumber(target: Tensor, chosen: Tensor, *, first: int) -> Tensor:
    """Targets [B, n], where the tokens of `chosen`, [B, m], get those from `first` on instead."""
    count = target.shape[1]
    places = torch.arange(count, device=chosen.device)
    is_chosen = (chosen[..., None] == places).to(torch.int64)
    numbers = torch.arange(first, first + chosen.shape[1], device=chosen.device)[:, None]
    return target * (1 - is_chosen.sum(dim=1)) + (is_chosen * numbers).sum(dim=1)


def _attention(rows: BlockRows, tower: TowerSpec) -> Tensor:
    """Attention that each patch gets: from [CLS] where there is one, else from all; [B, n]."""
    if tower.has_cls:
        return cls_attention(rows.queries, rows.keys)
    return received_attention(rows.queries, rows.keys)

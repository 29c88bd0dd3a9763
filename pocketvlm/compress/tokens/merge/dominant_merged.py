"""VisionZip: the tokens that the tower attends to, and the others merged into a few.

Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models" (arXiv
2412.04467). Dominant tokens are those of highest attention; of the others, every n-th is a target,
and each is averaged with the tokens whose keys are most like its own. What we do differently: a
target and its tokens weigh the same (the authors' code adds the mean to the target), merged tokens
stand at the target's place instead of after all others, and [CLS] is not kept, since projectors of
today's models never saw it. Keys are means over heads, as theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pocketvlm.compress.tokens.baseline.uniform_stride import uniform_indices
from pocketvlm.compress.tokens.rank.tower_attention import tower_attention
from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.graph.selection import (
    cosine_similarity,
    gather_tokens,
    order_tokens,
    split_indices,
    top_indices,
)
from pocketvlm.graph.tensor_ops import merge_patches
from pocketvlm.models.reducer import PositionPolicy, ReducerInputs, TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = ["DominantMerged", "DominantMergedReducer"]


class DominantMergedReducer(TokenReducer):
    """Keeps `keep - merged` tokens by attention, and merges the others into `merged`."""

    targets: Tensor

    def __init__(self, *, tokens: int, merged: int, keep: int, positions: PositionPolicy) -> None:
        super().__init__(keep=keep, positions=positions)
        rest = tokens - (keep - merged)
        self._dominant = keep - merged
        targets = torch.tensor(uniform_indices(rest, merged), dtype=torch.int64)
        self.register_buffer("targets", targets, persistent=False)

    def forward(self, inputs: ReducerInputs) -> tuple[Tensor, Tensor]:
        """Returns the kept features [B, k, C] and their indices [B, k] (int64, ascending)."""
        features, attention = inputs.features, tower_attention(inputs)
        if self._dominant == self.keep:
            indices = top_indices(attention, self.keep)
            return gather_tokens(features, indices), indices
        indices, rest = split_indices(attention, self._dominant)
        keys = gather_tokens(_token_keys(inputs), rest)
        others = gather_tokens(features, rest)
        places = self.targets.expand(features.shape[0], -1)
        likeness = cosine_similarity(keys, gather_tokens(keys, places))
        best = likeness.topk(1, dim=-1).indices
        # A target belongs to itself: its cosine with itself is the largest there is.
        numbers = torch.arange(self.targets.shape[0], device=features.device)
        one_hot = (best == numbers).to(features.dtype).transpose(1, 2)
        merged = one_hot @ others / one_hot.sum(dim=-1, keepdim=True).clamp_min(1.0)
        return order_tokens(
            torch.cat([gather_tokens(features, indices), merged], dim=1),
            torch.cat([indices, rest.gather(1, places)], dim=1),
        )


def _token_keys(inputs: ReducerInputs) -> Tensor:
    """The keys of each visual token, mean over heads, those of its patches side by side."""
    keys = inputs.keys.mean(dim=1)
    patches = keys[:, 1:] if inputs.has_cls else keys
    if inputs.merge_factor == 1:
        return patches
    return merge_patches(patches, inputs.merge_factor, inputs.patch_rows)


@dataclass(frozen=True, kw_only=True)
class DominantMerged(Reducer):
    """Keeps some visual tokens by attention, and merges the others into a few.

    Attributes:
        merged_share: The share of the k tokens that are merged ones; 10 of 64 in the paper.
    """

    kind: Literal["dominant_merged"] = "dominant_merged"
    merged_share: float = 0.15625

    def __post_init__(self) -> None:
        if not 0 <= self.merged_share <= 1:
            raise ValueError(f"merged_share is {self.merged_share}; allowed are 0 to 1")

    def build(self, spec: ModelSpec, *, keep: int, positions: PositionPolicy) -> TokenReducer:
        """The module of one model."""
        total = spec.visual_tokens
        # At least one token is chosen by attention, and nothing is left to merge at k = N.
        merged = 0 if keep == total else min(keep - 1, round(self.merged_share * keep))
        return DominantMergedReducer(tokens=total, merged=merged, keep=keep, positions=positions)

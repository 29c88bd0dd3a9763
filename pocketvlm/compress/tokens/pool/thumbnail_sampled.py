"""A pooled thumbnail of the picture, and single tokens of it at full detail.

TS-LLaVA (Qu et al., "TS-LLaVA: Constructing Visual Tokens through Thumbnail-and-Sampling for
Training-Free Video Large Language Models", arXiv 2411.11066) shows the decoder a thumbnail of all
frames and tokens sampled evenly from them; S2 (arXiv 2403.13043) likewise looks at a picture at
two scales. Here both are made of one picture: some of the k are means over the cells of a coarse
grid, the others every n-th of the tokens that are not the centre of a cell. It looks at no feature,
so it is one product with a constant, and a baseline. What we do differently: TS-LLaVA samples
tokens of several frames of a video, and S2 joins its scales as channels, for a projector that is
trained on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pocketvlm.compress.tokens.baseline.uniform_stride import uniform_indices
from pocketvlm.compress.tokens.pool.average_pool import (
    ConstantMeans,
    cell_tokens,
    nearest_reachable,
    pooled_grid,
)
from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.models.reducer import PositionPolicy, TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = ["ThumbnailSampled", "thumbnail_means"]


def thumbnail_means(tokens: tuple[int, int], *, pooled: int, keep: int) -> dict[int, list[int]]:
    """The tokens that are averaged, by the token at whose place their mean stands.

    Args:
        tokens: Rows and columns of visual tokens.
        pooled: Cells of the thumbnail, a number that a grid has; 0 for none.
        keep: Tokens that remain.
    """
    grid = pooled_grid(tokens, pooled) if pooled else None
    means = {} if grid is None else cell_tokens(tokens, grid)
    rest = [token for token in range(tokens[0] * tokens[1]) if token not in means]
    sampled = uniform_indices(len(rest), keep - len(means))
    return dict(sorted({**means, **{rest[at]: [rest[at]] for at in sampled}}.items()))


@dataclass(frozen=True, kw_only=True)
class ThumbnailSampled(Reducer):
    """Keeps a pooled thumbnail, and every n-th of the other tokens; a baseline.

    Attributes:
        pooled_share: The share of the k tokens that make up the thumbnail, rounded to the nearest
            number that a grid has.
    """

    looks_at_pictures: ClassVar[bool] = False

    kind: Literal["thumbnail_sampled"] = "thumbnail_sampled"
    pooled_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.pooled_share <= 1:
            raise ValueError(f"pooled_share is {self.pooled_share}; allowed are 0 to 1")

    def build(self, spec: ModelSpec, *, keep: int, positions: PositionPolicy) -> TokenReducer:
        """The module of one model."""
        tokens = (spec.visual_rows, spec.visual_columns)
        # All tokens are all of them as they are.
        wanted = 0 if keep == spec.visual_tokens else round(self.pooled_share * keep)
        pooled = nearest_reachable(tokens, wanted, most=keep)
        means = thumbnail_means(tokens, pooled=pooled, keep=keep)
        return ConstantMeans(means, tokens=spec.visual_tokens, positions=positions)

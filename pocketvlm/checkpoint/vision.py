"""What a checkpoint has several vision graphs for: sizes of pictures, numbers of visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pocketvlm.models.picture_size import PictureSize
from pocketvlm.models.reducer import TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = ["Vision", "combine_vision"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Vision:
    """One vision graph.

    Attributes:
        size: Pictures that it takes.
        reducer: Its reduction of visual tokens; `None` for all tokens.
    """

    size: PictureSize
    reducer: TokenReducer | None = None


def combine_vision(
    spec: ModelSpec,
    others: Iterable[PictureSize],
    reducers: Callable[[ModelSpec], Iterable[TokenReducer | None]],
) -> tuple[Vision, ...]:
    """Every size with every reducer, the model's own size first.

    Args:
        spec: The model.
        others: The other sizes.
        reducers: The reductions of a model whose pictures have one of the sizes.
    """
    tower = spec.tower
    return tuple(
        Vision(size=size, reducer=reducer)
        for size in (PictureSize(height=tower.height, width=tower.width), *others)
        for reducer in reducers(spec.with_picture_size(size.height, size.width))
    )

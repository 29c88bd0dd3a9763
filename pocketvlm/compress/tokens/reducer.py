"""The contract of a reducer of visual tokens; the table of reducers is in `stage`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from pocketvlm.models.reducer import PositionPolicy, TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = ["Reducer"]


class Reducer(ABC):
    """A way to reduce visual tokens: a frozen dataclass that is its own configuration.

    Attributes:
        looks_at_pictures: Whether which tokens it keeps depends on what a picture shows.
    """

    looks_at_pictures: ClassVar[bool] = True

    @property
    @abstractmethod
    def kind(self) -> str:
        """The tag that names it in a recipe."""

    def choose(self, spec: ModelSpec) -> Reducer:
        """The reducer that a model gets: this one, unless it stands for others."""
        return self

    def nearest_count(self, spec: ModelSpec, count: int) -> int:
        """The number of tokens closest to `count` that the reducer can leave."""
        return count

    @abstractmethod
    def build(self, spec: ModelSpec, *, keep: int, positions: PositionPolicy) -> TokenReducer:
        """The module that reduces one model's tokens.

        Args:
            spec: The model.
            keep: Visual tokens that remain, k, at most `spec.visual_tokens`.
            positions: Which rotary positions they get.

        Raises:
            RecipeError: Exactly `keep` tokens cannot remain.
            UnsupportedError: The tower lacks what the reducer reads.
        """

"""What both sides of a comparison are asked."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pocketvlm.export.parity.metrics import Floats
from pocketvlm.models.images.tilings.tile_grid import TileGrid

__all__ = ["Prompt", "Questions"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question as both sides take it.

    Attributes:
        token_ids: The prompt, each picture as all its placeholders.
        pictures: Numbers of its pictures' tiles, in the order of their places.
        grids: How its pictures are cut.
    """

    token_ids: tuple[int, ...]
    pictures: tuple[int, ...]
    grids: tuple[TileGrid, ...]


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What both sides are asked.

    Attributes:
        pictures: float32 [1, C, S, S] each, tile by tile; the last is blank.
        prompts: The questions.
        follow_ups: The same, answered, with another question after each.
    """

    pictures: tuple[Floats, ...]
    prompts: tuple[Prompt, ...]
    follow_ups: tuple[Prompt, ...]

    def token_ids(self) -> list[int]:
        """Every token of the prompts once, the image's placeholder among them."""
        return list(dict.fromkeys(token for p in self.prompts for token in p.token_ids))

    def swapped(self) -> list[tuple[int, Prompt]]:
        """Every question about the pictures of the next one, and about blank ones."""
        blank = len(self.pictures) - 1
        return [
            (number, replace(prompt, pictures=pictures))
            for number, prompt in enumerate(self.prompts)
            for pictures in dict.fromkeys(
                (
                    tuple((picture + len(prompt.pictures)) % blank for picture in prompt.pictures),
                    (blank,) * len(prompt.pictures),
                )
            )
            if pictures != prompt.pictures
        ]

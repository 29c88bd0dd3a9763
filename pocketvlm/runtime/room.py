"""Whether a conversation has room in a runner's cache and in the model's positions.

What pictures take is known by their sizes, so that too many are refused before any is encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pocketvlm.runtime.pictures import EncodedPicture, KnownPicture

__all__ = ["Room", "least_room"]


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a conversation takes.

    Attributes:
        rows: Rows of KV cache.
        positions: Rotary positions.
        pictures: Pictures of the conversation.
        visual_rows: Rows that stand for them.
    """

    rows: int
    positions: int
    pictures: int
    visual_rows: int

    def problem(self, *, capacity: int, max_positions: int) -> str | None:
        """Why there is no room for it, or `None`.

        Args:
            capacity: Rows that the runner has.
            max_positions: Positions that the model has.
        """
        shown = ""
        if self.pictures:
            plural = "s" if self.pictures > 1 else ""
            shown = f", {self.visual_rows} of them for {self.pictures} picture{plural}"
        if self.rows > capacity:
            return (
                f"the conversation needs {self.rows} rows of KV cache{shown}; allowed are "
                f"{capacity} (the runner's capacity): start a new one, or give the runner more"
            )
        if self.positions > max_positions:
            return (
                f"the conversation needs {self.positions} positions for {self.rows} rows{shown}; "
                f"the model has {max_positions}: start a new one"
            )
        return None


def least_room(pictures: Sequence[KnownPicture], text: int, *, keeps_positions: bool) -> Room:
    """What a conversation takes, whatever its pictures show; see `VisionGraph.least_rows`.

    Args:
        pictures: Its pictures.
        text: Tokens beside them.
        keeps_positions: Whether a tile takes as many positions as it has placeholders.
    """
    visual_rows, positions = 0, text
    for one in pictures:
        own = one.graph.rows
        if isinstance(one, EncodedPicture):
            rows = sum(tile.embeds.shape[1] for tile in one.rows)
        else:
            rows = one.graph.least_rows(one.cut)
        visual_rows += rows
        if own.grid is not None:
            positions += one.cut.all_tiles * own.grid.advance
        elif keeps_positions:
            positions += one.cut.placeholders(own.per_tile)
        else:
            positions += rows
    return Room(
        rows=text + visual_rows,
        positions=positions,
        pictures=len(pictures),
        visual_rows=visual_rows,
    )

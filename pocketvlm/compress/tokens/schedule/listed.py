"""Visual tokens leave the decoder where a recipe says, one place after another."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from pocketvlm.bundle import VisualDrop, VisualSchedule
from pocketvlm.compress.tokens.schedule.kind import ScheduleKind, check_share, share_of

__all__ = ["Drop", "Listed"]


@dataclass(frozen=True, kw_only=True)
class Drop:
    """A place where visual tokens leave.

    Attributes:
        first_layers: Layers before it: a number, or a share of the decoder's.
        keep: What is left of the visual tokens of a tile: a share of all that enter the decoder, a
            number, or 0.
    """

    first_layers: float | int
    keep: float | int

    def __post_init__(self) -> None:
        check_share("first_layers", self.first_layers, "layers")
        if isinstance(self.keep, bool) or self.keep != 0:
            check_share("keep", self.keep, "visual tokens")


@dataclass(frozen=True, kw_only=True)
class Listed(ScheduleKind):
    """Drops visual tokens at the places that are listed.

    Attributes:
        drops: The places, from the first layer on.
        ranked_in: Whose attention ranks, that of the layer before a drop, or after it.
        positions: Whether tokens keep their positions, or each layer numbers those that it runs.
    """

    kind: Literal["listed"] = "listed"
    drops: tuple[Drop, ...] = ()
    ranked_in: Literal["layer_before", "layer_after"] = "layer_before"
    positions: Literal["original", "consecutive"] = "original"

    def __post_init__(self) -> None:
        if not self.drops:
            raise ValueError("drops is empty; allowed are one place and more")
        for name in ("first_layers", "keep"):
            values = [getattr(drop, name) for drop in self.drops]
            if len({isinstance(value, int) for value in values if value}) > 1:
                raise ValueError(f"{name} of drops are {values}; allowed are shares, or numbers")
        if any(after.keep >= before.keep for before, after in pairwise(self.drops)):
            raise ValueError(
                f"keep of drops are {[drop.keep for drop in self.drops]}; allowed are fewer from "
                "place to place: what was dropped cannot return"
            )

    def plan(self, depth: int, tokens: int) -> VisualSchedule:
        """The drops as they are listed."""
        return VisualSchedule(
            drops=tuple(
                VisualDrop(
                    layers=share_of(drop.first_layers, depth),
                    keep=share_of(drop.keep, tokens) if drop.keep else 0,
                )
                for drop in self.drops
            ),
            tokens=tokens,
            ranked_in=self.ranked_in,
            positions=self.positions,
        )

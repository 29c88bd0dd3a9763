"""How many visual rows each layer of the decoder runs: fewer the deeper, by static counts.

A schedule belongs to a model, not to a prompt. It counts in rows of one tile and holds for any
number of rows by the same share, rounded up, so that every engine finds the same number of rows
whatever is asked about however many pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

__all__ = ["VisualDrop", "VisualSchedule"]

_MOST_TOKENS = 2**24


@dataclass(frozen=True, kw_only=True)
class VisualDrop:
    """One place where visual rows leave the decoder.

    Attributes:
        layers: Layers before it; those from this index on run the rows that are left.
        keep: Rows of a tile that are left, of `VisualSchedule.tokens`; 0 for none.
    """

    layers: int
    keep: int


@dataclass(frozen=True, kw_only=True)
class VisualSchedule:
    """Where visual rows leave the decoder, and which.

    Rows that are dropped are neither computed nor cached from there on. Of the visual rows of a
    call those are kept to which its last row pays the most attention, mean over heads of the
    softmax over all that this row sees (FastV, arXiv 2403.06764, section 4.1); rows of text always
    are. Where nothing is kept, nothing is ranked.

    Attributes:
        drops: The places, layers ascending, rows descending.
        tokens: Rows of a tile that enter the decoder.
        ranked_in: The layer whose attention ranks: the one before a drop, as in FastV, whose
            attention all rows still take part in; or the one after it, as in PyramidDrop (arXiv
            2410.17247, section 3.2), which the dropped rows no longer enter.
        positions: Whether rows keep their rotary positions, or each layer numbers those that it
            holds, from 0.
    """

    drops: tuple[VisualDrop, ...]
    tokens: int = 1
    ranked_in: Literal["layer_before", "layer_after"] = "layer_before"
    positions: Literal["original", "consecutive"] = "original"

    def __post_init__(self) -> None:
        if not self.drops:
            raise ValueError("a schedule needs a layer after which visual rows are dropped")
        if not 1 <= self.tokens <= _MOST_TOKENS:
            raise ValueError(f"tokens are {self.tokens}; allowed are 1 to {_MOST_TOKENS:,}")
        layers = [0, *(drop.layers for drop in self.drops)]
        if any(after <= before for before, after in pairwise(layers)):
            raise ValueError(f"layers of drops are {layers[1:]}; allowed are 1 and more, ascending")
        kept = [self.tokens, *(drop.keep for drop in self.drops)]
        if any(after >= before for before, after in pairwise(kept)) or kept[-1] < 0:
            raise ValueError(
                f"visual tokens of a tile are {kept} from drop to drop; allowed are fewer after "
                "each, down to 0: what was dropped cannot return"
            )

    @classmethod
    def ending(cls, layers: int) -> VisualSchedule:
        """The schedule of visual rows that all end after these first layers."""
        return cls(drops=(VisualDrop(layers=layers, keep=0),))

    @property
    def is_ranked(self) -> bool:
        """Whether rows are ranked, so that what is kept depends on the question."""
        return self.drops[0].keep > 0

    def require_depth(self, depth: int) -> None:
        """Checks that the schedule fits a decoder.

        Raises:
            ValueError: It drops rows where no layer is left to run without them.
        """
        if self.drops[-1].layers >= depth:
            raise ValueError(
                f"visual rows are dropped after {self.drops[-1].layers} layers; allowed are 1 to "
                f"{depth - 1}"
            )

    def stage_of(self, layer: int) -> int:
        """Drops before a layer: the number of its stage, whose rows its cache holds."""
        return sum(drop.layers <= layer for drop in self.drops)

    def kept(self, stage: int, rows: int) -> int:
        """Visual rows that are left in a stage, of those that entered the decoder in a call.

        Args:
            stage: Drops before it; all rows are left in stage 0.
            rows: Visual rows of the call, of all its pictures.
        """
        if stage == 0:
            return rows
        return -(-rows * self.drops[stage - 1].keep // self.tokens)

    def rows_by_layer(self, depth: int, rows: int) -> tuple[int, ...]:
        """Visual rows in the cache of every layer, of those that entered in a call."""
        return tuple(self.kept(self.stage_of(layer), rows) for layer in range(depth))

    def ends_in_attention(self, drop: int) -> bool:
        """Whether dropped rows still enter the attention of the layer before the drop.

        They end after it then: their keys and values are read there, and what the attention's last
        linear and the feed-forward network would make of them is not. Else they end before the
        attention of the layer after the drop.
        """
        return self.drops[drop].keep == 0 or self.ranked_in == "layer_before"

    def drop_in(self, layer: int, *, after_attention: bool) -> int | None:
        """The drop that takes place before or after the attention of a layer, by its number."""
        for number, drop in enumerate(self.drops):
            in_attention = self.ends_in_attention(number)
            if layer == drop.layers - in_attention and after_attention == in_attention:
                return number
        return None

    def describe(self) -> str:
        """In words, such as `all in the first layer, 16 of 64 in the next 4 layers, then none`."""
        parts, before = [], 0
        for stage, drop in enumerate(self.drops):
            kept = "all" if stage == 0 else f"{self.drops[stage - 1].keep} of {self.tokens}"
            layers = drop.layers - before
            count = "layer" if layers == 1 else f"{layers} layers"
            parts.append(f"{kept} in the {'first' if stage == 0 else 'next'} {count}")
            before = drop.layers
        last = self.drops[-1].keep
        return f"{', '.join(parts)}, then {f'{last} of {self.tokens}' if last else 'none'}"

"""Visual tokens that the question looks at least leave the decoder after its first layers.

FastV (Chen et al., arXiv 2403.06764, section 4.1): after layer K, of N visual tokens the (1 - R) N
are kept to which the last token pays the most attention in that layer, mean over heads; they keep
their positions. What differs: the dropped rows are gone, and so are their keys and values in later
layers, where the published code either hides them or runs layer K twice; and they end before the
last linear of that layer's attention, whose result nothing reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pocketvlm.bundle import VisualDrop, VisualSchedule
from pocketvlm.compress.tokens.schedule.kind import ScheduleKind, check_share, share_of

__all__ = ["FastV"]


@dataclass(frozen=True, kw_only=True)
class FastV(ScheduleKind):
    """Ranks visual tokens once, after the first layers.

    Attributes:
        first_layers: Layers that all visual tokens run through, K: a number, or a share of the
            decoder's. The paper has 2 of 32 and of 40.
        keep: What is left of the visual tokens of a tile, 1 - R: a share of them, or a number.
    """

    kind: Literal["fast_v"] = "fast_v"
    first_layers: float | int = 2
    keep: float | int = 0.5

    def __post_init__(self) -> None:
        check_share("first_layers", self.first_layers, "layers")
        check_share("keep", self.keep, "visual tokens")

    def plan(self, depth: int, tokens: int) -> VisualSchedule:
        """The one drop."""
        drop = VisualDrop(
            layers=share_of(self.first_layers, depth), keep=share_of(self.keep, tokens)
        )
        return VisualSchedule(drops=(drop,), tokens=tokens)

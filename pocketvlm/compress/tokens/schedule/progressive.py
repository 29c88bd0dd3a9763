"""Visual tokens become fewer layer by layer, down to none.

The schedule of AIM (Zhong et al., arXiv 2412.03248, section 3.3): from one layer on the share of
the visual tokens that run falls linearly, until none is left three quarters down the decoder. What
differs: AIM ranks by a PageRank over the whole attention matrix, all text protected, and hides
what it drops; here the attention of the last row ranks, which no fused attention has to give up,
and what is dropped is gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pocketvlm.bundle import VisualSchedule
from pocketvlm.compress.tokens.schedule.kind import (
    ScheduleKind,
    check_share,
    share_of,
    stepwise,
)

__all__ = ["Progressive"]


@dataclass(frozen=True, kw_only=True)
class Progressive(ScheduleKind):
    """Drops an equal number of visual tokens after each of a range of layers.

    Attributes:
        first: Layers after which the first ones go: a share of the decoder's, or a number. The
            paper has 14 of 28.
        last: Layers after which none is left, likewise. The paper has 21 of 28.
    """

    kind: Literal["progressive"] = "progressive"
    first: float | int = 0.5
    last: float | int = 0.75

    def __post_init__(self) -> None:
        check_share("first", self.first, "layers")
        check_share("last", self.last, "layers")

    def plan(self, depth: int, tokens: int) -> VisualSchedule:
        """One drop after each layer of the range.

        Raises:
            ValueError: The range is empty.
        """
        first, last = share_of(self.first, depth), share_of(self.last, depth)
        if last < first:
            raise ValueError(
                f"first is {first} and last {last} of {depth} layers; allowed is a first layer "
                "that is not after the last"
            )
        steps = last - first + 1
        return stepwise(
            [(first + step, 1 - (step + 1) / steps) for step in range(steps)],
            tokens,
            ranked_in="layer_before",
            positions="original",
        )

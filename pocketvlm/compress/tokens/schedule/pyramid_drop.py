"""Visual tokens become fewer by the same ratio at the end of each of several equal stages.

PyramidDrop (Xing et al., arXiv 2410.17247, section 3.2): four stages, after each of which half of
the visual tokens go; those stay to which the last token of the instruction pays the most attention
under queries and keys of the next layer, mean over heads. The published code numbers what is left
again in every stage, which is `consecutive`. What differs: keys that several heads share are ranked
too, and a step of generation counts on from the rows that each layer holds, so that no offsets are
kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pocketvlm.bundle import VisualSchedule
from pocketvlm.compress.tokens.schedule.kind import ScheduleKind, stepwise

__all__ = ["PyramidDrop"]


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(ScheduleKind):
    """Ranks visual tokens between equal stages.

    Attributes:
        stages: Stages of the decoder, of equally many layers.
        ratio: Share of a stage's visual tokens that the next one runs, lambda.
        positions: Whether tokens keep their positions, or each stage numbers those that it runs.
    """

    kind: Literal["pyramid_drop"] = "pyramid_drop"
    stages: int = 4
    ratio: float = 0.5
    positions: Literal["original", "consecutive"] = "consecutive"

    def __post_init__(self) -> None:
        if self.stages < 2:  # noqa: PLR2004  (one before the drop and one after it)
            raise ValueError(f"stages is {self.stages}; allowed are 2 and more")
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio!r}; allowed is a ratio in (0, 1)")

    def plan(self, depth: int, tokens: int) -> VisualSchedule:
        """One drop after each stage but the last.

        Raises:
            ValueError: There are fewer layers than stages.
        """
        if self.stages > depth:
            raise ValueError(f"{self.stages} stages are more than the {depth} layers")
        borders = [depth * stage // self.stages for stage in range(1, self.stages)]
        return stepwise(
            [(layers, self.ratio**stage) for stage, layers in enumerate(borders, start=1)],
            tokens,
            ranked_in="layer_after",
            positions=self.positions,
        )

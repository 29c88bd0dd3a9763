"""The contract of a kind of schedule; the table of kinds is in `stage`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pocketvlm.bundle import VisualDrop, VisualSchedule
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.stages import PlanState

__all__ = [
    "FOUND_LATER",
    "FoundSchedule",
    "ScheduleKind",
    "SearchedSchedule",
    "check_share",
    "share_of",
    "stepwise",
]

FOUND_LATER = "drop_tokens: where visual tokens leave the decoder is found on calibration samples"


@dataclass(frozen=True, kw_only=True, eq=False)
class FoundSchedule:
    """A schedule, and what was measured to find it.

    Attributes:
        schedule: The schedule.
        layers: One row per layer for the report, as JSON values; none where nothing was measured.
        metrics: Figures of the search, as JSON values.
    """

    schedule: VisualSchedule
    layers: tuple[Mapping[str, Any], ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)


class ScheduleKind(ABC):
    """A way to drop visual rows: a frozen dataclass that is its own configuration."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """The tag that names it in a recipe."""

    @property
    def is_searched(self) -> bool:
        """Whether calibration samples say where rows are dropped, so that no plan can."""
        return False

    @abstractmethod
    def plan(self, depth: int, tokens: int) -> VisualSchedule:
        """The schedule of a decoder; of one that is searched for, the longest that is possible.

        Args:
            depth: Layers of the decoder.
            tokens: Visual rows of a tile that enter it.

        Raises:
            ValueError: It does not fit.
        """

    def planned(self, state: PlanState) -> tuple[VisualSchedule, tuple[str, ...]]:
        """The schedule that a plan counts with, and what its reader should know.

        Raises:
            RecipeError: No schedule of this kind can be found for the model.
            ValueError: It does not fit.
        """
        note = f"{FOUND_LATER}; the KV cache is planned for all of them in every layer"
        notes = (note,) if self.is_searched else ()
        return self.plan(state.spec.decoder.depth, state.visual_tokens), notes

    def find(
        self, checkpoint: Checkpoint, samples: CalibrationSet, ctx: RunContext
    ) -> FoundSchedule:
        """The schedule that a model gets.

        Args:
            checkpoint: The model; no row is dropped inside its decoder.
            samples: Calibration samples.
            ctx: Told about the steps of a search.

        Raises:
            RecipeError: A search finds none that is good enough.
            CalibrationError: A search needs samples with answers, and one cannot be used.
            ValueError: It does not fit.
        """
        del samples, ctx
        depth = checkpoint.spec.decoder.depth
        return FoundSchedule(schedule=self.plan(depth, checkpoint.visual_tokens))


class SearchedSchedule(ScheduleKind):
    """A schedule that calibration samples decide."""

    @property
    def is_searched(self) -> bool:
        """Always."""
        return True

    def plan(self, depth: int, tokens: int) -> VisualSchedule:
        """All tokens in all layers."""
        del tokens
        return VisualSchedule.ending(depth)


def stepwise(
    shares: Sequence[tuple[int, float]],
    tokens: int,
    *,
    ranked_in: Literal["layer_before", "layer_after"],
    positions: Literal["original", "consecutive"],
) -> VisualSchedule:
    """A schedule from layers and shares of the rows that are left after them.

    A share is rounded to the nearest count, at least one unless it is 0; a step that is too small
    to take a row away is none.

    Raises:
        ValueError: No step takes any.
    """
    drops: list[VisualDrop] = []
    left = tokens
    for layers, share in shares:
        keep = max(1, round(share * tokens)) if share else 0
        if keep < left:
            drops.append(VisualDrop(layers=layers, keep=keep))
            left = keep
    if not drops:
        raise ValueError(f"its steps take no row from {tokens} visual tokens of a tile")
    return VisualSchedule(
        drops=tuple(drops), tokens=tokens, ranked_in=ranked_in, positions=positions
    )


def check_share(name: str, value: float | None, unit: str) -> None:
    """Checks an option that is a share in (0, 1), or a number of at least 1.

    Raises:
        ValueError: It is neither.
    """
    if value is None:
        return
    is_count = isinstance(value, int) and not isinstance(value, bool)
    if is_count and value < 1:
        raise ValueError(f"{name} is {value}; allowed are 1 and more {unit}, or a share of them")
    if not is_count and not (isinstance(value, float) and 0 < value < 1):
        raise ValueError(
            f"{name} is {value!r}; allowed are a share in (0, 1) or a whole number of {unit}"
        )


def share_of(value: float, total: int) -> int:
    """The number that a share or a number means, of a total."""
    return value if isinstance(value, int) else max(1, round(value * total))

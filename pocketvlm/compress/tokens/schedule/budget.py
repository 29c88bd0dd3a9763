"""What a searched schedule may cost: multiplications of the prefill, or milliseconds of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from pocketvlm.bundle import VisualSchedule
from pocketvlm.compress.tokens.schedule.kind import stepwise
from pocketvlm.compress.tokens.schedule.prefill_macs import PrefillMacs
from pocketvlm.context import PrefillTimes
from pocketvlm.errors import RecipeError
from pocketvlm.models.spec import ModelSpec

__all__ = ["Budget", "Cost", "Macs", "PrefillTime", "least_schedule", "require_affordable"]

Cost = Callable[[VisualSchedule | None], float]


class Budget(ABC):
    """A limit of what prefill costs: a frozen dataclass that is its own configuration."""

    @property
    @abstractmethod
    def limit(self) -> float:
        """The most that a schedule may cost."""

    @abstractmethod
    def spell(self, cost: float) -> str:
        """A cost in words."""

    @abstractmethod
    def cost(
        self, spec: ModelSpec, prompts: Sequence[tuple[int, int]], times: PrefillTimes | None
    ) -> Cost:
        """What schedules cost.

        Args:
            spec: The model.
            prompts: Rows of text and visual rows of every prompt.
            times: What prefill takes on devices; `None` where what will be exported is not known.

        Raises:
            RecipeError: Nothing is known of what they cost.
        """

    def require_possible(self, spec: ModelSpec, tokens: int, times: PrefillTimes | None) -> None:
        """Refuses, before there are prompts, what no schedule keeps whatever they are.

        Args:
            spec: The model.
            tokens: Visual tokens of a tile.
            times: As in `cost`.

        Raises:
            RecipeError: A single visual token in each layer costs more.
        """
        return


@dataclass(frozen=True, kw_only=True)
class Macs(Budget):
    """A share of the multiplications of the decoder's prefill.

    Attributes:
        share: Of those without a drop, rows of text included, on the prompts of the calibration
            samples.
    """

    kind: Literal["macs"] = "macs"
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share is {self.share!r}; allowed is a share in (0, 1)")

    @property
    def limit(self) -> float:
        """The share."""
        return self.share

    def spell(self, cost: float) -> str:
        """A share of the multiplications."""
        return f"{cost:.3f} of the multiplications"

    def cost(
        self, spec: ModelSpec, prompts: Sequence[tuple[int, int]], times: PrefillTimes | None
    ) -> Cost:
        """Counted from the model's shape."""
        del times
        return PrefillMacs.of(spec, prompts).share


@dataclass(frozen=True, kw_only=True)
class PrefillTime(Budget):
    """Milliseconds of the prefill on a device, as `plan --device` predicts them.

    Weights count as the whole recipe leaves them. Of an app's wait the tower and the processor are
    not in it: no schedule changes them.

    Attributes:
        most: Milliseconds, the mean over the prompts of the calibration samples.
        device: Name of a device profile; not `host`, whose rates are measured again now and then.
    """

    kind: Literal["prefill_ms"] = "prefill_ms"
    most: float
    device: str

    def __post_init__(self) -> None:
        if not (math.isfinite(self.most) and self.most > 0):
            raise ValueError(f"most is {self.most!r}; allowed are milliseconds above 0")
        if self.device == "host":
            raise ValueError(
                "device is 'host', whose rates are measured again now and then; allowed is the "
                "profile of another device, which always says the same"
            )

    @property
    def limit(self) -> float:
        """The milliseconds."""
        return self.most

    def spell(self, cost: float) -> str:
        """Milliseconds on the device."""
        return f"{cost:.1f} ms on {self.device}"

    def cost(
        self, spec: ModelSpec, prompts: Sequence[tuple[int, int]], times: PrefillTimes | None
    ) -> Cost:
        """Predicted for the model that the recipe will export.

        Raises:
            InputError: There is no such device.
            RecipeError: Nothing is known of its speed, or of what will be exported.
        """
        del spec
        if times is None:
            raise RecipeError(
                "drop_tokens: budget prefill_ms is predicted for a whole recipe with its targets, "
                "which pocketvlm compress and pocketvlm.pipeline.run have; a stage alone knows macs"
            )
        return partial(times, self.device, prompts)

    def require_possible(self, spec: ModelSpec, tokens: int, times: PrefillTimes | None) -> None:
        """Refuses what takes longer for the shortest prompt with a tile."""
        shortest = self.cost(spec, [(1, tokens)], times)
        require_affordable(self, shortest, spec.decoder.depth, tokens)


def least_schedule(tokens: int) -> VisualSchedule:
    """One visual token in each layer after the first."""
    shares = [(1, 0.5 / tokens)]
    return stepwise(shares, tokens, ranked_in="layer_before", positions="original")


def require_affordable(budget: Budget, cost: Cost, layers: int, tokens: int) -> None:
    """Refuses a budget that no schedule keeps.

    Raises:
        RecipeError: A single visual token in each layer costs more.
    """
    least = cost(least_schedule(tokens))
    if layers < 2 or budget.limit < least:  # noqa: PLR2004  (a layer that ranks, and one to save in)
        raise RecipeError(
            f"drop_tokens: a budget of {budget.spell(budget.limit)} is below "
            f"{budget.spell(least)}, which text, the first layer and a single visual token take; "
            "the schedule exit ends all tokens earlier"
        )

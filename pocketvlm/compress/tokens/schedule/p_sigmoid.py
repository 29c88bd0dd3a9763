"""Visual tokens fall along a sigmoid of depth whose form is optimised under a budget of compute.

P-Sigmoid (Zhao et al., arXiv 2412.00556): under a budget, the share of visual tokens that a layer
runs is a sigmoid of its depth, with few parameters, tuned by Bayesian optimisation on a calibration
set. The published form of the curve is not known to us; here it is

    share(l) = low + (high - low) / (1 + exp(steepness (l / L - middle)))

for layer l of L. Of its four parameters `middle` is solved, so that every curve that is tried costs
what the budget allows. `low` and `high` are searched below and above the constant share that costs
as much: that share is itself a curve of the family and is tried first, so that on the calibration
samples the result is never worse than it. The objective is the loss of the answers' tokens, which
tells apart schedules that answer equally often. The first layer runs all tokens: its attention is
the first that ranks.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Literal

from pocketvlm.bundle import VisualSchedule
from pocketvlm.calibration.gradients.schedule_trials import GivenAnswers, ScheduleTrials
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.schedule.budget import (
    Cost,
    Macs,
    PrefillTime,
    require_affordable,
)
from pocketvlm.compress.tokens.schedule.kind import (
    FOUND_LATER,
    FoundSchedule,
    SearchedSchedule,
    stepwise,
)
from pocketvlm.compress.tokens.schedule.prefill_macs import PrefillMacs
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.stages import PlanState
from pocketvlm.stages.photo import photo_tokens

__all__ = ["Curve", "PSigmoid", "constant_curve", "curve_within", "within_budget"]

_RANDOM_TRIALS = 8
_BISECTIONS = 24
_TEXT_ROWS = 32  # of the prompt that a plan speaks of
_STEEPEST = 60.0
_LEVEL_AFTER = 12.0  # steepness times distance from the middle where a curve is level

_HALF = Macs()


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Shares of visual tokens by depth.

    Attributes:
        high: The share that it falls from.
        low: The share that it falls to.
        steepness: How fast, per depth of the decoder.
        middle: Where it is halfway, as a share of the depth.
    """

    high: float
    low: float
    steepness: float
    middle: float

    def share(self, depth: float) -> float:
        """Share of the tokens at a depth, as a share of all layers."""
        fallen = 1 / (1 + math.exp(-self.steepness * (depth - self.middle)))
        return self.high - (self.high - self.low) * fallen

    def schedule(self, layers: int, tokens: int) -> VisualSchedule | None:
        """The curve in whole tokens; `None` where it drops none."""
        shares = [(layer, self.share(layer / layers)) for layer in range(1, layers)]
        if round(shares[-1][1] * tokens) >= tokens:
            return None
        return stepwise(shares, tokens, ranked_in="layer_before", positions="original")


def within_budget(cost: Callable[[float], float], budget: float, low: float, high: float) -> float:
    """The largest number in [low, high] that costs no more, where cost rises with it.

    `low` is taken to be within the budget.
    """
    if cost(high) <= budget:
        return high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if cost(middle) <= budget:
            low = middle
        else:
            high = middle
    return low


def constant_curve(cost: Cost, budget: float, layers: int, tokens: int) -> Curve:
    """One number of tokens in all layers but the first, the largest within the budget."""

    def level(count: int) -> Curve:
        share = count / tokens
        return Curve(high=share, low=share, steepness=0.0, middle=0.5)

    def spent(count: int) -> float:
        return cost(level(count).schedule(layers, tokens))

    return level(bisect_right(range(1, tokens), budget, key=spent))


def curve_within(
    cost: Cost,
    budget: float,
    layers: int,
    tokens: int,
    *,
    high: float,
    low: float,
    steepness: float,
) -> Curve:
    """The curve of this form that falls as late as the budget allows."""

    def at(middle: float) -> Curve:
        return Curve(high=high, low=low, steepness=steepness, middle=middle)

    reach = _LEVEL_AFTER / steepness
    found = within_budget(
        lambda middle: cost(at(middle).schedule(layers, tokens)), budget, -reach, 1 + reach
    )
    return at(found)


def _bayesian_points(
    objective: Callable[[float, float, float], float], trials: int, seed: int
) -> Iterator[float]:
    """Maximizes over the unit cube by Gaussian processes and expected improvement."""
    from bayes_opt import BayesianOptimization
    from bayes_opt.acquisition import ExpectedImprovement

    names = ("high", "low", "steepness")
    optimizer = BayesianOptimization(
        f=None,
        pbounds=dict.fromkeys(names, (0.0, 1.0)),
        acquisition_function=ExpectedImprovement(xi=0.0),
        random_state=seed,
        verbose=0,
        allow_duplicate_points=True,
    )
    for trial in range(trials):
        point = optimizer.random_sample(1)[0] if trial < _RANDOM_TRIALS else optimizer.suggest()
        value = objective(*(float(point[name]) for name in names))
        optimizer.register(params=point, target=value)
        yield value


@dataclass(frozen=True, kw_only=True)
class PSigmoid(SearchedSchedule):
    """Searches the best sigmoid of depth for a budget.

    Attributes:
        budget: What the prefill may cost.
        trials: Curves that are tried, the constant share not counted.
        seed: Of the search.
    """

    kind: Literal["p_sigmoid"] = "p_sigmoid"
    budget: Macs | PrefillTime = _HALF
    trials: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"trials is {self.trials}; allowed are 1 and more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; allowed are 0 to {2**32 - 1}")

    def planned(self, state: PlanState) -> tuple[VisualSchedule, tuple[str, ...]]:
        """The constant share that costs what the budget allows, as every curve that is tried.

        Raises:
            InputError: There is no such device.
            RecipeError: No schedule keeps the budget.
        """
        spec, tokens, budget = state.spec, state.visual_tokens, self.budget
        times = state.prefill_times
        budget.require_possible(spec, tokens, times)
        rows = photo_tokens(state)
        cost = cache(budget.cost(spec, [(_TEXT_ROWS, rows)], times))
        layers = spec.decoder.depth
        if layers < 2 or cost(None) <= budget.limit:  # noqa: PLR2004  (the first layer drops none)
            return super().planned(state)
        constant = constant_curve(cost, budget.limit, layers, tokens)
        schedule = constant.schedule(layers, tokens)
        if not constant.high or schedule is None:
            return super().planned(state)
        return schedule, (
            f"{FOUND_LATER}; planned is what costs as much: {schedule.describe()}. Prefill of "
            f"{rows} visual tokens and {_TEXT_ROWS} of text takes {budget.spell(cost(schedule))} "
            f"then, {budget.spell(cost(None))} without a drop",
        )

    def find(
        self, checkpoint: Checkpoint, samples: CalibrationSet, ctx: RunContext
    ) -> FoundSchedule:
        """Tries curves of one cost.

        Raises:
            RecipeError: A single visual token in each layer costs more than the budget, or all of
                them cost no more.
        """
        spec, budget = checkpoint.spec, self.budget
        layers = spec.decoder.depth
        tokens = checkpoint.visual_tokens
        trials = ScheduleTrials(checkpoint, samples)
        cost = cache(budget.cost(spec, trials.prompt_rows, ctx.prefill_times))
        require_affordable(budget, cost, layers, tokens)
        if cost(None) <= budget.limit:
            raise RecipeError(
                f"drop_tokens: prefill takes {budget.spell(cost(None))} without a drop, which the "
                f"budget of {budget.spell(budget.limit)} allows; leave drop_tokens out"
            )
        search = _Search(trials=trials, layers=layers, tokens=tokens)
        constant = constant_curve(cost, budget.limit, layers, tokens)
        plain = search.loss(constant)

        def objective(high: float, low: float, steepness: float) -> float:
            share = constant.high
            curve = curve_within(
                cost,
                budget.limit,
                layers,
                tokens,
                high=share + (1 - share) * high,
                low=share * (1 - low),
                steepness=_STEEPEST**steepness,
            )
            return -search.loss(curve)

        for number, _ in enumerate(_bayesian_points(objective, self.trials, self.seed), start=1):
            ctx.report("drop_tokens", number, self.trials, "curves")
        curve = search.best
        found = curve.schedule(layers, tokens)
        if found is None:
            raise RecipeError(
                f"drop_tokens: a budget of {budget.spell(budget.limit)} is spent by no curve; more "
                f"than {budget.spell(cost(constant.schedule(layers, tokens)))} drops nothing"
            )
        answers = search.tried[found]
        return FoundSchedule(
            schedule=found,
            metrics={
                "prefill_macs_share": PrefillMacs.of(spec, trials.prompt_rows).share(found),
                "budget": asdict(budget),
                "cost": cost(found),
                "cost_before": cost(None),
                "curve": {
                    "high": curve.high,
                    "low": curve.low,
                    "steepness": curve.steepness,
                    "middle": curve.middle,
                },
                "trials": len(search.tried),
                "samples": len(samples),
                "right": answers.right,
                "right_before": trials.plain.right,
                "answer_loss": answers.loss,
                "answer_loss_before": trials.plain.loss,
                "answer_loss_of_constant_share": plain,
                "constant_share": constant.high,
            },
        )


@dataclass(kw_only=True)
class _Search:
    """The curves that were tried; several may be one schedule in whole tokens."""

    trials: ScheduleTrials
    layers: int
    tokens: int
    tried: dict[VisualSchedule | None, GivenAnswers] = field(default_factory=dict)
    curves: dict[VisualSchedule | None, Curve] = field(default_factory=dict)

    def loss(self, curve: Curve) -> float:
        """Of the answers, in nats."""
        schedule = curve.schedule(self.layers, self.tokens)
        if schedule not in self.tried:
            self.tried[schedule] = self.trials.answers(schedule)
            self.curves[schedule] = curve
        return self.tried[schedule].loss

    @property
    def best(self) -> Curve:
        """The curve of least loss."""
        return self.curves[min(self.tried, key=lambda schedule: self.tried[schedule].loss)]

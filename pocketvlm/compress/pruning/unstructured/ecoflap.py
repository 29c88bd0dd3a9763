"""ECoFLaP's global stage (ICLR 2024, arXiv 2310.02998): how sparse each part of a model may be.

Layers are scored by how fast the answers' loss changes with them (`loss_scores`), scores of a
group's layers are added up, and the budget is shared out in proportion to the sums, with the bound
that no group loses more than the ratio and `max_excess` (`budget`). Published values: blocks,
an excess of 0.1, one draw of noise, 32 samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.walk.partial_forward import suffix_shares
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.budget import allocate_budget, spread_evenly
from pocketvlm.compress.pruning.unstructured.allocation import Budget, uniform_counts
from pocketvlm.compress.pruning.unstructured.loss_scores import (
    first_order_scores,
    zeroth_order_scores,
)
from pocketvlm.compress.pruning.unstructured.patterns import Pattern
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.models.layers import LinearSpec
from pocketvlm.models.spec import ModelSpec

__all__ = ["Ecoflap"]

Order = Literal["zeroth", "first"]
Grouping = Literal["block", "layer", "part"]


@dataclass(frozen=True, kw_only=True)
class Ecoflap:
    """Shares the budget out by how much the answers' loss depends on each group of layers.

    Attributes:
        order: `zeroth` (forward passes) or `first` (gradients).
        group: What loses one share: a transformer `block`, a single `layer`, or a `part` of the
            model. The projector is one group in the first and the last case.
        max_excess: By how much a group's sparsity may exceed the ratio.
        noise: Length of a step along the noise, as a share of the weight's root mean square;
            zeroth order only.
        draws: Draws of noise per layer; zeroth order only.
        samples: How many calibration samples are used, the first ones.
    """

    kind: Literal["ecoflap"] = "ecoflap"
    order: Order = "zeroth"
    group: Grouping = "block"
    max_excess: float = 0.1
    noise: float = 1e-2
    draws: int = 1
    samples: int = 32

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise ValueError(
                f"order {self.order!r} is unknown; allowed are {', '.join(get_args(Order))}"
            )
        if self.group not in get_args(Grouping):
            raise ValueError(
                f"group {self.group!r} is unknown; allowed are {', '.join(get_args(Grouping))}"
            )
        if not 0 < self.max_excess < 1:
            raise ValueError(f"max_excess must lie between 0 and 1, not {self.max_excess}")
        if not 0 < self.noise < 1:
            raise ValueError(f"noise must lie between 0 and 1, not {self.noise}")
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, not {self.draws}")
        if self.order == "first" and (self.noise, self.draws) != (Ecoflap.noise, Ecoflap.draws):
            raise ValueError("noise and draws are options of order zeroth, and order is first")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, not {self.samples}")

    @property
    def takes_gradients(self) -> bool:
        """Whether scores are of first order; those of zeroth order take losses alone."""
        return self.order == "first"

    def check(self, ratio: float, pattern: Pattern) -> None:
        """Refuses what leaves nothing to share out, or no room.

        Raises:
            ValueError: The pattern fixes every layer's ratio, or a group could lose everything.
        """
        if pattern.fixed_ratio is not None:
            raise ValueError(
                f"allocation ecoflap: {pattern.label} removes the same share of every layer, so "
                "there is nothing to share out; allowed is kind uniform"
            )
        if self._limit(ratio) >= 1:
            raise ValueError(
                f"allocation ecoflap: max_excess {self.max_excess:g} on top of ratio {ratio:g} "
                f"would let a group lose everything; allowed is less than {1 - ratio:g}"
            )

    def _limit(self, ratio: float) -> Fraction:
        """What a group may lose at most, as the decimal numbers say, not as floats add up."""
        return Fraction(str(ratio)) + Fraction(str(self.max_excess))

    def cost(self, spec: ModelSpec, layers: Sequence[LinearSpec]) -> float:
        """Forward passes of the samples that the scores take, a backward pass counted as two."""
        if self.order == "first":
            return 3.0
        shares = suffix_shares(spec)
        return 1 + 2 * self.draws * sum(shares[layer.name] for layer in layers)

    def plan_notes(self, spec: ModelSpec, layers: Sequence[LinearSpec]) -> tuple[str, ...]:
        """What the scores will cost."""
        cost = self.cost(spec, layers)
        if self.order == "first":
            return (
                f"ecoflap: scores take one forward and one backward pass of {self.samples} samples",
            )
        return (
            f"ecoflap: scores take {2 * self.draws * len(layers)} forward passes of {self.samples} "
            f"samples, each from a layer on: as much as {cost:.0f} whole ones",
        )

    def allocate(
        self,
        checkpoint: Checkpoint,
        layers: Sequence[LinearSpec],
        ratio: float,
        pattern: Pattern,
        calibration: CalibrationSet,
        ctx: RunContext,
    ) -> Budget:
        """Scores the layers and shares out what they keep together under `Uniform`.

        Raises:
            RecipeError: The pattern leaves nothing to share out, or the bounds no room.
            CalibrationError: A sample has no image or no answer, or a loss is not finite.
        """
        try:
            self.check(ratio, pattern)
        except ValueError as error:
            raise RecipeError(str(error)) from error
        limit = self._limit(ratio)
        samples = calibration.take(self.samples)
        scores = self._scores(checkpoint, layers, samples, ctx)
        groups: dict[str, list[LinearSpec]] = {}
        for layer in layers:
            groups.setdefault(_group_of(layer, self.group), []).append(layer)
        unit = pattern.elements
        units = {layer.name: layer.out_features * layer.in_features // unit for layer in layers}
        sizes = [sum(units[layer.name] for layer in group) for group in groups.values()]
        importance = [math.fsum(scores[layer.name] for layer in group) for group in groups.values()]
        total = sum(uniform_counts(layers, ratio, pattern).values()) // unit
        kept: dict[str, int] = {}
        try:
            counts = allocate_budget(importance, sizes, total, max_sparsity=limit)
            for group, count in zip(groups.values(), counts, strict=True):
                shares = spread_evenly(count, [units[layer.name] for layer in group])
                kept |= {
                    layer.name: share * unit for layer, share in zip(group, shares, strict=True)
                }
        except ValueError as error:
            raise RecipeError(
                f"allocation ecoflap: {error}, in units of {unit} weights; give a larger "
                "max_excess or wider groups"
            ) from error
        rows = tuple(
            {
                "group": name,
                "weights": size * unit,
                "score": score,
                "sparsity": 1 - count / size,
            }
            for name, size, score, count in zip(groups, sizes, importance, counts, strict=True)
        )
        return Budget(
            kept=kept,
            rows=rows,
            metrics={"scores": scores, "score_samples": len(samples)},
            notes=_notes(rows, float(limit)),
        )

    def _scores(
        self,
        checkpoint: Checkpoint,
        layers: Sequence[LinearSpec],
        samples: CalibrationSet,
        ctx: RunContext,
    ) -> dict[str, float]:
        names = [layer.name for layer in layers]
        if self.order == "first":
            return first_order_scores(checkpoint, names, samples, ctx)
        return zeroth_order_scores(
            checkpoint, names, samples, ctx, noise=self.noise, draws=self.draws
        )


def _group_of(layer: LinearSpec, grouping: Grouping) -> str:
    if grouping == "layer":
        return layer.name
    if grouping == "part" or layer.block is None:
        return layer.part
    return f"{layer.part} {layer.block}"


def _notes(rows: Sequence[Mapping[str, Any]], limit: float) -> tuple[str, ...]:
    """Where a bound, not the score, decided."""
    notes = []
    whole = [row["group"] for row in rows if row["sparsity"] == 0]
    bound = [row["group"] for row in rows if row["score"] == 0]
    if whole:
        notes.append(f"ecoflap: keeps all of {_listed(whole)}")
    if bound:
        notes.append(
            f"ecoflap: the loss does not depend on {_listed(bound)}, which lose at most {limit:g}"
        )
    return tuple(notes)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown  # noqa: PLR2004  (a line's worth)

"""Which layer gets how many bits: the rules that every quantizer shares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.errors import RecipeError
from pocketvlm.modelspec import LinearSpec, Part
from pocketvlm.selection import assign_rules, check_rule
from pocketvlm.weights import DenseWeight

__all__ = ["BITS", "Assignment", "WeightRule", "assign_bits", "assign_layers"]

BITS = (2, 3, 4, 8)


@dataclass(frozen=True, kw_only=True)
class WeightRule:
    """How the layers that a rule matches are quantized; the first rule that matches a layer wins.

    Attributes:
        part: Only layers of this part, or `None` for any.
        match: A regular expression that a layer's whole name must match, or `None` for any.
        blocks: Only these block indices, or `None` for any.
        bits: 2, 3, 4 or 8; `None` keeps the layer as it is.
        group_size: Neighbouring columns that share a scale.
        symmetric: Whether the zero point is fixed at half of the range.
    """

    part: Part | None = None
    match: str | None = None
    blocks: tuple[int, ...] | None = None
    bits: int | None
    group_size: int = 32
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_rule(self)
        if self.bits is not None and self.bits not in BITS:
            raise ValueError(
                f"bits must be {', '.join(map(str, BITS))}, or null to keep a layer as it is, "
                f"not {self.bits}"
            )
        if self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, not {self.group_size}")


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What becomes of one layer.

    Attributes:
        linear: The layer.
        rule: The rule that quantizes it; `None` where it stays as it is.
        reason: Why it stays as it is; empty where it does not.
    """

    linear: LinearSpec
    rule: WeightRule | None
    reason: str = ""


def assign_bits(
    rules: Sequence[WeightRule], linears: Iterable[LinearSpec]
) -> tuple[Assignment, ...]:
    """Decides for every layer, from the specification alone.

    Raises:
        RecipeError: A rule matches nothing, or its groups are wider than a layer.
    """
    assignments = []
    for linear, rule in assign_rules(rules, linears).items():
        if rule is None or rule.bits is None:
            reason = "no rule matches it" if rule is None else "its rule keeps it"
            assignments.append(Assignment(linear=linear, rule=None, reason=reason))
            continue
        if rule.group_size > linear.in_features:
            raise RecipeError(
                f"rules.{rules.index(rule)}: group_size {rule.group_size} does not fit "
                f"{linear.name}, which has {linear.in_features} columns; allowed is 1 to "
                f"{linear.in_features}"
            )
        assignments.append(Assignment(linear=linear, rule=rule))
    return tuple(assignments)


def assign_layers(rules: Sequence[WeightRule], checkpoint: Checkpoint) -> tuple[Assignment, ...]:
    """Decides for every layer of a checkpoint.

    Raises:
        RecipeError: A rule matches nothing, its groups are wider than a layer, or a layer that it
            quantizes is quantized already.
    """
    assignments = assign_bits(rules, checkpoint.spec.linears())
    for assignment in assignments:
        form = checkpoint.form(assignment.linear.name)
        if assignment.rule is not None and not isinstance(form, DenseWeight):
            raise RecipeError(
                f"{assignment.linear.name}: is quantized already; quantize a layer once, or keep "
                "it with a rule whose bits are null"
            )
    return assignments

"""Which layers are pruned, and which of them by how much."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pocketvlm.compress.pruning.unstructured.patterns import Pattern
from pocketvlm.errors import RecipeError
from pocketvlm.models.layers import LinearSpec, Part
from pocketvlm.models.selection import assign_rules, check_rule

__all__ = ["DEFAULT_RULES", "PruneRule", "PruningDecision", "choose_layers"]

_PRUNABLE = ("tower", "projector", "decoder")


@dataclass(frozen=True, kw_only=True)
class PruneRule:
    """Which layers a rule is for; the first rule that matches a layer wins.

    Attributes:
        part: `tower`, `projector` or `decoder`, or `None` for any.
        match: A regular expression that a layer's whole name must match, or `None` for any.
        blocks: Only these block indices, or `None` for any.
        ratio: Share of the weights that is removed, at least 0 and below 1; 0 keeps the layer as
            it is, `None` leaves it to the stage's allocation.
    """

    part: Part | None = None
    match: str | None = None
    blocks: tuple[int, ...] | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        check_rule(self)
        if self.part is not None and self.part not in _PRUNABLE:
            raise ValueError(
                f"part {self.part!r} is never pruned: each row of a table is a token's own; "
                f"allowed are {', '.join(_PRUNABLE)}"
            )
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise ValueError(f"ratio must be at least 0 and below 1, not {self.ratio}")


DEFAULT_RULES = (PruneRule(part="tower"), PruneRule(part="projector"), PruneRule(part="decoder"))
"""Every layer but embedding and head."""


@dataclass(frozen=True, kw_only=True)
class PruningDecision:
    """What becomes of one layer.

    Attributes:
        linear: The layer.
        ratio: Share that is removed, where a rule fixes it; `None` where the allocation decides.
        reason: Why it is kept as it is; empty where it is not.
    """

    linear: LinearSpec
    ratio: float | None = None
    reason: str = ""


def choose_layers(
    rules: Sequence[PruneRule], pattern: Pattern, linears: Iterable[LinearSpec]
) -> tuple[PruningDecision, ...]:
    """Decides for every layer, from the specification alone.

    Raises:
        RecipeError: A rule matches nothing, or the pattern does not fit a layer.
    """
    linears = tuple(linears)
    prunable = [linear for linear in linears if linear.part in _PRUNABLE]
    rule_of = assign_rules(rules, prunable)
    decisions = []
    for linear in linears:
        rule = rule_of.get(linear)
        if linear not in rule_of:
            decisions.append(PruningDecision(linear=linear, reason="tables are never pruned"))
        elif rule is None:
            decisions.append(PruningDecision(linear=linear, reason="no rule matches it"))
        elif rule.ratio == 0:
            decisions.append(PruningDecision(linear=linear, reason="its rule keeps it"))
        else:
            pattern.check(linear)
            fixed = pattern.fixed_ratio
            if fixed is not None and rule.ratio not in (None, fixed):
                raise RecipeError(
                    f"rules.{rules.index(rule)}: {pattern.label} removes {fixed:g} of a layer, "
                    f"not {rule.ratio:g}; allowed are {fixed:g}, 0 and null"
                )
            decisions.append(PruningDecision(linear=linear, ratio=rule.ratio))
    if all(decision.reason for decision in decisions):
        raise RecipeError("the rules keep every layer; there is nothing to prune")
    return tuple(decisions)

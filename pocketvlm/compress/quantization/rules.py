"""Which layer becomes what: the rules that every quantizer shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.errors import RecipeError
from pocketvlm.models.layers import LinearSpec, Part
from pocketvlm.models.selection import assign_rules, check_rule
from pocketvlm.weights.float_weights import is_float
from pocketvlm.weights.layout import SparseLayout, WeightLayout, plan_behind_mask
from pocketvlm.weights.sparse import SparseWeight

__all__ = [
    "Assignment",
    "LayerRule",
    "assign_layers",
    "assign_rules_to",
    "plan_layouts",
    "require_rules",
]


@dataclass(frozen=True, kw_only=True)
class LayerRule(ABC):
    """Which layers a rule is for; the first rule that matches a layer wins.

    Attributes:
        part: Only layers of this part, or `None` for any.
        match: A regular expression that a layer's whole name must match, or `None` for any.
        blocks: Only these block indices, or `None` for any.
    """

    part: Part | None = None
    match: str | None = None
    blocks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_rule(self)

    @property
    @abstractmethod
    def keeps_float(self) -> bool:
        """Whether the layers stay as they are."""

    @abstractmethod
    def plan(self, linear: LinearSpec) -> WeightLayout:
        """What a layer will be stored as.

        Raises:
            RecipeError: The rule does not fit the layer; the message says what would.
        """

    @abstractmethod
    def grid_columns(self, linear: LinearSpec) -> int:
        """Columns that share a grid, and so must be rounded one after another."""

    @abstractmethod
    def describe(self, linear: LinearSpec) -> dict[str, object]:
        """The rule's part of a layer's line in the report, as JSON values."""


RuleT = TypeVar("RuleT", bound=LayerRule)


@dataclass(frozen=True, kw_only=True)
class Assignment(Generic[RuleT]):
    """What becomes of one layer.

    Attributes:
        linear: The layer.
        rule: The rule that quantizes it; `None` where it stays as it is.
        reason: Why it stays as it is; empty where it does not.
    """

    linear: LinearSpec
    rule: RuleT | None
    reason: str = ""


def require_rules(rules: Sequence[object]) -> None:
    """Refuses a stage without rules.

    Raises:
        ValueError: There is none.
    """
    if not rules:
        raise ValueError("rules must hold at least one rule")


def assign_rules_to(
    rules: Sequence[RuleT], linears: Iterable[LinearSpec]
) -> tuple[Assignment[RuleT], ...]:
    """Decides for every layer, from the specification alone.

    Raises:
        RecipeError: A rule matches nothing, or does not fit a layer.
    """
    assignments = []
    for linear, rule in assign_rules(rules, linears).items():
        if rule is None or rule.keeps_float:
            reason = "no rule matches it" if rule is None else "its rule keeps it"
            assignments.append(Assignment[RuleT](linear=linear, rule=None, reason=reason))
            continue
        try:
            rule.plan(linear)
        except RecipeError as error:
            raise RecipeError(f"rules.{rules.index(rule)}: {error}") from error
        assignments.append(Assignment(linear=linear, rule=rule))
    return tuple(assignments)


def assign_layers(rules: Sequence[RuleT], checkpoint: Checkpoint) -> tuple[Assignment[RuleT], ...]:
    """Decides for every layer of a checkpoint.

    Raises:
        RecipeError: A rule matches nothing, does not fit a layer or its mask, or a layer that it
            quantizes is quantized already.
    """
    assignments = assign_rules_to(rules, checkpoint.spec.linears())
    for item in assignments:
        form = checkpoint.form(item.linear.name)
        if item.rule is None:
            continue
        if not is_float(form):
            raise RecipeError(
                f"{item.linear.name}: is quantized already; quantize a layer once, or keep "
                "it with a rule that leaves it as it is"
            )
        if isinstance(form, SparseWeight):
            mask = SparseLayout(density=form.density)
            plan_behind_mask(item.linear.name, mask, item.rule.plan(item.linear))
    return assignments


def plan_layouts(
    rules: Sequence[RuleT], linears: Iterable[LinearSpec]
) -> dict[LinearSpec, WeightLayout | None]:
    """What every layer will be stored as; `None` for those that stay as they are.

    Raises:
        RecipeError: A rule matches nothing, or does not fit a layer.
    """
    return {
        item.linear: None if item.rule is None else item.rule.plan(item.linear)
        for item in assign_rules_to(rules, linears)
    }

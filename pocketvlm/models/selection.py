"""Which layers a rule speaks of: ordered rules, first match wins, no silent miss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from pocketvlm.errors import RecipeError
from pocketvlm.models.layers import PARTS, LinearSpec, Part
from pocketvlm.models.patterns import compile_pattern, pattern_matches

__all__ = ["Rule", "assign_rules", "check_rule"]


class Rule(Protocol):
    """What every rule of a stage has beside its own settings.

    Attributes:
        part: Only layers of this part, or `None` for any.
        match: A regular expression that a layer's whole name must match, or `None` for any.
        blocks: Only these block indices, or `None` for any.
    """

    @property
    def part(self) -> Part | None:
        """Part that the layer belongs to."""

    @property
    def match(self) -> str | None:
        """Expression that its name matches."""

    @property
    def blocks(self) -> tuple[int, ...] | None:
        """Blocks that it may lie in."""


RuleT = TypeVar("RuleT", bound=Rule)


def check_rule(rule: Rule) -> None:
    """Checks what can be checked without a model.

    Raises:
        ValueError: The part is unknown or the expression does not compile.
    """
    if rule.part is not None and rule.part not in PARTS:
        raise ValueError(f"part {rule.part!r} is unknown; allowed are {', '.join(PARTS)}")
    if rule.match is not None:
        try:
            compile_pattern(rule.match)
        except ValueError as error:
            raise ValueError(f"match {rule.match!r} {error}") from error


def assign_rules(
    rules: Sequence[RuleT], linears: Iterable[LinearSpec], *, field: str = "rules"
) -> dict[LinearSpec, RuleT | None]:
    """Gives every layer the first rule that matches it, or `None`.

    Args:
        rules: The rules, in order.
        linears: The layers.
        field: The option that holds the rules, for the message.

    Raises:
        RecipeError: A rule matches no layer at all, whether or not an earlier one took them:
            a rule without effect is a typing mistake more often than an intention.
    """
    linears = tuple(linears)
    for index, rule in enumerate(rules):
        if not any(_matches(rule, linear) for linear in linears):
            raise RecipeError(
                f"{field}.{index}: {_describe(rule)} matches none of the {len(linears)} layers; "
                f"names look like {linears[0].name!r}"
            )
    return {
        linear: next((rule for rule in rules if _matches(rule, linear)), None) for linear in linears
    }


def _matches(rule: Rule, linear: LinearSpec) -> bool:
    return (
        (rule.part is None or rule.part == linear.part)
        and (rule.blocks is None or linear.block in rule.blocks)
        and (rule.match is None or pattern_matches(rule.match, linear.name))
    )


def _describe(rule: Rule) -> str:
    wanted = {"part": rule.part, "match": rule.match, "blocks": rule.blocks}
    return ", ".join(f"{key} {value!r}" for key, value in wanted.items() if value is not None)

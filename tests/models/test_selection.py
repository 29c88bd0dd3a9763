from __future__ import annotations

from dataclasses import dataclass

import pytest

from pocketvlm.errors import RecipeError
from pocketvlm.models.families.table import read_model_spec
from pocketvlm.models.layers import Part
from pocketvlm.models.selection import assign_rules, check_rule
from pocketvlm.reference.random_models import tiny_config


@dataclass(frozen=True, kw_only=True)
class Named:
    label: str
    part: Part | None = None
    match: str | None = None
    blocks: tuple[int, ...] | None = None


LINEARS = read_model_spec(tiny_config("smolvlm")).linears()


def test_the_first_matching_rule_wins_and_the_rest_stay_without():
    rules = (
        Named(label="v", part="decoder", match=r".*\.v_proj", blocks=(1,)),
        Named(label="decoder", part="decoder"),
        Named(label="tower", part="tower"),
    )
    assigned = assign_rules(rules, LINEARS)
    for linear, rule in assigned.items():
        label = rule.label if rule else None
        if linear.part == "decoder" and linear.role == "v_proj" and linear.block == 1:
            assert label == "v"
        elif linear.part in ("decoder", "tower"):
            assert label == linear.part
        else:
            assert label is None


@pytest.mark.parametrize(
    "rule",
    [
        Named(label="x", match="decoder"),
        Named(label="x", part="decoder", blocks=(2,)),
        Named(label="x", part="tower", match=r".*\.gate_proj"),
    ],
)
def test_a_rule_that_matches_nothing_is_an_error(rule):
    with pytest.raises(RecipeError, match=r"rules\.1: .* matches none"):
        assign_rules((Named(label="all"), rule), LINEARS)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Named(label="x", part="eyes"), "part 'eyes' is unknown"),
        (Named(label="x", match="("), "not a regular expression"),
    ],
)
def test_rules_that_can_never_work_are_refused_without_a_model(rule, message):
    with pytest.raises(ValueError, match=message):
        check_rule(rule)

"""What a report says of a quantized layer, and the mask of the weight that it was made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.report import describe_layer
from pocketvlm.compress.quantization.rules import Assignment
from pocketvlm.weights.float_weights import keeps_of
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["behind_mask", "describe_quantized", "float_rows"]


def describe_quantized(
    assignment: Assignment[Any], form: WeightForm, **figures: Any
) -> dict[str, Any]:
    """The row of a layer in the report, as JSON values."""
    linear, rule = assignment.linear, assignment.rule
    return {
        **describe_layer(linear, form),
        "method": "none",
        "group_size": None,
        **({} if rule is None else rule.describe(linear)),
        "sparsity": 1 - form.density if isinstance(form, SparseWeight) else 0.0,
        "reason": assignment.reason,
        **figures,
    }


def behind_mask(form: WeightForm, weight: WeightForm) -> WeightForm:
    """What was made of a weight, under the weight's own mask where it has one.

    Raises:
        UnsupportedError: Elements of the form cannot be stored one by one.
    """
    keeps = keeps_of(weight)
    return form if keeps is None else SparseWeight.from_form(form, keeps)


def float_rows(
    assignments: Iterable[Assignment[Any]], checkpoint: Checkpoint
) -> list[dict[str, Any]]:
    """Rows of the layers that stay as they are, with the reason."""
    return [
        describe_quantized(item, checkpoint.form(item.linear.name))
        for item in assignments
        if item.rule is None
    ]

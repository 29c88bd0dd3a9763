"""How a quantized layer stands in the report, and behind the mask of the weight it was made of."""

from __future__ import annotations

from typing import Any

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.quantization.affine.rules import Assignment
from pocketvlm.weights.float_weights import keeps_of
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["behind_mask", "describe_layer", "float_rows"]


def describe_layer(assignment: Assignment[Any], form: WeightForm, **figures: Any) -> dict[str, Any]:
    """The line of a layer in the report, as JSON values."""
    linear, rule = assignment.linear, assignment.rule
    return {
        "name": linear.name,
        "part": linear.part,
        "role": linear.role,
        "block": linear.block,
        "method": "none",
        "bits": None,
        "group_size": None,
        "grid": "float",
        **({} if rule is None else rule.describe(linear)),
        "bits_per_weight": form.bits_per_weight,
        "stored_bytes": form.stored_bytes,
        "sparsity": 1 - form.density if isinstance(form, SparseWeight) else 0.0,
        "reason": assignment.reason,
        **figures,
    }


def behind_mask(form: WeightForm, weight: WeightForm) -> WeightForm:
    """What was made of a weight, behind the weight's own mask where it has one.

    Raises:
        UnsupportedError: Elements of the form cannot be stored one by one.
    """
    keeps = keeps_of(weight)
    return form if keeps is None else SparseWeight.from_form(form, keeps)


def float_rows(
    assignments: tuple[Assignment[Any], ...], checkpoint: Checkpoint
) -> list[dict[str, Any]]:
    """Lines of the layers that stay as they are, with why."""
    return [
        describe_layer(item, checkpoint.form(item.linear.name))
        for item in assignments
        if item.rule is None
    ]

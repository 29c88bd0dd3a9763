"""What a report says of a layer, and of the calibration, whatever the method."""

from __future__ import annotations

from typing import Any

from pocketvlm.calibration.walk.walk import BlockWalk
from pocketvlm.models.layers import LinearSpec
from pocketvlm.weights.form import WeightForm

__all__ = ["describe_calibration", "describe_layer", "relative"]


def describe_layer(linear: LinearSpec, form: WeightForm, **figures: Any) -> dict[str, Any]:
    """The row of a layer in the report, as JSON values."""
    return {
        "name": linear.name,
        "part": linear.part,
        "role": linear.role,
        "block": linear.block,
        "bits": None,
        "grid": "float",
        "bits_per_weight": form.bits_per_weight,
        "stored_bytes": form.stored_bytes,
        **figures,
    }


def describe_calibration(walk: BlockWalk) -> dict[str, Any]:
    """The samples of a walk and their tokens, as JSON values."""
    counts = walk.counts
    return {
        **walk.samples.describe(),
        "held_out_samples": len(walk.samples) - walk.first_held_out,
        "visual_tokens": counts.visual,
        "text_tokens": counts.text,
        "visual_per_text_token": counts.ratio,
    }


def relative(part: float, whole: float) -> float:
    """A loss relative to what it is a loss of; zero where that is nothing."""
    return part / whole if whole > 0 else 0.0

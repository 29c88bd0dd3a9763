"""Grid rules: which of the grids that a model may have a picture of some size is cut into.

A model's own rule is its tiling's. Those here are of other models, and take its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pocketvlm.models.images.tilings.grid_rules.relaxed_ratio import RelaxedRatio
from pocketvlm.models.images.tilings.grid_rules.slice_count import SliceCount

__all__ = ["GridRule", "RelaxedRatio", "SliceCount", "rule_settings"]

GridRule = RelaxedRatio | SliceCount
"""Every rule that a recipe and an image processor's file may name."""


def rule_settings(rule: GridRule | None) -> Mapping[str, Any]:
    """How an image processor's file states a rule; nothing for `None`."""
    return {} if rule is None else {"grid_rule": asdict(rule)}

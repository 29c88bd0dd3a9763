"""What recipes used to write otherwise: refused, with the line that says it now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from pocketvlm.errors import RecipeError

__all__ = ["refuse_former_spelling"]

# Scores of `prune` that were stages, each with the options that went along.
_SCORES = {
    "magnitude": (),
    "wanda": (),
    "gblm": ("gradient", "norm", "alpha"),
    "sparsegpt": ("compare", "damping"),
}


def refuse_former_spelling(stage: Mapping[str, Any], path: str) -> None:
    """Refuses a stage as an earlier version wrote it.

    Args:
        stage: The stage, as a recipe gives it.
        path: Where it stands, for the message.

    Raises:
        RecipeError: It is written so; the message says how to write it now.
    """
    method = stage.get("method")
    if isinstance(method, str) and method in _SCORES:
        own = {name: stage[name] for name in _SCORES[method] if name in stage}
        now = {"method": "prune", "score": {"kind": method, **own}}
        raise RecipeError(f"{path}.method: {method} is a score of prune; write {_spell(now)}")
    if method == "skip_visual":
        own = {name: stage[name] for name in ("first_layers", "rule") if name in stage}
        now = {"method": "drop_tokens", "schedule": {"kind": "exit", **own}}
        raise RecipeError(f"{path}.method: skip_visual is a schedule; write {_spell(now)}")
    if method == "reduce_tokens" and ("score" in stage or "seed" in stage):
        kind = stage.get("score", "auto")
        own = {"seed": stage["seed"]} if kind == "random_tokens" and "seed" in stage else {}
        key = "score" if "score" in stage else "seed"
        spelled = _spell({"reducer": {"kind": kind, **own}})[1:-1]
        raise RecipeError(f"{path}.{key}: is no longer an option; write {spelled}")
    if method == "prune_depth" and (
        isinstance(stage.get("importance"), str) or "modality_weights" in stage
    ):
        kind = stage.get("importance", "greedy")
        weighs = kind == "block_influence" and "modality_weights" in stage
        own = {"modality_weights": stage["modality_weights"]} if weighs else {}
        key = "importance" if "importance" in stage else "modality_weights"
        spelled = _spell({"importance": {"kind": kind, **own}})[1:-1]
        raise RecipeError(f"{path}.{key}: an importance has its own options; write {spelled}")


def _spell(value: Mapping[str, Any]) -> str:
    """A value as a recipe writes it, on one line."""
    text = yaml.safe_dump(dict(value), default_flow_style=True, sort_keys=False, width=1000)
    return text.strip()

"""The order of stages, checked on what they say of themselves and never on their names."""

from __future__ import annotations

from collections.abc import Sequence

from pocketvlm.errors import RecipeError
from pocketvlm.stages.stage import Stage

__all__ = ["INITIAL_FLAGS", "check_order"]

INITIAL_FLAGS = frozenset({"float_weights", "all_tokens"})
"""What holds of a checkpoint before the first stage."""

# A stage that provides one of a pair takes the other away.
_OPPOSITES = {
    "quantized_weights": "float_weights",
    "reduced_tokens": "all_tokens",
    "ended_tokens": "all_tokens",
}
_FEWER_TOKENS = frozenset({"reduced_tokens", "ended_tokens", "merged_tokens"})


def check_order(stages: Sequence[Stage], flags: frozenset[str] = INITIAL_FLAGS) -> None:
    """Checks that every stage finds what it needs and nothing that it cannot bear.

    Args:
        stages: In the order in which they would run.
        flags: What holds before the first one.

    Raises:
        RecipeError: A stage stands in the wrong place; the message names it and the flag.
    """
    for index, stage in enumerate(stages):
        missing = sorted(stage.requires - flags)
        if missing:
            raise RecipeError(
                f"stages.{index} ({stage.method}): needs {', '.join(missing)}, which no longer "
                "holds here; move it before the stage that takes it away"
            )
        clash = sorted(stage.forbids & flags)
        if clash:
            raise RecipeError(
                f"stages.{index} ({stage.method}): cannot follow a stage that leaves "
                f"{', '.join(clash)}"
            )
        fewer = sorted(_FEWER_TOKENS & flags)
        if fewer and stage.takes_gradients:
            raise RecipeError(
                f"stages.{index} ({stage.method}): takes gradients of the whole model, which has "
                f"to have all its tokens then; move it before the stage that leaves "
                f"{', '.join(fewer)}"
            )
        lost = {_OPPOSITES[flag] for flag in stage.provides if flag in _OPPOSITES}
        flags = (flags - lost) | stage.provides

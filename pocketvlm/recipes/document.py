"""Settings that change a recipe document: `--set`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pocketvlm.errors import RecipeError
from pocketvlm.files.yaml_document import parse_yaml, plain_values

__all__ = ["apply_overrides"]

_LONGEST_INDEX = 6
_SHOWN = 60


def apply_overrides(document: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Applies `a.b=c` settings to a recipe document, of which a changed copy is returned.

    Raises:
        RecipeError: A setting has no `=`, its path leads nowhere, or its value is not YAML.
    """
    changed: dict[str, Any] = plain_values(document, "recipe")
    for setting in overrides:
        path, separator, text = setting.partition("=")
        if not separator:
            raise RecipeError(f"--set {_shown(setting)}: expected a.b=c, such as stages.0.keep=0.5")
        *parents, last = path.split(".")
        if not all((*parents, last)):
            raise RecipeError(f"--set {_shown(setting)}: {_shown(path)} has an empty step")
        value = parse_yaml(text, f"--set {_shown(setting)}")
        place: Any = changed
        for step in parents:
            place = _descend(place, step, setting)
        if isinstance(place, list):
            place[_index(place, last, setting)] = value
        elif isinstance(place, dict):
            place[last] = value
        else:
            raise RecipeError(f"--set {_shown(setting)}: {'.'.join(parents)} holds no settings")
    return changed


def _descend(place: Any, step: str, setting: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, step, setting)]
    if isinstance(place, dict):
        return place.setdefault(step, {})
    raise RecipeError(f"--set {_shown(setting)}: {_shown(step)} leads nowhere")


def _index(place: list[Any], step: str, setting: str) -> int:
    if not step.isdecimal() or len(step) > _LONGEST_INDEX or int(step) >= len(place):
        raise RecipeError(
            f"--set {_shown(setting)}: {_shown(step)} is not an index below {len(place)}"
        )
    return int(step)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")

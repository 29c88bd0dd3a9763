"""How the layers of each part are stored, in the words of the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from pocketvlm.modelspec import LinearSpec, Part
from pocketvlm.weights import WeightForm

__all__ = ["part_precisions"]


def part_precisions(
    forms: Mapping[LinearSpec, WeightForm],
    parts: Iterable[Part],
    describe: Callable[[WeightForm], str],
) -> dict[str, str]:
    """By part, what `describe` says of its layers, the most frequent first."""
    precisions: dict[str, str] = {}
    for part in parts:
        counts = Counter(describe(form) for linear, form in forms.items() if linear.part == part)
        kinds = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        precisions[part] = (
            kinds[0][0]
            if len(kinds) == 1
            else ", ".join(f"{kind} ({count} layers)" for kind, count in kinds)
        )
    return precisions

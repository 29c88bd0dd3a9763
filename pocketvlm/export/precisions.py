"""How the layers of each part are stored, in the words of the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from pocketvlm.models.spec import LinearSpec, Part
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["part_precisions"]


def part_precisions(
    forms: Mapping[LinearSpec, WeightForm],
    parts: Iterable[Part],
    describe: Callable[[WeightForm], str],
) -> dict[str, str]:
    """By part, what `describe` says of its layers, the most frequent first.

    Masked layers that are told alike are one kind, whatever each of them keeps; their share of kept
    elements is that of all together.
    """
    precisions: dict[str, str] = {}
    for part in parts:
        kinds: dict[str, list[WeightForm]] = {}
        for linear, form in forms.items():
            if linear.part == part:
                kinds.setdefault(describe(form), []).append(form)
        ordered = sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0]))
        labels = [f"{label}{_kept_share(alike)}" for label, alike in ordered]
        precisions[part] = (
            labels[0]
            if len(labels) == 1
            else ", ".join(
                f"{label} ({len(alike)} layers)"
                for label, (_, alike) in zip(labels, ordered, strict=True)
            )
        )
    return precisions


def _kept_share(forms: Iterable[WeightForm]) -> str:
    masked = [form for form in forms if isinstance(form, SparseWeight)]
    if not masked:
        return ""
    elements = sum(form.shape[0] * form.shape[1] for form in masked)
    return f", {sum(form.kept for form in masked) / elements:.0%} kept"

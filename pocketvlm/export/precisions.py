"""How the layers of each part are stored, in the words of the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.models.layers import Part
from pocketvlm.stages import Target
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.layout import AffineLayout, SparseLayout, WeightLayout
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["describe_grid", "describe_masked", "masked_notes", "part_precisions"]


def describe_grid(layout: AffineLayout) -> str:
    """A grid in a few words."""
    kind = "symmetric" if layout.symmetric else "asymmetric"
    return f"int{layout.bits} g{layout.group_size} {kind}"


def describe_masked(layout: SparseLayout, engine: str) -> tuple[str, str]:
    """A masked weight where a runtime has no kernels for masks.

    Args:
        layout: The weight's.
        engine: The runtime.

    Returns:
        How it is stored, and what that costs, as `Explanation` has them.
    """
    plain = layout.without_mask
    stored, kind = ("float32", "floats") if plain is None else (describe_grid(plain), "integers")
    return (
        f"masked {stored}, stored dense",
        f"are masked {kind} and stored dense: {engine} has no kernel that saves time by zeros",
    )


def masked_notes(layouts: Iterable[WeightLayout | None]) -> tuple[str, ...]:
    """What became of masked weights on such a runtime, for the report."""
    kinds: Counter[str] = Counter()
    for layout in layouts:
        if isinstance(layout, SparseLayout):
            integers = isinstance(layout.values, AffineLayout)
            plain = layout.without_mask
            kinds["codes" if plain is not None else "grid" if integers else "floats"] += 1
    says = {
        "codes": "integers, whose masked codes are their zero point",
        "grid": "floats, since no code of their grid means zero",
        "floats": "floats, since no kernel reads masked floats or tables",
    }
    return tuple(
        f"{kinds[kind]} masked layers are multiplied as dense {what}: zeros save no time"
        for kind, what in says.items()
        if kinds[kind]
    )


def part_precisions(
    target: Target, checkpoint: Checkpoint, parts: Iterable[Part]
) -> dict[str, str]:
    """By part, how a target stores its layers, the most frequent first.

    Masked layers that are told alike are one kind, whatever each of them keeps; their share of kept
    elements is that of all together.
    """
    precisions: dict[str, str] = {}
    for part in parts:
        kinds: dict[str, list[WeightForm]] = {}
        for linear, form in checkpoint.forms().items():
            if linear.part == part:
                found = target.explain_layer(checkpoint.spec, linear, form.layout)
                kinds.setdefault(found.stored, []).append(form)
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

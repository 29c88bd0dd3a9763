"""What all targets need to predict an export: refusals in words, and counts of numbers."""

from __future__ import annotations

from collections.abc import Iterable

from pocketvlm.models.spec import ModelSpec

__all__ = ["join_refusals", "other_elements"]


def join_refusals(target: str, misfits: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """One line for each reason, with the first layer that it is about and how many others.

    Args:
        target: The target's name.
        misfits: Names of layers, each with its reason.
    """
    layers: dict[str, list[str]] = {}
    for name, reason in misfits:
        layers.setdefault(reason, []).append(name)
    return tuple(
        f"{target}: {names[0]}{'' if len(names) == 1 else f' and {len(names) - 1} more'}: {reason}"
        for reason, names in layers.items()
    )


def other_elements(spec: ModelSpec) -> tuple[int, int]:
    """Numbers outside of weight matrices: of patches and positions, and of norms and biases."""
    tower = spec.tower
    patches = tower.tokens
    patch_weights = tower.channels * tower.patch_size**2
    embeddings = (
        patch_weights + patches + int(tower.has_cls) + int(tower.has_patch_bias)
    ) * tower.hidden_size
    norms = sum(norm.width * (1 + norm.has_bias) for norm in spec.norms())
    biases = sum(linear.out_features for linear in spec.linears() if linear.has_bias)
    return embeddings, norms + biases

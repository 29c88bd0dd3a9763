"""What layouts of integers say of a layer beside its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pocketvlm.weights.affine import AffineWeight

__all__ = ["WHOLE_ROW", "AffineSettings", "affine_settings"]

WHOLE_ROW = -1
"""The group size of a layer with one scale per row."""


@dataclass(frozen=True, kw_only=True)
class AffineSettings:
    """The settings of one layer.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: Columns that share a scale; -1 for the whole row.
        symmetric: Whether the zero point is 2**(bits - 1) everywhere.
    """

    bits: int
    group_size: int
    symmetric: bool

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"bits must be 2, 3, 4 or 8, not {self.bits}")
        if self.group_size < 1 and self.group_size != WHOLE_ROW:
            raise ValueError(f"group_size must be -1 or at least 1, not {self.group_size}")


def affine_settings(forms: Mapping[str, AffineWeight]) -> dict[str, AffineSettings]:
    """The settings of every layer, in as few different ones as say the same.

    One group per row everywhere is written as -1, whatever the widths; so is a group wider than a
    row, which readers would not divide by.
    """
    per_row = all(form.groups == 1 for form in forms.values())
    return {
        name: AffineSettings(
            bits=form.bits,
            group_size=WHOLE_ROW
            if per_row or form.group_size > form.in_features
            else form.group_size,
            symmetric=form.zeros is None,
        )
        for name, form in forms.items()
    }

"""Which layer gets integers on an affine grid, and on which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pocketvlm.compress.quantization.affine.grid import AffineScheme
from pocketvlm.compress.quantization.rules import LayerRule
from pocketvlm.errors import RecipeError
from pocketvlm.models.layers import LinearSpec
from pocketvlm.weights.layout import AffineLayout

__all__ = ["BITS", "WeightRule"]

BITS = (2, 3, 4, 8)


@dataclass(frozen=True, kw_only=True)
class WeightRule(LayerRule):
    """Integers on an affine grid.

    Attributes:
        bits: 2, 3, 4 or 8; `None` keeps the layer as it is.
        group_size: Neighbouring columns that share a scale; `None` for all columns of a row.
        symmetric: Whether the zero point is fixed at half of the range.
        restricted: Whether a symmetric grid leaves out its lowest code, such as [-7, 7] for 4
            bits, so that it spans the largest weight on either side with a finer step.
        zero_point: `integer` puts zero on a code, `float` puts the grid's ends on the group's.
    """

    bits: int | None
    group_size: int | None = 32
    symmetric: bool = False
    restricted: bool = False
    zero_point: Literal["integer", "float"] = "integer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits is not None and self.bits not in BITS:
            raise ValueError(
                f"bits must be {', '.join(map(str, BITS))}, or null to keep a layer as it is, "
                f"not {self.bits}"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(
                f"group_size must be at least 1, or null for a whole row, not {self.group_size}"
            )
        if self.restricted and not self.symmetric:
            raise ValueError("restricted leaves out a code of a symmetric grid; set symmetric too")
        if self.zero_point not in ("integer", "float"):
            raise ValueError(f"zero_point must be integer or float, not {self.zero_point!r}")
        if self.zero_point == "float" and self.symmetric:
            raise ValueError("a symmetric grid has a fixed zero point; zero_point cannot be float")

    @property
    def keeps_float(self) -> bool:
        """Whether the layers stay as they are."""
        return self.bits is None

    @property
    def scheme(self) -> AffineScheme:
        """The kind of grid."""
        if self.bits is None:
            raise ValueError("the rule has no bits")
        return AffineScheme(
            bits=self.bits,
            symmetric=self.symmetric,
            restricted=self.restricted,
            float_zeros=self.zero_point == "float",
        )

    def plan(self, linear: LinearSpec) -> AffineLayout:
        """What a layer will be stored as."""
        if self.group_size is not None and self.group_size > linear.in_features:
            raise RecipeError(
                f"group_size {self.group_size} does not fit {linear.name}, which has "
                f"{linear.in_features} columns; allowed is 1 to {linear.in_features}"
            )
        return AffineLayout(
            bits=self.scheme.bits,
            group_size=self.columns_a_group(linear.in_features),
            symmetric=self.symmetric,
            float_zeros=self.zero_point == "float",
        )

    def columns_a_group(self, columns: int) -> int:
        """Columns that share a scale in a row of that many."""
        return self.group_size or columns

    def grid_columns(self, linear: LinearSpec) -> int:
        """Columns that share a scale."""
        return self.columns_a_group(linear.in_features)

    def describe(self, linear: LinearSpec) -> dict[str, object]:
        """The rule's part of a layer's line in the report."""
        return {
            "bits": self.bits,
            "group_size": self.columns_a_group(linear.in_features),
            "symmetric": self.symmetric,
            "grid": "affine" if self.bits is None else self.scheme.label,
        }

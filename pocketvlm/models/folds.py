"""Folds: how tensors of a stock checkpoint become those of the graphs, as data.

A family may store what the graphs have no operator for, because it need not be computed on the
phone: scales that belong into a weight, a kernel over two equal frames, three linears in one. A
fold says which stored tensors make which tensors of the model. It is applied while a stock folder
is read, before anything else, so that what is calibrated and quantized is what runs; what pocketvlm
saves holds the folded tensors. The arithmetic is in `pocketvlm.checkpoint.folding`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "AddOne",
    "FlattenKernel",
    "Fold",
    "Multiply",
    "PairsToHalves",
    "PatchKernel",
    "Reshape",
    "ResizeTable",
    "ScaleRows",
    "SplitRows",
    "SumFrames",
    "Transpose",
    "fold_sources",
    "fold_targets",
]


@dataclass(frozen=True, kw_only=True)
class SplitRows:
    """A tensor whose rows are those of several, one after another, such as fused projections.

    Attributes:
        source: The stored tensor.
        targets: What it is split into.
        sizes: Rows of each.
    """

    kind: Literal["split_rows"] = "split_rows"
    source: str
    targets: tuple[str, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ScaleRows:
    """Rows multiplied by a vector: LayerScale (arXiv 2103.17239) into the linear before it.

    Attributes:
        target: The weight or bias, stored under the same name.
        scale: The vector.
    """

    kind: Literal["scale_rows"] = "scale_rows"
    target: str
    scale: str


@dataclass(frozen=True, kw_only=True)
class AddOne:
    """A norm that multiplies by 1 + w, as one that multiplies by w.

    Attributes:
        target: The weight, stored under the same name.
    """

    kind: Literal["add_one"] = "add_one"
    target: str


@dataclass(frozen=True, kw_only=True)
class Multiply:
    """A tensor times a constant.

    Attributes:
        target: The tensor, stored under the same name.
        factor: The constant.
    """

    kind: Literal["multiply"] = "multiply"
    target: str
    factor: float


@dataclass(frozen=True, kw_only=True)
class SumFrames:
    """A patch kernel over equal frames, [out, C, frames, h, w], as one over a single picture.

    Attributes:
        target: The kernel, stored under the same name.
    """

    kind: Literal["sum_frames"] = "sum_frames"
    target: str


@dataclass(frozen=True, kw_only=True)
class PatchKernel:
    """A linear over flattened patches, [out, h * w * C], as a convolution's kernel [out, C, h, w].

    Attributes:
        target: The weight, stored under the same name.
        channels: C.
        size: Side of a patch.
    """

    kind: Literal["patch_kernel"] = "patch_kernel"
    target: str
    channels: int
    size: int


@dataclass(frozen=True, kw_only=True)
class FlattenKernel:
    """A convolution of cells side by side, [out, C, h, w], as a linear over merged patches.

    Attributes:
        target: The weight, stored under the same name, which becomes [out, h * w * C].
    """

    kind: Literal["flatten_kernel"] = "flatten_kernel"
    target: str


@dataclass(frozen=True, kw_only=True)
class PairsToHalves:
    """Rows of heads whose neighbouring channels turn together, as heads whose halves do.

    Rows 0, 2, 4, ... of each head come first, then 1, 3, 5, ... (RoFormer's layout, arXiv
    2104.09864, eq. 34, as transformers' usual one). Products of queries and keys stay what they
    are.

    Attributes:
        target: The weight of queries or keys, stored under the same name.
        width: Rows of a head.
    """

    kind: Literal["pairs_to_halves"] = "pairs_to_halves"
    target: str
    width: int


@dataclass(frozen=True, kw_only=True)
class Reshape:
    """The same numbers in another shape, such as a table of positions that is a bare parameter.

    Attributes:
        source: The stored tensor.
        target: The tensor of the model.
        shape: Its shape.
    """

    kind: Literal["reshape"] = "reshape"
    source: str
    target: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Transpose:
    """A bare matrix [in, out] as the weight of a linear, [out, in].

    Attributes:
        source: The stored tensor.
        target: The linear's weight.
    """

    kind: Literal["transpose"] = "transpose"
    source: str
    target: str


@dataclass(frozen=True, kw_only=True)
class ResizeTable:
    """A table of positions of a square of patches, resampled to that of the tower's picture.

    Bilinear and antialiased, pixel centres kept (SigLIP 2's NaFlex, arXiv 2502.14786).

    Attributes:
        target: The table [side * side, hidden], stored under the same name.
        rows: Patches of the picture from top to bottom.
        columns: Patches from left to right.
    """

    kind: Literal["resize_table"] = "resize_table"
    target: str
    rows: int
    columns: int


Fold = (
    SplitRows
    | ScaleRows
    | AddOne
    | Multiply
    | SumFrames
    | PatchKernel
    | FlattenKernel
    | PairsToHalves
    | Reshape
    | Transpose
    | ResizeTable
)


def fold_sources(fold: Fold) -> tuple[str, ...]:
    """Names of the stored tensors that a fold reads."""
    if isinstance(fold, SplitRows | Reshape | Transpose):
        return (fold.source,)
    if isinstance(fold, ScaleRows):
        return (fold.target, fold.scale)
    return (fold.target,)


def fold_targets(fold: Fold) -> tuple[str, ...]:
    """Names of the tensors that it makes."""
    return fold.targets if isinstance(fold, SplitRows) else (fold.target,)

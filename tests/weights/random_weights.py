"""A random weight of every layout: codes, scales, tables and masks are drawn, nothing is fitted."""

from __future__ import annotations

import torch

from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.codebook import CodebookWeight, Lookup
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.layout import AffineLayout, CodebookLayout, SparseLayout, WeightLayout
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["random_weight"]


def random_weight(layout: WeightLayout | None, shape: tuple[int, int]) -> WeightForm:
    """A weight [rows, columns] with a layout: bf16 floats for `None`."""
    random = torch.Generator().manual_seed(0)
    if layout is None:
        return DenseWeight(values=torch.randn(shape, generator=random).bfloat16())
    if isinstance(layout, SparseLayout):
        return _random_sparse(layout, shape, random)
    if isinstance(layout, CodebookLayout):
        return _random_codebook(layout, shape, random)
    return _random_affine(layout, shape, random)


def _random_sparse(
    layout: SparseLayout, shape: tuple[int, int], random: torch.Generator
) -> SparseWeight:
    keeps = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
    keeps[torch.randperm(len(keeps), generator=random)[: layout.kept(*shape)]] = True
    plain = random_weight(layout.values, shape)
    if layout.values is None:
        plain = DenseWeight(values=torch.randn(shape, generator=random).half())
    return SparseWeight.from_form(plain, keeps.view(shape))


def _random_codebook(
    layout: CodebookLayout, shape: tuple[int, int], random: torch.Generator
) -> CodebookWeight:
    rows, columns = shape

    def lookup(bits: int) -> Lookup:
        length, groups = layout.vector_length, (layout.row_groups, layout.column_groups)
        indices = torch.randint(1 << bits, (rows // length, columns), generator=random)
        tables = torch.randn(*groups, 1 << bits, length, generator=random).half()
        return Lookup.from_indices(indices, tables, index_bits=bits)

    return CodebookWeight(
        main=lookup(layout.index_bits),
        residual=None if layout.residual_bits is None else lookup(layout.residual_bits),
        order=torch.randperm(columns, generator=random).int() if layout.is_ordered else None,
        row_scales=torch.rand(rows, generator=random).half() if layout.row_scales else None,
    )


def _random_affine(
    layout: AffineLayout, shape: tuple[int, int], random: torch.Generator
) -> AffineWeight:
    rows, columns = shape
    groups = -(-columns // layout.group_size)
    top = 1 << layout.bits
    zeros = None
    if layout.float_zeros:
        zeros = (torch.rand(rows, groups, generator=random) * (top - 1) + 0.25).half()
    elif not layout.symmetric:
        zeros = torch.randint(0, top, (rows, groups), generator=random)
    return AffineWeight.from_codes(
        torch.randint(0, top, (rows, groups * layout.group_size), generator=random),
        (torch.rand(rows, groups, generator=random) + 0.5).half(),
        zeros,
        bits=layout.bits,
        group_size=layout.group_size,
        in_features=columns,
    )

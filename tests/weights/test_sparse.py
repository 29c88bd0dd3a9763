"""The sparse form: masked elements are exactly 0, kept ones what their own form says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.errors import UnsupportedError
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.codebook import CodebookWeight, Lookup
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.layout import AffineLayout, CodebookLayout, SparseLayout, without_mask
from pocketvlm.weights.nonzeros import AffineNonzeros, FloatNonzeros
from pocketvlm.weights.sparse import SparseWeight

VALUES = (
    None,
    *(
        AffineLayout(bits=bits, group_size=16, symmetric=symmetric, float_zeros=between)
        for bits in (2, 3, 4, 8)
        for symmetric, between in ((True, False), (False, False), (False, True))
    ),
    *(
        CodebookLayout(index_bits=bits, vector_length=1, row_groups=groups, row_scales=scaled)
        for bits, groups, scaled in ((1, 1, False), (3, 2, True), (4, 1, True), (6, 2, False))
    ),
)


def make_form(
    planned: AffineLayout | CodebookLayout | None,
    rows: int,
    columns: int,
    generator: torch.Generator,
) -> WeightForm:
    """Random numbers in a form."""
    if planned is None:
        return DenseWeight(values=torch.randn(rows, columns, generator=generator).half())
    if isinstance(planned, AffineLayout):
        groups = -(-columns // planned.group_size)
        size = (rows, groups * planned.group_size)
        codes = torch.randint(0, 1 << planned.bits, size, generator=generator)
        zeros = torch.randint(0, 1 << planned.bits, (rows, groups), generator=generator)
        if planned.float_zeros:
            zeros = zeros.half() + 0.25
        return AffineWeight.from_codes(
            codes,
            torch.rand(rows, groups, generator=generator).half() + 0.01,
            None if planned.symmetric else zeros,
            bits=planned.bits,
            group_size=planned.group_size,
            in_features=columns,
        )
    entries = 1 << planned.index_bits
    books = torch.randn(planned.row_groups, 1, entries, 1, generator=generator).half()
    indices = torch.randint(0, entries, (rows, columns), generator=generator)
    scales = torch.rand(rows, generator=generator).half() if planned.row_scales else None
    lookup = Lookup.from_indices(indices, books, index_bits=planned.index_bits)
    return CodebookWeight(main=lookup, row_scales=scales)


@settings(max_examples=120, deadline=None)
@given(
    values=st.sampled_from(VALUES),
    half_rows=st.integers(1, 4),
    columns=st.integers(1, 40),
    density=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_kept_elements_are_the_forms_own_and_bytes_are_as_planned(
    values: AffineLayout | CodebookLayout | None,
    half_rows: int,
    columns: int,
    density: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * half_rows
    form = make_form(values, rows, columns, generator)
    mask = torch.rand(rows, columns, generator=generator) < density
    mask[-1, -1] = True
    sparse = SparseWeight.from_form(form, mask)
    whole = form.dequantize()
    dense = sparse.dequantize()
    for row in range(rows):
        for column in range(columns):
            expected = float(whole[row, column]) if mask[row, column] else 0.0
            assert float(dense[row, column]) == expected
    assert sparse.shape == form.shape
    assert torch.equal(sparse.keeps(), mask)
    assert sparse.kept == int(mask.sum())

    chosen = torch.randint(0, rows, (2, 3), generator=generator)
    assert torch.equal(sparse.take_rows(chosen), dense[chosen])
    assert sparse.take_rows(chosen[:, :0]).shape == (2, 0, columns)
    again = SparseWeight.from_tensors(sparse.to_tensors(), sparse.to_metadata())
    assert torch.equal(again.dequantize(), dense)
    assert again.to_metadata() == sparse.to_metadata()
    planned = SparseLayout(density=sparse.density, values=values)
    assert sparse.layout == planned
    assert planned.kept(rows, columns) == sparse.kept
    assert planned.stored_bytes(rows, columns) == sparse.stored_bytes


def test_bytes_fall_with_the_elements() -> None:
    generator = torch.Generator().manual_seed(0)
    form = make_form(AffineLayout(bits=4, group_size=32, symmetric=True), 64, 96, generator)
    mask = torch.arange(96).expand(64, 96) % 4 == 0
    sparse = SparseWeight.from_form(form, mask)
    # One bit per element, four bits per kept one, one scale per group.
    assert sparse.stored_bytes == 64 * 96 // 8 + 64 * 24 // 2 + 64 * 3 * 2
    assert sparse.stored_bytes < 0.6 * form.stored_bytes


def test_masked_elements_are_zero_where_no_code_is() -> None:
    planned = AffineLayout(bits=4, group_size=16, symmetric=False, float_zeros=True)
    form = make_form(planned, 4, 16, torch.Generator().manual_seed(0))
    assert not (form.dequantize() == 0).any()
    mask = torch.zeros(4, 16, dtype=torch.bool)
    mask[2, 5] = True
    assert SparseWeight.from_form(form, mask).dequantize().count_nonzero() == 1


@pytest.mark.parametrize("values", VALUES, ids=str)
def test_without_a_mask_it_is_the_same_matrix_with_the_layout_that_was_planned(
    values: AffineLayout | CodebookLayout | None,
) -> None:
    generator = torch.Generator().manual_seed(0)
    form = make_form(values, 6, 40, generator)
    mask = torch.rand(6, 40, generator=generator) < 0.5
    sparse = SparseWeight.from_form(form, mask)
    plain = sparse.without_mask()
    assert torch.equal(plain.dequantize(), sparse.dequantize())
    assert plain.layout == sparse.layout.without_mask == without_mask(sparse.layout)
    assert isinstance(plain, AffineWeight) == (
        isinstance(values, AffineLayout) and not values.float_zeros
    )
    if isinstance(plain, AffineWeight):
        assert torch.equal(plain.codes()[:, :40][mask], sparse.stored())
    assert form.without_mask() is form
    assert without_mask(form.layout) == form.layout == values


def test_a_checkpoint_keeps_sparse_weights(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    names = [linear.name for linear in tiny_checkpoint.spec.linears()]
    for number, name in enumerate(names):
        form = make_form(VALUES[number % len(VALUES)], *tiny_checkpoint.form(name).shape, generator)
        mask = torch.rand(form.shape, generator=generator) < 0.5
        tiny_checkpoint.set_form(name, SparseWeight.from_form(form, mask))
    tiny_checkpoint.save(tmp_path / "saved")
    loaded = Checkpoint.load(tmp_path / "saved")
    for name in names:
        form, again = tiny_checkpoint.form(name), loaded.form(name)
        assert isinstance(again, SparseWeight)
        assert torch.equal(again.dequantize(), form.dequantize())
        assert again.stored_bytes == form.stored_bytes


def test_what_cannot_be_masked_is_refused() -> None:
    mask = torch.ones(8, 6, dtype=torch.bool)
    vectors = Lookup.from_indices(
        torch.zeros(4, 6, dtype=torch.int64), torch.zeros(1, 1, 4, 2).half(), index_bits=2
    )
    wide = Lookup.from_indices(
        torch.zeros(8, 6, dtype=torch.int64), torch.zeros(1, 1, 512, 1).half(), index_bits=9
    )
    extras = make_form(CodebookLayout(index_bits=2, vector_length=1), 8, 6, torch.Generator())
    assert isinstance(extras, CodebookWeight)
    residual = CodebookWeight(main=extras.main, residual=extras.main)
    for form in (CodebookWeight(main=vectors), CodebookWeight(main=wide), residual):
        with pytest.raises(UnsupportedError, match="tables of up to 256 single values"):
            SparseWeight.from_form(form, mask)
    large = DenseWeight(values=torch.full((8, 6), 1e5))
    with pytest.raises(UnsupportedError, match=r"has a value of 1e\+05.*65504"):
        SparseWeight.from_form(large, mask)
    with pytest.raises(ValueError, match="keeps no element"):
        SparseWeight.from_form(large, ~mask)
    with pytest.raises(ValueError, match=r"the mask is \(8, 5\) torch.bool, not \(8, 6\)"):
        SparseWeight.from_form(large, mask[:, :5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": torch.zeros(4, 1, dtype=torch.uint8)}, r"not \[rows, 2\]"),
        ({"mask": torch.full((4, 2), 255, dtype=torch.uint8)}, "beyond column 10"),
        ({"values": FloatNonzeros(values=torch.zeros(3).half())}, "not one each of 20"),
        (
            {
                "values": AffineNonzeros(
                    packed=torch.zeros(9, dtype=torch.uint8),
                    scales=torch.ones(4, 1).half(),
                    zeros=None,
                    bits=4,
                    group_size=10,
                )
            },
            r"packed codes are \(9,\).*\(10,\)",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    mask = torch.from_numpy(np.tile(np.array([0b11111, 0], np.uint8), (4, 1)))
    fields = {
        "mask": mask,
        "values": FloatNonzeros(values=torch.ones(20).half()),
        "in_features": 10,
    }
    assert SparseWeight(**fields).kept == 20
    with pytest.raises(ValueError, match=message):
        SparseWeight(**{**fields, **changes})


def test_plans_that_no_form_has_are_refused() -> None:
    for density in (0.0, 1.5):
        with pytest.raises(ValueError, match="density is"):
            SparseLayout(density=density)
    with pytest.raises(ValueError, match="single values"):
        SparseLayout(density=0.5, values=CodebookLayout(index_bits=4, vector_length=2))

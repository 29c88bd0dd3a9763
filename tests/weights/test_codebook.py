"""The codebook form: decoding against a loop that follows the definition, bytes, and sharing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.weights.bitpack import pack_codes, unpack_codes
from pocketvlm.weights.codebook import CodebookWeight, Lookup
from pocketvlm.weights.form import total_stored_bytes


def random_lookup(
    generator: torch.Generator,
    *,
    rows: int,
    columns: int,
    length: int,
    index_bits: int,
    row_groups: int = 1,
    column_groups: int = 1,
) -> Lookup:
    entries = 1 << index_bits
    indices = torch.randint(0, entries, (rows // length, columns), generator=generator)
    books = torch.randn(row_groups, column_groups, entries, length, generator=generator)
    return Lookup.from_indices(indices, books.to(torch.float16), index_bits=index_bits)


def look_up_slowly(lookup: Lookup) -> np.ndarray:
    """Every element by the definition."""
    row_groups, _, _, length = lookup.codebooks.shape
    indices = lookup.indices().numpy()
    dense = np.zeros((lookup.rows, lookup.columns))
    rows_a_group = lookup.rows // row_groups
    for row in range(lookup.rows):
        for column in range(lookup.columns):
            book = lookup.codebooks[row // rows_a_group, column // lookup.group_columns]
            dense[row, column] = float(book[indices[row // length, column], row % length])
    return dense


@settings(max_examples=30, deadline=None)
@given(
    length=st.sampled_from([1, 2, 4]),
    index_bits=st.sampled_from([1, 2, 3, 5, 8, 10]),
    row_groups=st.sampled_from([1, 2]),
    column_groups=st.sampled_from([1, 3]),
    seed=st.integers(0, 1000),
)
def test_every_element_is_what_the_definition_says(
    length: int, index_bits: int, row_groups: int, column_groups: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns, apart = 16, 7, 2
    main = random_lookup(
        generator,
        rows=rows,
        columns=columns,
        length=length,
        index_bits=index_bits,
        row_groups=row_groups,
        column_groups=column_groups,
    )
    residual = random_lookup(generator, rows=rows, columns=columns, length=4, index_bits=3)
    outliers = random_lookup(generator, rows=rows, columns=apart, length=2, index_bits=4)
    order = torch.randperm(columns + apart, generator=generator).to(torch.int32)
    row_scales = torch.rand(rows, generator=generator).to(torch.float16)
    scales = torch.rand(columns + apart, generator=generator).to(torch.float16)
    offsets = torch.rand(columns + apart, generator=generator).to(torch.float16)
    form = CodebookWeight(
        main=main,
        residual=residual,
        outliers=outliers,
        order=order,
        row_scales=row_scales,
        column_scales=scales,
        column_offsets=offsets,
    )
    ordered = np.concatenate(
        [look_up_slowly(outliers), look_up_slowly(main) + look_up_slowly(residual)], axis=1
    )
    expected = np.zeros_like(ordered)
    expected[:, order.numpy()] = ordered
    expected *= row_scales.double().numpy()[:, None]
    expected = expected * scales.double().numpy() + offsets.double().numpy()
    dense = form.dequantize()
    np.testing.assert_allclose(dense.double().numpy(), expected, rtol=1e-6, atol=1e-6)

    chosen = torch.tensor([[3, 0], [15, 3]])
    assert torch.equal(form.take_rows(chosen), dense[chosen])
    assert form.take_rows(chosen[:, :0]).shape == (2, 0, dense.shape[1])

    again = CodebookWeight.from_tensors(form.to_tensors(), form.to_metadata())
    assert torch.equal(again.dequantize(), dense)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(1, 16), count=st.integers(0, 40), rows=st.integers(1, 3), seed=st.integers(0)
)
def test_codes_of_any_width_come_back(bits: int, count: int, rows: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count))
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, -(-count * bits // 8))
    assert np.array_equal(unpack_codes(packed, bits, count), codes)


def test_a_vector_lies_along_the_output() -> None:
    books = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], dtype=torch.float16)
    lookup = Lookup.from_indices(torch.tensor([[0, 1, 1]]), books, index_bits=1)
    dense = CodebookWeight(main=lookup).dequantize()
    assert dense.tolist() == [[1.0, 3.0, 3.0], [2.0, 4.0, 4.0]]


def test_shared_codebooks_are_stored_once(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    checkpoint = tiny_checkpoint
    names = [x.name for x in checkpoint.spec.linears() if x.part == "decoder"][:3]
    books = torch.randn(1, 1, 16, 2, generator=generator).to(torch.float16)
    forms = []
    for name in names:
        rows, columns = checkpoint.form(name).shape
        indices = torch.randint(0, 16, (rows // 2, columns), generator=generator)
        forms.append(CodebookWeight(main=Lookup.from_indices(indices, books, index_bits=4)))
        checkpoint.set_form(name, forms[-1])
    alone = sum(form.stored_bytes for form in forms)
    assert total_stored_bytes(forms) == alone - 2 * books.numel() * 2
    checkpoint.save(tmp_path / "saved")
    loaded = Checkpoint.load(tmp_path / "saved")
    found = [loaded.form(name) for name in names]
    for form, again in zip(forms, found, strict=True):
        assert torch.equal(again.dequantize(), form.dequantize())
    assert total_stored_bytes(found) == total_stored_bytes(forms)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": torch.tensor([0, 0, 1], dtype=torch.int32)}, "is not a permutation"),
        ({"row_scales": torch.ones(3, dtype=torch.float16)}, "row_scales must be"),
        ({"column_scales": torch.ones(3)}, "column_scales must be float16"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    generator = torch.Generator().manual_seed(0)
    main = random_lookup(generator, rows=4, columns=3, length=2, index_bits=2)
    with pytest.raises(ValueError, match=message):
        CodebookWeight(main=main, **change)

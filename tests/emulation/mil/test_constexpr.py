"""Compressed weights that coremltools wrote, decoded here, against loops over the definition."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pocketvlm.emulation.mil.constexpr import CONSTEXPR
from pocketvlm.emulation.mil.types import unpack_bits
from tests.emulation.mil.rig import open_program, toolkit, write_package

RANDOM = np.random.default_rng(3)


def block_of(place: tuple[int, ...], shape: tuple[int, ...], blocks: tuple[int, ...]):
    return tuple(p // (n // b) for p, n, b in zip(place, shape, blocks, strict=True))


def slow_shift_scale(data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None) -> np.ndarray:
    dense = np.zeros(data.shape)
    for place in np.ndindex(data.shape):
        block = block_of(place, data.shape, scale.shape)
        zero = 0.0 if offset is None else float(offset[block])
        dense[place] = float(scale[block]) * (float(data[place]) - zero)
    return dense


def slow_lut(indices: np.ndarray, lut: np.ndarray, axis: int) -> np.ndarray:
    length = lut.shape[-1]
    shape = list(indices.shape)
    shape[axis] *= length
    dense = np.zeros(shape)
    for place in np.ndindex(indices.shape):
        block = block_of(place, indices.shape, lut.shape[:-2])
        for number in range(length):
            target = list(place)
            target[axis] = place[axis] * length + number
            dense[tuple(target)] = lut[(*block, indices[place], number)]
    return dense


def codes(bits: int, *shape: int) -> np.ndarray:
    return RANDOM.integers(0, 1 << bits, shape).astype(np.uint8)


def half(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float16)


def mask(*shape: int) -> np.ndarray:
    return (RANDOM.random(shape) < 0.4).astype(np.uint8)


def narrow(values: np.ndarray, kind: str) -> np.ndarray:
    """A packed type, as coremltools marks it."""
    return values.astype(getattr(toolkit().types, f"np_{kind}_dtype"))


Case = tuple[Callable[[Any], Any], np.ndarray]


def affine(kind: str, shape: Any, blocks: Any, offset: str | None) -> Case:
    signed = kind.startswith("i")
    bits = int(kind.lstrip("uint"))
    low = -(1 << (bits - 1)) if signed else 0
    data = RANDOM.integers(low, low + (1 << bits), shape)
    scale = half(*blocks)
    zero = None
    if offset == "code":
        zero = RANDOM.integers(low, low + (1 << bits), blocks)
    elif offset == "float":
        zero = half(*blocks)
    stored = narrow(data, kind) if bits < 8 else data.astype(kind)

    def build(mb: Any) -> Any:
        arguments = {"data": stored, "scale": scale}
        if zero is not None:
            packed = zero if offset == "float" else zero.astype(stored.dtype)
            arguments["offset"] = packed
        return mb.constexpr_blockwise_shift_scale(**arguments)

    return build, slow_shift_scale(data, scale, zero)


def table(bits: int, shape: Any, groups: Any, length: int = 1, axis: int = 0) -> Case:
    indices, lut = codes(bits, *shape), half(*groups, 1 << bits, length)
    stored = narrow(indices, f"uint{bits}") if bits < 8 else indices

    def build(mb: Any) -> Any:
        where = {"vector_axis": np.int32(axis)} if length > 1 else {}
        return mb.constexpr_lut_to_dense(indices=stored, lut=lut, **where)

    return build, slow_lut(indices, lut, axis)


def table_of_integers() -> Case:
    """An int8 table whose entries are scaled block by block."""
    indices, lut = codes(4, 8, 12), RANDOM.integers(-128, 128, (2, 1, 16, 1)).astype(np.int8)
    scale = half(8, 3)

    def build(mb: Any) -> Any:
        dense = mb.constexpr_lut_to_dense(indices=narrow(indices, "uint4"), lut=lut)
        return mb.constexpr_blockwise_shift_scale(data=dense, scale=scale)

    return build, slow_shift_scale(slow_lut(indices, lut, 0), scale, None)


def sparse(kind: str) -> Case:
    seen = mask(8, 6)
    count = int(seen.sum())
    dense = np.zeros((8, 6))
    if kind == "dense":
        values = half(count)
        dense[seen != 0] = values

        def build(mb: Any) -> Any:
            return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=narrow(seen, "uint1"))

        return build, dense
    if kind == "affine":
        values, scale, zero = (
            RANDOM.integers(-8, 8, count),
            half(1, 3),
            RANDOM.integers(-8, 8, (1, 3)),
        )
        dense[seen != 0] = values
        dense = slow_shift_scale(dense, scale, zero) * seen

        def build(mb: Any) -> Any:
            found, data = mb.constexpr_sparse_blockwise_shift_scale(
                data_mask=narrow(seen, "uint1"),
                nonzero_data=narrow(values, "int4"),
                scale=scale,
                offset=narrow(zero, "int4"),
            )
            return mb.constexpr_sparse_to_dense(nonzero_data=data, mask=found)

        return build, dense
    length = 1 if kind == "lut" else 2
    indices = codes(2, count)
    lut = half(2, 1, 4, length)
    full = np.zeros((8, 6), np.uint8)
    full[seen != 0] = indices
    dense = slow_lut(full, lut, 0) * np.repeat(seen, length, 0)

    def build(mb: Any) -> Any:
        found, data = mb.constexpr_lut_to_sparse(
            indices_mask=narrow(seen, "uint1"),
            indices_nonzero_data=narrow(indices, "uint2"),
            lut=lut,
            **({"vector_axis": np.int32(0)} if length > 1 else {}),
        )
        return mb.constexpr_sparse_to_dense(nonzero_data=data, mask=found)

    return build, dense


CASES: dict[str, Callable[[], Case]] = {
    "int4 per block": lambda: affine("int4", (6, 64), (6, 2), None),
    "uint4 per block, offsets": lambda: affine("uint4", (6, 64), (6, 2), "code"),
    "uint4 per block, float offsets": lambda: affine("uint4", (6, 64), (6, 2), "float"),
    "int8 per channel": lambda: affine("int8", (6, 10), (6, 1), None),
    "uint8 blocks along both axes": lambda: affine("uint8", (6, 10), (3, 5), "code"),
    "int4 of a convolution": lambda: affine("int4", (4, 6, 3, 3), (4, 2, 1, 1), "code"),
    **{f"{b}-bit table": (lambda b=b: table(b, (8, 6), (1, 1))) for b in (1, 2, 3, 4, 6, 8)},
    "tables for groups of rows": lambda: table(3, (8, 6), (4, 1)),
    "tables for groups of columns": lambda: table(2, (8, 6), (1, 3)),
    "vectors along the output": lambda: table(6, (4, 6), (1, 1), 4, 0),
    "vectors along the input": lambda: table(2, (4, 6), (1, 1), 3, 1),
    "vectors, tables for groups": lambda: table(4, (4, 6), (2, 3), 2, 0),
    "int8 table, scaled": table_of_integers,
    "sparse": lambda: sparse("dense"),
    "sparse, int4": lambda: sparse("affine"),
    "sparse, table": lambda: sparse("lut"),
    "sparse, vectors": lambda: sparse("vectors"),
}


@pytest.fixture(scope="module")
def decoded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All cases in one package: what the evaluator decodes, and the slow reference."""
    kit = toolkit()
    made = {name: make() for name, make in CASES.items()}
    inputs = {
        f"x{number}": kit.mb.TensorSpec(expected.shape, dtype=kit.types.fp16)
        for number, (_, expected) in enumerate(made.values())
    }

    def build(mb: Any, **placeholders: Any) -> list[Any]:
        return [
            mb.add(x=placeholders[f"x{number}"], y=one(mb), name=f"y{number}")
            for number, (one, _) in enumerate(made.values())
        ]

    path = write_package(
        tmp_path_factory.mktemp("constexpr") / "all.mlpackage", {"main": (inputs, build)}
    )
    outputs = open_program(path).run(
        "main",
        {f"x{n}": np.zeros(expected.shape) for n, (_, expected) in enumerate(made.values())},
    )
    return {
        name: (outputs[f"y{number}"], expected)
        for number, (name, (_, expected)) in enumerate(made.items())
    }


@pytest.mark.parametrize("name", CASES)
def test_decodes_what_coremltools_wrote(
    name: str, decoded: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    found, expected = decoded[name]
    np.testing.assert_array_equal(found, expected.astype(np.float16))
    assert np.unique(expected).size > 1


def test_decodes_the_forms_of_ios16(tmp_path: Path) -> None:
    kit = toolkit()
    data, scale, zero = RANDOM.integers(-128, 128, (4, 6)).astype(np.int8), half(6), np.int8(3)
    indices, lut = codes(6, 4, 6), half(64)
    seen, values = mask(4, 6), half(24)
    values = values[: int(seen.sum())]
    packed = np.packbits(
        np.unpackbits(indices.reshape(-1, 1), axis=1, bitorder="little")[:, :6],
        bitorder="little",
    )

    def build(mb: Any, x: Any) -> list[Any]:
        decoded = [
            mb.constexpr_affine_dequantize(
                quantized_data=data, zero_point=zero, scale=scale, axis=np.int32(1)
            ),
            mb.constexpr_lut_to_dense(indices=packed, lut=lut, shape=np.array([4, 6], np.uint32)),
            mb.constexpr_sparse_to_dense(
                nonzero_data=values,
                mask=np.packbits(seen, bitorder="little"),
                shape=np.array([4, 6], np.uint32),
            ),
        ]
        wide = mb.constexpr_cast(source_val=half(4, 6) * 0 + np.float16(0.1), output_dtype="fp32")
        return [
            *[mb.add(x=x, y=one, name=f"y{number}") for number, one in enumerate(decoded)],
            mb.add(x=mb.cast(x=x, dtype="fp32"), y=wide, name="y3"),
        ]

    path = write_package(
        tmp_path / "old.mlpackage",
        {"main": ({"x": kit.mb.TensorSpec((4, 6), dtype=kit.types.fp16)}, build)},
        target="iOS16",
    )
    outputs = open_program(path).run("main", {"x": np.zeros((4, 6))})
    dense = np.zeros((4, 6))
    dense[seen != 0] = values
    expected = [
        scale.astype(np.float64) * (data.astype(np.float64) - 3),
        lut[indices],
        dense,
    ]
    for number, one in enumerate(expected):
        np.testing.assert_array_equal(outputs[f"y{number}"], one.astype(np.float16))
    np.testing.assert_array_equal(outputs["y3"], np.full((4, 6), np.float32(np.float16(0.1))))


@settings(deadline=None, max_examples=40)
@given(
    data=st.data(),
    bits=st.sampled_from([1, 2, 3, 4]),
    rows=st.sampled_from([(4, 1), (4, 2), (4, 4)]),
    columns=st.sampled_from([(6, 1), (6, 2), (6, 3)]),
    length=st.sampled_from([1, 2, 3]),
    axis=st.sampled_from([0, 1, -1]),
)
def test_tables_equal_the_loop(
    data: Any, bits: int, rows: Any, columns: Any, length: int, axis: int
):
    indices = data.draw(
        arrays(np.uint8, (rows[0], columns[0]), elements=st.integers(0, 2**bits - 1))
    )
    lut = np.arange(rows[1] * columns[1] * 2**bits * length, dtype=np.float32)
    lut = lut.reshape(rows[1], columns[1], 2**bits, length)
    found = CONSTEXPR["constexpr_lut_to_dense"](indices, lut, np.int32(axis))
    np.testing.assert_array_equal(found, slow_lut(indices, lut, axis % 2))


@given(bits=st.integers(1, 8), data=st.data())
def test_unpacking_undoes_packing(bits: int, data: Any) -> None:
    values = data.draw(st.lists(st.integers(0, (1 << bits) - 1), max_size=40))
    stream = itertools.chain.from_iterable(
        [(value >> place) & 1 for place in range(bits)] for value in values
    )
    packed = np.packbits(np.array([*stream], np.uint8), bitorder="little")
    assert unpack_bits(packed, bits, len(values)).tolist() == values


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="3 blocks do not divide the 8 elements of axis 1"):
        CONSTEXPR["constexpr_blockwise_shift_scale"](
            np.zeros((2, 8), np.int8), np.ones((2, 3), np.float32)
        )

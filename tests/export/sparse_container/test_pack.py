"""Packed files: what comes out is what went in, what is in them is what the format says."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.errors import BundleError, ExportError
from pocketvlm.export.sparse_container.pack import MaskedPlace, pack_file
from pocketvlm.export.sparse_container.size import saved_bytes
from pocketvlm.export.sparse_container.unmasked import has_zero_code, unmasked, zero_codes
from pocketvlm.runtime.sparse_file import expand, expanded_path
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.bitpack import pack_codes
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.layout import AffineLayout, CodebookLayout, SparseLayout
from pocketvlm.weights.nonzeros import AffineNonzeros
from pocketvlm.weights.sparse import SparseWeight
from tests.export.coreml.test_forms import make_codebook
from tests.export.rig import quantize_affine


def make_mask(pattern: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    """Half of the elements by a pattern; `rows` and `columns` are multiples of 8."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, columns, generator=generator)
    if pattern == "2:4":
        return scores.view(rows, -1, 4).argsort(-1).argsort(-1).view(rows, columns) < 2
    if pattern == "3:8":
        return scores.view(rows, -1, 8).argsort(-1).argsort(-1).view(rows, columns) < 3
    if pattern == "blocks":
        cells = scores[::4, ::8] > scores[::4, ::8].median()
        return cells.repeat_interleave(4, 0).repeat_interleave(8, 1)
    return scores > scores.median()


def read_slowly(data: bytes) -> bytes:
    """The format as it is documented, element by element; shares nothing with its reader."""
    magic, version, length = struct.unpack_from("<8sII", data)
    assert (magic, version) == (b"PVSPARSE", 1)
    document = json.loads(data[16 : 16 + length])
    rest = data[16 + length :]
    whole = bytearray()
    masks: dict[int, list[list[bool]]] = {}

    def take(count: int) -> bytes:
        nonlocal rest
        taken, rest = rest[:count], rest[count:]
        assert len(taken) == count
        return taken

    def codes(rows: int, columns: int, bits: int) -> list[list[int]]:
        packed = [int.from_bytes(take(-(-columns * bits // 8)), "little") for _ in range(rows)]
        return [[(row >> (i * bits)) & ((1 << bits) - 1) for i in range(columns)] for row in packed]

    for number, span in enumerate(document["spans"]):
        if "bytes" in span:
            whole += take(span["bytes"])
            continue
        rows, columns, width, bits = (span[x] for x in ("rows", "columns", "width", "bits"))
        high, wide = span.get("block", (1, 1))
        if "like" in span:
            mask = masks[span["like"]]
        elif "choice" in span:
            keep, of = span["choice"]
            choices = list(itertools.combinations(range(of), keep))
            size = max(1, (len(choices) - 1).bit_length())
            numbers = codes(rows, columns // of, size)
            mask = [[c % of in choices[row[c // of]] for c in range(columns)] for row in numbers]
        else:
            cells = codes(rows // high, columns // wide, 1)
            mask = [
                [bool(cells[r // high][c // wide]) for c in range(columns)] for r in range(rows)
            ]
        masks[number] = mask
        group = span.get("group", 0)
        fills = codes(rows, -(-width // group), bits) if group else None
        tables = span.get("tables")
        value_bits = tables[0] if tables else 16 if span.get("is_half") else bits
        (values,) = codes(1, span["kept"], value_bits)
        looked_up = (
            struct.unpack(f"<{tables[1] * tables[2]}H", take(2 * tables[1] * tables[2]))
            if tables
            else ()
        )
        scales = np.frombuffer(take(2 * rows), "<f2") if span.get("row_scales") else None
        position = iter(values)
        for r in range(rows):
            row = 0
            for c in range(width):
                element = fills[r][c // group] if fills else span.get("fill", 0)
                if c < columns and mask[r][c]:
                    element = next(position)
                    if tables:
                        element = looked_up[r // (rows // tables[1]) * tables[2] + element]
                    if bits == 32 and (tables or span.get("is_half")):
                        wide_value = np.float32(np.uint16(element).view(np.float16))
                        if scales is not None:
                            wide_value *= np.float32(scales[r])
                        element = int(wide_value.view(np.uint32))
                row |= element << (c * bits)
            whole += row.to_bytes(width * bits // 8, "little")
    assert not rest
    assert len(whole) == document["bytes"]
    return bytes(whole)


KINDS = ("float16", "float32", "bfloat16", "int2", "int3", "int4", "int8", "row8", "lut", "scaled")


def make_stored(kind: str, mask: torch.Tensor, seed: int, *, symmetric: bool) -> tuple[bytes, Any]:
    """A masked weight as some file holds it, and where; plus what a plan calls it."""
    rows, columns = mask.shape
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if kind.startswith(("int", "row")):
        bits = int(kind[3:])
        size = columns if kind == "row8" else 16
        form = SparseWeight.from_form(quantize_affine(dense, bits, size, symmetric=symmetric), mask)
        plain = unmasked(form)
        assert isinstance(plain, AffineWeight)
        assert isinstance(form.values, AffineNonzeros)
        # Containers of 4 bits for 3, as one runtime has them.
        stored_bits = 4 if bits == 3 else bits
        stored = pack_codes(plain.codes().numpy(), stored_bits)
        place = MaskedPlace(
            start=0,
            form=form,
            bits=stored_bits,
            width=plain.groups * plain.group_size,
            fills=zero_codes(form.values),
        )
        planned = AffineLayout(bits=bits, group_size=size, symmetric=symmetric)
        return stored.tobytes(), (place, planned)
    form_of: WeightForm = DenseWeight(values=dense.to(torch.bfloat16))
    codebook = None
    if kind in ("lut", "scaled"):
        form_of = make_codebook(
            rows, columns, bits=4, groups=(2, 1), scaled=kind == "scaled", seed=seed
        )
        codebook = CodebookLayout(
            index_bits=4, vector_length=1, row_groups=2, row_scales=kind == "scaled"
        )
    form = SparseWeight.from_form(form_of, mask)
    dtype = getattr(torch, {"lut": "float16", "scaled": "float32"}.get(kind, kind))
    values = form.dequantize().to(dtype)
    assert torch.equal(values.to(torch.float32), form.dequantize())
    bits = values.element_size() * 8
    raw = values.contiguous().view(torch.uint8).numpy().tobytes()
    return raw, (MaskedPlace(start=0, form=form, bits=bits, table_type=dtype), codebook)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    pattern=st.sampled_from(["unstructured", "2:4", "3:8", "blocks"]),
    size=st.tuples(st.sampled_from([8, 16]), st.sampled_from([16, 24, 40])),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_bytes_come_back_and_the_format_is_the_documented_one(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    pattern: str,
    size: tuple[int, int],
    symmetric: bool,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("packed")
    mask = make_mask(pattern, *size, seed)
    stored, (place, _) = make_stored(kind, mask, seed, symmetric=symmetric)
    head, tail = bytes(range(70)), b"tail"
    # The same weight twice: the second has no separate mask.
    data = head + stored + tail + stored
    (folder / "whole.bin").write_bytes(data)
    places = [place.moved(len(head) + len(stored) + len(tail)), place.moved(len(head))]
    pack_file(folder / "whole.bin", folder / "packed", places)
    assert not (folder / "whole.bin").exists()
    packed = (folder / "packed").read_bytes()
    whole = expand(folder / "packed")
    assert whole.content.tobytes() == data
    assert whole.name == "whole.bin"
    assert read_slowly(packed) == data
    (length,) = struct.unpack_from("<I", packed, 12)
    spans = json.loads(packed[16 : 16 + length])["spans"]
    if kind == "int2" and len(spans) == 1:
        return  # a mask would have cost more than it leaves out
    assert spans[3]["like"] == 1
    if pattern == "2:4":
        assert spans[1]["choice"] == [2, 4]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "3:8", "blocks"])
def test_predicted_bytes(tmp_path: Path, kind: str, pattern: str) -> None:
    mask = make_mask(pattern, 256, 320, 5)
    stored, (place, values) = make_stored(kind, mask, 5, symmetric=False)
    (tmp_path / "whole.bin").write_bytes(stored)
    pack_file(tmp_path / "whole.bin", tmp_path / "packed", [place])
    choices = {"2:4": (2, 4), "3:8": (3, 8)}
    planned = SparseLayout(
        density=place.form.density,
        values=values,
        block=(4, 8) if pattern == "blocks" else (1, 1),
        choice=choices.get(pattern),
    )
    has_fills = isinstance(values, AffineLayout)
    saved = saved_bytes(
        planned, mask.shape, bits=place.bits, width=place.width, has_fills=has_fills
    )
    written = (tmp_path / "packed").stat().st_size
    assert len(stored) - saved == pytest.approx(written, rel=0.01)
    # Two bits, of which half are kept, and a mask: as much as without one.
    if kind != "int2" or pattern == "blocks":
        assert written < 0.95 * len(stored)
    assert written < len(stored) + 200


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    stored, (place, _) = make_stored("int4", make_mask("2:4", 8, 32, 0), 0, symmetric=False)
    (folder / "whole.bin").write_bytes(stored + b"more")
    pack_file(folder / "whole.bin", folder / "weights.sparse", [place])
    return folder / "weights.sparse"


def refuse(folder: Path, content: bytes) -> str:
    (folder / "bad.sparse").write_bytes(content)
    with pytest.raises(BundleError) as caught:
        expand(folder / "bad.sparse")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{folder / 'bad.sparse'}: ")
    return message


def test_damage_is_one_line(packed: Path, tmp_path: Path) -> None:
    data = packed.read_bytes()
    (length,) = struct.unpack_from("<I", data, 12)
    for end in (0, 10, 16, 16 + length // 2, 16 + length, len(data) - 1):
        assert "damaged" in refuse(tmp_path, data[:end])
    assert "damaged" in refuse(tmp_path, data + b"\0")
    assert "does not begin" in refuse(tmp_path, b"x" + data[1:])
    later = data[:8] + struct.pack("<I", 2) + data[12:]
    assert "of version 2, and this one reads 1" in refuse(tmp_path, later)
    # 6 choices take 3 bits: 7 is none of them.
    mask = 16 + length
    assert "choice 7 of 6" in refuse(tmp_path, data[:mask] + b"\xff" + data[mask + 1 :])
    with pytest.raises(BundleError, match=r"nothing\.sparse: cannot be read: No such file"):
        expand(tmp_path / "nothing.sparse")


@pytest.mark.parametrize(
    "change",
    [
        {"rows": -8},
        {"columns": 31},
        {"width": 1 << 40},
        {"bits": 5},
        {"kept": 7},
        {"kept": "all"},
        {"block": [3, 1], "choice": None},
        {"like": 3},
        {"group": -1},
        {"tables": [4, 1, 16]},
        {"unknown": 1},
        {"choice": [2]},
    ],
    ids=str,
)
def test_wrong_descriptions_are_one_line(
    packed: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    data = packed.read_bytes()
    (length,) = struct.unpack_from("<I", data, 12)
    document = json.loads(data[16 : 16 + length])
    document["spans"][0] |= change
    text = json.dumps(document).encode()
    message = refuse(
        tmp_path, data[:12] + struct.pack("<I", len(text)) + text + data[16 + length :]
    )
    assert "damaged" in message


def test_wrong_places_are_not_packed(tmp_path: Path) -> None:
    stored, (place, _) = make_stored("int4", make_mask("2:4", 8, 32, 0), 0, symmetric=False)
    (tmp_path / "whole.bin").write_bytes(b"\x37" * len(stored))
    with pytest.raises(ExportError, match="does not expand to the bytes of whole.bin"):
        pack_file(tmp_path / "whole.bin", tmp_path / "packed", [place])
    assert (tmp_path / "whole.bin").exists()


def test_an_expanded_file_leaves_nothing_behind(packed: Path) -> None:
    before = sorted(packed.parent.iterdir())
    with expanded_path(packed) as (path, spent):
        content = path.read_bytes()
        assert path.is_file()
        assert spent > 0
    assert content == expand(packed).content.tobytes()
    assert not path.exists()
    assert sorted(packed.parent.iterdir()) == before


def test_zeros_that_are_no_codes_become_floats() -> None:
    dense = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    mask = dense > 0
    whole = quantize_affine(dense, 4)
    for zeros in (whole.zero_points().to(torch.float16) + 0.5, whole.zero_points() + 16):
        form = SparseWeight.from_form(
            AffineWeight.from_codes(
                whole.codes(), whole.scales, zeros, bits=4, group_size=32, in_features=32
            ),
            mask,
        )
        assert not has_zero_code(form)
        plain = unmasked(form)
        assert isinstance(plain, DenseWeight)
        assert torch.equal(plain.dequantize(), form.dequantize())
    assert unmasked(whole) is whole

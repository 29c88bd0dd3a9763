"""Reading of packages: messages, weight files, damage."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.emulation.mil.blobs import WeightFile
from pocketvlm.emulation.mil.package import Literal, MilPackage
from pocketvlm.emulation.mil.program import MilProgram
from pocketvlm.emulation.mil.types import ELEMENTS
from pocketvlm.errors import BundleError
from pocketvlm.files.protobuf import Message
from tests.emulation.mil.rig import toolkit, write_package

PACKED = {name for name, element in ELEMENTS.items() if element.is_packed}


def test_schema_numbers_are_those_of_the_format() -> None:
    toolkit()
    from coremltools.proto import MIL_pb2

    for name, element in ELEMENTS.items():
        assert MIL_pb2.DataType.Value(name) == element.code


@settings(deadline=None, max_examples=30)
@given(
    longs=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5),
    floats=st.lists(st.floats(width=32, allow_nan=False), max_size=5),
    text=st.text(max_size=8),
)
def test_messages_are_read_as_protobuf_writes_them(
    longs: list[int], floats: list[float], text: str
) -> None:
    toolkit()
    from coremltools.proto import MIL_pb2

    tensor = MIL_pb2.TensorValue()
    tensor.longInts.values.extend(longs)
    assert Message(tensor.SerializeToString()).message(5).integers(1) == longs
    tensor.floats.values.extend(floats)
    found = Message(tensor.SerializeToString()).message(1).floats(1, "<f4")
    assert found.tolist() == floats
    tensor.strings.values.append(text)
    assert Message(tensor.SerializeToString()).message(4).texts(1) == [text]
    named = MIL_pb2.Block(outputs=[text, "b"])
    named.attributes["key"].docString = "value"
    message = Message(named.SerializeToString())
    assert message.texts(2) == [text, "b"]
    assert message.mapping(4)["key"].text(1) == "value"


@pytest.mark.parametrize("damage", [b"\x80", b"\x0a\x05abc", b"\x0b", b"\x00\x01", b"\xff" * 12])
def test_bytes_that_are_no_message_are_refused(damage: bytes) -> None:
    with pytest.raises(ValueError, match="a field|a number"):
        Message(damage)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, Any, int]]]:
    """A weight file from coremltools' own writer, and what was written where."""
    kit = toolkit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from coremltools.libmilstoragepython import _BlobStorageWriter

    path = tmp_path_factory.mktemp("blobs") / "weight.bin"
    writer = _BlobStorageWriter(str(path))
    random = np.random.default_rng(0)
    records = []
    for name, element in ELEMENTS.items():
        if element.blob_code is None or name in {"FLOAT16", "FLOAT32"}:
            continue
        low = -(1 << (element.bits - 1)) if element.stored.kind == "i" else 0
        for count in (1, 7, 64, 1001):
            values = random.integers(low, low + (1 << element.bits), count)
            kind = name.lower()
            stored = getattr(kit.types, f"np_{kind}_dtype") if element.is_packed else element.stored
            offset = getattr(writer, f"write_{kind}_data")(values.astype(stored))
            records.append((name, values, offset))
    halves = random.standard_normal(33).astype(np.float16)
    records.append(("FLOAT16", halves, writer.write_fp16_data(halves.view(np.uint16))))
    floats = random.standard_normal(33).astype(np.float32)
    records.append(("FLOAT32", floats, writer.write_float_data(floats)))
    del writer
    return path, records


def test_weight_files_are_read_as_coremltools_writes_them(
    written: tuple[Path, list[tuple[str, Any, int]]],
) -> None:
    path, records = written
    file = WeightFile(path)
    for name, values, offset in records:
        found = file.read(offset, ELEMENTS[name], len(values))
        np.testing.assert_array_equal(found, values, err_msg=name)
    assert {name for name, _, _ in records} >= {"INT4", "UINT1", "UINT3", "UINT6"}


def test_a_damaged_weight_file_is_refused(
    written: tuple[Path, list[tuple[str, Any, int]]], tmp_path: Path
) -> None:
    path, records = written
    name, values, offset = records[-1]
    file = WeightFile(path)
    with pytest.raises(BundleError, match="has type code"):
        file.read(offset, ELEMENTS["INT4"], len(values))
    with pytest.raises(BundleError, match="bits"):
        file.read(offset, ELEMENTS[name], len(values) + 1)
    with pytest.raises(BundleError, match="has no record there"):
        file.read(offset + 64, ELEMENTS[name], len(values))
    with pytest.raises(BundleError, match="begins after the end"):
        file.read(1 << 40, ELEMENTS[name], 1)
    cut = tmp_path / "cut.bin"
    cut.write_bytes(path.read_bytes()[: offset + 70])
    with pytest.raises(BundleError, match="ends after the end"):
        WeightFile(cut).read(offset, ELEMENTS[name], len(values))
    for content, match in ((b"", "cannot be read"), (b"12", "at least 64"), (b"9" * 64, "version")):
        cut.write_bytes(content)
        with pytest.raises(BundleError, match=match):
            WeightFile(cut)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One function with immediate values of every kind and values in the weight file."""
    kit = toolkit()
    mb = kit.mb

    def build(mb: Any, x: Any) -> Any:
        values = {
            "fp16": np.array([0.1, -3], np.float16),
            "fp32": np.array([0.1, -3], np.float32),
            "int8": np.array([-3, 7], np.int8),
            "uint16": np.array([3, 65535], np.uint16),
            "int32": np.array([-(2**31), 2**31 - 1], np.int32),
            "bool": np.array([True, False]),
            "large": np.arange(100, dtype=np.float16),
        }
        for name, value in values.items():
            mb.cast(x=mb.const(val=value, name=name), dtype="fp32" if "f" in name else "int32")
        return mb.reduce_sum(x=x, axes=[1], keep_dims=False, name="total")

    inputs = {"x": mb.TensorSpec((2, 3), dtype=kit.types.fp32)}
    return write_package(
        tmp_path_factory.mktemp("package") / "a.mlpackage", {"main": (inputs, build)}
    )


def test_a_package_is_read_as_it_was_written(package: Path) -> None:
    found = MilPackage.open(package)
    assert found.specification_version == 9
    function = found.function("any name")
    assert [(p.name, str(p.type), p.is_state) for p in function.inputs] == [
        ("x", "float32 [2, 3]", False)
    ]
    assert function.outputs == ("total",)
    # The builder adds a suffix to names of immediate values.
    constants = {
        op.outputs[0].name.removesuffix("_workaround"): op.value
        for op in function.operations
        if op.kind == "const"
    }
    expected = {
        "fp16": np.array([0.1, -3], np.float16).astype(np.float32),
        "fp32": np.array([0.1, -3], np.float32),
        "int8": np.array([-3, 7]),
        "uint16": np.array([3, 65535]),
        "int32": np.array([-(2**31), 2**31 - 1]),
        "bool": np.array([True, False]),
        "large": np.arange(100.0),
    }
    for name, values in expected.items():
        literal = constants[name]
        assert isinstance(literal, Literal)
        np.testing.assert_array_equal(literal.load(), values, err_msg=name)
    assert constants["large"].blob is not None
    assert constants["fp16"].blob is None


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ("no manifest", "is missing"),
        ("manifest", "not the manifest of a package"),
        ("no model", "is missing"),
        ("model", "cannot be read"),
        ("empty", "holds no ML program"),
        ("weights", "weight.bin: 10 bytes"),
        ("no weights", "is missing"),
    ],
)
def test_a_damaged_package_is_refused_and_named(
    package: Path, tmp_path: Path, damage: str, match: str
) -> None:
    copy = shutil.copytree(package, tmp_path / "b.mlpackage")
    (model,) = copy.rglob("*.mlmodel")
    (weights,) = copy.rglob("weight.bin")
    if damage == "no manifest":
        (copy / "Manifest.json").unlink()
    elif damage == "manifest":
        (copy / "Manifest.json").write_text(json.dumps({"itemInfoEntries": []}))
    elif damage == "no model":
        model.unlink()
    elif damage == "model":
        model.write_bytes(model.read_bytes()[:-7])
    elif damage == "empty":
        model.write_bytes(b"")
    elif damage == "weights":
        weights.write_bytes(weights.read_bytes()[:10])
    else:
        weights.unlink()
    with pytest.raises(BundleError, match=match) as raised:
        MilProgram(MilPackage.open(copy))
    assert "\n" not in str(raised.value)
    assert str(copy) in str(raised.value)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ("../../secret", "leads out of the package"),
        ("/etc/hostname", "leads out of the package"),
        ("link", "leads out of the package"),
    ],
)
@pytest.mark.parametrize("which", ["root", "another"])
def test_entries_of_a_package_lie_inside(
    package: Path, tmp_path: Path, entry: str, match: str, which: str
) -> None:
    copy = shutil.copytree(package, tmp_path / "b.mlpackage")
    (tmp_path / "secret").write_text("secret")
    (copy / "Data" / "link").symlink_to("../../secret")
    document = json.loads((copy / "Manifest.json").read_text())
    key = document["rootModelIdentifier"] if which == "root" else "other"
    document["itemInfoEntries"].setdefault(key, {})["path"] = entry
    (copy / "Manifest.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=match):
        MilPackage.open(copy)


def test_weights_of_a_package_lie_inside(package: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(package, tmp_path / "b.mlpackage")
    (weights,) = copy.rglob("weight.bin")
    shutil.move(weights, tmp_path / "weight.bin")
    weights.symlink_to(tmp_path / "weight.bin")
    with pytest.raises(BundleError, match=r"weight.bin: leads out of its folder"):
        MilProgram(MilPackage.open(copy))
    (model,) = copy.rglob("*.mlmodel")
    name = b"@model_path/weights/weight.bin"
    assert name in model.read_bytes()
    for other in (b"@model_path/../../../../weight.bin"[: len(name)], b"/" * len(name)):
        padded = other.ljust(len(name), b"x")
        model.write_bytes(model.read_bytes().replace(name, padded))
        name = padded
        with pytest.raises(BundleError, match=r"not the name of a file inside|not inside of the"):
            MilProgram(MilPackage.open(copy))

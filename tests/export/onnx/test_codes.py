"""The integers in the ONNX files are the checkpoint's own, at every width."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.bundle import TensorSignature
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.export.onnx.expansion import affine_rows
from pocketvlm.export.onnx.limits import BLOCK_SIZES, container_bits
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.export.onnx.weights import (
    gathers_blocks,
    narrowest_float,
    pack_weight,
    unpack_weight,
)
from pocketvlm.export.onnx.writer import GraphWriter, WeightFile
from pocketvlm.runtime.onnx.engine import onnxruntime
from pocketvlm.weights.affine import AffineWeight
from tests.export.rig import quantize_affine, quantize_checkpoint


def read_codes(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes of each row, one bit at a time: independent of every packer of the package."""
    rows = packed.reshape(packed.shape[0], -1)
    codes = np.zeros((rows.shape[0], count), np.int64)
    for index in range(count):
        for bit in range(bits):
            place = index * bits + bit
            codes[:, index] |= ((rows[:, place // 8].astype(np.int64) >> (place % 8)) & 1) << bit
    return codes


def check_weight(
    forms: list[AffineWeight], constants: dict[str, np.ndarray], inputs: list[str], bits: int
) -> None:
    """Compares the operands of one node with the forms whose rows they join."""
    groups, width = forms[0].groups, forms[0].groups * forms[0].group_size
    stored = read_codes(constants[inputs[0]], bits, width)
    expected = np.concatenate([form.codes().numpy() for form in forms])
    np.testing.assert_array_equal(stored, expected)
    scales = constants[inputs[1].removesuffix("_float32")]
    assert scales.dtype == np.float16
    np.testing.assert_array_equal(scales, np.concatenate([form.scales for form in forms]))
    points = np.concatenate([form.zero_points().numpy() for form in forms])
    if len(inputs) > 2 and inputs[2]:
        np.testing.assert_array_equal(read_codes(constants[inputs[2]], bits, groups), points)
    else:
        assert (points == 1 << (bits - 1)).all()


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 32), (4, 32), (4, 128), (8, 32)])
def test_every_code_of_every_graph(
    tiny_checkpoint: Checkpoint, tmp_path: Path, bits: int, group_size: int, symmetric: bool
) -> None:
    # 64 and 96 columns: groups of 128 leave ragged ends. One group of 8 bits is test_byte_rows'.
    checkpoint = quantize_checkpoint(tiny_checkpoint, bits, group_size, symmetric=symmetric)
    ToOnnx().export(checkpoint, tmp_path, RunContext())
    seen: set[str] = set()
    for role in ("vision", "embedding", "decoder"):
        graph = onnx.load(tmp_path / "onnx" / f"{role}.onnx").graph
        constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        for node in graph.node:
            attributes = {a.name: a.i for a in node.attribute}
            if node.op_type == "GatherBlockQuantized":
                inputs = [node.input[0], *node.input[2:]]
                # Versions before 1.27 know no 2-bit rows, and misread rows of half a byte.
                assert attributes["bits"] > 2
                if len(inputs) > 2:
                    assert constants[inputs[1].removesuffix("_float32")].shape[1] % 2 == 0 or (
                        attributes["bits"] == 8
                    )
            elif node.op_type == "MatMulNBits":
                inputs = [*node.input[1:]]
            elif node.op_type == "Gather" and node.name.endswith(".taken"):
                name = node.name.removesuffix(".taken")
                constants[f"{name}.scales"] = constants[f"{name}.scales_by_group"][..., 0]
                zeros = f"{name}.zeros"
                operands = [f"{name}.codes", f"{name}.scales", zeros if zeros in constants else ""]
                check_weight([checkpoint.form(name)], constants, operands, container_bits(bits))
                seen.add(name)
                continue
            else:
                continue
            assert attributes["block_size"] == group_size
            assert attributes["bits"] == container_bits(bits)
            prefix, _, roles = node.name.rpartition(".")
            names = [f"{prefix}.{r}_proj" for r in roles.replace("_proj", " ").split(" ") if r]
            names = [name.replace("._", ".") for name in names]
            if roles.count("_proj") <= 1:
                names = [node.name]
            forms = [checkpoint.form(name) for name in names]
            check_weight(forms, constants, inputs, container_bits(bits))
            seen.update(names)
    every = {linear.name for linear in checkpoint.spec.linears()} | {checkpoint.spec.decoder.head}
    assert seen == every


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from(BLOCK_SIZES),
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    columns=st.integers(1, 300),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_unpacking_undoes_packing(
    bits: int, group_size: int, rows: list[int], columns: int, symmetric: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    forms = [
        quantize_affine(
            torch.randn(count, columns, generator=generator), bits, group_size, symmetric=symmetric
        )
        for count in rows
    ]
    unpacked = unpack_weight(pack_weight(forms), bits=bits)
    expected = torch.cat([form.dequantize() for form in forms])
    # Without stored zero points the form knows the same implied ones.
    assert torch.equal(unpacked.dequantize(), expected)


@pytest.mark.parametrize("group_size", [8, 24, 96, 512])
def test_group_sizes_without_kernel_are_refused(group_size: int) -> None:
    form = quantize_affine(torch.randn(4, 192), 4, group_size)
    refusal = ToOnnx().explain(form.layout, form.shape).refusal
    assert refusal.startswith(f"group size {group_size} has no ONNX Runtime kernel")
    assert "16, 32, 64" in refusal


def test_floats_are_stored_as_narrowly_as_is_exact() -> None:
    brain = torch.randn(50).to(torch.bfloat16)
    assert narrowest_float(brain)[1] == onnx.TensorProto.BFLOAT16
    half = torch.tensor([1.0 + 2**-10])
    assert narrowest_float(half)[1] == onnx.TensorProto.FLOAT16
    wide = torch.tensor([1.0 + 2**-20, 1e30])
    array, data_type = narrowest_float(wide)
    assert data_type == onnx.TensorProto.FLOAT
    np.testing.assert_array_equal(array, wide.numpy())


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_rows_of_a_table_are_the_same_in_every_version(
    tmp_path: Path, bits: int, groups: int, symmetric: bool
) -> None:
    """Versions before 1.27 read some grids of `GatherBlockQuantized` wrongly: they are not used."""
    torch.manual_seed(0)
    form = quantize_affine(torch.randn(7, 16 * groups - 3), bits, 16, symmetric=symmetric)
    packed = pack_weight([form])
    zeros = packed.zeros
    ends_in_half_a_byte = zeros is not None and groups * packed.bits % 8 != 0
    assert gathers_blocks(packed) == (packed.bits > 2 and not ends_in_half_a_byte)
    path = tmp_path / "graph.onnx"
    with WeightFile(tmp_path / "weights.bin") as weights:
        graph = GraphWriter("rows", weights, opset=18)
        rows = affine_rows(graph, "table", packed, "ids")
        graph.node("Identity", [rows], name="rows", output="rows")
        graph.save(
            path,
            [TensorSignature(name="ids", dtype="int64", shape=(1, "L"))],
            [TensorSignature(name="rows", dtype="float32", shape=(1, "L", form.in_features))],
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    ids = np.array([[6, 0, 3, 3, 1]])
    (found,) = session.run(["rows"], {"ids": ids})
    np.testing.assert_array_equal(found[0], form.dequantize().numpy()[ids[0]])

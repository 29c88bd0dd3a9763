"""int8 weights of one scale per row: their kernels compute what torch says, on every row alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pocketvlm.bundle import TensorSignature
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.export.onnx.byte_rows import (
    RoundedOver,
    byte_codes,
    integer_product,
    narrow_rows,
    row_product,
)
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.export.onnx.writer import GraphWriter, WeightFile
from pocketvlm.models.layers import Part
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.reference_graph.activation_rounding import input_rounding, round_per_tile
from pocketvlm.runtime.onnx import engine
from pocketvlm.runtime.onnx.engine import EXACT_SUMS, onnxruntime, require_exact_sums
from pocketvlm.weights.affine import AffineWeight
from tests.export.rig import (
    Decoder,
    make_prompt,
    open_session,
    quantize_affine,
    quantize_checkpoint,
)

PARTS: dict[RoundedOver, Part] = {"tile": "tower", "row": "decoder"}


def run_product(
    folder: Path, form: AffineWeight, inputs: Tensor, bias: Tensor | None, over: RoundedOver
) -> np.ndarray:
    rows, columns = form.shape
    with WeightFile(folder / "weights.bin") as weights:
        graph = GraphWriter("layer", weights, opset=18)
        operands = (
            "inputs",
            graph.constant("codes", byte_codes([form])),
            graph.constant("scales", form.scales[:, 0].float().numpy()),
        )
        added = None if bias is None else graph.constant("bias", bias.numpy())
        found = integer_product(graph, "layer", operands, added, rounded_over=over)
        graph.node("Identity", [found], name="outputs", output="outputs")
        graph.save(
            folder / "layer.onnx",
            [TensorSignature(name="inputs", dtype="float32", shape=(1, "n", columns))],
            [TensorSignature(name="outputs", dtype="float32", shape=(1, "n", rows))],
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    require_exact_sums(options)
    session = onnxruntime.InferenceSession(
        folder / "layer.onnx", options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"inputs": inputs.numpy()})[0]


@pytest.mark.parametrize("over", ["tile", "row"])
def test_sums_of_the_largest_codes_do_not_saturate(tmp_path: Path, over: RoundedOver) -> None:
    form = quantize_affine(torch.ones(16, 64), 8, None, symmetric=True)
    found = run_product(tmp_path, form, torch.ones(1, 3, 64), None, over)
    np.testing.assert_allclose(found, 64, rtol=1e-3)


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_weights_that_are_made_do_not_saturate(tmp_path: Path, sign: int) -> None:
    """The session's setting reaches constants alone, so they are made in the type that is safe."""
    names = ("made.codes", "made.scales")
    with WeightFile(tmp_path / "weights.bin") as weights:
        unpack = GraphWriter("unpack", weights, opset=18)
        dense = unpack.constant("dense", np.full((16, 64), sign, np.float32))
        narrow_rows(unpack, "made", dense, names)
        layer = GraphWriter("layer", weights, opset=18)
        found = row_product(layer, "layer", ("inputs", *names), None, is_made=True)
        layer.node("Identity", [found], name="outputs", output="outputs")
        made = [
            TensorSignature(name=names[0], dtype="uint8", shape=(64, 16)),
            TensorSignature(name=names[1], dtype="float32", shape=(16,)),
        ]
        inputs = TensorSignature(name="inputs", dtype="float32", shape=(1, "n", 64))
        outputs = TensorSignature(name="outputs", dtype="float32", shape=(1, "n", 16))
        unpack.save(tmp_path / "unpack.onnx", [], made)
        layer.save(tmp_path / "layer.onnx", [inputs, *made], [outputs])
    options = onnxruntime.SessionOptions()
    require_exact_sums(options)
    first, second = (
        onnxruntime.InferenceSession(
            tmp_path / f"{name}.onnx", options, providers=["CPUExecutionProvider"]
        )
        for name in ("unpack", "layer")
    )
    codes, scales = first.run(list(names), {})
    given = {"inputs": np.ones((1, 3, 64), np.float32), names[0]: codes, names[1]: scales}
    np.testing.assert_allclose(second.run(None, given)[0], 64 * sign, rtol=1e-3)


def random_layer(rows: int, seed: int = 0) -> tuple[AffineWeight, Tensor, Tensor]:
    """A weight that uses all of its codes, inputs with a token that is far larger, and a bias."""
    generator = torch.Generator().manual_seed(seed)
    form = quantize_affine(torch.randn(96, 200, generator=generator), 8, None, symmetric=True)
    inputs = torch.randn(1, rows, 200, generator=generator)
    inputs[0, 0] *= 30
    return form, inputs, torch.randn(96, generator=generator)


@pytest.mark.parametrize("over", ["tile", "row"])
@pytest.mark.parametrize("rows", [1, 5, 130])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_is_what_the_kernel_computes(
    tmp_path: Path, over: RoundedOver, rows: int, has_bias: bool
) -> None:
    form, inputs, bias = random_layer(rows)
    added = bias if has_bias else None
    found = run_product(tmp_path, form, inputs, added, over)
    rounding = input_rounding(form.layout, 200, PARTS[over], "onnx")
    assert rounding is not None
    weight = form.dequantize().double()
    offset = bias.double() if has_bias else torch.zeros(96, dtype=torch.float64)
    expected = (rounding(inputs).double() @ weight.T + offset).numpy()
    exact = (inputs.double() @ weight.T + offset).numpy()
    largest = np.abs(expected).max()
    assert np.abs(found - expected).max() < 2e-6 * largest
    assert np.abs(found - exact).max() > 1e-4 * largest


def slow_tile(values: np.ndarray) -> np.ndarray:
    """The rule of a tile in float64, number by number."""
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    if high == low:
        return np.zeros_like(values)
    step = (high - low) / 255
    zero = round(-low / step)
    flat = [(min(max(round(x / step) + zero, 0), 255) - zero) * step for x in values.flat]
    return np.array(flat).reshape(values.shape)


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    shift=st.floats(-50, 50, width=32),
)
def test_a_tile_is_rounded_by_its_own_range(values: list[float], shift: float) -> None:
    tile = torch.tensor(values)[None, :, None] + shift
    other = tile.flip(1) * 7 - 3
    rounded = round_per_tile(torch.cat([tile, other]))
    # The tile beside it changes nothing.
    assert torch.equal(rounded[:1], round_per_tile(tile))
    step = (max(float(tile.max()), 0) - min(float(tile.min()), 0)) / 255
    # In float32 a number on the border between two codes may take either.
    assert np.abs(rounded[0].double().numpy() - slow_tile(tile[0].double().numpy())).max() <= (
        step * 1.001 + 1e-30
    )
    assert float((rounded[:1] - tile).abs().max()) <= step * 1.001 + 1e-30
    assert bool((rounded[:1][tile == 0] == 0).all())


def test_a_row_of_a_decoder_does_not_depend_on_those_beside_it(tmp_path: Path) -> None:
    form, inputs, bias = random_layer(9)
    inputs[0, 3] = 0
    whole = run_product(tmp_path, form, inputs, bias, "row")
    for row in range(9):
        alone = run_product(tmp_path, form, inputs[:, row : row + 1], bias, "row")
        np.testing.assert_array_equal(alone[0, 0], whole[0, row])
    np.testing.assert_array_equal(whole[0, 3], bias.numpy())
    exact = (inputs.double() @ form.dequantize().double().T + bias.double()).numpy()
    loss = {
        over: np.abs(run_product(tmp_path, form, inputs, bias, over) - exact)[0, 1:].max()
        for over in PARTS
    }
    # The first row is thirty times as large as the others, and costs them nothing.
    assert loss["row"] < loss["tile"] / 5


def test_codes_lie_in_the_file_once(
    tiny_checkpoint: Checkpoint, tmp_path: Path, ctx: RunContext
) -> None:
    checkpoint = quantize_checkpoint(tiny_checkpoint, 8, None, symmetric=True)
    ToOnnx().export(checkpoint, tmp_path, ctx)
    places: dict[str, set[str]] = {}
    for role in ("vision", "embedding", "decoder"):
        path = tmp_path / "onnx" / f"{role}.onnx"
        raw = onnx.load(path, load_external_data=False).graph
        for tensor in raw.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if tensor.name.endswith(".codes") and "offset" in entries:
                places.setdefault(tensor.name, set()).add(entries["offset"])
        graph = onnx.load(path).graph
        stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        operators = [node.op_type for node in graph.node]
        products = {"vision": "DynamicQuantizeMatMul", "decoder": "MatMulIntegerToFloat"}
        assert "MatMulNBits" not in operators
        assert role == "embedding" or products[role] in operators
        for name, codes in stored.items():
            if name.endswith(".codes"):
                assert codes.dtype == np.int8
                assert codes.min() < -100
        for linear, form in checkpoint.forms().items():
            if f"{linear.name}.codes" in stored:
                expected = form.codes().numpy().astype(np.int16) - 128
                np.testing.assert_array_equal(stored[f"{linear.name}.codes"], expected)
    spec = checkpoint.spec
    assert len(places[f"{spec.decoder.embedding}.codes"]) == 1


def test_a_prompt_in_pieces_has_the_logits_of_the_whole(
    tiny_checkpoint: Checkpoint, tmp_path: Path, ctx: RunContext
) -> None:
    checkpoint = quantize_checkpoint(tiny_checkpoint, 8, None, symmetric=True)
    ToOnnx().export(checkpoint, tmp_path, ctx)
    _, _, prompt = make_prompt(checkpoint)
    embeds, positions = prompt.embeds.numpy(), prompt.positions.numpy()
    whole = Decoder(tmp_path, checkpoint.spec)(embeds, positions)
    pieces = Decoder(tmp_path, checkpoint.spec)
    for start in range(0, embeds.shape[1], 3):
        found = pieces(embeds[:, start : start + 3], positions[:, start : start + 3])
    # Attention sums float32 in another order, after which a number may fall to its other code.
    assert np.abs(found - whole).max() < 0.02 * np.abs(whole).max()


@pytest.mark.parametrize(
    ("machine", "sets", "asked"),
    [
        ("x86_64", ["avx2", "fma"], True),
        ("AMD64", [], True),
        ("x86_64", ["avx2", "avx512_vnni"], False),
        ("x86_64", ["avx2", "avx_vnni"], False),
        ("AMD64", ["AVX512VNNI"], False),
        ("aarch64", ["asimd"], False),
    ],
)
def test_exact_sums_are_asked_for_where_pairs_of_products_saturate(
    monkeypatch: pytest.MonkeyPatch, machine: str, sets: list[str], asked: bool
) -> None:
    found = {"machine": machine, "instruction_sets": sets}
    monkeypatch.setattr(engine, "describe_processor", lambda: found)
    options = onnxruntime.SessionOptions()
    require_exact_sums(options)
    key, value = EXACT_SUMS
    if asked:
        assert options.get_session_config_entry(key) == value
        return
    with pytest.raises(RuntimeError):
        options.get_session_config_entry(key)


@pytest.mark.parametrize("over", ["tile", "row"])
def test_the_setting_leaves_the_numbers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over: RoundedOver
) -> None:
    form, inputs, bias = random_layer(7)
    plain = run_product(tmp_path, form, inputs, bias, over)
    monkeypatch.setattr(
        engine, "describe_processor", lambda: {"machine": "x86_64", "instruction_sets": []}
    )
    exact = run_product(tmp_path, form, inputs, bias, over)
    np.testing.assert_allclose(exact, plain, rtol=1e-5, atol=1e-5)


def test_a_decoder_with_masks_has_rows_as_well(tmp_path: Path, ctx: RunContext) -> None:
    """Constants of masks and of rounding are not taken for each other."""
    write_tiny_model("gemma3", tmp_path / "model")
    checkpoint = Checkpoint.load(tmp_path / "model")
    assert checkpoint.spec.decoder.has_masks
    quantize_checkpoint(checkpoint, 8, None, symmetric=True)
    ToOnnx().export(checkpoint, tmp_path, ctx)
    constants = onnx.load(tmp_path / "onnx" / "decoder.onnx").graph.initializer
    kinds = {tensor.name: tensor.data_type for tensor in constants}
    assert kinds["int8.zero"] == onnx.TensorProto.UINT8
    assert kinds["zero"] == onnx.TensorProto.INT64
    assert open_session(tmp_path, "decoder").get_outputs()

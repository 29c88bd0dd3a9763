"""Codebooks and float zero points in ONNX: small in the file, the very weights in the session."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
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
from pocketvlm.errors import UnsupportedError
from pocketvlm.export.onnx.expansion import affine_rows, codebook_matrix, codebook_rows
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.export.onnx.weights import pack_weight, unpack_weight
from pocketvlm.export.onnx.writer import GraphWriter, WeightFile
from pocketvlm.pipeline.assemble import build_bundle
from pocketvlm.recipes.load import load_recipe
from pocketvlm.reference.random_models import tiny_config, write_random_model
from pocketvlm.runtime.onnx.engine import onnxruntime
from pocketvlm.runtime.onnx.versions import FLOAT_ZEROS_2BIT_VERSION
from pocketvlm.runtime.versions import is_older
from pocketvlm.stages import PlanState
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.codebook import CodebookWeight, Lookup
from pocketvlm.weights.layout import AffineLayout, CodebookLayout
from tests.export.parity.test_onnx_bundles import SAMPLES
from tests.export.rig import make_prompt, open_session

CONTEXT = RunContext(threads=1)

PLANS = {
    "plain": CodebookLayout(index_bits=8, vector_length=4, row_scales=True),
    "palette": CodebookLayout(index_bits=3, vector_length=1, row_groups=2),
    "wide": CodebookLayout(index_bits=6, vector_length=4, column_groups=2, residual_bits=4),
    "everything": CodebookLayout(
        index_bits=5,
        vector_length=4,
        row_groups=2,
        column_groups=2,
        residual_bits=2,
        outlier_columns=4,
        outlier_bits=4,
        row_scales=True,
        column_scales=True,
    ),
}


def random_lookup(
    rows: int, columns: int, bits: int, length: int, groups: tuple[int, int], scale: float
) -> Lookup:
    indices = torch.randint(0, 1 << bits, (rows // length, columns))
    books = torch.randn(*groups, 1 << bits, length) * scale
    return Lookup.from_indices(indices, books.to(torch.float16), index_bits=bits)


def random_form(plan: CodebookLayout, shape: tuple[int, int]) -> CodebookWeight:
    """What a plan stands for, as large as a layer's weights usually are."""
    rows, columns = shape
    scale = 0.5 * columns**-0.5
    groups = (plan.row_groups, plan.column_groups)
    main = columns - plan.outlier_columns

    def look_up(columns: int, bits: int, length: int, groups: tuple[int, int]) -> Lookup:
        return random_lookup(rows, columns, bits, length, groups, scale)

    return CodebookWeight(
        main=look_up(main, plan.index_bits, plan.vector_length, groups),
        residual=(
            None
            if plan.residual_bits is None
            else look_up(main, plan.residual_bits, plan.vector_length, groups)
        ),
        outliers=(
            look_up(plan.outlier_columns, plan.outlier_bits, plan.outlier_length, (1, 1))
            if plan.outlier_columns
            else None
        ),
        order=(
            torch.randperm(columns).to(torch.int32)
            if plan.outlier_columns or plan.column_groups > 1
            else None
        ),
        row_scales=(torch.rand(rows) + 0.5).half() if plan.row_scales else None,
        column_scales=(torch.rand(columns) + 0.5).half() if plan.column_scales else None,
        column_offsets=(torch.randn(columns) * scale / 8).half() if plan.column_scales else None,
    )


def put_everywhere(checkpoint: Checkpoint, plan: CodebookLayout) -> Checkpoint:
    torch.manual_seed(0)
    for linear, form in checkpoint.forms().items():
        checkpoint.set_form(linear.name, random_form(plan, form.shape))
    return checkpoint


def run_graph(
    forms: dict[str, CodebookWeight | AffineWeight], ids: np.ndarray
) -> dict[str, np.ndarray]:
    """Each weight's matrix (of codebooks) and rows, out of one session."""
    outputs: list[TensorSignature] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        with WeightFile(Path(folder) / "weights.bin") as weights:
            graph = GraphWriter("test", weights, opset=18)

            def finish(value: str, name: str, shape: tuple[int | str, ...]) -> None:
                graph.node("Identity", [value], name=name, output=name)
                outputs.append(TensorSignature(name=name, dtype="float32", shape=shape))

            for name, form in forms.items():
                rows, columns = form.shape
                if isinstance(form, CodebookWeight):
                    matrix = codebook_matrix(graph, f"{name}.all", form)
                    finish(matrix, f"{name}_matrix", (columns, rows))
                    taken = codebook_rows(graph, f"{name}.some", form, "ids")
                else:
                    taken = affine_rows(graph, name, pack_weight([form]), "ids")
                finish(taken, f"{name}_rows", (1, "L", columns))
            inputs = [TensorSignature(name="ids", dtype="int64", shape=(1, "L"))]
            graph.save(path, inputs, outputs)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [output.name for output in outputs]
        return dict(zip(names, session.run(names, {"ids": ids}), strict=True))


@settings(max_examples=12, deadline=None)
@given(
    bits=st.integers(1, 12),
    length=st.sampled_from([1, 2, 4]),
    groups=st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 3)]),
    columns=st.integers(5, 40),
    is_whole=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_sessions_hold_what_dequantize_defines(
    bits: int, length: int, groups: tuple[int, int], columns: int, is_whole: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    plan = CodebookLayout(
        index_bits=bits,
        vector_length=length,
        row_groups=groups[0],
        column_groups=groups[1],
        residual_bits=3 if is_whole else None,
        outlier_columns=2 if is_whole else 0,
        outlier_bits=7,
        row_scales=is_whole,
        column_scales=is_whole,
    )
    form = random_form(plan, (16, columns))
    ids = np.array([[3, 0, 15, 9, 9, 8]])
    found = run_graph({"layer": form}, ids)
    dense = form.dequantize().numpy()
    np.testing.assert_array_equal(found["layer_matrix"].T, dense)
    np.testing.assert_array_equal(found["layer_rows"][0], dense[ids[0]])


@pytest.mark.parametrize("family", ["llava", "smolvlm"])
def test_a_checkpoint_of_codebooks_is_certified(
    family: str, tiny_paths: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = put_everywhere(Checkpoint.load(tiny_paths[family]), PLANS["everything"])
    built = build_bundle(
        checkpoint, load_recipe("float"), (ToOnnx(),), tmp_path / "bundle", SAMPLES, CONTEXT
    )
    assert built.parity.failures() == []
    said = {
        part: how
        for component in built.bundle.manifest.components
        for part, how in component.precision.items()
    }
    assert said["decoder"] == "1.75-bit codebook v4 k32 with residual, float32 in memory"


def test_matrices_are_expanded_when_the_session_starts(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    put_everywhere(tiny_checkpoint, PLANS["everything"])
    ToOnnx().export(tiny_checkpoint, tmp_path, CONTEXT)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        tmp_path / "onnx" / "decoder.onnx", options, providers=["CPUExecutionProvider"]
    )
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert not {"BitShift", "BitwiseAnd", "BitwiseOr", "Transpose"} & set(kinds)
    assert kinds.count("Cast") == 1
    constants = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    assert len(products) == 7 * tiny_checkpoint.spec.decoder.depth + 1
    assert all(node.input[1] in constants for node in products)


def test_what_layers_share_is_stored_once(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint = put_everywhere(tiny_checkpoint, PLANS["plain"])
    ToOnnx().export(checkpoint, tmp_path / "own", CONTEXT)
    forms = checkpoint.forms()
    first = next(iter(forms.values()))
    assert isinstance(first, CodebookWeight)
    for linear, form in forms.items():
        assert isinstance(form, CodebookWeight)
        main = Lookup(
            packed=form.main.packed,
            codebooks=first.main.codebooks,
            index_bits=8,
            columns=form.main.columns,
        )
        shared = CodebookWeight(main=main, row_scales=form.row_scales)
        checkpoint.set_form(linear.name, shared)
    ToOnnx().export(checkpoint, tmp_path / "shared", CONTEXT)
    own, shared_bytes = (
        (tmp_path / name / "onnx" / "weights.bin").stat().st_size for name in ("own", "shared")
    )
    saved = (len(forms) - 1) * PLANS["plain"].codebook_bytes()
    assert own - shared_bytes == pytest.approx(saved, rel=0.03)


@pytest.fixture(scope="module", params=["llava", "smolvlm"])
def small_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that weights, not names, decide the size."""
    config = tiny_config(request.param)
    config["text_config"] |= {"hidden_size": 320, "intermediate_size": 1024, "vocab_size": 4000}
    config["vision_config"] |= {"hidden_size": 320, "intermediate_size": 1024}
    path = tmp_path_factory.mktemp(request.param)
    write_random_model(config, path)
    return path


@pytest.mark.parametrize("name", PLANS)
def test_prediction(small_path: Path, tmp_path: Path, name: str) -> None:
    checkpoint = put_everywhere(Checkpoint.load(small_path), PLANS[name])
    ToOnnx().export(checkpoint, tmp_path, CONTEXT)
    written = sum(file.stat().st_size for file in (tmp_path / "onnx").iterdir())
    predicted = ToOnnx().predict(
        checkpoint.spec, dict.fromkeys(checkpoint.spec.linears(), PLANS[name])
    )
    assert sum(predicted.part_bytes.values()) == pytest.approx(written, rel=0.03)
    (warning,) = predicted.warnings
    assert "dense float32 once loaded" in warning


def float_zeros(shape: tuple[int, int], bits: int, group_size: int = 32) -> AffineWeight:
    rows, columns = shape
    groups = -(-columns // group_size)
    top = (1 << bits) - 1
    return AffineWeight.from_codes(
        torch.randint(0, top + 1, (rows, groups * group_size)),
        ((torch.rand(rows, groups) + 0.5) / (top * columns**0.5)).half(),
        (torch.rand(rows, groups) * top).half(),
        bits=bits,
        group_size=group_size,
        in_features=columns,
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_float_zero_points(
    tiny_checkpoint: Checkpoint, tmp_path: Path, bits: int, exact: ToOnnx
) -> None:
    if bits == 2 and is_older(onnxruntime.__version__, FLOAT_ZEROS_2BIT_VERSION):
        pytest.skip("a version without this kernel, which the runner refuses")
    checkpoint = tiny_checkpoint
    torch.manual_seed(bits)
    for linear, form in checkpoint.forms().items():
        weight = float_zeros(form.shape, bits)
        assert torch.equal(
            unpack_weight(pack_weight([weight]), bits=bits).dequantize(),
            weight.dequantize(),
        )
        checkpoint.set_form(linear.name, weight)
    components = exact.export(checkpoint, tmp_path, CONTEXT)
    assert "float zeros" in components[2].precision["decoder"]
    pixels, visual, _ = make_prompt(checkpoint)
    embeds, _ = open_session(tmp_path, "vision").run(None, {"pixel_values": pixels.numpy()})
    error = np.abs(embeds - visual.embeds.numpy()).max() / visual.embeds.abs().max().item()
    assert error < 2e-5
    ids = np.array([[5, 0, 17, 5]])
    (rows,) = open_session(tmp_path, "embedding").run(None, {"input_ids": ids})
    table = checkpoint.form(checkpoint.spec.decoder.embedding)
    np.testing.assert_array_equal(rows, table.take_rows(torch.from_numpy(ids)).numpy())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", [64, 71])
def test_rows_of_a_table_with_float_zero_points(bits: int, columns: int) -> None:
    torch.manual_seed(bits)
    table = float_zeros((9, columns), bits)
    ids = np.array([[8, 0, 3, 3]])
    found = run_graph({"table": table}, ids)["table_rows"]
    np.testing.assert_array_equal(found, table.take_rows(torch.from_numpy(ids)).numpy())


def test_float_zero_points_of_eight_bits_are_refused(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    spec = tiny_checkpoint.spec
    linear = spec.linears()[0]

    def state(bits: int) -> PlanState:
        layout = AffineLayout(bits=bits, group_size=32, symmetric=False, float_zeros=True)
        return replace(PlanState.of(spec), layouts=dict.fromkeys(spec.linears()) | {linear: layout})

    (refusal,) = ToOnnx().refuse(state(8))
    assert linear.name in refusal
    assert "integer zero points" in refusal
    assert ToOnnx().refuse(state(4)) == ()
    (warning,) = ToOnnx().predict(spec, state(4).layouts).warnings
    assert "float32: slower" in warning
    tiny_checkpoint.set_form(linear.name, float_zeros(linear.shape, 8))
    with pytest.raises(UnsupportedError, match=rf"^{re.escape(refusal)}$"):
        ToOnnx().export(tiny_checkpoint, tmp_path, CONTEXT)

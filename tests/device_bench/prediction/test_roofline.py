from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import onnx
import pytest

from pocketvlm.bundle import Bundle, VisualSchedule
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.quantization.affine.rtn import round_to_nearest
from pocketvlm.context import RunContext
from pocketvlm.device_bench.devices.derive import load_reference
from pocketvlm.device_bench.prediction.costs import ExportedModel, vision_operators
from pocketvlm.device_bench.prediction.decoder_work import count_decoder, decoder_operators
from pocketvlm.device_bench.prediction.operators import (
    CachedAttention,
    Elementwise,
    Product,
    TowerAttention,
    Work,
)
from pocketvlm.device_bench.prediction.predicted import beside_measured
from pocketvlm.device_bench.prediction.rates import (
    BYTE_ROWS_KERNEL,
    FLOAT_KERNEL,
    ProductRates,
    kernel_bits,
    quantized_kernel,
)
from pocketvlm.device_bench.prediction.roofline import Question, _seconds, predict_times
from pocketvlm.device_bench.prediction.work import ModelWork, count_work
from pocketvlm.device_bench.workload import PRESETS
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.json_io import decode, encode
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.pipeline.plan import plan_stages
from pocketvlm.pipeline.predict import exported_model, question_of
from pocketvlm.reference.random_models import TINY_MODELS, tiny_config, write_random_model
from pocketvlm.reference.shapes import list_shapes, load_shape
from pocketvlm.reports.measurement import (
    Figure,
    Latency,
    MeasuredArm,
    Memory,
    PlausibilityCheck,
)
from pocketvlm.stages import PlanState
from pocketvlm.weights.layout import AffineLayout

RATES = load_reference().rates
QUESTION = Question(
    text_rows=32,
    visual_rows=64,
    tiles_by_vision=(1,),
    picture_pixels=512**2,
    new_tokens=16,
)
PRODUCTS = ("MatMulNBits", "FusedMatMul", "MatMul")


def model_of(name: str, kernel: str = FLOAT_KERNEL) -> ExportedModel:
    spec = load_shape(name).spec
    return ExportedModel(
        spec=spec,
        kernels=dict.fromkeys(spec.linears(), kernel),
        visual_tokens=spec.visual_tokens,
    )


def work_of(name: str, kernel: str = FLOAT_KERNEL) -> ModelWork:
    return count_work(model_of(name, kernel))


@pytest.mark.parametrize(
    ("name", "is_quantized"),
    [
        *((name, False) for name in TINY_MODELS),
        *((name, True) for name in ("llava", "lfm2-vl", "qwen3-vl")),
    ],
)
def test_what_is_counted_is_what_the_exported_graphs_hold(tmp_path, name, is_quantized):
    write_random_model(tiny_config(name), tmp_path / "model")
    checkpoint = Checkpoint.load(tmp_path / "model")
    spec, kernels = checkpoint.spec, {}
    for linear in spec.linears():
        kernels[linear] = FLOAT_KERNEL
        # Keys stay float, so that queries, keys and values cannot be joined.
        if is_quantized and linear.role != "k_proj":
            layout = AffineLayout(bits=4, group_size=16, symmetric=False)
            codes, _ = round_to_nearest(
                checkpoint.form(linear.name), scheme=_scheme(), group_size=layout.group_size
            )
            checkpoint.set_form(linear.name, codes)
            kernels[linear] = quantized_kernel(4, 16)
    (tmp_path / "bundle").mkdir()
    write_graphs(checkpoint, (ToOnnx(),), tmp_path / "bundle", "", RunContext(threads=1))
    bundle = Bundle.open(tmp_path / "bundle", verify=False)
    model = ExportedModel(spec=spec, kernels=kernels, visual_tokens=spec.visual_tokens)
    for role, operators in (
        ("vision", vision_operators(model)),
        ("decoder", decoder_operators(count_decoder(model), text_rows=7)),
    ):
        graph = onnx.load(bundle.file(f"onnx/{role}.onnx"), load_external_data=False).graph
        found = Counter(node.op_type for node in graph.node)
        counted = list(operators)
        products = [one for one in counted if isinstance(one, Product)]
        if role == "vision":
            products = products[1:]  # the patches, which are a Conv in the graph
            attentions = sum(isinstance(one, TowerAttention) for one in counted)
            assert found["MultiHeadAttention"] == attentions
        else:
            attentions = sum(isinstance(one, CachedAttention) for one in counted)
            assert found["GroupQueryAttention"] == attentions
        multiplied = sum(one.nodes for one in products)
        assert sum(found[name] for name in PRODUCTS) == multiplied + _rotary(found, role)
        norms = sum(
            one.nodes for one in counted if isinstance(one, Elementwise) and one.kind == "norm"
        )
        # A tower that has no norm after its last block is counted one too many.
        assert norms - _norms(found) in ((0, 1) if role == "vision" else (0,))
        quantized = sum(one.nodes for one in products if one.kernel != FLOAT_KERNEL)
        assert found["MatMulNBits"] == quantized


def test_a_long_call_is_counted_as_two_graphs_hold_it(tmp_path):
    write_random_model(tiny_config("llava"), tmp_path / "model")
    checkpoint = Checkpoint.load(tmp_path / "model")
    for linear in checkpoint.spec.linears():
        if linear.part == "decoder":
            codes, _ = round_to_nearest(
                checkpoint.form(linear.name), scheme=_scheme(), group_size=16
            )
            checkpoint.set_form(linear.name, codes)
    (tmp_path / "bundle").mkdir()
    target = ToOnnx(int8_prefill_rows=4)
    write_graphs(checkpoint, (target,), tmp_path / "bundle", "", RunContext(threads=1))
    found: Counter[str] = Counter()
    for role in ("prefill", "decoder"):
        file = tmp_path / "bundle" / "onnx" / f"{role}.onnx"
        found.update(node.op_type for node in onnx.load(file, load_external_data=False).graph.node)
    model = exported_model(PlanState.of_checkpoint(checkpoint), (target,))
    long = list(decoder_operators(count_decoder(model), text_rows=7, past=5))
    products = [one for one in long if isinstance(one, Product)]
    of_rows = [one for one in products if one.kernel == BYTE_ROWS_KERNEL]
    assert sum(one.nodes for one in of_rows) == found["MatMulIntegerToFloat"]
    assert {one.rows for one in of_rows} == {6}
    assert {one.rows for one in products if one.kernel != BYTE_ROWS_KERNEL} == {1}
    others = sum(one.nodes for one in products) - sum(one.nodes for one in of_rows)
    assert others == found["MatMulNBits"] + found["FusedMatMul"]
    attentions = [one for one in long if isinstance(one, CachedAttention)]
    assert len(attentions) == found["GroupQueryAttention"]
    width = checkpoint.spec.decoder.heads * checkpoint.spec.decoder.head_dim
    assert {one.macs for one in attentions} == {2 * 6 * 11 * width, 2 * 1 * 12 * width}
    short = [
        one
        for one in decoder_operators(count_decoder(model), text_rows=3)
        if isinstance(one, Product)
    ]
    assert not any(one.kernel == BYTE_ROWS_KERNEL for one in short)


def _scheme():
    from pocketvlm.recipes.load import load_recipe

    (stage,) = load_recipe("int8-safe").stages
    return stage.rules[0].scheme


def _norms(found: Counter[str]) -> int:
    return sum(count for name, count in found.items() if name.endswith("Normalization"))


def _rotary(found: Counter[str], role: str) -> int:
    """The product that turns positions of several axes into angles."""
    return int(role == "decoder" and found["Cos"] > 0 and found["Range"] == 0)


def test_a_prompt_multiplies_every_row_with_every_matrix_but_those_after_the_last_attention():
    model = model_of("smolvlm-256m")
    rows = 96
    operators = decoder_operators(count_decoder(model), text_rows=rows)
    macs = sum(one.macs for one in operators if isinstance(one, Product))
    decoder = [linear for linear in model.kernels if linear.part == "decoder"]
    last = max(linear.block for linear in decoder)
    alone = [
        linear
        for linear in decoder
        if linear.block == last and linear.role not in ("q_proj", "k_proj", "v_proj")
    ]
    size = lambda linears: sum(x.in_features * x.out_features for x in linears)  # noqa: E731
    head = model.spec.decoder.vocab_size * model.spec.decoder.hidden_size
    assert macs == rows * (size(decoder) - size(alone)) + size(alone) + head


def test_rows_that_end_early_are_not_counted_after_it():
    model = replace(model_of("smolvlm-256m"), visual_schedule=VisualSchedule.ending(10))
    rows = [
        one.rows
        for one in decoder_operators(count_decoder(model), text_rows=32, visual_rows=64)
        if isinstance(one, CachedAttention)
    ]
    assert rows == [96] * 10 + [32] * 20


def test_a_product_takes_its_arithmetic_or_its_reading_whichever_is_longer():
    rates = ProductRates(macs_s=1e9, weights_s=1e8, node_us=5)
    assert rates.seconds(1, 1_000_000) == pytest.approx(0.01 + 5e-6)
    assert rates.seconds(10, 1_000_000) == pytest.approx(0.01 + 5e-6)
    assert rates.seconds(100, 1_000_000) == pytest.approx(0.1 + 5e-6)


def test_bits_read_of_a_weight_include_scales_and_zero_points():
    assert kernel_bits(FLOAT_KERNEL) == 32
    assert kernel_bits("int4 g32") == 4 + (16 + 4) / 32


def test_a_kernel_that_was_not_calibrated_is_taken_for_the_most_similar_one():
    assert RATES.product("int4 g256") is RATES.products["int4 g128"]
    assert RATES.product("int8 g16") is RATES.products["int8 g32"]
    assert RATES.product("int2 g16") is RATES.products["int2 g64"]


@pytest.mark.parametrize("name", list_shapes())
def test_every_shape_is_predicted(name):
    times = predict_times(work_of(name, "int4 g32"), QUESTION, RATES)
    assert all(math.isfinite(value) and value > 0 for value in vars(times).values())
    parts = times.preprocess_ms + times.vision_ms + times.ttft_engine_ms
    assert times.ttft_user_ms == pytest.approx(parts, rel=0.01)


def test_fewer_bits_decode_faster_and_more_rows_take_longer():
    float_work = work_of("smolvlm-256m")
    dense = predict_times(float_work, QUESTION, RATES)
    int4 = predict_times(work_of("smolvlm-256m", "int4 g64"), QUESTION, RATES)
    assert int4.decode_tok_s > 2 * dense.decode_tok_s
    longer = replace(QUESTION, text_rows=320)
    assert predict_times(float_work, longer, RATES).prefill_ms > dense.prefill_ms
    five = predict_times(float_work, replace(QUESTION, tiles_by_vision=(5,)), RATES)
    assert five.vision_ms == pytest.approx(5 * dense.vision_ms)
    text = replace(QUESTION, tiles_by_vision=(), visual_rows=0, picture_pixels=0)
    assert predict_times(float_work, text, RATES).vision_ms == 0


def test_every_vision_graph_takes_its_own_time_for_its_own_tiles():
    model = model_of("qwen2-vl-2b")
    small = replace(model, spec=model.spec.with_picture_size(112, 224), visual_tokens=16)
    both = count_work(model, small)

    def vision_ms(*tiles):
        return predict_times(both, replace(QUESTION, tiles_by_vision=tiles), RATES).vision_ms

    assert vision_ms(1, 0) == predict_times(count_work(model), QUESTION, RATES).vision_ms
    assert vision_ms(0, 1) == predict_times(count_work(small), QUESTION, RATES).vision_ms
    assert vision_ms(0, 1) < vision_ms(1, 0)
    assert vision_ms(2, 3) == pytest.approx(2 * vision_ms(1, 0) + 3 * vision_ms(0, 1))


@pytest.mark.parametrize("name", ["smolvlm-256m", "lfm2-vl-450m", "qwen3-vl-2b"])
def test_counts_survive_a_file_and_add_up_to_the_same_times(name):
    """Added up, operators take what each of them takes alone, as `Work` promises."""
    model = replace(model_of(name), visual_schedule=None)
    work = count_work(model)
    assert decode(ModelWork, json.loads(json.dumps(encode(work)))) == work
    alone = sum(_seconds(one, RATES, "float32") for one in vision_operators(model))
    together = sum(_seconds(one, RATES, "float32") for one in work.visions[0].work.operators())
    assert together == pytest.approx(alone)
    assert work.decoder.depth == model.spec.decoder.depth
    assert (len(work.decoder.runs) == 1) == (name != "lfm2-vl-450m")  # layers of two kinds


def test_a_workload_becomes_the_rows_that_the_reduction_keeps():
    spec = load_shape("llava-interleave-0.5b").spec
    state = plan_stages((), spec)
    question = question_of(replace(state, visual_tokens=100), PRESETS["vlm"])
    assert (question.tiles, question.visual_rows, question.text_rows) == (1, 100, 32)
    assert question_of(state, PRESETS["short"]).tiles == 0
    two = question_of(state, replace(PRESETS["vlm"], pictures=2))
    assert (two.tiles, two.visual_rows) == (2, 2 * spec.visual_tokens)


def test_kernels_that_nobody_calibrated_are_named():
    spec = load_shape("smolvlm-256m").spec
    state = plan_stages((), spec)
    assert "accuracy_level 0" in exported_model(state, [ToOnnx(accuracy_level=0)])
    first = next(iter(state.layouts))
    grid = AffineLayout(bits=4, group_size=32, symmetric=False, float_zeros=True)
    changed = replace(state, layouts={**state.layouts, first: grid})
    assert exported_model(changed, [ToOnnx()]).startswith(f"{first.name}: float zero points")
    three = replace(grid, bits=3, float_zeros=False)
    held = exported_model(replace(state, layouts={**state.layouts, first: three}), [ToOnnx()])
    assert held.kernel(first.name) == "int4 g32"


def test_predicted_stands_beside_measured_where_both_are_known():
    times = predict_times(work_of("smolvlm-256m"), QUESTION, RATES)
    latency = Latency(
        figures={"prefill_ms": Figure(median=2 * times.prefill_ms), "load_ms": Figure()}
    )
    memory = Memory(before_load_rss_bytes=100, peak_rss_bytes=500)
    arm = MeasuredArm(latency=latency, memory=memory)
    prefill, ram = beside_measured(arm, times=times, ram_bytes=300)
    assert (prefill.name, prefill.ratio) == ("prefill_ms", pytest.approx(0.5))
    assert (ram.name, ram.measured, ram.ratio) == ("ram_bytes", 400, pytest.approx(0.75))
    assert beside_measured(arm, times=None, ram_bytes=None) == ()
    crashed = MeasuredArm(latency=Latency(failed="it crashed"))
    assert beside_measured(crashed, times=times, ram_bytes=300) == ()


def test_nothing_stands_beside_a_figure_that_is_not_published():
    times = predict_times(work_of("smolvlm-256m"), QUESTION, RATES)
    figures = ("prefill_ms", "peak_rss_bytes")
    arm = MeasuredArm(
        latency=Latency(figures={name: Figure(median=1.0) for name in ("prefill_ms", "vision_ms")}),
        memory=Memory(before_load_rss_bytes=100, peak_rss_bytes=500),
        plausibility=(PlausibilityCheck(check="nonsense", figures=figures, verdict="fail"),),
    )
    (row,) = beside_measured(arm, times=times, ram_bytes=300)
    assert row.name == "vision_ms"


def test_counts_are_bounded_as_they_are_stored_and_not_as_rows_multiply_them():
    most = 2**60
    work = Work(products=(), elementwise=(Elementwise(kind="norm", elements=most),))
    assert next(work.of_rows(64)).elements == 64 * most
    with pytest.raises(ValueError, match="elements must be 0 to 1,152,921,504,606,846,976"):
        Work(products=(), elementwise=(Elementwise(kind="norm", elements=most + 1),))
    with pytest.raises(ValueError, match="rows, weights, nodes must be at least 0"):
        Product(kernel=FLOAT_KERNEL, rows=-1, weights=1)

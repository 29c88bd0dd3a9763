"""Simulated activations are those of the kernels: torch then computes what the artifact does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from pocketvlm.bundle import Bundle
from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.errors import InputError
from pocketvlm.evaluation.score import score_checkpoint
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.export.onnx.weights import pack_weight
from pocketvlm.export.parity.metrics import relative_error
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.pipeline.sources import score_subject
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.reference_graph.activation_rounding import (
    round_per_block,
    round_per_token,
    simulate_activations,
)
from pocketvlm.reference_graph.forward import DecoderInputs, decode_logits, encode_images
from pocketvlm.runtime.engines import open_engine
from pocketvlm.runtime.onnx.engine import onnxruntime
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.sparse import SparseWeight
from tests.export.rig import (
    Decoder,
    make_prompt,
    open_session,
    quantize_affine,
    quantize_checkpoint,
)


def run_kernel(form: AffineWeight, inputs: Tensor) -> Tensor:
    """One `MatMulNBits` at accuracy level 4."""
    packed = pack_weight([form])
    constants = {"codes": packed.codes, "scales": packed.scales.astype(np.float32)}
    if packed.zeros is not None:
        constants["zeros"] = packed.zeros
    node = helper.make_node(
        "MatMulNBits",
        ["inputs", *constants],
        ["outputs"],
        domain="com.microsoft",
        K=packed.in_features,
        N=packed.out_features,
        bits=packed.bits,
        block_size=packed.block_size,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("inputs", TensorProto.FLOAT, ["n", packed.in_features])],
        [helper.make_tensor_value_info("outputs", TensorProto.FLOAT, ["n", packed.out_features])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run(None, {"inputs": inputs.numpy()})[0])


@pytest.mark.parametrize("rows", [1, 5, 130])
@pytest.mark.parametrize("width", [192, 200])
@pytest.mark.parametrize(
    ("bits", "group"), [(8, 32), (4, 16), (4, 32), (4, 64), (4, 256), (3, 32), (2, 32), (2, 16)]
)
def test_a_layer_is_what_the_kernel_computes(
    tiny_checkpoint: Checkpoint, bits: int, group: int, width: int, rows: int
) -> None:
    generator = torch.Generator().manual_seed(bits * group + rows)
    form = quantize_affine(torch.randn(96, width, generator=generator), bits, group)
    inputs = torch.randn(rows, width, generator=generator)
    inputs[0, :40] = 0
    layer = tiny_checkpoint.layer(tiny_checkpoint.spec.decoder.head)
    layer.form = form
    exact = inputs.double() @ form.dequantize().double().T
    with torch.no_grad(), simulate_activations(tiny_checkpoint, "onnx"):
        simulated = layer(inputs)
    found = run_kernel(form, inputs).double()
    scale = float(exact.abs().max())
    assert float((found - simulated).abs().max()) < 2e-6 * scale
    if (bits, group) == (2, 16):  # the one width that has no integer kernel
        assert float((found - exact).abs().max()) < 2e-6 * scale
    else:
        assert float((found - exact).abs().max()) > 1e-4 * scale


@pytest.mark.parametrize(
    ("bits", "group", "density"), [(4, 32, 1.0), (8, 32, 1.0), (8, None, 1.0), (4, 32, 0.5)]
)
def test_the_simulated_model_is_far_closer_to_the_artifact(
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    ctx: RunContext,
    bits: int,
    group: int | None,
    density: float,
) -> None:
    checkpoint = quantize_checkpoint(tiny_checkpoint, bits, group, symmetric=group is None)
    if density < 1:  # masked integers run on the same kernels
        for linear, form in checkpoint.forms().items():
            largest = form.dequantize().abs()
            mask = largest >= largest.quantile(1 - density)
            checkpoint.set_form(linear.name, SparseWeight.from_form(form, mask))
    ToOnnx().export(checkpoint, tmp_path, ctx)
    vision = open_session(tmp_path, "vision")
    plain, simulated = [], []
    for seed in range(8):
        pixels, _, prompt = make_prompt(checkpoint, seed)
        first = DecoderInputs(
            embeds=prompt.embeds[:, :4],
            positions=prompt.positions[:, :4],
            is_visual=prompt.is_visual[:, :4],
            next_position=torch.tensor([4]),
        )
        (embeds, _) = vision.run(None, {"pixel_values": pixels.numpy()})
        logits = Decoder(tmp_path, checkpoint.spec)(first.embeds.numpy(), first.positions.numpy())
        for errors, arithmetic in ((plain, "float32"), (simulated, "onnx")):
            with torch.inference_mode(), simulate_activations(checkpoint, arithmetic):
                visual = encode_images(checkpoint, pixels).embeds.numpy()
                expected = decode_logits(checkpoint, first, last_only=True)[0, 0].numpy()
            errors.append((rms(embeds - visual), rms(logits - expected)))
    before, after = np.array(plain), np.array(simulated)
    # Now and then a value is rounded to its other neighbour, because float32 was summed in another
    # order, and all that depends on it then differs as much as by rounding. In four tokens that is
    # rare, in a whole picture it is not.
    assert (after[:, 1] < before[:, 1] / 1000).sum() >= 6
    assert np.median(after[:, 0]) < 0.85 * np.median(before[:, 0])


def test_short_convolutions_are_simulated_as_they_run(tmp_path: Path, ctx: RunContext) -> None:
    """Their products are where rounding costs most; four rows are few enough not to drift apart."""
    write_tiny_model("lfm2-vl", tmp_path / "model")
    checkpoint = quantize_checkpoint(Checkpoint.load(tmp_path / "model"), 4)
    write_graphs(checkpoint, [ToOnnx()], tmp_path / "bundle", "", ctx)
    runner = open_engine(Bundle.open(tmp_path / "bundle"), "onnx", threads=1)
    plain, simulated = [], []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        rows = DecoderInputs(
            embeds=torch.randn(1, 4, checkpoint.spec.decoder.hidden_size, generator=generator),
            positions=torch.arange(4)[None, None],
            is_visual=torch.zeros(1, 4, dtype=torch.bool),
            next_position=torch.tensor([4]),
        )
        runner.reset()
        found = runner.decode(rows.embeds.numpy(), rows.positions[0].numpy())
        for errors, arithmetic in ((plain, "float32"), (simulated, "onnx")):
            with torch.inference_mode(), simulate_activations(checkpoint, arithmetic):
                expected = decode_logits(checkpoint, rows, last_only=True)[0, 0].numpy()
            errors.append(relative_error(found, expected))
    assert min(plain) > 5e-3
    assert sum(error < 1e-5 for error in simulated) >= 6


def test_parts_can_be_simulated_alone(tiny_checkpoint: Checkpoint) -> None:
    checkpoint = quantize_checkpoint(tiny_checkpoint, 4)
    pixels, _, prompt = make_prompt(checkpoint)

    def run() -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            embeds = encode_images(checkpoint, pixels).embeds
            return embeds, decode_logits(checkpoint, prompt, last_only=True)

    embeds, logits = run()
    with simulate_activations(checkpoint, "onnx", tower=False):
        found = run()
    assert torch.equal(found[0], embeds)
    assert not torch.equal(found[1], logits)
    with simulate_activations(checkpoint, "onnx", decoder=False):
        found = run()
    assert not torch.equal(found[0], embeds)
    assert torch.equal(found[1], logits)


def test_float_layers_stay_float(tiny_checkpoint: Checkpoint) -> None:
    _, _, prompt = make_prompt(tiny_checkpoint)
    with torch.inference_mode():
        expected = decode_logits(tiny_checkpoint, prompt)
        for arithmetic in ("onnx", "executorch", "float32"):
            with simulate_activations(tiny_checkpoint, arithmetic):
                assert torch.equal(decode_logits(tiny_checkpoint, prompt), expected)


def test_the_rule_per_token_is_that_of_the_operators_which_executorch_lowers() -> None:
    # Importing the module registers them.
    from torch.ao.quantization.fx import _decomposed  # noqa: F401

    operators = torch.ops.quantized_decomposed
    for shift in (-3.0, 0.0, 0.5, 20.0):
        inputs = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)) + shift
        scale, zero = operators.choose_qparams_per_token_asymmetric(inputs, torch.int8)
        codes = operators.quantize_per_token(inputs, scale, zero, -128, 127, torch.int8)
        expected = operators.dequantize_per_token(
            codes, scale, zero, -128, 127, torch.int8, torch.float32
        )
        torch.testing.assert_close(round_per_token(inputs), expected, rtol=0, atol=0)


@settings(deadline=None, max_examples=50)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=70),
    block=st.sampled_from([16, 32, 64]),
)
def test_rounding_moves_no_value_by_more_than_half_a_step(values: list[float], block: int) -> None:
    inputs = torch.tensor([values])
    for rounded, widths in (
        (round_per_block(inputs, block), [block] * (-(-len(values) // block))),
        (round_per_token(inputs), [len(values)]),
    ):
        assert rounded.shape == inputs.shape
        assert bool((rounded[inputs == 0] == 0).all())
        start = 0
        for width in widths:
            part = inputs[:, start : start + width]
            step = max(float(part.abs().max()) / 127, 2e-7)
            moved = (rounded[:, start : start + width] - part).abs().max()
            # Per token the zero point is rounded too, which costs another half.
            assert float(moved) <= step * 1.001
            start += width


def rms(values: np.ndarray) -> float:
    return float(np.sqrt((values.astype(np.float64) ** 2).mean()))


def reference(row: np.ndarray, block: int) -> np.ndarray:
    """The rule in float64, channel by channel."""
    out = np.zeros_like(row)
    for start in range(0, len(row), block):
        part = row[start : start + block]
        largest = max(abs(value) for value in part)
        for offset, value in enumerate(part):
            level = 0 if largest == 0 else round(value * 127 / largest)
            out[start + offset] = level * largest / 127
    return out


def test_blocks_against_a_slow_reference() -> None:
    inputs = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    expected = np.stack([reference(row, 32) for row in inputs.double().numpy()])
    np.testing.assert_allclose(round_per_block(inputs, 32), expected, atol=1e-6)


def test_scores_can_follow_a_runtime(tiny_checkpoint: Checkpoint) -> None:
    checkpoint = quantize_checkpoint(tiny_checkpoint, 4)
    samples = CalibrationSet.from_reference(0, 3)
    seen: list[int] = []
    layer = checkpoint.layer(checkpoint.spec.decoder.head)
    handle = layer.register_forward_hook(lambda *_: seen.append(len(layer._forward_pre_hooks)))
    for arithmetic, hooks in (("float32", 0), ("onnx", 1), ("executorch", 1)):
        seen.clear()
        score_checkpoint(checkpoint, samples, blind=False, max_new_tokens=2, arithmetic=arithmetic)
        assert set(seen) == {hooks}
    handle.remove()
    with pytest.raises(ValueError, match="arithmetic is 'int8'; allowed are float32, onnx"):
        score_checkpoint(checkpoint, samples, arithmetic="int8")


def test_a_subject_can_be_scored_under_a_runtimes_arithmetic(
    tiny_checkpoint: Checkpoint, tmp_path: Path, ctx: RunContext
) -> None:
    samples = CalibrationSet.from_reference(0, 2)
    quantize_checkpoint(tiny_checkpoint, 4).save(tmp_path / "checkpoint")
    assert score_subject(str(tmp_path / "checkpoint"), samples, ctx, "onnx").n == 2
    with pytest.raises(InputError, match="arithmetic is 'int8'; allowed are float32, onnx, exec"):
        score_subject(str(tmp_path / "checkpoint"), samples, ctx, "int8")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="is a bundle, which has the arithmetic of its runtime"):
        score_subject(str(tmp_path / "bundle"), samples, ctx, "onnx")

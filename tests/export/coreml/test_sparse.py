"""Sparse packages: every mask bit, code, scale and table entry, and what they compute."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.errors import UnsupportedError
from pocketvlm.export.coreml.constexpr import Codes, Constexpr
from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.export.coreml.weights import pack_weight
from pocketvlm.export.coreml.writer import identifier
from pocketvlm.reference.random_models import tiny_config, write_random_model
from pocketvlm.stages import PlanState
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.layout import AffineLayout, CodebookLayout, SparseLayout
from pocketvlm.weights.nonzeros import AffineNonzeros, CodebookNonzeros, FloatNonzeros
from pocketvlm.weights.sparse import SparseWeight
from tests.export.coreml.rig import Decoder, PackageContent, export, run_vision
from tests.export.coreml.test_codes import functions_of
from tests.export.coreml.test_forms import make_codebook
from tests.export.coreml.test_matches_torch import BOUNDS, TorchDecoder, difference
from tests.export.rig import make_prompt, quantize_affine

pytest.importorskip("coremltools", reason="the coreml extra is not installed")

Planned = AffineLayout | CodebookLayout | None

# Group sizes that leave a ragged end of 64 and 96 columns, and one that spans the row.
PLANS: tuple[Planned, ...] = (
    None,
    *(
        AffineLayout(bits=bits, group_size=size, symmetric=symmetric)
        for bits, size in ((2, 32), (3, 64), (4, 40), (4, 1024), (8, 64))
        for symmetric in (False, True)
    ),
    *(
        CodebookLayout(index_bits=bits, vector_length=1, row_groups=groups, row_scales=scaled)
        for bits, groups, scaled in ((4, 1, False), (2, 2, True), (5, 1, True), (8, 2, False))
    ),
)


def make_sparse(dense: torch.Tensor, planned: Planned, density: float, seed: int) -> SparseWeight:
    """Keeps the largest elements of a matrix, in a form."""
    form: WeightForm
    if planned is None:
        form = DenseWeight(values=dense)
    elif isinstance(planned, AffineLayout):
        form = quantize_affine(dense, planned.bits, planned.group_size, symmetric=planned.symmetric)
    else:
        form = make_codebook(
            *dense.shape,
            bits=planned.index_bits,
            groups=(planned.row_groups, 1),
            scaled=planned.row_scales,
            seed=seed,
        )
    kept = max(1, round(density * dense.numel()))
    mask = torch.zeros(dense.numel(), dtype=torch.bool)
    mask[dense.abs().flatten().topk(kept).indices] = True
    return SparseWeight.from_form(form, mask.view(dense.shape))


def make_all_sparse(checkpoint: Checkpoint, plans: Sequence[Planned] = PLANS) -> Checkpoint:
    """Every kind in turn, layer by layer, with densities between a tenth and all."""
    for index, linear in enumerate(checkpoint.spec.linears()):
        dense = checkpoint.form(linear.name).dequantize()
        density = (0.1, 0.5, 0.77, 1.0)[index % 4]
        form = make_sparse(dense, plans[index % len(plans)], density, index)
        checkpoint.set_form(linear.name, form)
    return checkpoint


def expand(packed: Constexpr) -> Any:
    """The definitions of the operators, element by element, in float64."""
    held = {
        name: operand.values if isinstance(operand, Codes) else operand
        for name, operand in packed.operands.items()
    }
    if packed.source is not None:
        held["mask"], held["nonzero_data"] = expand(packed.source)
    mask = next(held.pop(name) for name in ("mask", "data_mask", "indices_mask") if name in held)
    rows, columns = packed.shape
    if "shape" in held:
        bits = [(int(mask[place // 8]) >> (place % 8)) & 1 for place in range(rows * columns)]
        assert len(mask) == -(-rows * columns // 8)
        mask = np.array(bits).reshape(rows, columns)
    values = list(held["indices_nonzero_data" if "lut" in held else "nonzero_data"])
    assert len(values) == int(mask.sum())
    result = []
    for row, column in np.argwhere(mask):
        value = values[len(result)]
        if "lut" in held:
            assert value < held["lut"].shape[2]
            value = held["lut"][row // (rows // held["lut"].shape[0]), 0, value, 0]
        if "scale" in held:
            assert columns % held["scale"].shape[1] == 0
            place = (row, column // (columns // held["scale"].shape[1]))
            shift = float(held["offset"][place]) if "offset" in held else 0.0
            value = float(held["scale"][place]) * (float(value) - shift)
        result.append(float(value))
    if packed.operator != "constexpr_sparse_to_dense":
        return mask, result
    dense = np.zeros(packed.shape)
    dense[mask != 0] = result
    return dense


@settings(max_examples=60, deadline=None)
@given(
    planned=st.sampled_from(PLANS),
    half_rows=st.integers(1, 4),
    columns=st.integers(1, 70),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**20),
)
def test_what_is_packed_is_the_form(
    planned: Planned, half_rows: int, columns: int, density: float, seed: int
) -> None:
    dense = torch.randn(2 * half_rows, columns, generator=torch.Generator().manual_seed(seed))
    form = make_sparse(dense, planned, density, seed)
    packed = pack_weight("layer", form, deployment="iOS18", float_type=np.float16)
    assert isinstance(packed, Constexpr)
    assert packed.operator == "constexpr_sparse_to_dense"
    expanded = expand(packed)
    np.testing.assert_allclose(expanded[:, :columns], form.dequantize(), rtol=1e-6, atol=0)
    assert not expanded[:, columns:].any()


def check_layer(content: PackageContent, function: str, name: str, form: SparseWeight) -> None:
    """Everything in the package against everything in the form."""
    made = content.functions[function][identifier(f"{name}.weight")]
    assert made.type == "constexpr_sparse_to_dense"
    values, keeps, columns = form.values, form.keeps().numpy(), form.in_features

    def check_mask(operation: Any, parameter: str) -> None:
        mask = content.operand(function, operation, parameter)
        np.testing.assert_array_equal(mask[:, :columns], keeps)
        assert not mask[:, columns:].any()

    if isinstance(values, FloatNonzeros):
        check_mask(made, "mask")
        stored = content.operand(function, made, "nonzero_data")
        assert stored.dtype == np.float16
        np.testing.assert_array_equal(stored, values.values)
        return
    inner = content.operand(function, made, "nonzero_data")
    assert content.operand(function, made, "mask") is inner
    if isinstance(values, AffineNonzeros):
        assert inner.type == "constexpr_sparse_blockwise_shift_scale"
        np.testing.assert_array_equal(content.operand(function, inner, "scale"), values.scales)
        if values.bits in (2, 3):
            table = content.operand(function, inner, "nonzero_data")
            assert content.operand(function, inner, "data_mask") is table
            check_mask(table, "indices_mask")
            steps = content.operand(function, table, "lut").reshape(-1)
            codes = steps[content.operand(function, table, "indices_nonzero_data")]
        else:
            check_mask(inner, "data_mask")
            codes = content.operand(function, inner, "nonzero_data")
        implied = 1 << (values.bits - 1) if values.zeros is None else 0
        np.testing.assert_array_equal(codes.astype(np.int64) + implied, form.stored())
        assert ("offset" in inner.inputs) == (values.zeros is not None)
        if values.zeros is not None:
            offsets = content.operand(function, inner, "offset").astype(np.int64)
            np.testing.assert_array_equal(offsets, values.zeros)
        return
    assert isinstance(values, CodebookNonzeros)
    if values.row_scales is not None:
        scales = content.operand(function, inner, "scale")
        np.testing.assert_array_equal(scales[:, 0], values.row_scales)
        inner = content.operand(function, inner, "nonzero_data")
    assert inner.type == "constexpr_lut_to_sparse"
    check_mask(inner, "indices_mask")
    indices = content.operand(function, inner, "indices_nonzero_data")
    np.testing.assert_array_equal(indices, form.stored())
    table, entries = content.operand(function, inner, "lut"), values.codebooks.shape[2]
    np.testing.assert_array_equal(table[:, :, :entries], values.codebooks)


def check_outputs(checkpoint: Checkpoint, folder: Path, precision: str) -> None:
    close, cached = BOUNDS[precision]
    pixels, visual, prompt = make_prompt(checkpoint)
    seen = run_vision(folder / "vision.mlpackage", pixels.numpy())
    assert difference(seen["embeds"], visual.embeds) < close
    decoder, definition = Decoder(folder / "decoder.mlpackage"), TorchDecoder(checkpoint)
    logits = decoder.prefill(prompt.embeds.numpy(), prompt.positions.numpy())
    assert difference(logits, definition(prompt.embeds, prompt.positions)) < cached
    embeds = checkpoint.layer(checkpoint.spec.decoder.embedding)(torch.tensor([[7]]))
    assert difference(decoder.embed([7]), embeds) < close


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_every_layer_comes_back_and_outputs_are_torchs(
    tiny_checkpoint: Checkpoint, tmp_path: Path, precision: str
) -> None:
    checkpoint = make_all_sparse(tiny_checkpoint)
    folder = export(checkpoint, tmp_path, precision=precision)
    check_outputs(checkpoint, folder, precision)
    if precision == "float32":
        return  # scales and floats are widened; what is stored is read at float16
    places = functions_of(checkpoint, folder)
    for linear in checkpoint.spec.linears():
        form = checkpoint.form(linear.name)
        assert isinstance(form, SparseWeight)
        check_layer(*places[linear.part], linear.name, form)


def test_ios17_has_masks_for_floats(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint = make_all_sparse(tiny_checkpoint, [None])
    folder = export(checkpoint, tmp_path, deployment="iOS17")
    content = PackageContent(folder / "vision.mlpackage")
    for linear in checkpoint.spec.linears():
        form = checkpoint.form(linear.name)
        assert isinstance(form, SparseWeight)
        packed = pack_weight(linear.name, form, deployment="iOS17", float_type=np.float16)
        assert isinstance(packed, Constexpr)
        np.testing.assert_array_equal(expand(packed), form.dequantize())
        if linear.part == "tower":
            made = content.functions["main"][identifier(f"{linear.name}.weight")]
            values, mask = (content.operand("main", made, x) for x in ("nonzero_data", "mask"))
            np.testing.assert_array_equal(values, form.stored())
            bits = np.unpackbits(mask, bitorder="little", count=form.keeps().numel())
            np.testing.assert_array_equal(bits.reshape(form.shape), form.keeps())
    pixels, visual, _ = make_prompt(checkpoint)
    seen = run_vision(folder / "vision.mlpackage", pixels.numpy())
    assert difference(seen["embeds"], visual.embeds) < BOUNDS["float16"][0]


@pytest.mark.parametrize("planned", [PLANS[1], PLANS[-1]])
def test_ios17_has_no_joint_forms(
    tiny_checkpoint: Checkpoint, tmp_path: Path, planned: Planned
) -> None:
    spec = tiny_checkpoint.spec
    first = spec.linears()[0]
    forms = dict.fromkeys(spec.linears()) | {first: SparseLayout(density=0.5, values=planned)}
    state = replace(PlanState.of(spec), layouts=forms)
    assert not ToCoreml().refuse(state)
    (refusal,) = ToCoreml(deployment="iOS17").refuse(state)
    assert refusal.startswith(f"coreml: {first.name}: sparse integers and tables need iOS 18; ")
    assert "sparse float16 values would work" in refusal
    form = make_sparse(tiny_checkpoint.form(first.name).dequantize(), planned, 0.5, 0)
    tiny_checkpoint.set_form(first.name, form)
    with pytest.raises(UnsupportedError, match=rf"^{re.escape(refusal)}$"):
        ToCoreml(deployment="iOS17").export(tiny_checkpoint, tmp_path, RunContext())


@pytest.fixture(scope="module")
def small_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that weights, not names, decide the size."""
    config = tiny_config("smolvlm")
    config["text_config"] |= {"hidden_size": 192, "intermediate_size": 512, "vocab_size": 3000}
    config["vision_config"] |= {"hidden_size": 192, "intermediate_size": 512}
    path = tmp_path_factory.mktemp("smolvlm")
    write_random_model(config, path)
    return path


@pytest.mark.parametrize(
    ("deployment", "density", "values"),
    [
        ("iOS18", 0.5, None),
        ("iOS17", 0.5, None),
        ("iOS18", 0.5, AffineLayout(bits=4, group_size=32, symmetric=True)),
        ("iOS18", 0.2, AffineLayout(bits=3, group_size=80, symmetric=False)),
        (
            "iOS18",
            0.5,
            CodebookLayout(index_bits=5, vector_length=1, row_groups=2, row_scales=True),
        ),
    ],
    ids=str,
)
def test_prediction(
    small_path: Path, tmp_path: Path, deployment: str, density: float, values: Planned
) -> None:
    checkpoint = Checkpoint.load(small_path)
    forms = {}
    for index, linear in enumerate(checkpoint.spec.linears()):
        dense = checkpoint.form(linear.name).dequantize()
        form = make_sparse(dense, values, density, index)
        checkpoint.set_form(linear.name, form)
        forms[linear] = SparseLayout(density=density, values=values)
        # The rig's tables leave out one entry each, so that readers cannot count on full ones.
        left_out = 2 * values.row_groups if isinstance(values, CodebookLayout) else 0
        assert form.stored_bytes == forms[linear].stored_bytes(*form.shape) - left_out
    target = ToCoreml(deployment=deployment, context=64)
    target.export(checkpoint, tmp_path, RunContext())
    written = sum(f.stat().st_size for f in (tmp_path / "coreml").rglob("*") if f.is_file())
    prediction = target.predict(checkpoint.spec, forms)
    assert sum(prediction.part_bytes.values()) == pytest.approx(written, rel=0.03)


def test_descriptions() -> None:
    dense = torch.randn(4, 64)

    def stored(planned: Planned, density: float) -> str:
        form = make_sparse(dense, planned, density, 0)
        return ToCoreml().explain(form.layout, form.shape).stored

    assert [stored(plan, 0.5) for plan in (None, *PLANS[5:7])] == [
        "sparse float16",
        "sparse int4 g40 asymmetric",
        "sparse int4 g40 symmetric",
    ]
    assert stored(PLANS[-1], 0.25) == "sparse lut of 8-bit indices of values, 2 tables"

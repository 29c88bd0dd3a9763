"""Masked weights in ONNX: the very codes, exact zeros, and the bytes that were predicted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.reference.random_models import tiny_config, write_random_model
from pocketvlm.reference_graph.forward import decode_logits
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.layout import AffineLayout, CodebookLayout, SparseLayout, WeightLayout
from pocketvlm.weights.nonzeros import AffineNonzeros
from pocketvlm.weights.sparse import SparseWeight
from tests.export.coreml.test_forms import make_codebook
from tests.export.onnx.test_codes import read_codes
from tests.export.onnx.test_matches_torch import relative_error
from tests.export.rig import Decoder, make_mask, make_prompt, open_session, quantize_affine

Values = AffineLayout | CodebookLayout | None

INT4 = AffineLayout(bits=4, group_size=32, symmetric=False)


def grid(bits: int, *, symmetric: bool) -> AffineLayout:
    return AffineLayout(bits=bits, group_size=32, symmetric=symmetric)


def make_masked(
    form: WeightForm, values: Values, pattern: str, seed: int
) -> tuple[SparseWeight, SparseLayout]:
    """A weight with half of it masked, and its plan."""
    dense = form.dequantize()
    mask = make_mask(pattern, *form.shape, seed)
    if isinstance(values, AffineLayout):
        form = quantize_affine(dense, values.bits, values.group_size, symmetric=values.symmetric)
    elif values is not None:
        bits, groups = values.index_bits, (values.row_groups, 1)
        form = make_codebook(*form.shape, bits=bits, groups=groups, scaled=False, seed=seed)
    masked = SparseWeight.from_form(form, mask)
    return masked, SparseLayout(density=masked.density, values=values)


def mask_layers(
    checkpoint: Checkpoint, values: Values, pattern: str
) -> dict[object, WeightLayout | None]:
    """Masks everything but embedding and head, as pruning does; returns the plan."""
    plans: dict[object, WeightLayout | None] = {}
    for index, linear in enumerate(checkpoint.spec.linears()):
        plans[linear] = None
        if linear.part not in ("embedding", "head"):
            form, plans[linear] = make_masked(checkpoint.form(linear.name), values, pattern, index)
            checkpoint.set_form(linear.name, form)
    return plans


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_code_and_every_zero(
    tiny_checkpoint: Checkpoint, tmp_path: Path, bits: int, symmetric: bool
) -> None:
    checkpoint = tiny_checkpoint
    mask_layers(checkpoint, grid(bits, symmetric=symmetric), "unstructured")
    ToOnnx().export(checkpoint, tmp_path, RunContext())
    stored_bits = 4 if bits == 3 else bits
    seen = set()
    for role in ("vision", "decoder"):
        graph = onnx.load(tmp_path / "onnx" / f"{role}.onnx").graph
        constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        for node in graph.node:
            if node.op_type != "MatMulNBits":
                continue
            prefix, _, roles = node.name.rpartition(".")
            joined = roles.count("_proj") > 1
            names = [f"{prefix}.{r}_proj" for r in roles.split("_") if r != "proj"]
            names = names if joined else [node.name]
            forms = [checkpoint.form(name) for name in names]
            first = forms[0]
            assert isinstance(first, SparseWeight)
            assert isinstance(first.values, AffineNonzeros)
            width = first.values.scales.shape[1] * 32
            codes = read_codes(constants[node.input[1]], stored_bits, width)
            scales = constants[node.input[2].removesuffix("_float32")].astype(np.float32)
            zeros = np.full(scales.shape, 1 << (stored_bits - 1))
            if len(node.input) > 3 and node.input[3]:
                zeros = read_codes(constants[node.input[3]], stored_bits, scales.shape[1])
            centred = codes.reshape(*scales.shape, 32) - zeros[..., None]
            dense = (centred * scales[..., None]).reshape(codes.shape)[:, : first.in_features]
            keeps = np.concatenate([form.keeps().numpy() for form in forms])  # type: ignore[attr-defined]
            assert not dense[~keeps].any()
            kept = np.concatenate([form.stored().numpy() for form in forms])  # type: ignore[attr-defined]
            np.testing.assert_array_equal(codes[:, : first.in_features][keeps], kept)
            expected = np.concatenate([form.dequantize().numpy() for form in forms])
            np.testing.assert_array_equal(dense.astype(np.float32), expected)
            # What is padding means zero too.
            assert not centred.reshape(codes.shape)[:, first.in_features :].any()
            seen.update(names)
    parts = ("tower", "projector", "decoder")
    assert seen == {x.name for x in checkpoint.spec.linears() if x.part in parts}


def test_outputs_are_torchs_and_nothing_is_silent(
    tiny_checkpoint: Checkpoint, tmp_path: Path, exact: ToOnnx, ctx: RunContext
) -> None:
    checkpoint = tiny_checkpoint
    for index, (linear, form) in enumerate(checkpoint.forms().items()):
        weight = form.dequantize()
        affine = quantize_affine(weight, 4)
        if index % 4 == 3:  # beside integers without a mask, which are joined apart
            checkpoint.set_form(linear.name, affine)
            continue
        values: WeightForm = affine if index % 4 else form
        if index % 4 == 2:  # a grid without an exact zero
            zeros = affine.zero_points().to(torch.float16) + 0.5
            values = AffineWeight.from_codes(
                affine.codes(),
                affine.scales,
                zeros,
                bits=4,
                group_size=32,
                in_features=affine.in_features,
            )
        sparse = SparseWeight.from_form(values, weight.abs() > weight.abs().median())
        checkpoint.set_form(linear.name, sparse)
    components = exact.export(checkpoint, tmp_path, ctx)
    said = " ".join(str(part.precision) for part in components)
    assert "masked int4 g32 asymmetric, stored dense, 50% kept" in said
    assert "masked float32, stored dense, 50% kept" in said
    notes = " ".join(note for part in components for note in part.notes)
    assert "no code of their grid means zero" in notes
    assert "whose masked codes are their zero point" in notes
    assert "no kernel reads masked floats" in notes
    pixels, visual, prompt = make_prompt(checkpoint)
    embeds, _ = open_session(tmp_path, "vision").run(None, {"pixel_values": pixels.numpy()})
    assert relative_error(embeds, visual.embeds) < 2e-5
    decoder = Decoder(tmp_path, checkpoint.spec)
    with torch.inference_mode():
        expected = decode_logits(checkpoint, prompt, last_only=True)
    found = decoder(prompt.embeds.numpy(), prompt.positions.numpy())
    assert relative_error(found, expected[0, 0]) < 2e-5


@pytest.fixture(scope="module")
def small_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that weights, not names, decide the size."""
    config = tiny_config("llava")
    config["text_config"] |= {"hidden_size": 192, "intermediate_size": 512, "vocab_size": 1000}
    config["vision_config"] |= {"hidden_size": 192, "intermediate_size": 512}
    path = tmp_path_factory.mktemp("llava")
    write_random_model(config, path)
    return path


@pytest.mark.parametrize(
    ("pattern", "values"),
    [
        ("unstructured", None),
        ("unstructured", INT4),
        ("unstructured", grid(8, symmetric=True)),
        ("unstructured", CodebookLayout(index_bits=4, vector_length=1, row_groups=2)),
        ("2:4", grid(4, symmetric=True)),
        ("blocks", INT4),
    ],
    ids=str,
)
def test_prediction(small_path: Path, tmp_path: Path, pattern: str, values: Values) -> None:
    checkpoint = Checkpoint.load(small_path)
    plans = mask_layers(checkpoint, values, pattern)
    target = ToOnnx()
    target.export(checkpoint, tmp_path, RunContext())
    written = sum(file.stat().st_size for file in (tmp_path / "onnx").iterdir())
    prediction = target.predict(checkpoint.spec, plans)  # type: ignore[arg-type]
    assert sum(prediction.part_bytes.values()) == pytest.approx(written, rel=0.03)
    assert sum("masked" in warning for warning in prediction.warnings) == 1

"""Sparse weights in ONNX: dense, exact, and announced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.export.onnx import ToOnnx
from pocketvlm.forward import decode_logits
from pocketvlm.planned import PlannedAffine, PlannedSparse
from pocketvlm.weights import AffineWeight, SparseWeight
from tests.export.rig import Decoder, make_prompt, open_session, quantize_affine
from tests.export.test_onnx_matches_torch import relative_error


def test_sparse_weights_are_stored_dense(
    tiny_checkpoint: Checkpoint, tmp_path: Path, exact: ToOnnx, ctx: RunContext
) -> None:
    checkpoint = tiny_checkpoint
    forms: dict = {}
    for index, (linear, form) in enumerate(checkpoint.forms().items()):
        weight = form.dequantize()
        if index % 3 == 2:  # beside integers, which are joined apart
            checkpoint.set_form(linear.name, quantize_affine(weight, 4))
            forms[linear] = PlannedAffine(bits=4, group_size=32, symmetric=False)
            continue
        values = quantize_affine(weight, 4) if index % 3 else form
        mask = weight.abs() > weight.abs().median()
        sparse = SparseWeight.from_form(values, mask)
        checkpoint.set_form(linear.name, sparse)
        planned = PlannedAffine(bits=4, group_size=32, symmetric=False)
        forms[linear] = PlannedSparse(
            density=sparse.density, values=planned if isinstance(values, AffineWeight) else None
        )
    components = exact.export(checkpoint, tmp_path, ctx)
    assert any("stored dense, 50% kept" in str(part.precision) for part in components)
    pixels, visual, prompt = make_prompt(checkpoint)
    embeds, _ = open_session(tmp_path, "vision").run(None, {"pixel_values": pixels.numpy()})
    assert relative_error(embeds, visual.embeds) < 2e-5
    decoder = Decoder(tmp_path, checkpoint.spec)
    with torch.inference_mode():
        expected = decode_logits(checkpoint, prompt, last_only=True)
    found = decoder(prompt.embeds.numpy(), prompt.positions.numpy())
    assert relative_error(found, expected[0, 0]) < 2e-5
    assert np.isfinite(found).all()
    warnings = [w for w in exact.predict(checkpoint.spec, forms).warnings if "masked" in w]
    assert ["integers" in warning for warning in warnings] == [True, False]
    written = sum(file.stat().st_size for file in (tmp_path / "onnx").iterdir())
    predicted = sum(exact.predict(checkpoint.spec, forms).part_bytes.values())
    # Names and nodes weigh as much as the weights of a tiny model.
    assert predicted == pytest.approx(written, rel=0.2)

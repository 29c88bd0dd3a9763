"""A pruned and quantized checkpoint in Core ML: sparse operators, exact zeros, real bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.unstructured.magnitude import Magnitude
from pocketvlm.compress.pruning.unstructured.patterns import Blocked, Pattern, SemiStructured
from pocketvlm.compress.pruning.unstructured.pruner import Prune
from pocketvlm.compress.quantization.affine.rtn import RoundToNearest
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.context import RunContext
from pocketvlm.weights.nonzeros import AffineNonzeros, FloatNonzeros
from pocketvlm.weights.sparse import SparseWeight
from tests.export.coreml.rig import export
from tests.export.coreml.test_codes import functions_of
from tests.export.coreml.test_sparse import check_layer, check_outputs

pytest.importorskip("coremltools", reason="the coreml extra is not installed")

NO_SAMPLES = CalibrationSet.from_reference(1, 2)


def prune(checkpoint: Checkpoint, pattern: Pattern, bits: int | None) -> Checkpoint:
    """Half of every layer but embedding and head, as the stages do it."""
    checkpoint = Prune(score=Magnitude(), pattern=pattern).apply(
        checkpoint, NO_SAMPLES, RunContext(threads=1)
    )
    if bits is None:
        return checkpoint
    stage = RoundToNearest(rules=(WeightRule(match=".*", bits=bits, group_size=32),))
    return stage.apply(checkpoint, NO_SAMPLES, RunContext(threads=1))


@pytest.mark.parametrize(
    ("pattern", "bits"), [(SemiStructured(), 4), (Blocked(rows=1, columns=8), None)], ids=str
)
def test_masks_of_stages_arrive(
    tiny_checkpoint: Checkpoint, tmp_path: Path, pattern: Pattern, bits: int | None
) -> None:
    biases = {
        name: value.clone()
        for name, value in tiny_checkpoint.model.named_parameters()
        if name.endswith("bias")
    }
    checkpoint = prune(tiny_checkpoint, pattern, bits)
    folder = export(checkpoint, tmp_path, precision="float16")
    places = functions_of(checkpoint, folder)
    for linear, form in checkpoint.forms().items():
        if linear.part in ("embedding", "head"):
            assert not isinstance(form, SparseWeight)
            continue
        assert isinstance(form, SparseWeight)
        assert form.density == 0.5
        assert isinstance(form.values, AffineNonzeros if bits else FloatNonzeros)
        check_layer(*places[linear.part], linear.name, form)
    for name, value in checkpoint.model.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(value, biases[name])
    check_outputs(checkpoint, folder, "float16")

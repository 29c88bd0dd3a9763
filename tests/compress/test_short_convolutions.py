"""Stages on a decoder that has short convolutions in most of its layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pocketvlm import Awq, Gptq, Prune, QuantizeCache, Rotate
from pocketvlm.bundle import Bundle
from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.unstructured.magnitude import Magnitude
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.context import RunContext
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.export.torch_runner import TorchRunner
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.runtime.engines import open_engine
from pocketvlm.runtime.runner import Runner
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.sparse import SparseWeight

RULES = (WeightRule(part="decoder", bits=4, group_size=16),)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convolutions") / "model"
    write_tiny_model("lfm2-vl", folder)
    return folder


@pytest.fixture(scope="module")
def samples() -> CalibrationSet:
    return CalibrationSet.from_reference(0, 4)


def answer(runner: Runner) -> np.ndarray:
    """Logits after a few tokens, together and one by one."""
    logits = []
    for start, ids in ((0, [5, 6, 7, 8]), (4, [9]), (5, [10])):
        positions = np.arange(start, start + len(ids))[None]
        logits.append(runner.decode(runner.embed(ids), positions).copy())
    return np.stack(logits)


@pytest.mark.parametrize("stage", [Awq(rules=RULES, grid_points=3), Rotate(untie_head=True)])
def test_changes_of_float_weights_leave_answers_as_they_are(path, samples, stage):
    """Scales pass through the gate after a convolution, rotations through what stands around it."""
    before = answer(TorchRunner(Checkpoint.load(path), capacity=32))
    done = stage.apply(Checkpoint.load(path), samples, RunContext(threads=1))
    kernel = done.spec.decoder.convolutions[0]
    changed = [
        not torch.equal(done.form(name).dequantize(), Checkpoint.load(path).form(name).dequantize())
        for name in (*kernel.inputs, kernel.o)
    ]
    assert all(changed) if isinstance(stage, Rotate) else any(changed)
    np.testing.assert_allclose(answer(TorchRunner(done, capacity=32)), before, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("stage", "form"),
    [(Gptq(rules=RULES), AffineWeight), (Prune(score=Magnitude()), SparseWeight)],
    ids=["gptq", "prune"],
)
def test_all_linears_of_a_convolution_are_compressed_and_run(path, samples, tmp_path, stage, form):
    ctx = RunContext(threads=1)
    done = stage.apply(Checkpoint.load(path), samples, ctx)
    for convolution in done.spec.decoder.convolutions.values():
        for name in (*convolution.inputs, convolution.o):
            assert isinstance(done.form(name), form)
    write_graphs(done, (ToOnnx(accuracy_level=0),), tmp_path / "bundle", "", ctx)
    found = answer(open_engine(Bundle.open(tmp_path / "bundle"), "onnx", threads=1))
    expected = answer(TorchRunner(done, capacity=32))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


def test_an_int8_cache_has_scales_of_the_layers_that_have_attention(path, samples, tmp_path):
    ctx = RunContext(threads=1)
    done = QuantizeCache().apply(Checkpoint.load(path), samples, ctx)
    assert done.cache_grid is not None
    assert done.cache_grid.keys.shape[0] == 1
    done.save(tmp_path / "saved")
    again = Checkpoint.load(tmp_path / "saved")
    write_graphs(again, (ToOnnx(accuracy_level=0),), tmp_path / "bundle", "", ctx)
    found = answer(open_engine(Bundle.open(tmp_path / "bundle"), "onnx", threads=1))
    np.testing.assert_allclose(found, answer(TorchRunner(done, capacity=32)), rtol=0, atol=2e-4)

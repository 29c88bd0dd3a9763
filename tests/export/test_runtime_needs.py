"""What a target's files need of a runtime is read from the files."""

from __future__ import annotations

import pytest
import torch

from pocketvlm.bundle.manifest import Manifest
from pocketvlm.context import RunContext
from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline.assemble import write_graphs
from tests.export.onnx.test_codebook import float_zeros
from tests.export.rig import quantize_checkpoint

CONTEXT = RunContext(threads=1)


def test_onnx_names_opsets_and_operators(tiny_checkpoint, tmp_path):
    checkpoint = quantize_checkpoint(tiny_checkpoint, 4, 32, symmetric=True)
    manifest = write_graphs(checkpoint, (ToOnnx(),), tmp_path, "", CONTEXT)
    needs = manifest.runtimes["onnx"]
    assert (needs.runtime, needs.lowest_version) == ("ONNX Runtime", "1.25.0")
    assert needs.formats["ai.onnx"] == 23
    assert {"com.microsoft.MatMulNBits", "com.microsoft.GroupQueryAttention"} <= set(
        needs.operators
    )
    assert Manifest.from_json(manifest.to_json(), tmp_path).runtimes == manifest.runtimes


@pytest.mark.parametrize(("bits", "lowest"), [(2, "1.27.0"), (4, "1.25.0")])
def test_float_zero_points_of_two_bits_need_a_newer_runtime(
    tiny_checkpoint, tmp_path, bits, lowest
):
    torch.manual_seed(0)
    for linear, form in tiny_checkpoint.forms().items():
        if linear.part == "decoder":
            tiny_checkpoint.set_form(linear.name, float_zeros(form.shape, bits))
    components = ToOnnx().export(tiny_checkpoint, tmp_path, CONTEXT)
    assert ToOnnx().runtime_needs(tmp_path, components).lowest_version == lowest


@pytest.mark.parametrize(("deployment", "lowest"), [("iOS17", "17.0"), ("iOS18", "18.0")])
def test_coreml_names_the_system(tiny_checkpoint, tmp_path, deployment, lowest):
    pytest.importorskip("coremltools")
    target = ToCoreml(deployment=deployment)
    needs = target.runtime_needs(tmp_path, target.export(tiny_checkpoint, tmp_path, CONTEXT))
    assert (needs.runtime, needs.lowest_version) == ("iOS", lowest)
    assert needs.formats == {"specification": 8 if deployment == "iOS17" else 9}

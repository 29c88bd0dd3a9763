"""The readers of the other tools find the very same weights, layer by layer.

`make test-ecosystem` installs all but `vptq`, which brings a demo server and CUDA.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.checkpoint.convert import save_layout
from tests.ecosystem.libraries import needed
from tests.weights.formats.test_save_layout import quantize_affine, quantize_codebook

# Both libraries, and what they import, warn of much that is not ours.
pytestmark = pytest.mark.filterwarnings("ignore")


def tensors_of(stored, name):
    return {
        key.removeprefix(name + "."): value
        for key, value in stored.items()
        if key.startswith(name + ".")
    }


def test_vptq_finds_the_same_weights(tiny_checkpoint: Checkpoint, tmp_path):
    linear = pytest.importorskip("vptq.layers.vqlinear", reason="vptq is not installed")
    quantize_codebook(tiny_checkpoint)
    saved = save_layout(tiny_checkpoint, tmp_path / "out", layout="vptq")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    for name in saved.quantized:
        told = config["config_for_layers"][name]
        theirs = linear.VQuantLinear(**told, enable_proxy_error=False, dtype=torch.float32)
        theirs.load_state_dict(tensors_of(stored, name))
        outputs = theirs(torch.eye(told["in_features"])[None])[0]
        if theirs.bias is not None:
            outputs = outputs - theirs.bias
        assert torch.equal(outputs.T, tiny_checkpoint.form(name).dequantize()), name


def test_compressed_tensors_finds_the_same_weights(tiny_checkpoint: Checkpoint, tmp_path):
    """By its own reading of the configuration, down to which layer is of which group."""
    compressors = needed("compressed_tensors.compressors.pack_quantized.base")
    configs = needed("compressed_tensors.quantization")
    match = needed("compressed_tensors.utils.match")
    quantize_affine(tiny_checkpoint)
    saved = save_layout(tiny_checkpoint, tmp_path / "out", layout="compressed-tensors")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    told = configs.QuantizationConfig.model_validate(said)
    for name in saved.dense:
        assert not any(
            match.match_name(name, t) for g in told.config_groups.values() for t in g.targets
        )
    for name in saved.quantized:
        (group,) = [g for g in told.config_groups.values() if name in g.targets]
        theirs = compressors.PackedQuantizationCompressor.decompress(
            tensors_of(stored, name), group
        )
        own = tiny_checkpoint.form(name).dequantize()
        # Scales are float16 there, and one product is rounded once.
        assert torch.equal(theirs["weight"], own.half()), name


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_gptqmodel_finds_the_same_weights(tiny_checkpoint: Checkpoint, tmp_path, layout):
    linear = needed("gptqmodel.nn_modules.qlinear.torch")
    config = needed("gptqmodel.quantization.config")
    models = needed("gptqmodel.utils.model")
    quantize_affine(tiny_checkpoint)
    saved = save_layout(tiny_checkpoint, tmp_path / "out", layout=layout)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    told = config.QuantizeConfig.from_pretrained(str(tmp_path / "out"))
    for name in saved.dense:
        if name != tiny_checkpoint.spec.decoder.embedding:
            assert told.dynamic_get(name) is False
    for name in saved.quantized:
        layer = tiny_checkpoint.layer(name)
        rows, columns = layer.form.shape
        bits = told.dynamic_get(name, "bits", told.bits)
        theirs = linear.TorchLinear(
            bits=bits,
            group_size=told.dynamic_get(name, "group_size", told.group_size),
            sym=told.dynamic_get(name, "sym", told.sym),
            desc_act=False,
            in_features=columns,
            out_features=rows,
            bias=layer.bias is not None,
            pack_dtype=torch.int32,
        )
        theirs.load_state_dict(tensors_of(stored, name))
        if layout == "gptq":
            models.convert_gptq_v1_to_v2_format_module(theirs, bits=bits, pack_dtype=torch.int32)
        # It multiplies in float16, which rounds the one product once.
        assert torch.equal(theirs.dequantize_weight().T, layer.form.dequantize().half()), name

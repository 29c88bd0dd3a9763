"""Written checkpoints load by transformers' `from_pretrained`, and answer as they do here.

Weights are compared exactly, after the library has unpacked them by itself; then logits, and
finally the answers of a reference model to pictures.
"""

from __future__ import annotations

import pytest
import torch

from pocketvlm import RoundToNearest, WeightRule
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.checkpoint.convert import save_layout
from pocketvlm.context import RunContext
from pocketvlm.pipeline.sources import load_checkpoint, resolve_model
from tests.ecosystem.libraries import needed
from tests.stock import stock_of
from tests.weights.formats.test_save_layout import affine, quantize_affine

# The libraries, and what they import, warn of much that is not ours.
pytestmark = pytest.mark.filterwarnings("ignore")


def load_stock(path, dtype=torch.float32):
    transformers = needed("transformers")
    return transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).eval()


def text_inputs(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    ids = torch.arange(8, 24)[None] % checkpoint.spec.decoder.vocab_size
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_compressed_tensors_loads(tiny_checkpoint, tmp_path):
    """4 bits in the decoder, 3 in the projector and 8 in the tower, all in one model."""
    needed("compressed_tensors")
    quantize_affine(tiny_checkpoint, symmetric=True)
    saved = save_layout(tiny_checkpoint, tmp_path / "out", layout="compressed-tensors")
    model = load_stock(tmp_path / "out")
    inputs = text_inputs(tiny_checkpoint)
    with torch.no_grad():
        logits = model(**inputs).logits  # the first call unpacks every layer
        expected = stock_of(tiny_checkpoint)(**inputs).logits
    for name in saved.quantized:
        theirs = model.get_submodule(name).weight
        assert torch.equal(theirs, tiny_checkpoint.form(name).dequantize()), name
    assert torch.equal(logits, expected)


def test_asymmetric_layers_are_refused_loudly(tiny_checkpoint, tmp_path):
    """Where this fails, the library has learned it, and `convert` need not warn any more."""
    needed("compressed_tensors")
    quantize_affine(tiny_checkpoint)
    save_layout(tiny_checkpoint, tmp_path / "out", layout="compressed-tensors")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load_stock(tmp_path / "out")


@pytest.mark.parametrize(
    ("layout", "symmetric"), [("gptq", True), ("gptq_v2", True), ("gptq_v2", False)]
)
def test_gptq_loads(tiny_checkpoint, tmp_path, layout, symmetric):
    """One setting for the decoder; the other parts stay float. GPTQModel's kernels round more."""
    needed("gptqmodel")
    needed("optimum.gptq")
    for seed, (linear, form) in enumerate(tiny_checkpoint.forms().items()):
        if linear.part == "decoder":
            made = affine(form.shape, seed, group_size=32, symmetric=symmetric)
            tiny_checkpoint.set_form(linear.name, made)
    saved = save_layout(tiny_checkpoint, tmp_path / "out", layout=layout)
    model = load_stock(tmp_path / "out", torch.float16)
    inputs = text_inputs(tiny_checkpoint)
    for name in saved.quantized:
        theirs = model.get_submodule(name).dequantize_weight().T
        assert torch.equal(theirs, tiny_checkpoint.form(name).dequantize().half()), name
    with torch.no_grad():
        logits = model(**inputs).logits.float()
        expected = stock_of(tiny_checkpoint)(**inputs).logits
    assert (logits - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
def test_a_reference_model_answers_as_it_does_here(tmp_path, layout):
    """pocket-llava with int4 in the decoder and, where it may differ, int8 rows in the tower."""
    needed("compressed_tensors" if layout == "compressed-tensors" else "gptqmodel")
    rules = [WeightRule(part="decoder", bits=4, group_size=32, symmetric=True)]
    if layout == "compressed-tensors":
        rules += [WeightRule(part="tower", bits=8, group_size=None, symmetric=True)]
    source = load_checkpoint(resolve_model("reference:pocket-llava"))
    checkpoint = RoundToNearest(rules=tuple(rules)).apply(source, None, RunContext())
    save_layout(checkpoint, tmp_path / "out", layout=layout)
    processor = needed("transformers").AutoProcessor.from_pretrained(tmp_path / "out")
    stock, own = load_stock(tmp_path / "out"), stock_of(checkpoint)
    stock(**text_inputs(checkpoint))  # `generate` would run the tower before it is unpacked
    same = 0
    for sample in CalibrationSet.from_reference(seed=1, n=8, split="evaluation"):
        text = processor.apply_chat_template(sample.messages(), add_generation_prompt=True)
        inputs = processor(text=text, images=[sample.open_image()], return_tensors="pt")
        with torch.no_grad():
            answers = [
                model.generate(**inputs, max_new_tokens=8, do_sample=False)
                for model in (stock, own)
            ]
        same += torch.equal(*answers)
    assert same >= (8 if layout == "compressed-tensors" else 7)

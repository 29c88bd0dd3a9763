"""A program that was really written: its codes, its size, what it says of itself, what it runs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pocketvlm.bundle import Component
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.baseline.fixed import FixedReducer
from pocketvlm.context import Progress, RunContext
from pocketvlm.errors import BundleError, ExportError
from pocketvlm.export.executorch.file import read_layout
from pocketvlm.export.executorch.sharing import share_constants
from pocketvlm.export.executorch.target import ToExecutorch
from pocketvlm.json_io import read_json
from pocketvlm.reference_graph.forward import decode_logits
from pocketvlm.runtime.executorch.program import load_program
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.dense import DenseWeight
from tests.export.rig import make_prompt, quantize_affine

KEPT = (1, 4, 6, 11, 14)


@dataclass(frozen=True, eq=False)
class Exported:
    checkpoint: Checkpoint
    folder: Path
    components: tuple[Component, ...]
    steps: list[Progress]

    @property
    def file(self) -> Path:
        return self.folder / "executorch" / "model.pte"


@pytest.fixture(scope="module")
def exported(tiny_paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Five of sixteen tokens at their original positions, and a grid of each kind."""
    checkpoint = Checkpoint.load(tiny_paths["llava"])
    checkpoint = replace(checkpoint, reducer=FixedReducer(KEPT, positions="original"))
    for linear, form in checkpoint.forms().items():
        weight = form.dequantize()
        if linear.part == "tower":
            # Asymmetric groups of 8 bits: two digits and an offset.
            quantized = quantize_affine(weight, 8, 32)
        else:
            quantized = quantize_affine(weight, 4, 32, symmetric=True)
        checkpoint.set_form(linear.name, quantized)
    folder = tmp_path_factory.mktemp("executorch")
    steps: list[Progress] = []
    ctx = RunContext(threads=1, on_progress=steps.append)
    components = ToExecutorch(context=64).export(checkpoint, folder, ctx)
    return Exported(checkpoint, folder, components, steps)


def pack(signed: np.ndarray) -> bytes:
    """4-bit integers as XNNPACK's files hold them, one code at a time."""
    flat = signed.reshape(-1)
    return bytes((int(flat[i]) + 8) | ((int(flat[i + 1]) + 8) << 4) for i in range(0, len(flat), 2))


def test_the_file_holds_every_code(exported: Exported) -> None:
    data = exported.file.read_bytes()
    layout = read_layout(data)
    forms = exported.checkpoint.forms()
    for linear, form in forms.items():
        assert isinstance(form, AffineWeight)
        codes = form.codes().numpy().astype(np.int64)
        digits = [codes % 16 - 8, codes // 16 - 8] if form.bits == 8 else [codes - 8]
        if linear.part == "embedding" and not exported.checkpoint.spec.decoder.tied_head:
            assert pack(digits[0]) in data
            continue
        for digit in digits:
            content = pack(digit)
            # Delegates find a constant by the digest of its bytes.
            index = layout.named[hashlib.sha256(content).hexdigest()]
            assert layout.content(data, index) == content, linear.name


def test_it_runs_as_torch_does(exported: Exported) -> None:
    checkpoint = exported.checkpoint
    width = checkpoint.spec.decoder.hidden_size
    pixels, visual, prompt = make_prompt(checkpoint)
    module = load_program(exported.file)
    picture, indices = module.run_method("vision_encoder", (pixels,))
    assert torch.equal(indices, visual.indices)
    error = (picture[..., :width] - visual.embeds).norm() / visual.embeds.norm()
    assert float(error) < 0.05
    assert picture[0, :, width].tolist() == list(KEPT)
    assert picture[0, :, width + 1].tolist() == [0.0] * 4 + [16.0]
    (before,) = module.run_method("token_embedding", (torch.tensor([[5, 6]]),))
    (after,) = module.run_method("token_embedding", (torch.tensor([[7, 8, 9]]),))
    rows = torch.cat([before, picture, after], dim=1)
    (at_once,) = module.run_method("text_decoder", (rows, torch.tensor([0])))
    with torch.inference_mode():
        expected = decode_logits(checkpoint, prompt, last_only=True)
    assert float((at_once - expected).norm() / expected.norm()) < 0.1
    # A call for each piece, which is how ExecuTorch's own runner prefills.
    for start, piece in ((0, before), (2, picture), (7, after)):
        (in_pieces,) = module.run_method("text_decoder", (piece, torch.tensor([start])))
    torch.testing.assert_close(in_pieces, at_once, rtol=1e-4, atol=1e-4)


def test_it_says_what_it_is(exported: Exported) -> None:
    module = load_program(exported.file)
    spec = exported.checkpoint.spec
    constants = {
        "get_max_seq_len": 64,
        "get_max_context_len": 64,
        "get_vocab_size": spec.decoder.vocab_size,
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
    }
    for name, value in constants.items():
        assert module.run_method(name, ()) == [value]
    assert module.run_method("get_eos_ids", ()) == list(exported.checkpoint.processor.eos_token_ids)
    schema = json.loads(module.run_method("get_model_schema", ())[0])
    assert schema["row_channels"] == spec.decoder.hidden_size + 2
    by_role = {component.role: component for component in exported.components}
    for role, method in (
        ("vision", "vision_encoder"),
        ("embedding", "token_embedding"),
        ("decoder", "text_decoder"),
    ):
        for side in ("inputs", "outputs"):
            said = schema["methods"][method][side]
            signatures = getattr(by_role[role], side)
            assert [entry["name"] for entry in said] == [s.name for s in signatures]
            for entry, signature in zip(said, signatures, strict=True):
                shape = ["length" if isinstance(d, dict) else d for d in entry["shape"]]
                assert tuple(shape) == signature.shape


def test_what_was_delegated_is_told(exported: Exported) -> None:
    conversion = read_json(exported.folder / "executorch" / "conversion.json")
    decoder = conversion["delegation"]["text_decoder"]
    assert decoder["share"] > 0.8
    assert decoder["fallback"]["llama::custom_sdpa"] == exported.checkpoint.spec.decoder.depth
    assert "linear" not in decoder["fallback"]
    (notes,) = (component.notes for component in exported.components if component.notes)
    assert any(note.startswith("text_decoder: XNNPACK runs") for note in notes)
    assert any("bfloat16" in note for note in notes)
    assert "site-packages" not in json.dumps(conversion)
    assert [step.note for step in exported.steps][-1] == "done"
    assert exported.components[2].precision["decoder"] == "int4 g32, int8 activations"


def test_sharing_leaves_one_copy_and_every_segment(exported: Exported) -> None:
    data = exported.file.read_bytes()
    assert share_constants(data) == data
    layout = read_layout(data)
    assert layout.base + max(s.offset + s.size for s in layout.segments) <= len(data)
    decoder = exported.checkpoint.spec.decoder
    form = exported.checkpoint.form(decoder.head)
    assert isinstance(form, AffineWeight)
    assert data.count(pack(form.codes().numpy().astype(np.int64) - 8)) == 1


def test_damaged_programs_are_refused(exported: Exported, tmp_path: Path) -> None:
    data = exported.file.read_bytes()
    for content, message in (
        (data[:5000], "is cut off"),
        (b"nothing of the kind", "is not an ExecuTorch program"),
        (b"\0" * 5000, "is not an ExecuTorch program"),
    ):
        (tmp_path / "model.pte").write_bytes(content)
        with pytest.raises(BundleError, match=message):
            load_program(tmp_path / "model.pte")
    with pytest.raises(ExportError, match="cut off"):
        share_constants(data[:40])


def test_a_failed_conversion_is_one_line(tiny_paths: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.load(tiny_paths["llava"])
    name = checkpoint.spec.linears()[0].name
    values = torch.full(checkpoint.form(name).shape, torch.nan)
    checkpoint.set_form(name, DenseWeight(values=values))
    with pytest.raises(
        ExportError, match="^executorch: vision_encoder returns what is not a number$"
    ):
        ToExecutorch(context=64).export(checkpoint, tmp_path, RunContext())
    assert not list((tmp_path / "executorch").iterdir())


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="context is 0"):
        ToExecutorch(context=0)

"""Core ML beside the other formats of transformers' exporters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.emulation.mil.package import MilPackage
from pocketvlm.errors import CheckpointError, ExportError
from tests.export.coreml.rig import Decoder, export

pytest.importorskip("coremltools", reason="the coreml extra is not installed")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Remarks of transformers and torch on their own exporters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def exporter() -> Iterator[Any]:
    from transformers.exporters.auto import EXPORT_BACKENDS, AutoHfExporter

    from pocketvlm.export.coreml.transformers_backend import register

    register()
    yield AutoHfExporter.from_config({"export_format": "coreml"})
    del EXPORT_BACKENDS["coreml"]


def load(path: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()


def test_a_vision_language_model_becomes_our_packages(
    exporter: Any, tiny_path: Path, tmp_path: Path
) -> None:
    model = load(tiny_path)
    exported = exporter.export_for_generation(model, {}, {"context": 64, "chunk": 8})
    assert set(exported.components) == {"vision", "decoder"}
    exported.save_pretrained(tmp_path / "saved")
    functions = MilPackage.open(tmp_path / "saved" / "decoder.mlpackage").functions
    assert set(functions) == {"embedding", "prefill", "decode"}
    # The very packages of the target.
    own = export(Checkpoint.load(tiny_path), tmp_path / "own") / "decoder.mlpackage"
    embeds = torch.randn(1, 5, 64).numpy()
    positions = torch.arange(5)[None].numpy()
    saved = Decoder(tmp_path / "saved" / "decoder.mlpackage")
    assert (saved.prefill(embeds, positions) == Decoder(own).prefill(embeds, positions)).all()


def test_one_graph(exporter: Any, tiny_path: Path, tmp_path: Path) -> None:
    head = load(tiny_path).get_output_embeddings()
    exported = exporter.export(head, {"input": torch.randn(1, 3, 64)}, {})
    exported.save_pretrained(tmp_path)
    (function,) = MilPackage.open(tmp_path / "model.mlpackage").functions.values()
    assert [parameter.name for parameter in function.inputs] == ["input"]


def test_what_cannot_be_exported_is_named(exporter: Any, tiny_path: Path) -> None:
    model = load(tiny_path)
    with pytest.raises(ExportError, match="multi_token_decode: not an option"):
        exporter.export_for_generation(model, {}, {}, multi_token_decode=True)
    model.name_or_path = "somebody/something"
    with pytest.raises(CheckpointError, match=r"somebody/something.*local"):
        exporter.export_for_generation(model, {}, {})

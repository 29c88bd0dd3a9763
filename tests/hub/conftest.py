"""Folders that can be pushed, and a hub on this machine that the real client talks to."""

from __future__ import annotations

import pytest
import yaml
from huggingface_hub import HfApi, constants

from pocketvlm.bundle import (
    CacheLayout,
    Component,
    Generation,
    Manifest,
    PromptLayout,
    TensorSignature,
    sign_bundle,
)
from pocketvlm.json_io import write_json
from tests.hub.stand_in import TOKEN, running_hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub; the client of this process is allowed to ask it, and keeps its cache in `tmp_path`."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with running_hub() as running:
        yield running


@pytest.fixture
def api(hub):
    """The owner's client."""
    return HfApi(endpoint=hub.endpoint, token=TOKEN)


def write_bundle(path, content=b"graph"):
    """A signed bundle; `content` is that of its graph."""
    (path / "onnx").mkdir(parents=True)
    (path / "onnx" / "decoder.onnx").write_bytes(content)
    (path / "tokenizer.json").write_text("{}")
    manifest = Manifest(
        model="m",
        family="llava",
        source_sha256="0",
        recipe_sha256="1",
        visual_tokens=8,
        visual_tokens_full=16,
        positions="original",
        prompt=PromptLayout(image_token="<image>", image_token_id=3),  # noqa: S106  (no password)
        generation=Generation(eos_token_ids=(2,), max_positions=64),
        kv_cache=CacheLayout(layers=2, kv_heads=1, head_dim=4, dtype="float32"),
        components=(
            Component(
                target="onnx",
                role="decoder",
                file="onnx/decoder.onnx",
                inputs=(TensorSignature(name="embeds", dtype="float32", shape=(1, "length", 8)),),
                outputs=(),
                precision={"decoder": "int4 g32"},
            ),
        ),
    )
    sign_bundle(path, manifest)
    (path / "README.md").write_text("# A measured card\n")
    (path / "report.html").write_text("<html></html>")
    return path


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def run(tmp_path, tiny_checkpoint):
    """A finished run as `compress` leaves it."""
    folder = tmp_path / "run"
    write_bundle(folder / "bundle", b"graph" * 100)
    tiny_checkpoint.save(folder / "checkpoint")
    write_json(folder / "report.json", {"schema": 1})
    (folder / "report.html").write_text("<html></html>")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"schema": 1}))
    (folder / ".work").mkdir()
    (folder / ".work" / "log.jsonl").write_text("{}")
    (folder / "notes.txt").write_text("of nobody's business")
    return folder

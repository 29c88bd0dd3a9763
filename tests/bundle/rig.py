"""A bundle as small as one may be, for tests of what a folder promises."""

from __future__ import annotations

from pathlib import Path

from pocketvlm.bundle import (
    CacheLayout,
    Component,
    Generation,
    Manifest,
    PromptLayout,
    TensorSignature,
    sign_bundle,
)

__all__ = ["write_signed_bundle"]


def write_signed_bundle(path: Path, graph: bytes) -> None:
    """Writes a bundle of one decoder, whose file holds `graph`, and signs it."""
    (path / "onnx").mkdir(parents=True)
    (path / "onnx" / "decoder.onnx").write_bytes(graph)
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

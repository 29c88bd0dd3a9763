from __future__ import annotations

import json

import pytest

from pocketvlm.bundle import (
    Bundle,
    Component,
    Manifest,
    TensorSignature,
    sign_files,
    write_manifest,
)
from pocketvlm.errors import BundleError


@pytest.fixture
def bundle_path(tmp_path):
    path = tmp_path / "bundle"
    (path / "onnx").mkdir(parents=True)
    (path / "onnx" / "decoder.onnx").write_bytes(b"graph")
    (path / "tokenizer.json").write_text("{}")
    (path / "README.md").write_text("a card, not signed")
    manifest = Manifest(
        model="m",
        family="llava",
        source_sha256="0",
        recipe_sha256="1",
        visual_tokens=8,
        visual_tokens_full=16,
        positions="original",
        prompt={"image_token": "<image>"},
        generation={"eos_token_ids": [2]},
        kv_cache={"layers": 2},
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
        files=sign_files(path, frozenset({"README.md", "manifest.json"})),
    )
    write_manifest(path, manifest)
    return path


def test_a_manifest_comes_back_equal(bundle_path):
    bundle = Bundle.open(bundle_path)
    again = Manifest.from_json(json.loads(json.dumps(bundle.manifest.to_json())), bundle_path)
    assert again == bundle.manifest
    assert bundle.component("onnx", "decoder").inputs[0].shape == (1, "length", 8)
    assert set(bundle.manifest.files) == {"onnx/decoder.onnx", "tokenizer.json"}
    assert bundle.stored_bytes() == 5 + 2


def test_a_changed_file_is_named_with_both_digests(bundle_path):
    (bundle_path / "onnx" / "decoder.onnx").write_bytes(b"grapH")
    with pytest.raises(BundleError, match=r"decoder\.onnx: was changed after signing: sha256"):
        Bundle.open(bundle_path)


def test_a_missing_file_is_named(bundle_path):
    (bundle_path / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match="tokenizer.json: named in the manifest, but missing"):
        Bundle.open(bundle_path)


def test_an_unsigned_file_may_change(bundle_path):
    (bundle_path / "README.md").write_text("another card")
    Bundle.open(bundle_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds a JSON array"),
        ('{"schema": 9}', "bundle schema 9"),
        ('{"schema": 1}', "not a manifest"),
        ('{"schema": 1, "components": [{"x": 1}]}', "not a manifest"),
    ],
)
def test_a_broken_manifest_gets_one_line(bundle_path, text, message):
    (bundle_path / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle_path)


def test_a_folder_without_manifest_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"no bundle here: manifest\.json is missing"):
        Bundle.open(tmp_path)


def test_an_absent_graph_names_the_targets_there_are(bundle_path):
    with pytest.raises(BundleError, match="no vision graph for target 'coreml'; targets are onnx"):
        Bundle.open(bundle_path).component("coreml", "vision")

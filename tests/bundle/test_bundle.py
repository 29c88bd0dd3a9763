from __future__ import annotations

import json

import pytest

from pocketvlm.bundle import (
    Bundle,
    Manifest,
)
from pocketvlm.errors import BundleError
from pocketvlm.files.signed_folder import sign_document
from pocketvlm.json_io import parse_json
from tests.bundle.rig import write_signed_bundle


@pytest.fixture
def bundle_path(tmp_path):
    path = tmp_path / "bundle"
    write_signed_bundle(path, b"graph")
    (path / "README.md").write_text("a card, not signed")
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
    with pytest.raises(BundleError, match="tokenizer.json: is missing"):
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


def rewrite(path, change):
    """The manifest, changed and with a digest that fits it: what a stranger can always do."""
    document = json.loads((path / "manifest.json").read_text())
    change(document)
    (path / "manifest.json").write_text(json.dumps(sign_document(document)))


def test_a_bit_of_the_manifest_is_noticed(bundle_path):
    text = (bundle_path / "manifest.json").read_text()
    (bundle_path / "manifest.json").write_text(text.replace("<image>", "<imagE>"))
    with pytest.raises(BundleError, match=r"manifest.json: was changed after it was written"):
        Bundle.open(bundle_path)


def test_a_manifest_of_an_earlier_version_has_no_digest_of_its_own(bundle_path):
    document = json.loads((bundle_path / "manifest.json").read_text())
    del document["sha256"]
    (bundle_path / "manifest.json").write_text(json.dumps(document))
    assert Bundle.open(bundle_path).manifest.model == "m"


def test_an_unsigned_file_that_would_be_looked_for_first_is_refused(bundle_path):
    (bundle_path / "chat_template.jinja").write_text("{{ 'anything' }}")
    with pytest.raises(BundleError, match=r"chat_template.jinja: is not listed in manifest.json"):
        Bundle.open(bundle_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(files={}), "lists no files"),
        (lambda d: d["files"].pop("onnx/decoder.onnx"), "is not listed"),
        (lambda d: d["files"].update({"../secret": "0" * 64}), "not the name of a file inside"),
        (lambda d: d["files"].update({"/etc/hostname": "0" * 64}), "not the name of a file inside"),
        (lambda d: d["components"][0].update(file="../x.onnx"), "is used and not signed"),
        (lambda d: d["components"][0].update(sparse_file="x"), "sparse_file: unknown key"),
        (lambda d: d["components"][0].update(file="README.md"), "is used and not signed"),
        (lambda d: d["components"][0].update(file=3), "components.0.file: must be text"),
        (lambda d: d["components"][0].update(role="x"), "components.0.role: is"),
        (lambda d: d["components"][0].update(role="prefill"), "is what a prefill graph has"),
        (lambda d: d["components"][0].update(least_rows=8), "is what a prefill graph has"),
        (
            lambda d: d["components"][0].update(role="prefill", least_rows=1),
            "least_rows is 1; it must be at least 2",
        ),
        (lambda d: d.update(extra=1), "extra: unknown key"),
        (lambda d: d.update(positions="odd"), "positions: is"),
        (lambda d: d.update(visual_tokens=True), "visual_tokens: must be a whole number"),
        (lambda d: d.update(visual_tokens=17), "visual_tokens are 17 of 16"),
        (lambda d: d["prompt"].pop("image_token_id"), "prompt.image_token_id: is missing"),
        (lambda d: d["prompt"].update(image_token=""), "image_token must not be empty"),
        (lambda d: d["generation"].update(max_positions=0), "max_positions must be 1 to"),
        (lambda d: d["generation"].update(eos_token_ids=["2"]), "eos_token_ids.0: must be a whole"),
        (lambda d: d["kv_cache"].update(layers=-1), "each must be at least 1"),
        (lambda d: d["kv_cache"].update(head_dim=10**12), "product at most"),
        (lambda d: d["kv_cache"].update(dtype="object"), "kv_cache.dtype: is"),
        (
            lambda d: d["kv_cache"].update(visual_schedule={"drops": [{"layers": 2, "keep": 0}]}),
            "dropped after 2 layers; allowed are 1 to 1",
        ),
    ],
)
def test_a_hostile_manifest_gets_one_line(bundle_path, change, message):
    rewrite(bundle_path, change)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(bundle_path)
    assert "\n" not in str(caught.value)


def test_only_signed_files_are_handed_out(bundle_path):
    bundle = Bundle.open(bundle_path)
    assert bundle.file("tokenizer.json").is_file()
    assert not bundle.has("README.md")
    for name in ("README.md", "chat_template.jinja", "../bundle/tokenizer.json"):
        with pytest.raises(BundleError, match="has no signed file"):
            bundle.file(name)
    # Also where somebody exchanges it after the bundle was opened.
    (bundle_path / "tokenizer.json").unlink()
    (bundle_path / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(BundleError, match="leads out of its folder"):
        bundle.file("tokenizer.json")


def test_half_a_surrogate_pair_is_no_text_and_a_whole_one_is():
    assert parse_json('{"a": "\\ud83d\\ude00"}', "f.json") == {"a": "\U0001f600"}
    with pytest.raises(BundleError, match=r"f\.json: .*half of a surrogate pair"):
        parse_json('{"a": ["\\uD83D and more"]}', "f.json")

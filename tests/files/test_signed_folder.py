"""What is in a signed folder is listed, regular, inside, and as it was signed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pocketvlm.errors import BundleError
from pocketvlm.files.reader import locate
from pocketvlm.files.signed_folder import sign_document, sign_files, verify_document, verify_files

UNSIGNED = ("README.md",)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    (path / "onnx").mkdir(parents=True)
    (path / "onnx" / "graph").write_bytes(b"graph")
    (path / "tokenizer.json").write_text("{}")
    (path / "README.md").write_text("a card")
    (path / "document.json").write_text("{}")
    (tmp_path / "secret").write_text("secret")
    return path


def verify(folder, files):
    verify_files(folder, files, "document.json", UNSIGNED, error=BundleError)


def signed(folder):
    return sign_files(folder, ("document.json", *UNSIGNED))


def test_a_folder_as_it_was_signed_is_sound(folder):
    files = signed(folder)
    assert list(files) == ["onnx/graph", "tokenizer.json"]
    verify(folder, files)
    (folder / "README.md").write_text("another card")
    (folder / "document.json.sig").write_text("a detached signature")
    verify(folder, files)


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "onnx/x.bin", ".hidden", "document.jsonx", "a/b/c", "onnx/d/"]
)
def test_what_is_not_listed_is_refused(folder, name):
    files = signed(folder)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if name.endswith("/"):
        (folder / name).mkdir()
    else:
        (folder / name).write_text("x")
    with pytest.raises(BundleError, match="is not listed in document.json"):
        verify(folder, files)


def test_an_unlisted_link_is_refused_whatever_it_leads_to(folder):
    files = signed(folder)
    for target in ("onnx", "onnx/graph", "../secret", "nowhere"):
        (folder / "link").symlink_to(target)
        with pytest.raises(BundleError, match="link: is not listed"):
            verify(folder, files)
        (folder / "link").unlink()


def test_no_files_are_no_signature(folder):
    with pytest.raises(BundleError, match=r"document.json: lists no files"):
        verify(folder, {})


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/hostname", "onnx/../../secret", "..", ".", "", "a\\b", "nul\0", "onnx/.."],
)
def test_names_that_leave_the_folder_are_refused(folder, name):
    with pytest.raises(BundleError, match="is not the name of a file inside|is not a regular file"):
        verify(folder, {**signed(folder), name: "0" * 64})


def test_links_that_leave_the_folder_are_refused(folder):
    (folder / "tokenizer.json").unlink()
    for target in ("../secret", str(folder.parent / "secret"), "/proc/self/environ"):
        (folder / "tokenizer.json").symlink_to(target)
        with pytest.raises(BundleError, match=r"tokenizer.json: leads out of its folder"):
            verify(folder, {"tokenizer.json": "0" * 64})
        (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("onnx/graph")
    verify(folder, signed(folder))


def test_a_folder_of_links_is_refused(folder):
    (folder.parent / "outside").mkdir()
    (folder.parent / "outside" / "a").write_text("secret")
    (folder / "linked").symlink_to("../outside")
    with pytest.raises(BundleError, match="leads out of its folder"):
        verify(folder, {**signed(folder), "linked/a": "0" * 64})


def test_pipes_devices_sockets_and_folders_are_refused_at_once(folder):
    os.mkfifo(folder / "pipe")
    for name in ("pipe", "onnx"):
        with pytest.raises(BundleError, match=f"{name}: is not a regular file"):
            locate(folder, name)
    (folder / "zero").symlink_to("/dev/zero")
    with pytest.raises(BundleError, match="zero: leads out of its folder"):
        locate(folder, "zero")
    (folder / "loop").symlink_to("loop")
    with pytest.raises(BundleError, match="loop: is missing"):
        locate(folder, "loop")


@pytest.mark.parametrize("digest", ["", "0", "g" * 64, "A" * 64])
def test_a_digest_that_is_none_is_refused(folder, digest):
    with pytest.raises(BundleError, match="the digest of 'tokenizer.json' is not a sha256"):
        verify(folder, {**signed(folder), "tokenizer.json": digest})


def hub_cache(root: Path) -> tuple[Path, Path]:
    repository = root / "models--owner--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "123").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    return repository, snapshot


def test_links_of_a_hubs_cache_lead_to_its_blobs_and_nowhere_else(tmp_path):
    repository, snapshot = hub_cache(tmp_path)
    assert locate(snapshot, "config.json").read_text() == "{}"
    (tmp_path / "secret").write_text("s")
    (snapshot / "secret").symlink_to("../../../secret")
    with pytest.raises(BundleError, match="leads out of its folder"):
        locate(snapshot, "secret")
    # Blobs that are a link themselves could lead anywhere.
    (repository / "blobs" / "123").unlink()
    (repository / "blobs").rmdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "123").write_text("s")
    (repository / "blobs").symlink_to("../elsewhere")
    with pytest.raises(BundleError, match="leads out of its folder"):
        locate(snapshot, "config.json")


def test_a_document_knows_its_own_change(tmp_path):
    document = sign_document({"b": [1, 2.5, None, "é"], "a": {"x": (1, 2)}})
    assert sign_document(document) == document
    path = tmp_path / "document.json"
    verify_document({**document, "a": {"x": [1, 2]}}, path, error=BundleError)
    verify_document({"b": 1}, path, error=BundleError)  # one of an earlier version has none
    with pytest.raises(BundleError, match="its own digest does not match"):
        verify_document({**document, "b": [1, 2.5, None, "e"]}, path, error=BundleError)

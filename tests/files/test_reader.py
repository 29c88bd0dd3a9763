"""Files of a stranger's folder: read inside it, regular, bounded, or refused in one line."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import pytest

from pocketvlm.errors import BundleError, CheckpointError
from pocketvlm.files.reader import file_sha256, is_lfs_pointer, locate, read_bytes, read_text

_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").write_bytes(b"inside")
    (tmp_path / "secret.txt").write_bytes(b"outside")
    return folder


def test_a_file_of_the_folder_is_found(folder: Path) -> None:
    assert read_bytes(locate(folder, "sub/a.txt")) == b"inside"


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "..", "../secret.txt", "sub/../../secret.txt", "sub\\a.txt", "a\0b"],
)
def test_a_name_that_is_not_inside_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(BundleError, match="is not the name of a file inside this folder"):
        locate(folder, name)


@pytest.mark.parametrize("target", ["../secret.txt", "/etc/passwd"])
def test_a_link_that_leaves_the_folder_is_refused(folder: Path, target: str) -> None:
    (folder / "link").symlink_to(target)
    with pytest.raises(BundleError, match="leads out of its folder"):
        locate(folder, "link")


def test_a_folder_that_is_a_link_out_is_refused(folder: Path) -> None:
    (folder / "up").symlink_to("..")
    with pytest.raises(BundleError, match="leads out of its folder"):
        locate(folder, "up/secret.txt")


def test_a_link_inside_the_folder_is_followed(folder: Path) -> None:
    (folder / "link").symlink_to("sub/a.txt")
    assert read_bytes(locate(folder, "link")) == b"inside"


@pytest.mark.parametrize("name", ["none", "loop", "n" * 300, "sub/a.txt/b"])
def test_what_is_not_there_is_missing(folder: Path, name: str) -> None:
    (folder / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="is missing"):
        locate(folder, name, error=CheckpointError)


def test_a_snapshot_of_a_hub_reads_blobs_of_its_own_repository_alone(tmp_path: Path) -> None:
    for name in ("mine", "other"):
        (tmp_path / name / "blobs").mkdir(parents=True)
        (tmp_path / name / "blobs" / "b").write_bytes(name.encode())
    snapshot = tmp_path / "mine" / "snapshots" / "r"
    snapshot.mkdir(parents=True)
    (snapshot / "own").symlink_to("../../blobs/b")
    (snapshot / "foreign").symlink_to("../../../other/blobs/b")
    assert read_bytes(locate(snapshot, "own")) == b"mine"
    with pytest.raises(BundleError, match="leads out of its folder"):
        locate(snapshot, "foreign")


def test_what_is_not_a_regular_file_is_refused_and_never_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        # The name of a socket is short: it is bound from within its folder.
        before = Path.cwd()
        os.chdir(folder)
        try:
            listening.bind("socket")
        finally:
            os.chdir(before)
        for name in ("pipe", "socket", "sub"):
            with pytest.raises(BundleError, match="is not a regular file"):
                locate(folder, name)
    for name in ("pipe", "sub"):
        with pytest.raises(BundleError, match="is not a regular file"):
            read_bytes(folder / name)


def test_the_bound_is_on_bytes_read_and_the_last_allowed_byte_is_read(folder: Path) -> None:
    (folder / "a").write_bytes(b"12345")
    assert read_bytes(folder / "a", max_bytes=5) == b"12345"
    with pytest.raises(BundleError, match="has more than 4 bytes"):
        read_bytes(folder / "a", max_bytes=4)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="a file without an end")
def test_a_file_without_an_end_is_refused() -> None:
    with pytest.raises(BundleError, match="is not a regular file"):
        read_bytes(Path("/dev/zero"))


def test_a_pointer_of_git_lfs_says_what_to_do(folder: Path) -> None:
    (folder / "a").write_bytes(_POINTER)
    assert is_lfs_pointer(folder / "a")
    assert not is_lfs_pointer(folder / "sub" / "a.txt")
    with pytest.raises(BundleError, match="git lfs pull"):
        read_bytes(folder / "a")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_read_in_the_encodings_that_editors_write(folder: Path, encoding: str) -> None:
    (folder / "a").write_bytes("ä\r\nb".encode(encoding))
    assert read_text(folder / "a") == "ä\r\nb"


def test_what_is_not_text_is_refused_with_the_byte(folder: Path) -> None:
    (folder / "a").write_bytes(b"ab\xff")
    with pytest.raises(BundleError, match="is not UTF-8 text: byte 2"):
        read_text(folder / "a")


def test_the_digest_is_that_of_the_content(folder: Path) -> None:
    assert file_sha256(folder / "sub" / "a.txt") == hashlib.sha256(b"inside").hexdigest()

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pocketvlm.errors import BundleError, ExportError, StorageError
from pocketvlm.files import publish
from pocketvlm.files.full_disk import describe_fault, naming_faults
from pocketvlm.files.publish import recover, replace_directory, replace_file

FILLS_AND_WAITS = """
import sys, time
from pathlib import Path
from pocketvlm.files.publish import replace_directory
with replace_directory(Path(sys.argv[1])) as folder:
    (folder / "a").write_text("half")
    print("filling", flush=True)
    time.sleep(60)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def without_exchange(monkeypatch):
    """A system that cannot exchange two names."""

    def refuse(first, second):
        number = errno.EINVAL if second.exists() else errno.ENOENT
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(publish, "_exchange", refuse)


def test_a_folder_is_replaced_only_by_a_whole_one(tmp_path):
    place = tmp_path / "place"
    with replace_directory(place) as folder:
        (folder / "a").write_text("first")
    with pytest.raises(KeyboardInterrupt), replace_directory(place) as folder:
        (folder / "a").write_text("second")
        raise KeyboardInterrupt
    assert (place / "a").read_text() == "first"
    with replace_directory(place) as folder:
        (folder / "b").write_text("third")
    assert names(place) == ["b"]
    assert names(tmp_path) == ["place"]


def test_a_system_without_exchange_does_it_in_two_renames(tmp_path, without_exchange):
    for text in ("first", "second"):
        with replace_directory(tmp_path / "place") as folder:
            (folder / text).write_text(text)
    assert names(tmp_path) == ["place"]
    assert names(tmp_path / "place") == ["second"]


@pytest.mark.skipif(sys.platform not in {"linux", "darwin"}, reason="no exchange of two names")
def test_at_no_moment_is_there_no_folder(tmp_path):
    place = tmp_path / "place"
    with replace_directory(place) as folder:
        (folder / "a").write_text("first")
    missing, done = [], threading.Event()

    def watch():
        while not done.is_set():
            if not os.path.exists(place / "a"):  # noqa: PTH110  (as quick as can be)
                missing.append(True)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(200):
        with replace_directory(place) as folder:
            (folder / "a").write_text("next")
    done.set()
    watcher.join()
    assert not missing


@pytest.mark.parametrize("name", ["place.retired.partial", "place.01234567.retired.partial"])
def test_what_was_retired_and_never_replaced_comes_back(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "a").write_text("old")
    (tmp_path / "place.89abcdef.partial").mkdir()
    recover(tmp_path / "place")
    assert names(tmp_path) == ["place"]
    assert names(tmp_path / "place") == ["a"]


def test_what_a_dead_process_left_is_removed_and_what_a_living_one_fills_is_not(tmp_path):
    place = tmp_path / "place"
    (tmp_path / "place.of-mine.partial").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", FILLS_AND_WAITS, str(place)], stdout=subprocess.PIPE
    )
    assert process.stdout.readline()
    with replace_directory(place) as folder:
        (folder / "a").write_text("whole")
    assert len(names(tmp_path)) == 3
    process.kill()
    process.communicate()
    with replace_directory(place) as folder:
        (folder / "a").write_text("again")
    assert names(tmp_path) == ["place", "place.of-mine.partial"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_says(tmp_path, mask):
    before = os.umask(mask)
    try:
        with replace_directory(tmp_path / "place") as folder:
            private = Path(folder / "private")
            private.mkdir(mode=0o700)
            # The library writes to a private temporary file, which it renames.
            save_file({"x": torch.ones(2)}, private / "x.safetensors")
        with replace_file(tmp_path / "y.safetensors") as aside:
            save_file({"x": torch.ones(2)}, aside)
    finally:
        os.umask(before)
    found = [tmp_path / "place" / "private" / "x.safetensors", tmp_path / "y.safetensors"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in found} == {0o666 & ~mask}
    assert stat.S_IMODE((tmp_path / "place" / "private").stat().st_mode) == 0o777 & ~mask


def test_a_linked_folder_is_replaced_where_it_is(tmp_path):
    (tmp_path / "large" / "place").mkdir(parents=True)
    (tmp_path / "place").symlink_to(tmp_path / "large" / "place")
    with replace_directory(tmp_path / "place") as folder:
        (folder / "a").write_text("x")
    assert (tmp_path / "place").is_symlink()
    assert names(tmp_path / "large" / "place") == ["a"]
    assert names(tmp_path / "large") == ["place"]


def test_a_file_is_written_in_another_folder_where_its_own_must_hold_nothing_else(tmp_path):
    folder, scratch = tmp_path / "bundle", tmp_path / "work"
    folder.mkdir()
    scratch.mkdir()
    with replace_file(folder / "README.md", scratch=scratch) as aside:
        aside.write_text("card")
        assert not list(folder.iterdir())
    assert (folder / "README.md").read_text() == "card"
    assert not list(scratch.iterdir())


def test_a_file_that_fails_leaves_the_old_one_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    with replace_file(path) as aside:
        aside.write_text("old")
    full = pytest.raises(StorageError, match=r"a\.json: No space left on device")
    with full, replace_file(path) as aside:
        aside.write_text("ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing"),
        ExportError("coreml: File too large"),
    ],
)
def test_a_full_disk_is_known_whatever_reports_it(tmp_path, error):
    outer = ExportError("could not be converted")
    outer.__cause__ = error
    for raised in (error, outer):
        full = pytest.raises(StorageError, match="nothing that was there before is lost")
        with full, naming_faults(tmp_path):
            raise raised


def test_a_toolkit_that_says_nothing_while_the_disk_is_full(tmp_path, monkeypatch):
    assert describe_fault(RuntimeError("it failed"), tmp_path) is None
    monkeypatch.setattr("pocketvlm.files.full_disk.is_full", lambda _: True)
    assert describe_fault(RuntimeError("it failed"), tmp_path) == "No space left on device"
    # What this package refuses, it knows the reason of.
    assert describe_fault(BundleError("was changed"), tmp_path) is None

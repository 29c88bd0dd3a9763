"""The emulated environment: what it is made of, and what is said where it cannot be had."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pocketvlm.context import RunContext
from pocketvlm.emulation.arm64 import environment, prepare
from pocketvlm.emulation.arm64.emulator import CPUS, Emulator
from pocketvlm.emulation.arm64.environment import (
    PREPARE,
    Environment,
    environment_folder,
    find_environment,
    locked_wheels,
)
from pocketvlm.errors import InputError, MissingExtraError, PocketVLMError, UnsupportedError

ROOT = Path(__file__).parents[3]
IMPORT_NAMES = {"pillow": "PIL"}

LIST_IMPORTS = """
import json, sys
import pocketvlm.export.parity.recorder, pocketvlm.runtime.onnx.runner
found = {name.partition(".")[0] for name in sys.modules}
print(json.dumps(sorted(found - set(sys.stdlib_module_names) - {"pocketvlm", "__main__"})))
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache, 'quoted'"))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    return environment_folder()


def test_wheels_are_those_of_the_lock() -> None:
    script = ROOT / "requirements" / "arm64_wheels.py"
    finished = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert locked_wheels() == finished.stdout


def test_wheels_are_what_the_runtime_imports() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", LIST_IMPORTS], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = {name for name in json.loads(finished.stdout) if not name.startswith("_")}
    names = [
        line.partition("==")[0] for line in locked_wheels().splitlines() if not line.startswith(" ")
    ]
    assert loaded == {IMPORT_NAMES.get(name, name) for name in names}


def test_another_content_has_another_folder(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "PYTHON_PACKAGES", ("python3.14-minimal",))
    other = environment_folder()
    assert other.parent == elsewhere.parent
    assert other != elsewhere


def test_what_is_missing_is_named_with_what_mends_it(elsewhere: Path) -> None:
    with pytest.raises(MissingExtraError, match=PREPARE) as raised:
        find_environment()
    assert str(elsewhere) in str(raised.value)


def test_a_folder_that_was_not_finished_does_not_count(elsewhere: Path) -> None:
    found = Environment(folder=elsewhere)
    for program in found.programs:
        program.parent.mkdir(parents=True, exist_ok=True)
        program.touch(mode=0o755)
    assert not found.is_complete
    found.contents_file.write_text("{}")
    assert found.is_complete
    found.python.chmod(0o644)
    assert not found.is_complete


@pytest.mark.parametrize("name", ["aarch64", "arm64"])
def test_a_host_that_is_arm64_needs_none(
    name: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: name)
    with pytest.raises(UnsupportedError, match="this host is ARM64 itself"):
        find_environment()
    with pytest.raises(UnsupportedError, match="this host is ARM64 itself"):
        prepare.prepare_environment(RunContext())


def test_other_systems_are_refused(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    with pytest.raises(UnsupportedError, match="needs Linux, .* this is Darwin"):
        find_environment()


def test_tools_that_are_missing_are_named(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(prepare, "_KEYRING", elsewhere / "no keyring")
    with pytest.raises(MissingExtraError, match=r"apt, dpkg, debian-archive-keyring, which is not"):
        prepare.prepare_environment(RunContext())
    assert not elsewhere.parent.exists()


def test_a_download_that_fails_leaves_nothing(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("apt-get") is None or not prepare._KEYRING.is_file():
        pytest.skip("needs Debian's apt and keyring")
    monkeypatch.setattr(prepare, "_ASK_MIRROR", ("echo", "http://127.0.0.1:9/debian"))
    with pytest.raises(PocketVLMError, match=r"apt-get (update|download): ended with 100: E: "):
        prepare.prepare_environment(RunContext())
    assert list(elsewhere.parent.iterdir()) == []


def test_without_a_mirror_there_is_one_line_and_nothing_else(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("apt-get") is None or not prepare._KEYRING.is_file():
        pytest.skip("needs Debian's apt and keyring")
    monkeypatch.setattr(prepare, "_ASK_MIRROR", ("true",))
    monkeypatch.delenv("DEBIAN_MIRROR", raising=False)
    with pytest.raises(UnsupportedError, match=r"^apt knows no mirror of Debian: run `apt-get up"):
        prepare.prepare_environment(RunContext())
    assert list(elsewhere.parent.iterdir()) == []


def test_an_unknown_processor_is_refused_first(elsewhere: Path) -> None:
    with pytest.raises(InputError, match="--cpu is 'i386'; allowed are cortex-a72, "):
        prepare.open_emulator(RunContext(), cpu="i386", prepare=True)


def test_variables_of_the_host_do_not_reach_an_emulated_process(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "QEMU_CPU"):
        monkeypatch.setenv(name, "/nowhere")
    monkeypatch.setenv("LANG", "C.UTF-8")
    found = Emulator(environment=Environment(folder=elsewhere), cpu=next(iter(CPUS))).variables()
    assert not [name for name in found if name.startswith(("LD_", "PYTHON", "QEMU"))]
    assert found["LANG"] == "C.UTF-8"
    assert found["ORT_DISABLE_TELEMETRY"] == "1"

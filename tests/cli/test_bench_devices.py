"""`pocketvlm bench --device`: a whole run over ssh and adb, and devices that are not there."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.device_bench.conftest import reference_bundle, tiny_bundle
from tests.device_bench.transports.conftest import (
    adb_device,
    adb_port,
    android,
    packed_runner,
    shell_rig,
    ssh,
    ssh_device,
)
from tests.device_bench.transports.rigs import AdbRig, write_runner

__all__ = [
    "adb_device",
    "adb_port",
    "android",
    "packed_runner",
    "reference_bundle",
    "shell_rig",
    "ssh",
    "ssh_device",
    "tiny_bundle",
]

NASTY = '-n it\'s $HOME `x`\n"q" é *'


@pytest.fixture
def command(shell_rig, packed_runner, tmp_path):
    """The command line, with the client of the device in its path, and a process for it."""
    programs = tmp_path / "clients"
    programs.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    if isinstance(shell_rig, AdbRig):
        environment["ANDROID_ADB_SERVER_PORT"] = str(shell_rig.server_port)
    else:
        client = programs / "ssh"
        real = " ".join(shlex.quote(word) for word in shell_rig.client)
        client.write_text(f'#!/bin/sh\nPATH=/usr/bin:/bin\nexec {real} "$@"\n')
        client.chmod(0o755)
        environment["PATH"] = f"{programs}:{environment['PATH']}"

    def start(*arguments: str | Path, runner: Path = packed_runner) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "pocketvlm", "bench", "--device", shell_rig.address]
        return subprocess.Popen(
            [*line, "--runner", runner, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    return start


def test_a_bundle_is_timed_on_a_device(command, shell_rig, reference_bundle, tmp_path):
    bundle = Path(shutil.copytree(reference_bundle, tmp_path / NASTY))
    process = command("--out", tmp_path / "bench.json", "--", bundle)
    _, err = process.communicate()
    assert process.returncode in (0, 1), err  # 1: figures of a busy machine may be withheld
    assert "Traceback" not in err
    bench = json.loads((tmp_path / "bench.json").read_text())["bench"]
    assert bench["environment"]["device"] == shell_rig.address
    (arm,) = bench["arms"].values()
    assert not arm["failures"]
    assert len(bench["order"]) >= 5
    assert shell_rig.left() == []


def test_an_interrupted_run_leaves_nothing(command, shell_rig, tiny_bundle, tmp_path):
    sleeper = write_runner(
        tmp_path / "sleeper", "import time; open('../started', 'w'); time.sleep(60)"
    )
    process = command(tiny_bundle, runner=sleeper)
    deadline = time.monotonic() + 60
    while not (shell_rig.base / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    (shell_rig.base / "started").unlink()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert shell_rig.left() == []


def test_a_device_without_space_is_one_line(command, shell_rig, tiny_bundle):
    shell_rig.set_free_kb(100)
    process = command(tiny_bundle)
    _, err = process.communicate()
    assert process.returncode == 2
    assert len(err.strip().splitlines()) == 1
    assert "MB of free space" in err
    assert shell_rig.left() == []


def test_a_bundle_for_another_runtime_is_one_line(command, shell_rig, tiny_bundle):
    process = command("--runtime", "executorch", "--", tiny_bundle)
    _, err = process.communicate()
    assert process.returncode == 2
    assert len(err.strip().splitlines()) == 1
    assert "executorch" in err
    assert shell_rig.left() == []

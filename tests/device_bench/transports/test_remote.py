"""Devices with a shell, over the real clients of ssh and adb: what goes wrong, and what is left."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.protocol import PROTOCOL, EnvironmentJob, Failure, LoadedEvent
from pocketvlm.device_bench.transports import push, remote
from pocketvlm.device_bench.transports.shell import LostConnectionError
from pocketvlm.errors import InputError
from tests.device_bench.transports.rigs import write_runner

JOB = EnvironmentJob(threads=3)
OK = json.dumps({"schema": PROTOCOL, "status": "ok", "result": {"answer": 42}})
ECHO = f"import sys; sys.stdin.read(); print('''{OK}''')"
LOADED = 'print(\'{"event": "loaded", "load_ms": 12.5}\', flush=True);'
NASTY = '-n it\'s $HOME `x`\n"q" é *'


@pytest.fixture
def connect(shell_rig, tmp_path):
    """Connects with a runner that is this program."""

    def connect(program: str = ECHO, **options):
        runner = tmp_path / f"runner {len(list(tmp_path.iterdir()))}"
        return shell_rig.transport(write_runner(runner, program), **options).connect()

    return connect


@pytest.fixture
def nasty_bundle(tiny_bundle, tmp_path):
    """A bundle in a folder whose name no shell takes as it is."""
    return Bundle.open(Path(shutil.copytree(tiny_bundle, tmp_path / NASTY)))


def wait_until(condition, timeout_s: float = 15.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def running(mark: str) -> list[int]:
    """Processes that work in this folder."""
    return [
        process.pid
        for process in psutil.process_iter(["cwd", "status"])
        if process.info["status"] != "zombie" and mark in (process.info["cwd"] or "")
    ]


def test_files_arrive_as_they_are_and_nothing_is_left(connect, shell_rig, nasty_bundle):
    with connect() as connection:
        folder = Path(connection.install(nasty_bundle))
        Bundle.open(folder)  # every digest
        assert folder.is_relative_to(shell_rig.base)
        assert (folder.stat().st_mode & 0o077) == 0
        assert connection.install(nasty_bundle) == str(folder)
        assert connection.run(JOB, timeout_s=30) == {"answer": 42}
    assert shell_rig.left() == []


def test_a_file_name_is_never_a_command(shell_rig, tmp_path):
    names = [f"{NASTY}/{NASTY}", "-rf", "$(touch hacked)", "a;touch hacked", "#status 0", " ", "é"]
    files = []
    for index, name in enumerate(names):
        source = tmp_path / f"source{index}"
        source.write_bytes(os.urandom(1000))
        files.append(push.PushFile.of(source, name))
    with shell_rig.transport(write_runner(tmp_path / "r", ECHO)).connect() as connection:
        connection._push(files, f"{shell_rig.base}/{NASTY}", lambda *_: None)
        there = shell_rig.base / NASTY
        for file in files:
            assert hashlib.sha256((there / file.name).read_bytes()).hexdigest() == file.sha256
        assert len([path for path in there.rglob("*") if path.is_file()]) == len(names)
        shutil.rmtree(there)
    assert shell_rig.left() == []


def test_the_job_arrives_and_events_come_before_the_end(connect):
    program = (
        "import json, sys, time; job = json.load(sys.stdin);"
        f"{LOADED} time.sleep(1);"
        f"print(json.dumps({{'schema': {PROTOCOL}, 'status': 'ok', 'result': job}}))"
    )
    heard = []
    with connect(program) as connection:
        result = connection.run(
            JOB, timeout_s=30, on_event=lambda event: heard.append((event, time.monotonic()))
        )
        ended = time.monotonic()
    assert result == {"schema": PROTOCOL, "job": "environment", "threads": 3}
    ((event, at),) = heard
    assert event == LoadedEvent(load_ms=12.5)
    assert ended - at > 0.5


def test_every_end_of_the_runner_is_told_from_a_lost_connection(connect, shell_rig):
    ends = {
        "import os; os.kill(os.getpid(), 9)": "ended by SIGKILL; the system does this when",
        "import os; os.abort()": "ended by SIGABRT",
        "import sys; sys.exit('no such file')": "ended with status 1 and no result: no such file",
        "import sys; sys.exit(255)": "ended with status 255 and no result",
    }
    with connect(f"{LOADED} exec(open('../end').read())") as connection:
        for end, reason in ends.items():
            (shell_rig.base / "end").write_text(end)
            result = connection.run(JOB, timeout_s=30)
            assert isinstance(result, Failure)
            assert reason in result.reason
            assert result.events == (LoadedEvent(load_ms=12.5),)
        (shell_rig.base / "end").unlink()
    assert shell_rig.left() == []


def test_a_runner_that_hangs_is_ended_on_the_device_with_its_children(connect, shell_rig):
    program = (
        "import subprocess, sys, time;"
        f"{LOADED} subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "time.sleep(60)"
    )
    with connect(program) as connection:
        result = connection.run(JOB, timeout_s=2)
        assert isinstance(result, Failure)
        assert result.reason == "no result within 2 s"
        assert result.events == (LoadedEvent(load_ms=12.5),)
        assert wait_until(lambda: not running(f"{shell_rig.base}/runner"))
    assert shell_rig.left() == []


def test_a_connection_lost_mid_run_keeps_events_and_comes_back(connect, shell_rig, nasty_bundle):
    program = (
        "import os, sys, time; sys.stdin.read();"
        f"{LOADED} time.sleep(0 if os.path.exists('../calm') else 60); print('''{OK}''')"
    )
    with connect(program) as connection:
        folder = Path(connection.install(nasty_bundle))
        result = connection.run(JOB, timeout_s=60, on_event=lambda _: shell_rig.break_connections())
        assert isinstance(result, Failure)
        assert "the connection to" in result.reason
        assert "was lost" in result.reason
        assert result.events == (LoadedEvent(load_ms=12.5),)
        assert wait_until(lambda: not running(f"{shell_rig.base}/runner"))
        (shell_rig.base / "calm").touch()
        assert connection.run(JOB, timeout_s=60) == {"answer": 42}
        Bundle.open(folder)
        (shell_rig.base / "calm").unlink()
    assert shell_rig.left() == []


def test_a_device_that_vanishes_for_good_leaves_failures_and_a_warning(connect, shell_rig):
    program = f"import time; {LOADED} time.sleep(60)"
    connection = connect(program, patience_s=0)
    first = connection.run(JOB, timeout_s=60, on_event=lambda _: shell_rig.stop())
    second = connection.run(JOB, timeout_s=60)
    with pytest.warns(RuntimeWarning, match=r"files were left in .*bench.*not reached any more"):
        connection.close()
    assert isinstance(first, Failure)
    assert first.events == (LoadedEvent(load_ms=12.5),)
    assert isinstance(second, Failure)
    assert "is not reached any more" in second.reason
    assert wait_until(lambda: not running(f"{shell_rig.base}/runner"))


def test_a_transfer_continues_where_it_was_cut(connect, shell_rig, tiny_bundle, monkeypatch):
    """The connection breaks within the largest file; what had arrived is not sent again."""
    bundle = Bundle.open(tiny_bundle)
    sizes = {name: (tiny_bundle / name).stat().st_size for name in bundle.manifest.files}
    largest = max(sizes, key=sizes.__getitem__)
    monkeypatch.setattr(push, "_PIECE_BYTES", 2**12)
    starts: list[int] = []
    read_from = push._read_from

    def has_arrived() -> bool:
        parts = shell_rig.base.glob(f"bundles/*/{largest}")
        return any(part.stat().st_size > 2**13 for part in parts)

    def read_then_break(source: Path, start: int):
        for index, piece in enumerate(read_from(source, start)):
            if is_sending and not starts and index == sizes[largest] // 2**13:
                assert wait_until(has_arrived)
                starts.append(0)
                shell_rig.break_connections()
            yield piece

    is_sending = False
    send = push._send

    def note_start(shell, file, folder, start, name):
        nonlocal is_sending
        is_sending = file.name == largest
        if starts and is_sending:
            starts.append(start)
        try:
            send(shell, file, folder, start, name)
        finally:
            is_sending = False

    monkeypatch.setattr(push, "_read_from", read_then_break)
    monkeypatch.setattr(push, "_send", note_start)
    with connect() as connection:
        Bundle.open(Path(connection.install(bundle)))
    assert starts[0] == 0
    assert len(starts) == 2
    assert starts[1] > 2**13


def test_what_is_there_is_continued_or_replaced(connect, tiny_bundle, monkeypatch):
    bundle = Bundle.open(tiny_bundle)
    name = max(bundle.manifest.files, key=lambda name: (tiny_bundle / name).stat().st_size)
    content = (tiny_bundle / name).read_bytes()
    half = len(content) // 2
    starts = {content[:half]: half, bytes(half): 0, content + b"x": 0, bytes(len(content)): 0}
    sent: list[tuple[str, int]] = []
    send = push._send

    def note(shell, file, folder, start, device):
        sent.append((file.name, start))
        send(shell, file, folder, start, device)

    with connect() as connection:
        folder = Path(connection.install(bundle))
        monkeypatch.setattr(push, "_send", note)
        for there, start in starts.items():
            (folder / name).write_bytes(there)
            sent.clear()
            connection.install(bundle)
            assert (folder / name).read_bytes() == content
            assert sent == [(name, start)]


def test_a_device_that_changes_what_it_is_sent_is_given_up(
    connect, shell_rig, tiny_bundle, monkeypatch
):
    monkeypatch.setattr(push, "_ATTEMPTS", 1)
    cat = shell_rig.programs / "cat"
    with connect() as connection:
        cat.write_text("#!/bin/sh\n/bin/cat \"$@\" | tr 'a' 'b'\n")
        cat.chmod(0o755)
        with pytest.raises(InputError, match=r"was not brought, it is not there as it was sent"):
            connection.install(Bundle.open(tiny_bundle))
        cat.unlink()
    assert shell_rig.left() == []


def test_a_device_without_space_is_refused_before_anything_is_sent(
    connect, shell_rig, nasty_bundle
):
    with connect() as connection:
        shell_rig.set_free_kb(16_384)
        with pytest.raises(InputError, match="has 17 MB of free space") as caught:
            connection.install(nasty_bundle)
        assert "\n" not in str(caught.value)
        assert not (shell_rig.base / "bundles").exists()
    assert shell_rig.left() == []
    with pytest.raises(InputError, match="free space, and the runner takes"):
        shell_rig.set_free_kb(5)
        connect()
    assert shell_rig.left() == []


def test_a_device_without_memory_is_refused(connect, shell_rig, nasty_bundle, monkeypatch):
    monkeypatch.setattr(remote, "least_graph_bytes", lambda _: 10**15)
    with connect() as connection, pytest.raises(InputError, match="MB of memory available"):
        connection.install(nasty_bundle)
    assert shell_rig.left() == []


def test_a_disk_that_fills_up_is_one_line(connect, shell_rig, tiny_bundle):
    cat = shell_rig.programs / "cat"
    with connect() as connection:
        cat.write_text("#!/bin/sh\necho 'cat: write error: No space left on device' >&2\nexit 1\n")
        cat.chmod(0o755)
        with pytest.raises(InputError, match=r"cannot be written: cat: .*No space left on device$"):
            connection.install(Bundle.open(tiny_bundle))
        cat.unlink()
    assert shell_rig.left() == []


def test_one_controller_at_a_time(connect, shell_rig):
    with connect():
        with pytest.raises(InputError, match=r"is in use by .* \(process \d+\)") as caught:
            connect()
        assert "\n" not in str(caught.value)
        assert shell_rig.base.exists()
    assert shell_rig.left() == []
    with connect():
        pass


def test_a_lock_whose_process_is_gone_is_taken(connect, shell_rig):
    lock = shell_rig.base / "lock"
    lock.mkdir(parents=True)
    (lock / "owner").write_text("4194303 0123 nobody (process 1)\n")
    with connect() as connection:
        assert connection.run(JOB, timeout_s=30) == {"answer": 42}
    assert shell_rig.left() == []


def test_files_can_be_kept_for_the_next_run(connect, shell_rig, tiny_bundle, monkeypatch):
    bundle = Bundle.open(tiny_bundle)
    with connect(keeps_files=True) as connection:
        folder = connection.install(bundle)
    assert sorted(path.name for path in shell_rig.base.iterdir()) == [
        "bundles",
        "runner",
        "runner.tar",
    ]
    monkeypatch.setattr(push, "_send", lambda *_: pytest.fail("nothing is missing"))
    with connect() as connection:
        assert connection.install(bundle) == folder
        assert connection.run(JOB, timeout_s=30) == {"answer": 42}
    assert shell_rig.left() == []


def test_a_controller_that_is_killed_frees_the_device(shell_rig, tmp_path):
    """SIGKILL: nothing of it can clean up, yet the runner ends and the next one gets the device."""
    runner = write_runner(tmp_path / "sleeper", f"import time; {LOADED} time.sleep(60)")
    transport = shell_rig.transport(runner)
    script = tmp_path / "controller.py"
    script.write_text(
        "from pathlib import Path, PosixPath\n"
        "from pocketvlm.device_bench.transports.adb import AdbTransport\n"
        "from pocketvlm.device_bench.transports.ssh import SshTransport\n"
        "from pocketvlm.device_bench.protocol import EnvironmentJob\n"
        f"with {transport!r}.connect() as connection:\n"
        "    connection.run(EnvironmentJob(), timeout_s=60, on_event=lambda e: print(1,flush=True))"
    )
    for number, is_left in ((signal.SIGINT, False), (signal.SIGKILL, True)):
        controller = subprocess.Popen(
            [sys.executable, script],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        )
        assert controller.stdout is not None
        assert controller.stdout.readline() == b"1\n"
        assert running(f"{shell_rig.base}/runner")
        controller.send_signal(number)
        controller.wait(30)
        controller.stdout.close()
        assert wait_until(lambda: not running(f"{shell_rig.base}/runner"))
        assert wait_until(lambda: not (shell_rig.base / "lock").exists())
        assert bool(shell_rig.left()) == is_left
    with shell_rig.transport(runner).connect():
        pass
    assert shell_rig.left() == []


def test_a_script_that_is_cut_off_does_not_run(shell_rig, tmp_path):
    """Of a script that did not arrive whole, nothing is run."""
    with shell_rig.transport(write_runner(tmp_path / "r", ECHO)).connect() as connection:
        shell = connection._link.shell
        with pytest.MonkeyPatch.context() as patch:
            write = push.Shell.run.__globals__["write_script"]
            patch.setitem(
                push.Shell.run.__globals__, "write_script", lambda *text: write(*text)[:-9]
            )
            with pytest.raises(LostConnectionError):
                shell.run(f"touch '{tmp_path}/ran'\ntrue but not whole")
        assert not (tmp_path / "ran").exists()


def test_a_runner_with_its_wheels_is_installed_on_the_device(shell_rig, tmp_path):
    runner = write_runner(tmp_path / "r", f"open('ready'); {ECHO}")
    (runner / "wheels").mkdir()
    (runner / "wheels" / "numpy.whl").touch()
    (runner / "install").write_text("touch ready\n")
    with shell_rig.transport(runner).connect() as connection:
        assert connection.run(JOB, timeout_s=30) == {"answer": 42}
    (runner / "install").write_text("echo no such wheel; exit 1\n")
    with pytest.raises(InputError, match="cannot take the runner: no such wheel"):
        shell_rig.transport(runner).connect()
    assert shell_rig.left() == []

"""The line protocol, with real processes that fail in every known way."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pocketvlm.device_bench.protocol import (
    PROTOCOL,
    BlockJob,
    EnvironmentJob,
    Failure,
    LoadedEvent,
    Turn,
    parse_job,
    write_job,
)
from pocketvlm.device_bench.transports.host import HostTransport
from pocketvlm.machine import peak_rss_bytes

JOB = EnvironmentJob(threads=1)
TOO_BIG = {"schema": PROTOCOL, "status": "failed", "reason": "too big"}
OK = {"schema": PROTOCOL, "status": "ok", "result": {"answer": 42}}


def outcome(program: str, *, timeout_s: float = 20.0):
    with HostTransport(command=(sys.executable, "-c", program)).connect() as connection:
        return connection.run(JOB, timeout_s=timeout_s)


def test_the_last_line_is_the_result_whatever_came_before():
    program = f"print('loading...'); print('{{\"not\": \"this\"}}'); print('''{json.dumps(OK)}''')"
    assert outcome(program) == {"answer": 42}


def test_the_job_arrives_with_its_schema():
    program = (
        "import json, sys; job = json.loads(sys.stdin.read());"
        f"print(json.dumps({{'schema': {PROTOCOL}, 'status': 'ok', 'result': job}}))"
    )
    assert outcome(program) == {"schema": PROTOCOL, "job": "environment", "threads": 1}


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os; os.abort()", "ended by SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "memory runs out"),
        ("import sys; sys.stderr.write('no such file\\n'); sys.exit(3)", "status 3.*no such file"),
        ("print('garbage {')", "status 0 and no result"),
        ("", "status 0 and no result"),
        ("print('[1, 2]')", "not a result of this protocol"),
        ('print(\'{"schema": 99, "status": "ok", "result": {}}\')', "of this protocol"),
        (f"print('''{json.dumps(OK)}'''); import sys; sys.exit(7)", "status 7"),
        (f"print('''{json.dumps(TOO_BIG)}''')", "^too big$"),
        ("import sys; sys.stdout.buffer.write(b'\\xff\\xfe')", "no result"),
    ],
)
def test_every_bad_end_is_a_failure_with_a_reason(program, reason):
    result = outcome(program)
    assert isinstance(result, Failure)
    assert re.search(reason, result.reason), result.reason


def test_a_process_that_hangs_is_killed_with_its_children(tmp_path):
    marker = tmp_path / "child"
    program = (
        "import subprocess, sys, time;"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"open({str(marker)!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    started = time.monotonic()
    result = outcome(program, timeout_s=2.0)
    assert isinstance(result, Failure)
    assert result.reason == "no result within 2 s"
    assert time.monotonic() - started < 20
    child = int(marker.read_text())
    for _ in range(100):
        if not is_running(child):
            break
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_what_was_measured_is_kept_when_the_runner_dies():
    program = (
        "import os, sys, time;"
        'print(\'{"event": "loaded", "load_ms": 12.5}\', flush=True);'
        "print('{\"event\": \"unheard of\"}'); print('{garbage', flush=True); os.abort()"
    )
    seen = []
    with HostTransport(command=(sys.executable, "-c", program)).connect() as connection:
        result = connection.run(JOB, timeout_s=20, on_event=seen.append)
    assert isinstance(result, Failure)
    assert list(result.events) == seen == [LoadedEvent(load_ms=12.5)]


def test_jobs_of_another_protocol_are_refused():
    with pytest.raises(ValueError, match=f"job schema 99; this runner speaks {PROTOCOL}"):
        parse_job('{"schema": 99}')
    with pytest.raises(ValueError, match="'dance'; this runner knows environment, sensors, block"):
        parse_job(json.dumps({"schema": PROTOCOL, "job": "dance"}))
    assert parse_job(write_job(JOB)) == JOB


def test_the_real_runner_reports_a_missing_bundle(tmp_path):
    job = BlockJob(
        bundle=str(tmp_path), runtime="onnx", turns=(Turn(text="x"),), new_tokens=2, threads=1
    )
    with HostTransport().connect() as connection:
        result = connection.run(job, timeout_s=60)
    assert isinstance(result, Failure)
    assert "no bundle here" in result.reason


def test_native_output_cannot_reach_the_result_line():
    """Descriptor 1 is stderr while a job runs, so output of a library is harmless."""
    program = (
        "import os, sys, pocketvlm.device_bench.runner.worker as worker;"
        "worker.run_job = lambda job, send: os.write(1, b'native noise') and {'x': 1};"
        "sys.exit(worker.main())"
    )
    assert outcome(program, timeout_s=60) == {"x": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux hands the parent's peak down")
def test_peak_memory_is_that_of_the_process_alone():
    """A parent of 300 MB starts a child of 20 MB: ru_maxrss is 300 MB, ours is 20 MB."""
    ballast = bytearray(300 * 2**20)
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            "from pocketvlm.machine import peak_rss_bytes; print(peak_rss_bytes())",
        ],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ},
    )
    assert peak_rss_bytes() > len(ballast)
    assert int(child.stdout) < 150 * 2**20

"""A program runs in its own process, whatever becomes of that process."""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from pocketvlm.bundle import Bundle
from pocketvlm.cli import main
from pocketvlm.errors import BundleError
from pocketvlm.runtime.executorch.frames import (
    ArrayType,
    FrameError,
    array_types,
    read_arrays,
    read_header,
    write_frame,
)
from pocketvlm.runtime.executorch.process import ProgramProcess, UnspeakablePieceError
from pocketvlm.runtime.executorch.runner import ExecutorchRunner
from tests.fuzzing.materials import sign_again

IDS = np.array([[5, 6]], np.int64)


@pytest.fixture(scope="module")
def bundle(both_targets: Bundle) -> Bundle:
    return both_targets


@pytest.fixture
def process(bundle: Bundle):
    opened = ProgramProcess(bundle, threads=1)
    yield opened
    opened.close()


def rows_of(bundle: Bundle, count: int = 2) -> ArrayType:
    width = bundle.component("executorch", "embedding").outputs[0].shape[-1]
    assert isinstance(width, int)
    return ArrayType("float32", (1, count, width))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_signal_is_one_line_and_no_call_is_answered_after_it(
    bundle: Bundle, process: ProgramProcess
) -> None:
    os.kill(process.pid, signal.SIGSEGV)
    call = ("token_embedding", IDS)
    with pytest.raises(
        BundleError,
        match=r"model\.pte: ExecuTorch ended with signal SIGSEGV while running token_embedding",
    ) as caught:
        process.run(*call, outputs=[rows_of(bundle)])
    assert "\n" not in str(caught.value)
    with pytest.raises(BundleError, match="process has ended; open the bundle again"):
        process.run(*call, outputs=[rows_of(bundle)])
    assert not is_running(process.pid)


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_program_that_ends_its_runtime_is_one_line(
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    options: list[str],
) -> None:
    """The first table of the file says that its description lies two gigabytes further on."""
    broken = tmp_path / "bundle"
    shutil.copytree(bundle.path, broken)
    file = broken / bundle.component("executorch", "decoder").file
    content = bytearray(file.read_bytes())
    (table,) = struct.unpack_from("<I", content)
    struct.pack_into("<i", content, table, -(2**31 - 16))
    file.write_bytes(content)
    sign_again(broken, "manifest.json")
    Bundle.open(broken)
    command = ["pocketvlm", "ask", str(broken), "--prompt", "What?", "--runtime", "executorch"]
    monkeypatch.setattr("sys.argv", [*command, *options])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capfd.readouterr()
    assert not said.out
    assert len(said.err.splitlines()) == 1
    assert "model.pte: ExecuTorch ended with signal SIG" in said.err
    assert "while loading it" in said.err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_context_len", b"-1", "max_context_len must be 1 to"),
        ("max_context_len", b"{}", "max_context_len"),
        ("row_channels", b"1", "row_channels must be hidden_size"),
        ("hidden_size", b"}}", "cannot be read as JSON"),
    ],
)
def test_a_program_that_lies_about_its_sizes_is_one_line(
    bundle: Bundle, tmp_path: Path, name: str, value: bytes, message: str
) -> None:
    broken = tmp_path / "bundle"
    shutil.copytree(bundle.path, broken)
    file = broken / bundle.component("executorch", "decoder").file
    changed, count = re.subn(
        rb'("%s": )(\d+)' % name.encode(),
        lambda found: found[1] + value.ljust(len(found[2])),
        file.read_bytes(),
    )
    assert count
    file.write_bytes(changed)
    with pytest.raises(BundleError, match=rf"model\.pte: get_model_schema.*{message}"):
        ExecutorchRunner(Bundle.open(broken, verify=False))


def test_torch_is_not_imported_where_a_program_is_asked(bundle: Bundle) -> None:
    script = (
        "import sys; from pathlib import Path; from pocketvlm.bundle import Bundle; "
        "from pocketvlm.runtime.executorch.runner import ExecutorchRunner; "
        f"ExecutorchRunner(Bundle.open(Path({str(bundle.path)!r}))).embed([5]); "
        "print({'torch', 'executorch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_silence_is_one_line(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="did not answer within 0 s while loading it"):
        ProgramProcess(bundle, load_limit_s=0)
    process = ProgramProcess(bundle, run_limit_s=0.1)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(BundleError, match=r"did not answer within 0\.1 s while running token_emb"):
        process.run("token_embedding", IDS, outputs=[rows_of(bundle)])
    assert not is_running(process.pid)


def test_what_was_not_asked_for_is_not_read(bundle: Bundle, process: ProgramProcess) -> None:
    with pytest.raises(
        BundleError, match=r"returned float32 \[1, 2, \d+\]; this bundle needs float32 \[1, 3, \d+"
    ):
        process.run("token_embedding", IDS, outputs=[rows_of(bundle, 3)])
    assert not is_running(process.pid)


def test_what_the_runtime_refuses_leaves_the_process(
    bundle: Bundle, process: ProgramProcess
) -> None:
    with pytest.raises(BundleError, match=r"model\.pte: nothing does not run: "):
        process.run("nothing", IDS, outputs=[rows_of(bundle)])
    assert len(process.run("token_embedding", IDS, outputs=[rows_of(bundle)])) == 1


def test_the_process_ends_with_its_runner(bundle: Bundle) -> None:
    runner = ExecutorchRunner(bundle)
    pid = runner.process.pid
    assert is_running(pid)
    del runner
    gc.collect()
    assert not is_running(pid)
    runner = ExecutorchRunner(bundle)
    runner.close()
    assert not is_running(runner.process.pid)


def test_it_outlives_the_thread_that_started_it(bundle: Bundle) -> None:
    opened: list[ExecutorchRunner] = []
    thread = threading.Thread(target=lambda: opened.append(ExecutorchRunner(bundle)))
    thread.start()
    thread.join()
    time.sleep(0.1)
    assert opened[0].embed([5, 6]).shape[1] == 2
    opened[0].close()


def test_an_interrupted_answer_ends_the_process(bundle: Bundle, process: ProgramProcess) -> None:
    def stop(_: str) -> None:
        raise KeyboardInterrupt

    tokenizer = str(bundle.file("tokenizer.json"))
    with pytest.raises(KeyboardInterrupt):
        # A random model says anything, and some tokens are not whole characters.
        for token in range(5, 100):
            with suppress(UnspeakablePieceError):
                process.generate(tokenizer, [[token]], max_new_tokens=4, on_piece=stop)
    assert not is_running(process.pid)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xff\xff\xff", "a header of 4294967295 bytes"),
        (b"\2\0\0\0{]", "is not JSON"),
        (b"\2\0\0\0[]", "is not an object"),
        (b"\2\0\0\0{}", "without arrays"),
        (b'\x1b\0\0\0{"arrays": [["O", [1, 2]]]}', "without type"),
        (b'\x1d\0\0\0{"arrays": [["int64", [-1]]]}', "without type"),
        (b'\x1f\0\0\0{"arrays": [["int64", [true]]]}', "without type"),
        (b'\x25\0\0\0{"arrays": [["int64", [9876543210]]]}', "an array of 79012345680 bytes"),
    ],
)
def test_nonsense_is_no_message(content: bytes, message: str) -> None:
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    with pytest.raises(FrameError, match=message):
        read_arrays(reading, array_types(read_header(reading) or {}))
    os.close(reading)


def test_arrays_arrive_as_they_were() -> None:
    reading, writing = os.pipe()
    rng = np.random.default_rng(0)
    sent = [rng.standard_normal((2, 3)).astype(np.float32).T, np.arange(4)[None, ::2]]
    write_frame(writing, {"word": "ä\ud800"}, sent)
    header = read_header(reading)
    assert header is not None
    assert header["word"] == "ä\ud800"
    for found, expected in zip(read_arrays(reading, array_types(header)), sent, strict=True):
        np.testing.assert_array_equal(found, expected)
    os.close(writing)
    assert read_header(reading) is None
    os.close(reading)

"""The main job through the command line, on real (tiny) models."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from pocketvlm.bundle import Bundle
from pocketvlm.errors import BundleError
from pocketvlm.json_io import read_json
from tests.forked import fork_cli


def signed_bytes(run):
    """Content of every file that must not depend on when or how often the run was started."""
    names = [f"bundle/{name}" for name in Bundle.open(run / "bundle").manifest.files]
    names += ["bundle/manifest.json", "recipe.yaml", "run.json"]
    names += [f"checkpoint/{file.name}" for file in (run / "checkpoint").iterdir()]
    return {name: (run / name).read_bytes() for name in sorted(names)}


def assert_one_error_line(finished):
    assert "Traceback" not in finished.stderr
    assert sum(line.startswith("error: ") for line in finished.stderr.splitlines()) == 1


def test_a_run_leaves_everything_the_design_names(finished_runs):
    for run in finished_runs.values():
        names = {path.name for path in run.iterdir()}
        assert names == {
            *("bundle", "checkpoint", "log.jsonl", "recipe.yaml"),
            *("report.html", "report.json", "run.json"),
        }
        report = read_json(run / "report.json")
        assert report["parity"]["passed"]
        assert [stage["method"] for stage in report["stages"]] == ["reduce_tokens", "gptq"]
        assert all(stage["seconds"] > 0 for stage in report["stages"])
        assert report["size"]["bundle_bytes"] == Bundle.open(run / "bundle").stored_bytes()
        assert report["latency"] is None
        assert any("synthetic" in note for note in report["notes"])


def test_the_same_command_again_ends_in_the_same_bytes(finished_runs, tiny_paths, recipe_path):
    run = finished_runs["llava"]
    before = signed_bytes(run)
    fork_cli(
        *("compress", tiny_paths["llava"], "--recipe", recipe_path, "--out", run),
        *("--no-bench", "--threads", 1),
        check=0,
    )
    assert signed_bytes(run) == before


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)]
)
def test_an_interrupted_run_resumes_to_the_same_bytes(
    number, code, finished_runs, tiny_paths, recipe_path, tmp_path
):
    """Stopped in the middle of the quantizer, at a layer that differs from run to run."""
    out = tmp_path / "run"
    arguments = [
        *("compress", str(tiny_paths["llava"]), "--recipe", str(recipe_path)),
        *("--out", str(out), "--no-bench", "--threads", "1"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "pocketvlm", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(out.glob(".work/*/layers/*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait(60) == code
    assert not (out / "report.json").exists()
    fork_cli(*arguments, check=0)
    assert signed_bytes(out) == signed_bytes(finished_runs["llava"])


def test_another_run_is_refused_and_nothing_is_touched(finished_runs, tiny_paths, recipe_path):
    run = finished_runs["llava"]
    before = signed_bytes(run)
    finished = fork_cli(
        *("compress", tiny_paths["smolvlm"], "--recipe", recipe_path, "--out", run, "--no-bench"),
        check=2,
    )
    assert "holds another run" in finished.stderr
    assert signed_bytes(run) == before


def test_a_folder_with_other_things_is_refused(tiny_paths, recipe_path, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    finished = fork_cli(
        *("compress", tiny_paths["llava"], "--recipe", recipe_path, "--out", tmp_path), check=2
    )
    assert "is not empty and holds no run" in finished.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_full_disk_gets_one_line_and_the_run_goes_on_later(
    tiny_paths, recipe_path, finished_runs, tmp_path
):
    """A limit on the size of a file fails a write half way, as a full disk does."""
    out = tmp_path / "run"
    arguments = [
        *("compress", tiny_paths["llava"], "--recipe", recipe_path),
        *("--out", out, "--no-bench", "--threads", 1),
    ]
    finished = fork_cli(*arguments, check=2, largest_file=40_000)
    assert_one_error_line(finished)
    assert not list(out.glob("*.partial"))
    assert not (out / "bundle").exists()
    fork_cli(*arguments, check=0)
    assert signed_bytes(out) == signed_bytes(finished_runs["llava"])


def test_scores_of_a_folder_of_questions_are_reported(tiny_paths, recipe_path, questions, tmp_path):
    out = tmp_path / "run"
    finished = fork_cli(
        *("compress", tiny_paths["smolvlm"], "--recipe", recipe_path, "--out", out),
        *("--no-bench", "--data", questions, "--n", 4, "--json"),
        check=0,
    )
    quality = json.loads(finished.stdout)["quality"]
    assert quality["n"] == 4
    assert set(quality) >= {"metric", "float", "compressed", "recovery", "blind"}


def test_a_changed_bundle_is_not_asked(finished_runs, tmp_path):
    bundle = shutil.copytree(finished_runs["llava"] / "bundle", tmp_path / "bundle")
    weights = bundle / "onnx" / "weights.bin"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(BundleError, match=r"weights\.bin: was changed after signing"):
        Bundle.open(bundle)
    finished = fork_cli("ask", bundle, "--prompt", "hello", check=2)
    assert "was changed after signing" in finished.stderr


def test_a_failed_bound_exits_with_1_and_keeps_the_bundle(tiny_paths, recipe_path, tmp_path):
    finished = fork_cli(
        *("compress", tiny_paths["llava"], "--recipe", recipe_path, "--out", tmp_path / "run"),
        *("--no-bench", "--set", "expect.bundle_share.max=0.001"),
        check=1,
    )
    assert "bundle_share is" in finished.stderr
    Bundle.open(tmp_path / "run" / "bundle")


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.ismount("/sys"), reason="root may write")
def test_a_read_only_place_gets_one_line(tiny_paths, recipe_path):
    finished = fork_cli(
        *("compress", tiny_paths["llava"], "--recipe", recipe_path, "--out", "/sys/run"), check=2
    )
    assert_one_error_line(finished)

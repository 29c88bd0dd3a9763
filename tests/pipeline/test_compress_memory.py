"""The memory that `plan` says `compress` takes, and what a run on a tiny model takes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pocketvlm.pipeline.plan import plan
from pocketvlm.pipeline.sources import select_targets
from pocketvlm.recipes.load import load_recipe
from pocketvlm.reference.shapes import load_shape

INT4 = load_recipe("int4-balanced")


def planned(shape, recipe=INT4):
    return plan(load_shape(shape), recipe).compress_bytes


def test_a_large_model_takes_less_than_its_source():
    for shape in ("qwen3-vl-2b", "qwen2.5-vl-3b", "gemma-3-4b", "llava-1.5-7b"):
        made = plan(load_shape(shape), INT4)
        assert made.compress_bytes < made.source_bytes
    assert planned("llava-1.5-7b") < 0.5 * plan(load_shape("llava-1.5-7b"), INT4).source_bytes


def test_what_a_runner_makes_for_long_calls_is_the_devices_alone():
    """`compress` keeps it in a file: it takes one byte for each weight of the decoder."""
    shape = load_shape("llava-1.5-7b")
    short, long = (
        plan(shape, load_recipe("int4-balanced", [f"targets.0.int8_prefill_rows={rows}"]))
        for rows in ("null", 32)
    )
    assert long.ram_bytes - short.ram_bytes > 6e9
    assert 0 <= long.compress_bytes - short.compress_bytes < 2e6  # bytes of the graphs


def test_a_stage_that_holds_the_model_is_counted():
    shape = load_shape("smolvlm-500m")
    weights = plan(shape, INT4).source_bytes / 2
    pruned = load_recipe("pruned-structured-25")
    assert any(stage.holds_model for stage in pruned.stages)
    assert plan(shape, pruned).compress_bytes > 4 * weights > plan(shape, INT4).compress_bytes


def test_the_certificate_of_a_float_model_holds_it_as_the_runtime_does():
    made = plan(load_shape("smolvlm-500m"), load_recipe("float"))
    assert made.compress_bytes > 2 * made.source_bytes


def test_other_toolkits_are_said_to_come_on_top():
    shape = load_shape("smolvlm-256m")
    alone = plan(shape, INT4)
    both = plan(shape, select_targets(INT4, ["onnx", "executorch"]))
    assert "toolkit" not in "\n".join(alone.lines())
    assert "beside what the toolkit of executorch takes" in "\n".join(both.lines())
    assert f"at least {alone.compress_bytes / 1e6:.0f} MB to compress" in "\n".join(alone.lines())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_takes_what_was_planned(tiny_paths, recipe_path, tmp_path):
    """Of a tiny model that is what the libraries take, which every run takes."""
    path, recipe = tiny_paths["smolvlm"], load_recipe(str(recipe_path))
    command = [sys.executable, "-m", "pocketvlm", "compress", path, "--recipe", recipe_path]
    command += ["--out", tmp_path / "run", "--no-bench", "--data", "none", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        rows = dict(line.split(":", 1) for line in status.read_text().splitlines())
        peak = max(peak, int(rows.get("RssAnon", "0 kB").split()[0]) * 1024)
        time.sleep(0.05)
    assert process.returncode == 0
    most = plan(path, recipe).compress_bytes
    assert 0.4 * most < peak <= most

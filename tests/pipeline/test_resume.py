"""Runs that were stopped half way, damaged meanwhile, and started again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pocketvlm.errors import CheckpointError, RecipeError
from pocketvlm.pipeline.job import Job
from pocketvlm.pipeline.run_lock import hold_lock

UNCOMPARED = {"README.md", "report.html", "report.json", "log.jsonl"}
"""What holds timings."""


def results(out: Path) -> dict[str, bytes]:
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in files
        if path.name not in UNCOMPARED
    }


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    content[2 * len(content) // 3] ^= 4
    path.write_bytes(content)


@pytest.fixture(scope="module")
def job(tiny_paths, recipe_path):
    return Job(
        model=str(tiny_paths["llava"]), recipe=str(recipe_path), bench=False, data="none", threads=1
    )


@pytest.fixture(scope="module")
def undisturbed(job, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    job.run(out)
    return results(out)


@pytest.fixture(scope="module")
def half(job, tmp_path_factory):
    """A run folder with one stage finished, and five layers of the next."""
    out = tmp_path_factory.mktemp("half") / "run"

    def stop(progress):
        if progress.task == "gptq" and progress.done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run(out, on_progress=stop)
    return out


@pytest.mark.parametrize(
    "pattern",
    [
        ".work/*/layers/*v_proj*",  # one layer, of which others were made
        ".work/*/checkpoint/chat_template.jinja",  # not a weight
        "**/*",
    ],
)
def test_what_was_damaged_is_made_again(job, undisturbed, half, tmp_path, pattern):
    out = shutil.copytree(half, tmp_path / "run")
    damaged = [path for path in out.glob(pattern) if path.is_file()]
    assert damaged
    for path in damaged:
        flip_a_bit(path)
    job.run(out)
    assert results(out) == undisturbed


def test_work_under_other_conditions_is_done_again(job, undisturbed, half, tmp_path, monkeypatch):
    """As if another version had made the layers: what they hold is not looked at."""
    out = shutil.copytree(half, tmp_path / "run")
    kept = {path.name for path in out.glob(".work/*")}
    monkeypatch.setattr("pocketvlm.pipeline.run.conditions", lambda: {"torch": "another"})
    seen = []
    with pytest.raises(KeyboardInterrupt):
        job.run(out, on_progress=lambda step: seen.append(step) or _stop_at(step, 3))
    assert next(step.done for step in seen if step.task == "gptq") <= 1
    assert {path.name for path in out.glob(".work/*")} > kept


def _stop_at(progress, done):
    if progress.task == "gptq" and progress.done == done:
        raise KeyboardInterrupt


def test_a_second_process_is_refused_and_harms_nothing(job, half, tmp_path):
    out = shutil.copytree(half, tmp_path / "run")
    before = results(out)
    with hold_lock(out / ".work"):
        with pytest.raises(RecipeError, match="is being written by process"):
            job.run(out)
        assert {**results(out), ".work/lock": b""} == {**before, ".work/lock": b""}


def test_a_model_that_is_written_to_meanwhile_ends_the_run(tiny_paths, recipe_path, tmp_path):
    """Its weights are mapped: layers before the write and after it are those of two models."""
    model = shutil.copytree(tiny_paths["llava"], tmp_path / "model")
    job = Job(model=str(model), recipe=str(recipe_path), bench=False, data="none", threads=1)

    def write(progress):
        if progress.task == "gptq" and progress.done == 3:
            flip_a_bit(model / "model.safetensors")

    with pytest.raises(CheckpointError, match="was written to while the run read it"):
        job.run(tmp_path / "run", on_progress=write)
    assert not (tmp_path / "run" / "bundle").exists()


def test_a_model_that_is_replaced_meanwhile_does_no_harm(
    tiny_paths, recipe_path, undisturbed, tmp_path
):
    model = shutil.copytree(tiny_paths["llava"], tmp_path / "llava")
    job = Job(model=str(model), recipe=str(recipe_path), bench=False, data="none", threads=1)

    def replace(progress):
        if progress.task == "gptq" and progress.done == 3:
            weights = model / "model.safetensors"
            other = shutil.copy(weights, tmp_path / "other.safetensors")
            flip_a_bit(other)
            other.replace(weights)

    job.run(tmp_path / "run", on_progress=replace)
    assert results(tmp_path / "run") == undisturbed

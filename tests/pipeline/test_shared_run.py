"""Two processes that share a run, beside one: codes, deaths, and processes that do not agree."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.walk import walk as walk_module
from pocketvlm.calibration.walk.moments import CrossMoment, SecondMoment
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.cli.app import run_command
from pocketvlm.cli.failures import run_to_exit_code
from pocketvlm.compress.layerwise.layer_store import LayerStore
from pocketvlm.context import ALONE, RunContext
from pocketvlm.errors import CalibrationError
from pocketvlm.pipeline.journal import Journal
from pocketvlm.pipeline.run import compress_checkpoint
from pocketvlm.pipeline.sources import load_checkpoint, resolve_calibration
from pocketvlm.pipeline.torchrun import join_ranks
from pocketvlm.recipes.load import load_recipe
from pocketvlm.weights.sparse import SparseWeight
from tests.contracts.promises import read
from tests.ranks import run_ranks

RECIPE = """
schema: 1
name: shared
calibration: {source: reference, samples: 8}
stages:
  - {method: reduce_tokens, keep: 0.5}
  - method: gptq
    drift_share: 0.5
    modality_weights: gradient
    rules:
      - {part: tower, bits: 8, group_size: 32}
      - {match: '.*', bits: 4, group_size: 32}
targets:
  - {method: onnx, accuracy_level: 0, tower_accuracy_level: 0}
"""
RULES = [{"bits": 4, "group_size": 16}]
SHARED = {
    "rtn": {"rules": RULES},
    "awq": {"rules": RULES, "grid_points": 3},
    "prune": {
        "score": {"kind": "gblm"},
        "allocation": {"kind": "ecoflap", "order": "first"},
    },
    "distill": {"steps": 3, "batch_size": 4, "check_every": 2, "held_out": 0.25},
}
SAMPLES = 8
SMALL_BATCHES = 80
"""Tokens of a batch: few, so that there are several of every kind."""


@pytest.fixture(scope="module")
def model(tiny_paths) -> Path:
    return tiny_paths["smolvlm"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "shared.yaml"
    path.write_text(RECIPE)
    return path


def compress(rank, job, seeds=(0, 0), dies_after=None):
    """The command line in one rank."""
    walk_module.BATCH_TOKENS = SMALL_BATCHES
    if rank == 1 and dies_after is not None:
        save, saved = LayerStore.save, []

        def dying(self, name, layer):
            saved.append(name)
            if len(saved) > dies_after:
                os._exit(9)
            return save(self, name, layer)

        LayerStore.save = dying
    return run_to_exit_code(lambda: run_command([*job, "--seed", str(seeds[rank])]))


def keep_work(rank, job):
    """As `compress`, and what the run has kept to resume from stays to be looked at."""
    Journal.clean = lambda _: None
    return compress(rank, job)


@pytest.fixture(scope="module")
def command(model, recipe):
    options = ["--no-bench", "--data", "none", "--threads", "1", "--no-verify-source"]
    return ["compress", str(model), "--recipe", str(recipe), *options]


@pytest.fixture(scope="module")
def died(command, tmp_path_factory) -> Path:
    """A folder whose run was ended by the death of one of two processes."""
    folder = tmp_path_factory.mktemp("died")
    job = [*command, "--out", str(folder / "run")]
    first, second = run_ranks(2, compress, folder, job, (0, 0), 3)
    assert (first.exit_code, second.exit_code) == (2, 9)
    (line,) = first.printed.strip().splitlines()
    assert line.startswith("error: another process of this run has ended")
    assert "the same command resumes" in line
    return folder / "run"


def test_after_a_death_two_processes_end_with_the_codes_of_one(
    command, died, model, recipe, tmp_path, monkeypatch
):
    finished = list(died.glob(".work/*/layers/*.safetensors"))
    times = {path: path.stat().st_mtime_ns for path in finished}
    assert finished
    first, second = run_ranks(2, keep_work, tmp_path, [*command, "--out", str(died)])
    assert (first.exit_code, second.exit_code) == (0, 0), first.printed + second.printed
    assert not second.printed
    assert {path: path.stat().st_mtime_ns for path in finished} == times
    monkeypatch.setattr(walk_module, "BATCH_TOKENS", SMALL_BATCHES)
    loaded = load_recipe(str(recipe))
    alone = compress_checkpoint(
        load_checkpoint(model),
        loaded.stages,
        resolve_calibration(loaded.calibration, pictures=None),
        RunContext(),
    )
    shared = load_checkpoint(died / "checkpoint")
    for linear, form in alone.forms().items():
        for name, values in form.to_tensors().items():
            assert torch.equal(shared.form(linear.name).to_tensors()[name], values), linear.name
    notes = json.loads((died / "report.json").read_text())["notes"]
    assert "2 processes shared the work of gptq" in notes
    assert "one of 2 processes did the work of reduce_tokens" in notes


def test_a_rank_that_works_on_something_else_is_refused(command, tmp_path):
    job = [*command, "--out", str(tmp_path / "run")]
    for each in run_ranks(2, compress, tmp_path / "logs", job, (0, 7)):
        assert each.exit_code == 2
        (line,) = each.printed.strip().splitlines()
        assert line.startswith("error: process 1 has another seed than process 0; ")
    assert not (tmp_path / "run").exists()


def compress_at_home(rank, job, home):
    """As `compress`, where relative paths are those of another machine."""
    os.chdir(home / str(rank))
    return compress(rank, job)


def test_a_rank_that_sees_other_data_is_refused(command, questions, tmp_path):
    """One picture of a folder differs by one byte; its name and its row do not."""
    for rank in range(2):
        shutil.copytree(questions, tmp_path / str(rank) / "data")
    picture = tmp_path / "1" / "data" / "2.png"
    picture.write_bytes(picture.read_bytes() + b"\0")
    job = [*command, "--set", "calibration.source=data", "--set", "calibration.samples=4"]
    job += ["--out", str(tmp_path / "run")]
    for each in run_ranks(2, compress_at_home, tmp_path / "logs", job, tmp_path):
        assert each.exit_code == 2
        (line,) = each.printed.strip().splitlines()
        assert line.startswith("error: process 1 has another calibration than process 0; ")
    assert not (tmp_path / "run").exists()


def test_more_processes_than_batches_are_refused(model):
    class _Many(type(ALONE)):
        count = 99

    walk = walk_module.BlockWalk(
        checkpoint=Checkpoint.load(model),
        samples=CalibrationSet.from_reference(0, SAMPLES),
        ranks=_Many(),
    )
    with pytest.raises(
        CalibrationError, match=r"which 99 processes cannot share; start at most \d"
    ):
        next(iter(walk))


def apply_shared(rank, model, folder):
    """Every stage that shares samples, by one rank."""
    walk_module.BATCH_TOKENS = SMALL_BATCHES
    with join_ranks() as ranks:
        for method, options in SHARED.items():
            scratch = folder / f"{method}-{ranks.rank}"
            ctx = RunContext(scratch_dir=scratch, source_dir=model, ranks=ranks)
            apply(method, options, model, ctx).save(scratch / "checkpoint")
        check_messages(ranks, folder)


def apply(method, options, model, ctx):
    samples = CalibrationSet.from_reference(0, SAMPLES)
    stage = read("stages", method, options)
    assert stage.shares_work
    ctx.scratch_dir.mkdir(parents=True)
    return stage.apply(Checkpoint.load(model), samples, ctx)


def check_messages(ranks, folder):
    """What ranks say to each other arrives as it was said."""
    own = [np.full((rank, 2), rank, dtype=np.int64) for rank in ranks.own(range(5))]
    found = list(ranks.in_order(own, 5))
    assert [each.shape for each in found] == [(index, 2) for index in range(5)]
    assert all((each == index).all() for index, each in enumerate(found))
    assert ranks.documents({"rank": ranks.rank}) == [{"rank": 0}, {"rank": 1}]
    assert ranks.first(ranks.rank) == 0
    inputs = torch.randn(6, 40, 5, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(6, 40, generator=torch.Generator().manual_seed(1))
    moments, whole = [SecondMoment(5), CrossMoment(5)], [SecondMoment(5), CrossMoment(5)]
    for index, batch in enumerate(inputs):
        for kinds in (whole, moments) if ranks.owner(index) == ranks.rank else (whole,):
            kinds[0].add(batch, weights[index])
            kinds[1].add_pairs(batch, batch.flip(0), weights[index])
    for one, all_of_it in zip(moments, whole, strict=True):
        one.join(ranks)
        assert one.tokens == all_of_it.tokens
        torch.testing.assert_close(one.blocks()[0], all_of_it.blocks()[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(moments[0].mean(), whole[0].mean(), rtol=1e-12, atol=0)
    assert moments[0].int8_steps().row == pytest.approx(whole[0].int8_steps().row, rel=1e-12)
    assert moments[0].int8_steps().tile == pytest.approx(whole[0].int8_steps().tile, rel=1e-12)


@pytest.fixture(scope="module")
def both(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("both")
    for each in run_ranks(2, apply_shared, folder / "logs", model, folder):
        assert each.exit_code == 0, each.printed
    return folder


@pytest.mark.parametrize("method", SHARED)
def test_stages_that_are_shared_find_what_one_process_finds(
    model, both, tmp_path, monkeypatch, method
):
    monkeypatch.setattr(walk_module, "BATCH_TOKENS", SMALL_BATCHES)
    ctx = RunContext(scratch_dir=tmp_path / "scratch", source_dir=model)
    alone = apply(method, SHARED[method], model, ctx)
    ranks = [Checkpoint.load(both / f"{method}-{rank}" / "checkpoint") for rank in range(2)]
    for linear, form in alone.forms().items():
        first, second = (each.form(linear.name) for each in ranks)
        for name, values in first.to_tensors().items():
            assert torch.equal(second.to_tensors()[name], values)
        if method == "distill":
            torch.testing.assert_close(first.dequantize(), form.dequantize(), rtol=1e-4, atol=1e-6)
        elif isinstance(form, SparseWeight) and method == "prune":
            assert torch.equal(first.mask, form.mask)
        else:
            assert torch.equal(first.dequantize(), form.dequantize())
    if method == "distill":
        own, others = (
            [check["loss"] for check in done.history[-1].metrics["checks"]]
            for done in (alone, ranks[0])
        )
        assert own == pytest.approx(others, rel=1e-5)
        assert len(set(own)) == len(own)


def test_a_single_process_shares_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_ranks() as ranks:
        assert ranks is ALONE

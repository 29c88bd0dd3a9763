"""Rows of a benchmark read gradients and scores that one of them took, and prune as without."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from benchmarks.shared_scores import SharedEcoflap, SharedGblm
from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.unstructured.allocation import Uniform
from pocketvlm.compress.pruning.unstructured.ecoflap import Ecoflap
from pocketvlm.compress.pruning.unstructured.gblm import Gblm
from pocketvlm.compress.pruning.unstructured.pruner import Prune
from pocketvlm.compress.pruning.unstructured.rules import PruneRule
from pocketvlm.compress.pruning.unstructured.wanda import Wanda
from pocketvlm.context import RunContext

RULES = (PruneRule(part="decoder"),)


@pytest.fixture(scope="module")
def samples():
    return CalibrationSet.from_reference(0, 4)


def prune(path, samples, ratio, score, allocation):
    """The masks of the decoder's layers, and what was measured for them."""
    tasks = []
    ctx = RunContext(on_progress=lambda progress: tasks.append(progress.task))
    stage = Prune(score=score, ratio=ratio, rules=RULES, allocation=allocation)
    done = stage.apply(Checkpoint.load(path), samples, ctx)
    forms = [form for linear, form in done.forms().items() if linear.part == "decoder"]
    return [form.dequantize() for form in forms], {*tasks} - {"prune"}


@pytest.mark.parametrize(
    ("score", "allocation", "measured"),
    [(Gblm(), Uniform(), "gradients"), (Wanda(), Ecoflap(order="first"), "ecoflap")],
)
def test_what_no_ratio_changes_is_measured_once(
    score, allocation, measured, tiny_paths, samples, tmp_path
):
    path = tiny_paths["smolvlm"]
    shared = score, allocation
    if isinstance(score, Gblm):
        shared = SharedGblm(**asdict(score), folder=tmp_path), allocation
    if isinstance(allocation, Ecoflap):
        shared = score, SharedEcoflap(**asdict(allocation), folder=tmp_path)
    for ratio, taken in ((0.5, {measured}), (0.3, set())):
        own, _ = prune(path, samples, ratio, score, allocation)
        found, tasks = prune(path, samples, ratio, *shared)
        assert tasks == taken
        for one, other in zip(found, own, strict=True):
            assert bool((one == other).all())


def test_other_samples_have_gradients_of_their_own(tiny_paths, samples, tmp_path):
    path, other = tiny_paths["smolvlm"], CalibrationSet.from_reference(1, 4)
    scores = [SharedGblm(folder=tmp_path, samples=own) for own in (None, other)]
    (one, first), (two, second) = (prune(path, samples, 0.5, each, Uniform()) for each in scores)
    assert first == second == {"gradients"}
    assert any(bool((left != right).any()) for left, right in zip(one, two, strict=True))

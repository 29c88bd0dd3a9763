"""Layers that keep a state: rows are cut back to where it is known, and padding never enters it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.bundle import Bundle
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.errors import BundleError
from pocketvlm.export.coreml.swift import render_swift
from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.export.torch_runner import TorchRunner
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.runtime.engines import open_engine
from pocketvlm.runtime.runner import Runner

ENGINES = ("torch", "onnx", "coreml", "coreml17")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("states") / "model"
    write_tiny_model("lfm2-vl", path)
    return Checkpoint.load(path)


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("states") / "bundle"
    targets = (ToOnnx(accuracy_level=0), ToCoreml(context=64, precision="float32", chunk=8))
    write_graphs(checkpoint, targets, path, "", RunContext(threads=1))
    return Bundle.open(path)


@pytest.fixture(scope="module")
def passed(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("states") / "bundle17"
    target = ToCoreml(context=64, precision="float32", chunk=8, deployment="iOS17")
    write_graphs(checkpoint, (target,), path, "", RunContext(threads=1))
    return Bundle.open(path)


@pytest.fixture(scope="module", params=ENGINES)
def runner(request: pytest.FixtureRequest, checkpoint: Checkpoint, bundle: Bundle) -> Runner:
    if request.param == "torch":
        return TorchRunner(checkpoint, capacity=64)
    if request.param == "coreml17":
        return open_engine(request.getfixturevalue("passed"), "coreml", threads=1)
    return open_engine(bundle, request.param, threads=1)


def run(runner: Runner, ids: list[int]) -> np.ndarray:
    """Logits after some more tokens, run together."""
    positions = np.arange(runner.length, runner.length + len(ids))[None]
    return runner.decode(runner.embed(ids), positions).copy()


@settings(deadline=None, max_examples=10)
@given(
    ids=st.lists(st.integers(3, 250), min_size=1, max_size=20),
    cut=st.integers(0, 20),
)
def test_pieces_of_any_size_give_the_same_logits(runner: Runner, ids: list[int], cut: int):
    runner.reset()
    whole = run(runner, ids)
    runner.reset()
    for piece in (ids[:cut], ids[cut:]):
        if piece:
            parted = run(runner, piece)
    np.testing.assert_allclose(parted, whole, rtol=2e-3, atol=2e-3)


def test_a_conversation_is_cut_back_to_where_its_states_are_known(runner: Runner):
    prompt, answer, other = [5, 6, 7, 8, 9, 10], [20, 21, 22], [11, 12, 13]
    runner.reset()
    run(runner, prompt)
    expected = run(runner, other)
    runner.reset()
    run(runner, prompt)
    for token in answer:
        run(runner, [token])
    # Rows of an answer are run one by one, and no copies are kept of what came after each.
    assert runner.truncate(len(prompt) + 2) == len(prompt)
    assert runner.length == len(prompt)
    np.testing.assert_array_equal(run(runner, other), expected)
    assert runner.truncate(len(prompt) + len(other)) == len(prompt) + len(other)
    assert runner.truncate(len(prompt)) == len(prompt)
    np.testing.assert_array_equal(run(runner, other), expected)
    assert runner.truncate(len(prompt) - 1) == 0
    run(runner, prompt)
    np.testing.assert_array_equal(run(runner, other), expected)


def test_an_empty_cache_begins_with_zeros(runner: Runner):
    runner.reset()
    expected = run(runner, [7, 8])
    run(runner, [30, 31, 32])
    runner.reset()
    np.testing.assert_array_equal(run(runner, [7, 8]), expected)


def test_the_swift_file_says_what_it_does_not_keep(bundle: Bundle, passed: Bundle):
    for each in (bundle, passed):
        with pytest.raises(BundleError, match="has states of short convolutions as well"):
            render_swift(each)

"""The runner: one cache that never moves, and clear words where a graph or the room is missing."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.bundle import Bundle
from pocketvlm.errors import BundleError, InputError
from pocketvlm.runtime.onnx.runner import DEFAULT_CAPACITY, OnnxRunner


def run(runner, ids, *, start=0, chunk=None):
    """Logits of the last of some tokens, fed in pieces."""
    for first in range(0, len(ids), chunk or len(ids)):
        piece = ids[first : first + (chunk or len(ids))]
        positions = np.arange(start + first, start + first + len(piece))[None]
        logits = runner.decode(runner.embed(piece), positions)
    return logits.copy()


@pytest.fixture(scope="module")
def runner(pairs):
    return OnnxRunner(pairs["llava"].bundle, capacity=64)


@settings(deadline=None, max_examples=30)
@given(ids=st.lists(st.integers(3, 250), min_size=1, max_size=24), chunk=st.integers(1, 24))
def test_pieces_of_any_size_give_the_same_logits(runner, ids, chunk):
    runner.reset()
    whole = run(runner, ids)
    assert runner.length == len(ids)
    runner.reset()
    # Rows multiplied one by one or together differ in the last bits of float32 sums.
    np.testing.assert_allclose(run(runner, ids, chunk=chunk), whole, rtol=1e-4, atol=1e-5)


def test_a_long_prompt_runs_in_pieces(runner, monkeypatch):
    sizes = []
    run_rows = OnnxRunner._run_rows

    def spy(self, role, embeds, *rest):
        sizes.append((role, embeds.shape[1]))
        run_rows(self, role, embeds, *rest)

    monkeypatch.setattr(OnnxRunner, "_run_rows", spy)
    ids = list(range(3, 3 + 23))
    runner.reset()
    whole = run(runner, ids)
    assert sizes == [("decoder", 23)]
    sizes.clear()
    monkeypatch.setattr("pocketvlm.runtime.onnx.runner.PREFILL_PIECE_ROWS", 8)
    for count, expected in ((8, [8]), (16, [8, 8]), (23, [8, 8, 7])):
        runner.reset()
        found = run(runner, ids[:count])
        assert sizes == [("decoder", rows) for rows in expected]
        assert runner.length == count
        sizes.clear()
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-5)
    runner.reset()
    run(runner, ids[:17])  # the last piece is one row, as of a generated token
    assert sizes == [("decoder", 8), ("decoder", 8)]
    assert runner.length == 17


def test_truncate_forgets_exactly_what_came_behind(runner):
    runner.reset()
    run(runner, [5, 6, 7])
    expected = run(runner, [8, 9], start=3)
    runner.truncate(3)
    run(runner, [20, 21, 22, 23], start=3)
    runner.truncate(3)
    assert np.array_equal(run(runner, [8, 9], start=3), expected)
    with pytest.raises(ValueError, match="cannot truncate to 6: the cache holds 5"):
        runner.truncate(6)


def test_cache_and_logits_never_move(runner):
    """Steps write one row into the bound buffers and return the very same logits array."""
    runner.reset()
    run(runner, [3, 4, 5])
    key = runner._cache["0.key"]
    before = key.copy()
    logits = runner.decode(runner.embed([6]), np.array([[3]]))
    assert runner._cache["0.key"] is key
    changed = np.flatnonzero((key != before).any(axis=(0, 1, 3)))
    assert changed.tolist() == [3]
    assert np.shares_memory(logits, runner.decode(runner.embed([7]), np.array([[4]])))
    assert np.shares_memory(runner.embed([6]), runner.embed([7]))


def test_rows_beyond_the_length_are_never_read(runner):
    """What the page promises of uninitialized memory."""
    runner.reset()
    expected = run(runner, [3, 4, 5, 6], chunk=2)
    for buffer in runner._cache.values():
        buffer[...] = np.nan
    runner.reset()
    assert np.array_equal(run(runner, [3, 4, 5, 6], chunk=2), expected)


def test_step_takes_an_embedding_that_is_not_its_own(runner):
    runner.reset()
    expected = run(runner, [5])
    runner.reset()
    logits = runner.decode(runner.embed([5]).copy(), np.array([[0]]))
    assert np.array_equal(logits, expected)


def test_room_is_checked_before_anything_runs(runner):
    runner.reset()
    run(runner, list(range(3, 63)))
    with pytest.raises(InputError, match="needs 65 rows of KV cache; allowed are 64"):
        run(runner, [1, 2, 3, 4, 5], start=60)
    assert runner.length == 60
    run(runner, [1, 2, 3, 4], start=60)
    with pytest.raises(InputError, match="needs 65 rows"):
        run(runner, [1], start=64)


def test_capacity_follows_the_model_unless_told(llava):
    assert OnnxRunner(llava.bundle).capacity == 512
    generation = replace(llava.bundle.manifest.generation, max_positions=9000)
    manifest = replace(llava.bundle.manifest, generation=generation)
    runner = OnnxRunner(replace(llava.bundle, manifest=manifest))
    assert runner.capacity == DEFAULT_CAPACITY
    assert runner.cache_bytes == 2 * 2 * 2 * DEFAULT_CAPACITY * 16 * 4
    with pytest.raises(ValueError, match="at least 1 row"):
        OnnxRunner(llava.bundle, capacity=0)


def test_capacity_does_not_change_the_answer(pair):
    ids = list(range(3, 30))
    small = run(OnnxRunner(pair.bundle, capacity=27), ids)
    large = run(OnnxRunner(pair.bundle, capacity=500), ids)
    assert np.array_equal(small, large)


def test_vision_may_be_freed_between_pictures(pair):
    side = pair.bundle.manifest.components[0].inputs[0].shape[-1]
    pixels = np.random.default_rng(0).standard_normal((1, 3, side, side), np.float32)
    kept = OnnxRunner(pair.bundle)
    freed = OnnxRunner(pair.bundle, keep_vision=False)
    assert not freed._vision
    for one, other in zip(kept.encode_image(pixels), freed.encode_image(pixels), strict=True):
        assert np.array_equal(one, other)
    assert not freed._vision


@pytest.fixture
def copy(llava, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(llava.bundle.path, folder)
    return folder


@pytest.mark.parametrize("role", ["vision", "embedding", "decoder"])
@pytest.mark.parametrize("content", [None, b"", b"no graph at all"])
def test_graph_that_does_not_load_is_named(copy, role, content):
    file = copy / "onnx" / f"{role}.onnx"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BundleError, match=f"{role}.onnx"):
        Bundle.open(copy)
    with pytest.raises(
        BundleError, match=f"{role}.onnx: (ONNX Runtime cannot load it|is missing)"
    ) as caught:
        OnnxRunner(Bundle.open(copy, verify=False))
    assert "\n" not in str(caught.value)


def test_missing_weights_are_named(copy):
    (copy / "onnx" / "weights.bin").unlink()
    with pytest.raises(BundleError, match=r"weights.bin: is missing"):
        OnnxRunner(Bundle.open(copy, verify=False))


def test_bundle_without_onnx_graphs_is_an_error(llava):
    bundle = replace(llava.bundle, manifest=replace(llava.bundle.manifest, components=()))
    with pytest.raises(BundleError, match="no vision graph for target 'onnx'"):
        OnnxRunner(bundle)


def test_graph_that_differs_from_the_manifest_is_an_error(llava):
    manifest = llava.bundle.manifest
    components = tuple(
        replace(c, inputs=c.inputs[1:]) if c.role == "decoder" else c for c in manifest.components
    )
    bundle = replace(llava.bundle, manifest=replace(manifest, components=components))
    with pytest.raises(BundleError, match=r"decoder.onnx: has the inputs embeds that only one"):
        OnnxRunner(bundle)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 1}', '{"schema": 99}'])
def test_corrupted_manifest_is_an_error(copy, content):
    (copy / "manifest.json").write_text(content)
    with pytest.raises(BundleError, match=r"manifest.json"):
        Bundle.open(copy)

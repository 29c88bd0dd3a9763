"""The stage: what it refuses, what it records, what survives a save, what an exporter traces."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens import REDUCERS, ReduceTokens
from pocketvlm.compress.tokens.auto import Auto
from pocketvlm.compress.tokens.baseline.random_tokens import RandomTokens
from pocketvlm.compress.tokens.baseline.uniform_stride import UniformStride
from pocketvlm.compress.tokens.pool.average_pool import AveragePool
from pocketvlm.compress.tokens.rank.cls_attention import ClsAttention
from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.context import RunContext
from pocketvlm.errors import CheckpointError, RecipeError, UnsupportedError
from pocketvlm.reference_graph.forward import embed_prompts, encode_images
from tests.contracts.reducers import make_reducer

NO_CALIBRATION: Any = None  # token reduction looks at no data


def reduce(checkpoint: Checkpoint, **options: Any) -> Checkpoint:
    return ReduceTokens(**options).apply(checkpoint, NO_CALIBRATION, RunContext())


def pixels_of(checkpoint: Checkpoint, images: int = 2) -> Tensor:
    size = checkpoint.spec.tower.height
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0},
        {"keep": -3},
        {"keep": 0.0},
        {"keep": 1.5},
        {"keep": True},
        {"keep": float("nan")},
        {"positions": "relative"},
    ],
)
def test_values_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"allowed are|at least 1"):
        ReduceTokens(**options)


def test_more_tokens_than_there_are_is_a_recipe_error(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(RecipeError, match=r"keep 17 is more than the 16 .* allowed are 1 to 16"):
        reduce(tiny_checkpoint, keep=17)


def test_reducing_twice_is_a_recipe_error(tiny_checkpoint: Checkpoint) -> None:
    reduced = reduce(tiny_checkpoint, keep=8)
    with pytest.raises(RecipeError, match="reduced to 8 already"):
        reduce(reduced, keep=4)


def test_cls_attention_needs_cls(tiny_paths: dict[str, Path]) -> None:
    with pytest.raises(UnsupportedError, match=r"\[CLS\] token, which smolvlm does not have"):
        reduce(Checkpoint.load(tiny_paths["smolvlm"]), reducer=ClsAttention(), keep=4)


def test_a_grid_that_cannot_be_is_a_recipe_error(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(RecipeError, match="nearest counts that it can are 6 and 8"):
        reduce(tiny_checkpoint, reducer=AveragePool(), keep=7)


def test_auto_follows_the_tower(tiny_paths: dict[str, Path]) -> None:
    chosen = {
        family: reduce(Checkpoint.load(path), keep=0.5).history[-1].metrics["reducer"]
        for family, path in tiny_paths.items()
    }
    assert chosen == {"llava": "cls_attention", "smolvlm": "distinct_features"}


def test_the_record_says_what_was_kept(tiny_checkpoint: Checkpoint) -> None:
    record = reduce(tiny_checkpoint, keep=0.26).history[-1]
    assert record.method == "reduce_tokens"
    assert record.metrics["keep"] == 4
    assert record.metrics["of"] == 16
    assert record.metrics["kept_share"] == 0.25
    assert record.parameters == asdict(ReduceTokens(keep=0.26))


def reducers_for(checkpoint: Checkpoint) -> list[Reducer]:
    has_cls = checkpoint.spec.tower.has_cls
    return [make_reducer(name) for name in REDUCERS if has_cls or not name.startswith("cls_")]


def test_keeping_every_token_changes_nothing(tiny_checkpoint: Checkpoint) -> None:
    pixels = pixels_of(tiny_checkpoint)
    whole = encode_images(tiny_checkpoint, pixels)
    for reducer in reducers_for(tiny_checkpoint):
        same = encode_images(reduce(tiny_checkpoint, reducer=reducer, keep=1.0), pixels)
        assert torch.equal(same.indices, whole.indices), reducer
        torch.testing.assert_close(same.embeds, whole.embeds, rtol=1e-5, atol=1e-6)


AVERAGING = {"average_pool", "dominant_merged", "similar", "thumbnail_sampled"}


def test_kept_tokens_are_those_of_the_whole_image(tiny_checkpoint: Checkpoint) -> None:
    pixels = pixels_of(tiny_checkpoint)
    whole = encode_images(tiny_checkpoint, pixels)
    for reducer in reducers_for(tiny_checkpoint):
        kept = encode_images(reduce(tiny_checkpoint, reducer=reducer, keep=8), pixels)
        assert kept.embeds.shape[:2] == (2, 8)
        assert bool((kept.indices[:, 1:] > kept.indices[:, :-1]).all())
        if reducer.kind not in AVERAGING:
            for image in range(2):
                expected = whole.embeds[image, kept.indices[image]]
                torch.testing.assert_close(kept.embeds[image], expected, rtol=1e-5, atol=1e-6)


def test_positions_of_kept_tokens(tiny_checkpoint: Checkpoint) -> None:
    processor, spec = tiny_checkpoint.processor, tiny_checkpoint.spec
    ids = torch.tensor([processor.encode([{"role": "user", "content": [{"type": "image"}]}])])
    first = int((ids[0] == spec.image_token_id).nonzero()[0])
    pixels = pixels_of(tiny_checkpoint, 1)
    for positions in ("original", "consecutive"):
        reduced = reduce(tiny_checkpoint, keep=5, positions=positions)
        visual = encode_images(reduced, pixels)
        inputs = embed_prompts(reduced, ids, visual)
        found = inputs.positions[0, first : first + 5]
        after = int(inputs.positions[0, first + 5])
        if positions == "original":
            assert found.tolist() == (first + visual.indices[0]).tolist()
            assert after == first + spec.visual_tokens
        else:
            assert found.tolist() == list(range(first, first + 5))
            assert after == first + 5


@pytest.mark.parametrize("reducer", [Auto(), RandomTokens(seed=3), UniformStride(), AveragePool()])
def test_a_saved_checkpoint_reduces_the_same(
    reducer: Reducer, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    reduced = reduce(tiny_checkpoint, reducer=reducer, keep=6, positions="consecutive")
    reduced.save(tmp_path / "saved")
    builders = {"reduce_tokens": ReduceTokens.build_reducers}
    restored = Checkpoint.load(tmp_path / "saved", reducers=builders)
    assert restored.reducer is not None
    assert restored.reducer.positions == "consecutive"
    pixels = pixels_of(reduced)
    expected, found = encode_images(reduced, pixels), encode_images(restored, pixels)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.embeds, expected.embeds)


def test_a_record_of_before_reducers_had_options_is_read(tiny_checkpoint: Checkpoint) -> None:
    spec = tiny_checkpoint.spec
    former = {"method": "reduce_tokens", "keep": 6, "positions": "original", "seed": 3}
    pixels = pixels_of(tiny_checkpoint)
    for kind, reducer in (("random_tokens", RandomTokens(seed=3)), ("auto", Auto())):
        (read,) = ReduceTokens.build_reducers({**former, "score": kind}, spec)
        found = encode_images(replace(tiny_checkpoint, reducer=read), pixels)
        expected = encode_images(reduce(tiny_checkpoint, reducer=reducer, keep=6), pixels)
        assert torch.equal(found.indices, expected.indices)


@pytest.mark.parametrize(
    "broken", [{"kind": "beauty"}, {"kind": ["auto"]}, {"kind": "auto", "seed": 1}, 7]
)
def test_parameters_that_fit_nothing_are_one_line(
    broken: Any, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    reduced = reduce(tiny_checkpoint, keep=6)
    parameters = {**reduced.history[-1].parameters, "reducer": broken}
    record = replace(reduced.history[-1], parameters=parameters)
    replace(reduced, history=(record,)).save(tmp_path / "broken")
    with pytest.raises(CheckpointError, match=r"reducer\.parameters do not fit reduce_tokens"):
        Checkpoint.load(
            tmp_path / "broken", reducers={"reduce_tokens": ReduceTokens.build_reducers}
        )

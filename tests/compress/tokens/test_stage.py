"""The stage: what it refuses, what it records, what survives a save, what an exporter traces."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens import SCORES, ReduceTokens
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError, UnsupportedError
from pocketvlm.models.reducer import ReducerInputs
from pocketvlm.reference_graph.forward import embed_prompts, encode_images
from pocketvlm.runtime.onnx.engine import onnxruntime

NO_CALIBRATION: Any = None  # token reduction looks at no data


def reduce(checkpoint: Checkpoint, **options: Any) -> Checkpoint:
    return ReduceTokens(**options).apply(checkpoint, NO_CALIBRATION, RunContext())


def pixels_of(checkpoint: Checkpoint, images: int = 2) -> Tensor:
    size = checkpoint.spec.tower.image_size
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
        {"score": "best"},
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
    with pytest.raises(UnsupportedError, match=r"\[CLS\] token, which smolvlm has not"):
        reduce(Checkpoint.load(tiny_paths["smolvlm"]), score="cls_attention", keep=4)


def test_a_grid_that_cannot_be_is_a_recipe_error(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(RecipeError, match="nearest counts that it can are 6 and 8"):
        reduce(tiny_checkpoint, score="average_pool", keep=7)


def test_auto_follows_the_tower(tiny_paths: dict[str, Path]) -> None:
    chosen = {
        family: reduce(Checkpoint.load(path), keep=0.5).history[-1].metrics["score"]
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


def scores_for(checkpoint: Checkpoint) -> list[str]:
    return [name for name in SCORES if checkpoint.spec.tower.has_cls or name != "cls_attention"]


def test_keeping_every_token_changes_nothing(tiny_checkpoint: Checkpoint) -> None:
    pixels = pixels_of(tiny_checkpoint)
    whole = encode_images(tiny_checkpoint, pixels)
    for score in scores_for(tiny_checkpoint):
        same = encode_images(reduce(tiny_checkpoint, score=score, keep=1.0), pixels)
        assert torch.equal(same.indices, whole.indices), score
        torch.testing.assert_close(same.embeds, whole.embeds, rtol=1e-5, atol=1e-6)


def test_kept_tokens_are_those_of_the_whole_image(tiny_checkpoint: Checkpoint) -> None:
    pixels = pixels_of(tiny_checkpoint)
    whole = encode_images(tiny_checkpoint, pixels)
    for score in scores_for(tiny_checkpoint):
        kept = encode_images(reduce(tiny_checkpoint, score=score, keep=6), pixels)
        assert kept.embeds.shape[:2] == (2, 6)
        assert bool((kept.indices[:, 1:] > kept.indices[:, :-1]).all())
        if score != "average_pool":
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


@pytest.mark.parametrize("score", ["auto", "random_tokens", "uniform_stride", "average_pool"])
def test_a_saved_checkpoint_reduces_the_same(
    score: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    reduced = reduce(tiny_checkpoint, score=score, keep=6, positions="consecutive", seed=3)
    reduced.save(tmp_path / "saved")
    builders = {"reduce_tokens": ReduceTokens.build_reducer}
    restored = Checkpoint.load(tmp_path / "saved", reducers=builders)
    assert restored.reducer is not None
    assert restored.reducer.positions == "consecutive"
    pixels = pixels_of(reduced)
    expected, found = encode_images(reduced, pixels), encode_images(restored, pixels)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.embeds, expected.embeds)


class Traceable(nn.Module):
    """A reducer between plain tensors, as an exporter sees it."""

    def __init__(self, reducer: nn.Module, *, has_cls: bool, merge_factor: int) -> None:
        super().__init__()
        self.reducer, self.has_cls, self.merge_factor = reducer, has_cls, merge_factor

    def forward(self, features: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        inputs = ReducerInputs(
            features=features,
            queries=queries,
            keys=keys,
            has_cls=self.has_cls,
            merge_factor=self.merge_factor,
        )
        kept, indices = self.reducer(inputs)
        return kept, indices


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the exporter's own imports
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_exported_reducers_choose_what_eager_chooses(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    spec = tiny_checkpoint.spec
    merge, tower = spec.projector.merge_factor, spec.tower
    tokens = tower.patches_per_side**2 + int(tower.has_cls)
    generator = torch.Generator().manual_seed(5)
    width = tower.hidden_size * merge**2
    for score in scores_for(tiny_checkpoint):
        reducer = ReduceTokens(score=score, keep=6).reducer(spec)
        module = Traceable(reducer, has_cls=tower.has_cls, merge_factor=merge).eval()
        shapes = ((1, spec.visual_tokens, width), *[(1, tower.heads, tokens, tower.head_dim)] * 2)
        args = tuple(torch.randn(shape, generator=generator) for shape in shapes)
        program = torch.export.export(module, args, strict=False)
        operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert not {name for name in operators if "sort" in name or "nonzero" in name}
        file = tmp_path / f"{score}.onnx"
        torch.onnx.export(program, (), str(file), dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        names = {value.name for value in session.get_inputs()}
        for _ in range(5):
            args = tuple(torch.randn(shape, generator=generator) for shape in shapes)
            feeds = dict(zip(("features", "queries", "keys"), args, strict=True))
            kept, indices = session.run(
                None, {name: value.numpy() for name, value in feeds.items() if name in names}
            )
            expected, expected_indices = module(*args)
            np.testing.assert_array_equal(indices, expected_indices.numpy())
            np.testing.assert_allclose(kept, expected.numpy(), rtol=1e-5, atol=1e-6)

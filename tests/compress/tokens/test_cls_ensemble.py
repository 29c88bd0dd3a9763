"""[CLS] attention over several blocks: stock attention maps, walks, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.data.prompts import encode_samples
from pocketvlm.calibration.walk.partial_forward import PartialForward
from pocketvlm.calibration.walk.steps import LinearGroup
from pocketvlm.calibration.walk.walk import BlockWalk
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.rank.cls_ensemble import ClsEnsemble
from pocketvlm.errors import RecipeError, UnsupportedError
from pocketvlm.reference_graph.forward import decode_logits, embed_prompts, encode_images
from pocketvlm.weights.dense import DenseWeight

KEEP = 5


@pytest.fixture
def path(tiny_paths: Mapping[str, Path]) -> Path:
    return tiny_paths["llava"]


@pytest.fixture
def checkpoint(path: Path) -> Checkpoint:
    loaded = Checkpoint.load(path)
    reducer = ClsEnsemble(first_block=0).build(loaded.spec, keep=KEEP, positions="original")
    return replace(loaded, reducer=reducer)


def stock_rows(path: Path, pixels: Tensor) -> Tensor:
    """[CLS] attention of every block of the stock tower, [blocks, images, patches]."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    maps = model.model.vision_tower(pixels, output_attentions=True).attentions
    return torch.stack([attention.mean(dim=1)[:, 0, 1:] for attention in maps])


@torch.inference_mode()
def test_the_kept_tokens_are_those_of_the_summed_stock_attention(
    path: Path, checkpoint: Checkpoint
) -> None:
    spec = checkpoint.spec
    last = spec.tower.feature_block
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(12, 3, spec.tower.height, spec.tower.width, generator=generator)
    rows = stock_rows(path, pixels)

    def kept(first: int) -> list[list[int]]:
        reducer = ClsEnsemble(first_block=first).build(spec, keep=KEEP, positions="original")
        return encode_images(replace(checkpoint, reducer=reducer), pixels).indices.tolist()

    def expected(first: int) -> list[list[int]]:
        best = rows[first : last + 1].sum(dim=0).topk(KEEP, dim=-1).indices
        return best.sort(dim=-1).values.tolist()

    assert last > 0
    for first in range(last + 1):
        assert kept(first) == expected(first)
    assert kept(0) != kept(last), "the earlier blocks change what is kept"


def test_by_default_the_later_half_of_the_blocks_counts(path: Path) -> None:
    spec = Checkpoint.load(path).spec
    deep = replace(spec, tower=replace(spec.tower, feature_block=22))
    assert ClsEnsemble().earlier_blocks(deep) == tuple(range(11, 22))
    assert ClsEnsemble(first_block=22).earlier_blocks(deep) == ()


def test_what_cannot_be_is_refused(path: Path, tiny_paths: Mapping[str, Path]) -> None:
    with pytest.raises(ValueError, match="first_block is -1; allowed are blocks from 0"):
        ClsEnsemble(first_block=-1)
    with pytest.raises(RecipeError, match=r"first_block is 9; the blocks .* are 0 to 1$"):
        ClsEnsemble(first_block=9).build(
            Checkpoint.load(path).spec, keep=KEEP, positions="original"
        )
    with pytest.raises(UnsupportedError, match="reducer cls_ensemble needs a tower with a"):
        ClsEnsemble().build(
            Checkpoint.load(tiny_paths["smolvlm"]).spec, keep=KEEP, positions="original"
        )


def change_first_queries(checkpoint: Checkpoint) -> tuple[str, DenseWeight]:
    """A weight whose output is nothing but the first block's queries, and another for it."""
    name = checkpoint.spec.tower.blocks[0].attention.q
    weight = checkpoint.form(name).dequantize()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return name, DenseWeight(values=noise * weight.abs().max())


def test_a_walk_keeps_the_tokens_of_the_model_as_it_is_then(checkpoint: Checkpoint) -> None:
    """A weight of an earlier block that was replaced on the way counts in the score."""
    samples = CalibrationSet.from_reference(0, 6)
    name, form = change_first_queries(checkpoint)
    pixels = checkpoint.processor.pixels([sample.open_image() for sample in samples])
    with torch.inference_mode():
        before = encode_images(checkpoint, pixels)
        walk = BlockWalk(checkpoint=checkpoint, samples=samples, held_out=0.0)
        first = checkpoint.spec.projector.linears[0]
        found = None
        for step in walk:
            assert isinstance(step, LinearGroup)
            if name in step.names:
                checkpoint.set_form(name, form)
            if first in step.names:
                assert step.moments is not None
                (found,) = step.moments(None).calibration.blocks()
        after = encode_images(checkpoint, pixels)
        assert after.indices.tolist() != before.indices.tolist()
        features = kept_features(checkpoint, pixels)
    expected = features.flatten(0, 1).T @ features.flatten(0, 1) / features[..., 0].numel()
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=1e-5)


def kept_features(checkpoint: Checkpoint, pixels: Tensor) -> Tensor:
    """What enters the projector, float64 [images, k, C]."""
    seen: list[Tensor] = []
    layer = checkpoint.model.get_submodule(checkpoint.spec.projector.linears[0])
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encode_images(checkpoint, pixels)
    handle.remove()
    return seen[0].double()


def test_a_partial_forward_keeps_them_too(checkpoint: Checkpoint) -> None:
    samples = CalibrationSet.from_reference(0, 4)
    name, form = change_first_queries(checkpoint)
    partial = PartialForward(checkpoint, samples)
    present = checkpoint.form(name)
    prompts = encode_samples(checkpoint.processor, samples)
    for changed, logits in ((present, partial.logits), (form, partial.logits_with(name, form))):
        checkpoint.set_form(name, changed)
        for sample, prompt, found in zip(samples, prompts, logits, strict=True):
            with torch.inference_mode():
                pixels = checkpoint.processor.pixels([sample.open_image()])
                visual = encode_images(checkpoint, pixels)
                inputs = embed_prompts(checkpoint, torch.tensor([prompt.token_ids]), visual)
                every = decode_logits(checkpoint, inputs)[0]
            rows = every[prompt.predicting(every.shape[0])]
            torch.testing.assert_close(found, rows, rtol=1e-4, atol=1e-4)
        checkpoint.set_form(name, present)

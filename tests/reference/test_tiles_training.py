"""Training of `pocket-tiles`: what a step sees is what the shipped processor and model see."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from pocketvlm.reference import reference_model_path
from pocketvlm.reference.mosaics import render_mosaic, sample_mosaic_example
from pocketvlm.reference.packing import IGNORED
from pocketvlm.reference.tiles import make_groups, start_model
from pocketvlm.reference.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def groups():
    folder = reference_model_path("pocket-tiles")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, make_groups(model, 9, 8)


def test_words_keep_the_vectors_that_they_had():
    origin = AutoModelForImageTextToText.from_pretrained(
        reference_model_path("pocket-smol"), dtype=torch.float32
    )
    old, new = (build_tokenizer(name).get_vocab() for name in ("pocket-smol", "pocket-tiles"))
    before, after = (m.get_input_embeddings().weight for m in (origin, start_model()))
    for word, index in old.items():
        if word in new:
            assert torch.equal(after[new[word]], before[index]), word
    markers = [after[index] for word, index in new.items() if word.startswith("<row_")]
    assert len(markers) == 4
    assert len({tuple(marker.tolist()) for marker in markers}) == 4


def test_a_step_sees_the_prompt_and_the_features_of_the_shipped_model(groups):
    model, made = groups
    processor = AutoProcessor.from_pretrained(reference_model_path("pocket-tiles"))
    seen = dict.fromkeys(made, 0)
    for number in range(8):
        mosaic, _ = sample_mosaic_example(9, number, split="train")
        is_whole = number % 4 == 0
        picture = render_mosaic(mosaic)
        inputs = processor(
            images=[[picture]],
            text=["<|im_start|>User:<image>"],
            do_image_splitting=not is_whole,
            return_tensors="pt",
        )
        prefix = inputs["input_ids"][0]
        grid = next(
            grid
            for grid, group in made.items()
            if group.packs.shape[-1] == len(prefix) + 176
            and (is_whole or (grid.rows, grid.columns) == (mosaic.rows, mosaic.columns))
        )
        row, seen[grid] = seen[grid], seen[grid] + 1
        tokens, targets, segments, _ = made[grid].packs[row]
        assert torch.equal(tokens[: len(prefix)], prefix)
        assert set(segments[: len(prefix)].tolist()) == {0}
        assert bool((targets[: len(prefix)] == IGNORED).all())
        with torch.no_grad():
            parts = model.model.get_image_features(inputs["pixel_values"]).pooler_output
        expected = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        assert torch.equal(made[grid].features[row], expected.bfloat16())
    assert sum(seen.values()) == sum(len(group.packs) for group in made.values()) == 8

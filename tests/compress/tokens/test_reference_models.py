"""On the trained reference models a score must beat the baselines that look at nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens import ReduceTokens
from pocketvlm.compress.tokens.baseline.random_tokens import RandomTokens
from pocketvlm.context import RunContext
from pocketvlm.evaluation.score import score_checkpoint
from pocketvlm.reference import reference_model_path
from pocketvlm.reference.questions import sample_example_scene
from pocketvlm.reference.scenes import object_coverage, render
from pocketvlm.reference_graph.forward import encode_images

SCENES = 48


@pytest.fixture(scope="module", params=["pocket-llava", "pocket-smol"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return Checkpoint.load(reference_model_path(request.param))


def reduced(checkpoint: Checkpoint, **options: Any) -> Checkpoint:
    return replace(checkpoint, reducer=ReduceTokens(**options).build(checkpoint.spec))


def object_share_kept(checkpoint: Checkpoint, **options: Any) -> float:
    """Share of the patches that show an object which are among the tokens kept."""
    scenes = [sample_example_scene(3, index, split="evaluation")[0] for index in range(SCENES)]
    with torch.inference_mode():
        pixels = checkpoint.processor.pixels([render(scene) for scene in scenes])
        kept = encode_images(reduced(checkpoint, **options), pixels).indices.numpy()
    found = total = 0
    for scene, indices in zip(scenes, kept, strict=True):
        shown = np.maximum.reduce([object_coverage(thing) for thing in scene.objects]) > 0.25
        found += int(shown.ravel()[indices].sum())
        total += int(shown.sum())
    return found / total


def test_the_score_keeps_objects_and_chance_does_not(checkpoint: Checkpoint) -> None:
    by_score = object_share_kept(checkpoint, keep=0.5)
    by_chance = np.mean(
        [
            object_share_kept(checkpoint, reducer=RandomTokens(seed=seed), keep=0.5)
            for seed in range(4)
        ]
    )
    assert abs(by_chance - 0.5) < 0.08
    assert by_score > by_chance + 0.1


def test_the_score_depends_on_the_picture(checkpoint: Checkpoint) -> None:
    samples = CalibrationSet.from_reference(3, 16, split="evaluation")
    with torch.inference_mode():
        pixels = checkpoint.processor.pixels([sample.open_image() for sample in samples])
        kept = encode_images(reduced(checkpoint, keep=0.25), pixels).indices
    count = checkpoint.spec.visual_tokens
    chosen = torch.zeros(len(samples), count).scatter_(1, kept, 1.0)
    overlap = (chosen @ chosen.T)[~torch.eye(len(samples), dtype=torch.bool)].mean()
    assert float(overlap) / kept.shape[1] < 0.8  # 1 for a score that only knows places


def test_half_of_the_tokens_by_score_answer_better_than_half_by_chance(
    checkpoint: Checkpoint,
) -> None:
    samples = CalibrationSet.from_reference(3, 96, split="evaluation")
    options: dict[str, Any] = {"blind": False, "ctx": RunContext(threads=1)}
    by_score = score_checkpoint(reduced(checkpoint, keep=0.5), samples, **options)
    by_chance = score_checkpoint(
        reduced(checkpoint, reducer=RandomTokens(), keep=0.5), samples, **options
    )
    assert by_score.accuracy > by_chance.accuracy

"""Answers under a schedule, against the whole decoder run sample by sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from pocketvlm.bundle import VisualDrop, VisualSchedule
from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.data.prompts import encode_samples
from pocketvlm.calibration.gradients.schedule_trials import ScheduleTrials
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.errors import CalibrationError
from pocketvlm.reference_graph.forward import decode_logits, embed_prompts, encode_images


@pytest.fixture(scope="module")
def samples() -> CalibrationSet:
    return CalibrationSet.from_reference(0, 5)


def schedule(*drops: tuple[int, int], tokens: int, **options: Any) -> VisualSchedule:
    made = tuple(VisualDrop(layers=layers, keep=keep) for layers, keep in drops)
    return VisualSchedule(drops=made, tokens=tokens, **options)


@torch.no_grad()
def one_by_one(
    checkpoint: Checkpoint, samples: CalibrationSet, found: VisualSchedule | None
) -> tuple[list[float], list[bool], list[tuple[int, int]]]:
    """Losses, right answers and rows of prompts, by `decode_logits`."""
    model = replace(checkpoint, visual_schedule=found)
    losses, right, rows = [], [], []
    for sample, prompt in zip(
        samples.samples, encode_samples(checkpoint.processor, samples), strict=True
    ):
        visual = encode_images(model, checkpoint.processor.pixels([sample.open_image()]))
        ids = torch.tensor([prompt.token_ids])
        inputs = embed_prompts(
            model, ids, visual, [prompt.grid], answer_starts=[prompt.answer_start]
        )
        logits = decode_logits(model, inputs)[0, prompt.predicting(inputs.embeds.shape[1])]
        answer = ids[0, prompt.answer_start : prompt.answer_end]
        losses.append(float(functional.cross_entropy(logits.double(), answer)))
        right.append(bool((logits.argmax(dim=-1) == answer).all()))
        count = int(inputs.is_visual.sum())
        asked = inputs.embeds.shape[1] - (len(prompt.token_ids) - prompt.answer_start)
        rows.append((asked - count, count))
    return losses, right, rows


@pytest.mark.parametrize(
    "options",
    [{}, {"ranked_in": "layer_after"}, {"ranked_in": "layer_after", "positions": "consecutive"}],
)
def test_answers_are_those_of_the_whole_decoder(
    deep_checkpoint: Checkpoint, samples: CalibrationSet, options: Any
) -> None:
    tokens = deep_checkpoint.spec.visual_tokens
    found = schedule((1, tokens // 2), (3, 1), tokens=tokens, **options)
    trials = ScheduleTrials(deep_checkpoint, samples)
    for tried in (None, found):
        losses, right, rows = one_by_one(deep_checkpoint, samples, tried)
        answers = trials.answers(tried)
        assert answers.losses.tolist() == pytest.approx(losses, abs=1e-5)
        assert answers.is_right.tolist() == right
        assert list(trials.prompt_rows) == rows
    assert trials.plain.loss == pytest.approx(trials.answers(None).loss, abs=1e-12)
    assert trials.answers(found).loss != pytest.approx(trials.plain.loss, abs=1e-6)


def test_settled_layers_are_not_run_again_and_answer_alike(
    deep_checkpoint: Checkpoint, samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = deep_checkpoint.spec.visual_tokens
    first, both = schedule((1, 3), tokens=tokens), schedule((1, 3), (3, 1), tokens=tokens)
    trials = ScheduleTrials(deep_checkpoint, samples)
    before = trials.answers(both).losses
    trials.settle(first, 2)
    with monkeypatch.context() as patched:
        blocks = list(trials._blocks)
        patched.setattr(trials, "_blocks", [None, None, *blocks[2:]])
        assert torch.equal(trials.answers(both).losses, before)
    with pytest.raises(ValueError, match="before block 2 is settled"):
        trials.settle(first, 1)


def test_a_right_answer_is_what_greedy_generation_writes() -> None:
    from pocketvlm.evaluation.score import score_checkpoint
    from pocketvlm.pipeline.sources import resolve_model

    checkpoint = Checkpoint.load(resolve_model("reference:pocket-llava"))
    samples = CalibrationSet.from_reference(3, 24)
    found = schedule((2, 4), tokens=checkpoint.spec.visual_tokens)
    answers = ScheduleTrials(checkpoint, samples).answers(found)
    score = score_checkpoint(replace(checkpoint, visual_schedule=found), list(samples), blind=False)
    assert answers.is_right.tolist() == [credit == 1 for credit in score.credits]
    assert 0 < answers.right < 24


def test_a_sample_without_an_answer_is_named(deep_checkpoint: Checkpoint) -> None:
    samples = CalibrationSet.from_reference(0, 2)
    silent = replace(samples.samples[1], answer="")
    without = replace(samples, samples=(samples.samples[0], silent))
    with pytest.raises(CalibrationError, match="schedules are judged by answers"):
        ScheduleTrials(deep_checkpoint, without)

"""Scoring a checkpoint: batches compared with transformers' generate, the blind floor, the JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pocketvlm.calibration.source import CalibrationSet, Sample
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import Progress, RunContext
from pocketvlm.errors import CalibrationError
from pocketvlm.evaluation.prompts import prompt_messages
from pocketvlm.evaluation.score import Score, blinded, compare_scores, score_checkpoint
from pocketvlm.evaluation.torch_answers import answer_with_checkpoint
from pocketvlm.prompt.messages import PICTURE, Turn, user_turn
from tests.stock import stock_of

assistant = Turn(role="assistant", parts=("hi",))
QUESTIONS = ("what is it?", "why?", "is it red?", "why?", "how many are there?", "why not?")


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))


@pytest.fixture
def samples() -> list[Sample]:
    shared = picture(99)
    images = [picture(0), shared, shared, picture(1), shared, None]
    return [
        Sample(image=image, question=question, answer="?", kind="ab"[index % 2])
        for index, (image, question) in enumerate(zip(images, QUESTIONS, strict=True))
    ]


def about_several_pictures() -> list[Sample]:
    """Two pictures first, two in a second turn between texts, and one picture twice."""
    pair, earlier = (picture(3), picture(4)), (user_turn("hello"), assistant)
    between = Turn(role="user", parts=("this ", PICTURE, " or ", PICTURE, " then?"))
    return [
        Sample(images=pair, question="which?", answer="?"),
        Sample(images=pair[::-1], turns=(*earlier, between), answer="?"),
        Sample(images=(pair[0], pair[0]), question="which?", answer="?"),
    ]


def generate_one(checkpoint: Checkpoint, sample: Sample, tokens: int) -> str:
    """The answer of transformers' generate, from all placeholders and pixels."""
    processor = checkpoint.processor
    ids = torch.tensor([processor.encode(prompt_messages(sample))])
    options = {}
    if sample.images:
        pixels = processor.pixels([sample.open_image(at) for at in range(len(sample.images))])
        is_llava = checkpoint.spec.family == "llava"
        options = {"pixel_values": pixels if is_llava else pixels[None]}
    whole = stock_of(checkpoint).generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=list(processor.eos_token_ids),
        pad_token_id=0,
        **options,
    )
    return processor.decode(whole[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batched_answers_are_those_of_transformers(
    batch_size: int, tiny_checkpoint: Checkpoint, samples: list[Sample]
) -> None:
    samples = [*samples, *about_several_pictures()]
    expected = [generate_one(tiny_checkpoint, sample, 4) for sample in samples]
    found = answer_with_checkpoint(
        tiny_checkpoint,
        samples,
        batch_size=batch_size,
        max_new_tokens=4,
        ctx=RunContext(),
        task="test",
    )
    assert found == expected
    assert len(set(expected)) > 1


def test_score_counts_kinds_and_reports_progress(
    tiny_checkpoint: Checkpoint, samples: list[Sample]
) -> None:
    right = [replace(sample, answer=generate_one(tiny_checkpoint, sample, 4)) for sample in samples]
    right[1] = replace(right[1], answer="surely not this")
    seen: list[Progress] = []
    score = score_checkpoint(
        tiny_checkpoint,
        right,
        max_new_tokens=4,
        ctx=RunContext(on_progress=seen.append),
    )
    assert (score.n, score.correct) == (6, 5)
    assert score.credits == (1.0, 0.0, 1.0, 1.0, 1.0, 1.0)
    assert score.per_kind["a"].accuracy == 1.0
    assert score.per_kind["b"].correct == 2
    assert score.interval_low < 5 / 6 < score.interval_high
    assert {progress.task for progress in seen} == {"evaluate", "evaluate blind"}
    assert seen[-1].done == seen[-1].total == 6
    document = json.loads(json.dumps(score.to_json()))
    assert Score.from_json(document) == score


def test_blind_questions_keep_words_and_size_and_lose_the_picture() -> None:
    sample = Sample(image=picture(5), question="what?", answer="a")
    first, again, other = blinded(sample, 0, 3), blinded(sample, 0, 3), blinded(sample, 0, 4)
    assert first.question == "what?"
    assert first.image_sizes() == sample.image_sizes()
    pixels = [np.asarray(s.open_image()) for s in (first, again, other, sample)]
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])
    assert abs(np.corrcoef(pixels[0].ravel(), pixels[3].ravel())[0, 1]) < 0.05
    text_only = Sample(image=None, question="what?", answer="a")
    assert blinded(text_only, 0, 0) is text_only


def test_a_folder_can_be_scored(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    line = {"image": "a.png", "question": "what?", "answer": "a", "kind": "k"}
    (tmp_path / "data.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    score = score_checkpoint(
        tiny_checkpoint, CalibrationSet.from_folder(tmp_path), blind=False, max_new_tokens=2
    )
    assert score.n == 1
    assert score.blind is None
    assert set(score.per_kind) == {"k"}


def test_nothing_to_score_is_an_error(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(CalibrationError, match="no questions"):
        score_checkpoint(tiny_checkpoint, [])


def test_scores_of_different_metrics_cannot_be_compared() -> None:
    first = Score(
        metric="exact_match",
        n=1,
        correct=1,
        accuracy=1,
        interval_low=0,
        interval_high=1,
        credits=(1.0,),
    )
    assert compare_scores(first, first).difference == 0
    with pytest.raises(ValueError, match="cannot be compared"):
        compare_scores(first, replace(first, metric="anls"))


def test_rows_that_cannot_be_asked_end_an_evaluation_before_it_begins(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr("pocketvlm.evaluation.torch_answers.encode_tiles", never)
    rows = [
        Sample(image=picture(1), question="word " * count, answer="?", where=f"data.jsonl:{count}")
        for count in (1, 600, 700, 800, 900)
    ]
    with pytest.raises(CalibrationError, match="takes .* positions .* has 512") as caught:
        score_checkpoint(tiny_checkpoint, rows)
    assert str(caught.value).startswith("data.jsonl:600: ")
    assert str(caught.value).endswith("; and 1 more")


def test_the_last_position_of_the_context_is_used(tiny_checkpoint: Checkpoint) -> None:
    """The last token of an answer is never run, so a prompt need not leave a position for it."""
    sample = Sample(image=None, question="", answer="?")
    empty = len(tiny_checkpoint.processor.encode(prompt_messages(sample)))
    limit = tiny_checkpoint.spec.decoder.context_length
    for spare, fits in ((0, True), (1, False)):
        count = limit - empty - 2 + 1 + spare
        asked = Sample(image=None, question="\x01" * count, answer="?")
        taken = len(tiny_checkpoint.processor.encode(prompt_messages(asked)))
        assert taken + 1 == limit + spare
        if fits:
            score_checkpoint(tiny_checkpoint, [asked], max_new_tokens=2, blind=False)
        else:
            with pytest.raises(CalibrationError, match="positions"):
                score_checkpoint(tiny_checkpoint, [asked], max_new_tokens=2, blind=False)

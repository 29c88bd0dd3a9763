"""Scores a checkpoint or a bundle: the same questions, the same metric, the same blind floor.

The blind floor is the score of the same subject when every picture is replaced by noise: what can
be answered without seeing. A score means little without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError
from pocketvlm.evaluation.answers import METRIC_NAMES, METRICS, MetricName
from pocketvlm.evaluation.intervals import PairedDifference, compare_paired, wilson_interval
from pocketvlm.runtime.engines import ENGINES, Engine

if TYPE_CHECKING:
    from pocketvlm.bundle import Bundle
    from pocketvlm.calibration.source import Sample
    from pocketvlm.checkpoint import Checkpoint
    from pocketvlm.reference_graph.activation_rounding import Arithmetic

__all__ = [
    "MAX_NEW_TOKENS",
    "KindScore",
    "Score",
    "blinded",
    "compare_scores",
    "score_bundle",
    "score_checkpoint",
]

MAX_NEW_TOKENS = 16
"""Default length of the longest answer, in tokens."""

Answerer = Callable[["Sequence[Sample]", str], list[str]]
"""Answers questions; the text is the name of the task for progress."""


@dataclass(frozen=True, kw_only=True)
class KindScore:
    """The score on one kind of question."""

    n: int
    correct: float
    accuracy: float
    interval_low: float
    interval_high: float


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of a subject's answers.

    Attributes:
        metric: Name of the metric.
        n: Number of questions.
        correct: Right answers, or the sum of credits.
        accuracy: `correct / n`.
        interval_low: Lower end of Wilson's 95 % interval.
        interval_high: Upper end.
        per_kind: The same by kind of question; empty if kinds are unknown.
        blind: Accuracy when every picture is noise; `None` if it was not measured.
        credits: Credit of each question, in order, for paired comparisons.
    """

    metric: str
    n: int
    correct: float
    accuracy: float
    interval_low: float
    interval_high: float
    per_kind: Mapping[str, KindScore] = field(default_factory=dict)
    blind: float | None = None
    credits: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The score as JSON values."""
        return {**asdict(self), "credits": list(self.credits)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Score:
        """Undoes `to_json`."""
        kinds = {kind: KindScore(**row) for kind, row in document["per_kind"].items()}
        return cls(**{**document, "per_kind": kinds, "credits": tuple(document["credits"])})


def score_checkpoint(
    checkpoint: Checkpoint,
    samples: Iterable[Sample],
    *,
    metric: MetricName = "exact_match",
    blind: bool = True,
    batch_size: int = 32,
    max_new_tokens: int = MAX_NEW_TOKENS,
    arithmetic: Arithmetic = "float32",
    int8_prefill_rows: int | None = None,
    ctx: RunContext | None = None,
) -> Score:
    """Scores greedy answers of a checkpoint in torch.

    Args:
        checkpoint: The model.
        samples: Questions with their answers.
        metric: Name of the metric.
        blind: Whether the blind floor is measured too, which doubles the time.
        batch_size: Prompts of one length that are answered together.
        max_new_tokens: Longest answer.
        arithmetic: `onnx` or `executorch` round activations as that runtime does; `float32`
            rounds nothing.
        int8_prefill_rows: With `onnx`, the target's option of this name; `None` where it has none.
        ctx: Seed of the noise, and progress.

    Raises:
        CalibrationError: There are no questions, or a picture cannot be read.
        ValueError: The metric or the arithmetic is unknown.
    """
    from pocketvlm.evaluation.torch_answers import answer_with_checkpoint

    context = ctx or RunContext()

    def answer(questions: Sequence[Sample], task: str) -> list[str]:
        return answer_with_checkpoint(
            checkpoint,
            questions,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            ctx=context,
            task=task,
            arithmetic=arithmetic,
            int8_prefill_rows=int8_prefill_rows,
        )

    return _score(answer, samples, metric=metric, blind=blind, seed=context.seed)


def score_bundle(
    bundle: Bundle,
    samples: Iterable[Sample],
    *,
    metric: MetricName = "exact_match",
    blind: bool = True,
    max_new_tokens: int = MAX_NEW_TOKENS,
    runtime: str | None = None,
    engines: Mapping[str, Engine] = ENGINES,
    ctx: RunContext | None = None,
) -> Score:
    """Scores greedy answers of a bundle, one question at a time as in an app.

    Args:
        bundle: The bundle.
        samples: Questions with their answers.
        metric: Name of the metric.
        blind: Whether the blind floor is measured too, which doubles the time.
        max_new_tokens: Longest answer.
        runtime: The engine; `None` for the first that the bundle has graphs for.
        engines: How each is opened.
        ctx: Seed of the noise, threads, and progress.

    Raises:
        CalibrationError: There are no questions, or a picture cannot be read.
        BundleError: The bundle cannot be run.
        InputError: There is no such engine.
    """
    from pocketvlm.evaluation.bundle_answers import answer_with_bundle, open_for_questions

    context, questions = ctx or RunContext(), tuple(samples)
    runner = open_for_questions(
        bundle,
        questions,
        max_new_tokens=max_new_tokens,
        runtime=runtime,
        threads=context.threads,
        engines=engines,
    )

    def answer(questions: Sequence[Sample], task: str) -> list[str]:
        return answer_with_bundle(
            bundle,
            questions,
            max_new_tokens=max_new_tokens,
            ctx=context,
            task=task,
            runner=runner,
        )

    return _score(answer, questions, metric=metric, blind=blind, seed=context.seed)


def compare_scores(baseline: Score, candidate: Score) -> PairedDifference:
    """Compares two scores on the same questions, with an interval of their difference.

    Raises:
        ValueError: Their metrics or their numbers of questions differ.
    """
    if baseline.metric != candidate.metric:
        raise ValueError(f"{baseline.metric} and {candidate.metric} cannot be compared")
    return compare_paired(baseline.credits, candidate.credits)


def _score(
    answer: Answerer, samples: Iterable[Sample], *, metric: MetricName, blind: bool, seed: int
) -> Score:
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; allowed are {', '.join(METRIC_NAMES)}")
    questions = tuple(samples)
    if not questions:
        raise CalibrationError("there are no questions to score")
    earned = _judge(answer(questions, "evaluate"), questions, metric)
    kinds = sorted({question.kind for question in questions if question.kind})
    per_kind = {
        kind: KindScore(
            **_summary([c for c, q in zip(earned, questions, strict=True) if q.kind == kind])
        )
        for kind in kinds
    }
    floor = None
    if blind:
        noise = tuple(blinded(question, seed, index) for index, question in enumerate(questions))
        unseen = _judge(answer(noise, "evaluate blind"), noise, metric)
        floor = sum(unseen) / len(unseen)
    return Score(
        metric=metric, **_summary(earned), per_kind=per_kind, blind=floor, credits=tuple(earned)
    )


def blinded(sample: Sample, seed: int, index: int) -> Sample:
    """The same question with pictures of seeded noise; a question without pictures is unchanged."""
    if not sample.images:
        return sample
    rng = np.random.default_rng((seed, index))
    noise = tuple(
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in sample.image_sizes()
    )
    return replace(sample, images=noise)


def _judge(answers: Sequence[str], questions: Sequence[Sample], metric: MetricName) -> list[float]:
    return [
        METRICS[metric](answer, question.answer)
        for answer, question in zip(answers, questions, strict=True)
    ]


def _summary(earned: Sequence[float]) -> dict[str, Any]:
    low, high = wilson_interval(sum(earned), len(earned))
    return {
        "n": len(earned),
        "correct": sum(earned),
        "accuracy": sum(earned) / len(earned),
        "interval_low": low,
        "interval_high": high,
    }

"""The budget law of the model at hand: the exponent of its tokens, fitted to runs that were scored.

The published law is of decoders that were trained with their compression. A reduction without
training loses more, so what tokens are worth is measured: runs of one model that differ in the
tokens they keep say what the error does. Weighted least squares of log error on log tokens; the
weight of a run is the inverse variance of its logarithm. One model has one size, so the exponent of
weights stays the published one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pocketvlm.errors import InputError
from pocketvlm.models.spec import ModelSpec
from pocketvlm.pipeline.advice.budget_law import PUBLISHED_LAWS, BudgetLaw
from pocketvlm.reports.report_file import read_report

__all__ = ["MeasuredLaw", "TokenScore", "fit_tokens", "read_token_scores"]

_LEAST_COUNTS = 3
_TWO_SIDED = 1.96
_POOR_FIT = 3.0
"""Chi-squared over degrees of freedom from which the law does not describe the runs."""


@dataclass(frozen=True, kw_only=True)
class TokenScore:
    """A run that was scored.

    Attributes:
        tokens: Visual tokens of a tile that it keeps.
        wrong: Questions that it answered wrongly.
        n: Questions.
    """

    tokens: int
    wrong: float
    n: int

    @property
    def log_error(self) -> float:
        """Logarithm of the error; half a question more is wrong, so that none is possible."""
        return math.log((self.wrong + 0.5) / (self.n + 1))

    @property
    def log_variance(self) -> float:
        """Variance of that, of a binomial share."""
        error = math.exp(self.log_error)
        return (1 - error) / (error * (self.n + 1))


@dataclass(frozen=True, kw_only=True)
class MeasuredLaw:
    """What was fitted.

    Attributes:
        law: The law, with the published exponent of weights.
        beta_low: Lower end of the 95 % interval of its exponent of tokens.
        beta_high: Upper end.
        misfit: Chi-squared over degrees of freedom; about 1 where the law holds.
        scores: What it was fitted to.
    """

    law: BudgetLaw
    beta_low: float
    beta_high: float
    misfit: float
    scores: tuple[TokenScore, ...]

    def lines(self) -> list[str]:
        """The fit for people."""
        law, counts = self.law, sorted({score.tokens for score in self.scores})
        told = (
            f"measured       beta {law.beta:.3f} [{self.beta_low:.3f}, {self.beta_high:.3f}] from "
            f"{len(self.scores)} runs with {', '.join(map(str, counts))} tokens per tile"
        )
        notes = []
        if self.beta_low <= 0:
            notes.append("               the interval has 0 in it: more questions would tell more")
        if self.misfit > _POOR_FIT:
            notes.append(
                f"               the runs do not lie on a power of tokens ({self.misfit:.1f} times "
                "the scatter of their answers): trust the runs, not the law"
            )
        return [told, *notes]


def read_token_scores(runs: Sequence[Path], spec: ModelSpec) -> tuple[TokenScore, ...]:
    """What scored runs of a model say of its tokens.

    Args:
        runs: Folders or reports of `pocketvlm compress`.
        spec: The model.

    Raises:
        InputError: A report cannot be read, is of another model, or has no score.
    """
    scores = []
    for path in runs:
        report = read_report(path)
        facts, quality = report.model.facts, report.quality
        kept, full = facts.get("visual_tokens"), facts.get("visual_tokens_full")
        if facts.get("family") != spec.family or full != spec.visual_tokens:
            raise InputError(
                f"{path}: is a report of a {facts.get('family')} model with {full} visual tokens "
                f"per tile; allowed are runs of this {spec.family} model, which has "
                f"{spec.visual_tokens}"
            )
        score = None if quality is None else quality.compressed
        if score is None or score.n is None or score.correct is None or not isinstance(kept, int):
            raise InputError(f"{path}: has no score; run compress with --data")
        scores.append(TokenScore(tokens=kept, wrong=score.n - score.correct, n=score.n))
    return tuple(scores)


def fit_tokens(scores: Sequence[TokenScore], *, weights: float) -> MeasuredLaw:
    """Fits the exponent of tokens.

    Args:
        scores: Runs of one model.
        weights: Weights of its decoder.

    Raises:
        InputError: They keep fewer than three different numbers of tokens.
    """
    counts = {score.tokens for score in scores}
    if len(counts) < _LEAST_COUNTS:
        raise InputError(
            f"--measured: the runs keep {len(counts)} different numbers of visual tokens; a law "
            f"needs at least {_LEAST_COUNTS}"
        )
    logs = np.log([score.tokens for score in scores])
    errors = np.array([score.log_error for score in scores])
    weight = np.array([score.log_variance for score in scores]) ** -0.5
    (slope, height), covariance = np.polyfit(logs, errors, 1, w=weight, cov="unscaled")
    reach = _TWO_SIDED * float(covariance[0, 0]) ** 0.5
    misfit = float((((errors - height - slope * logs) * weight) ** 2).sum())
    published = PUBLISHED_LAWS[0]
    law = replace(
        published,
        name="your questions",
        beta=-float(slope),
        scale=math.exp(height) * (weights / 1e9) ** published.alpha,
        floor=0.0,
        least_tokens=min(counts),
        source="exponent of tokens fitted to the given runs, that of weights as published",
    )
    return MeasuredLaw(
        law=law,
        beta_low=law.beta - reach,
        beta_high=law.beta + reach,
        misfit=misfit / max(1, len(scores) - 2),
        scores=tuple(scores),
    )

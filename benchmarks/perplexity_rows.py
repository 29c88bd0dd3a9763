"""Perplexity of compressed models on pieces of text, and tables that compare them.

Differences are paired piece by piece. Intervals are bootstrapped: pieces are drawn again, the same
for both models, and with them calibration sets where a method ran on several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from pocketvlm.calibration.data.decoder_inputs import embed_samples
from pocketvlm.calibration.data.prompts import (
    BATCH_TOKENS,
    batch_prompts,
    encode_samples,
)
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.reference_graph.activation_rounding import Arithmetic, simulate_activations
from pocketvlm.reference_graph.forward import decode_logits, encode_images
from pocketvlm.weights.modules import cache_dense_weights

__all__ = ["Interval", "Judged", "compare", "judge", "perplexity"]
_DRAWS = 10_000

Interval = tuple[float, float, float]
"""A figure and the ends of its 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What one model makes of the pieces.

    Attributes:
        losses: Sum of -log p over the tokens of every piece, in nats.
        tokens: Tokens of every piece.
    """

    losses: tuple[float, ...]
    tokens: tuple[int, ...]


@torch.inference_mode()
def judge(
    checkpoint: Checkpoint, samples: CalibrationSet, arithmetic: Arithmetic = "float32"
) -> Judged:
    """The losses of the answers' tokens, without the one that ends an answer."""
    prompts = encode_samples(checkpoint.processor, samples)
    losses, tokens = [0.0] * len(prompts), [0] * len(prompts)
    with cache_dense_weights(checkpoint.model), simulate_activations(checkpoint, arithmetic):
        for batch in batch_prompts(prompts, len(prompts), BATCH_TOKENS):
            chosen = [prompts[index] for index in batch.samples]
            first, last = chosen[0].answer_start, chosen[0].answer_end - 1
            pixels = samples.pixels(checkpoint.processor, batch.samples)
            visual = encode_images(checkpoint, pixels)
            ids = torch.tensor([prompt.token_ids for prompt in chosen])
            inputs = embed_samples(checkpoint, prompts, batch.samples, visual)
            columns = torch.arange(first - 1, last - 1).expand(len(chosen), -1)
            logits = decode_logits(checkpoint, inputs, columns=columns)
            found = functional.cross_entropy(
                logits.transpose(1, 2), ids[:, first:last], reduction="none"
            )
            for index, values in zip(batch.samples, found.double().sum(dim=1), strict=True):
                losses[index], tokens[index] = float(values), last - first
    return Judged(losses=tuple(losses), tokens=tuple(tokens))


def perplexity(sets: Sequence[Judged]) -> Interval:
    """Perplexity of one method, the geometric mean over its calibration sets."""
    value, draws = _log_perplexity(sets)
    return _spread(value, draws)


def compare(sets: Sequence[Judged], baseline: Sequence[Judged]) -> Interval:
    """The ratio of two methods' perplexities.

    Args:
        sets: Of one method, a calibration set each.
        baseline: Of the other. Where both have several, they are on the same calibration sets.
    """
    count = max(len(sets), len(baseline))
    value, draws = _log_perplexity(list(sets) * (count // len(sets)))
    other, beside = _log_perplexity(list(baseline) * (count // len(baseline)))
    return _spread(value - other, draws - beside)


def _log_perplexity(sets: Sequence[Judged]) -> tuple[float, NDArray[np.float64]]:
    """The figure, and what it would be on pieces and sets that are drawn again, [draws]."""
    losses = np.array([judged.losses for judged in sets])
    tokens = np.array(sets[0].tokens)
    count, pieces = losses.shape
    # The same draws for every method: differences are paired.
    random = np.random.default_rng(0)
    weights = random.multinomial(pieces, np.full(pieces, 1 / pieces), size=_DRAWS)
    drawn = np.random.default_rng(1).multinomial(count, np.full(count, 1 / count), size=_DRAWS)
    sums = ((drawn @ losses) * weights).sum(axis=1)
    return float(losses.sum() / (count * tokens.sum())), sums / (count * (weights @ tokens))


def _spread(value: float, draws: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(draws, (0.025, 0.975))
    return math.exp(value), math.exp(low), math.exp(high)

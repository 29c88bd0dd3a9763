"""The choice of the next token: the likeliest, or a seeded draw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["GREEDY", "Sampling"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token; above 0, logits are divided by it.
        top_p: Draws come from the fewest likeliest tokens that have this probability together
            (nucleus sampling, arXiv 1904.09751, section 3.1).
        seed: Seed of the draws; the same seed gives the same answer.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    def generator(self) -> np.random.Generator:
        """A fresh source of draws."""
        return np.random.default_rng(self.seed)

    def choose(self, logits: npt.NDArray[np.float32], generator: np.random.Generator) -> int:
        """The next token, from logits [vocabulary]."""
        if self.temperature == 0:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / self.temperature
        weights = np.exp(scaled - scaled.max())
        weights /= weights.sum()
        order = np.argsort(-weights, kind="stable")
        cumulative = np.cumsum(weights[order])
        last = int(np.searchsorted(cumulative, self.top_p * cumulative[-1]))
        draw = generator.random() * cumulative[last]
        return int(order[min(int(np.searchsorted(cumulative, draw, side="right")), last)])


GREEDY = Sampling()

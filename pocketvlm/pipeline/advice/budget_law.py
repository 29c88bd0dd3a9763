"""The inference-optimal law: how many weights and how many visual tokens one budget should buy.

"Inference Optimal VLMs Need Only One Visual Token but Larger Models" (Li et al., arXiv 2411.03312),
equations 2 and 3: error = A / N^alpha / V^beta + D and compute = 2 N (Q + V), for N weights of the
decoder, V visual tokens and Q rows of text. What differs: the published optimum is that of a
decoder of any size. Here N ends where a device's memory does, V where the model's own tokens do,
and below a floor no number of tokens is offered, so the optimum is searched among all V.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PUBLISHED_LAWS", "BudgetLaw", "Offer", "best_offer", "tokens_for"]

_FLOPS_PER_WEIGHT = 2
_BILLION = 1e9


@dataclass(frozen=True, kw_only=True)
class BudgetLaw:
    """Error as a power of weights and of visual tokens.

    Attributes:
        name: What is asked of the pictures.
        alpha: Exponent of the decoder's weights, which are counted in billions.
        beta: Exponent of the visual tokens.
        scale: A, the reducible error of a billion weights and one token.
        floor: D, the error that neither reduces.
        least_tokens: Tokens below which nothing is offered: where answers broke in published
            tables, whatever the law says.
        source: Where exponents and scale are from.
    """

    name: str
    alpha: float
    beta: float
    scale: float
    floor: float
    least_tokens: int
    source: str

    def error(self, weights: float, tokens: float) -> float:
        """Expected share of wrong answers."""
        reducible = self.scale / (weights / _BILLION) ** self.alpha
        return float(reducible / max(tokens, 1) ** self.beta + self.floor)

    def free_optimum(self, text_rows: int) -> float | None:
        """Tokens that are best when a decoder may have any size; `None` for as many as there are.

        Where alpha is above beta, (Q + V)^alpha / V^beta is least at V = beta Q / (alpha - beta);
        elsewhere it falls with every token.
        """
        if self.alpha <= self.beta:
            return None
        return max(1.0, self.beta * text_rows / (self.alpha - self.beta))


PUBLISHED_LAWS = (
    BudgetLaw(
        name="scenes",
        alpha=0.077,
        beta=0.015,
        scale=0.553,
        floor=0.036,
        least_tokens=16,
        source="visual reasoning: published exponents, scale refitted to the published values",
    ),
    BudgetLaw(
        name="text in pictures",
        alpha=0.027,
        beta=0.039,
        scale=0.915,
        floor=0.0,
        least_tokens=256,
        source="reading: refitted to the published values, without the point that repeats another",
    ),
)
"""Of decoders of 0.5 to 7 billion weights and 1 to 576 tokens, trained with their compression."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A size of decoder with a number of tokens.

    Attributes:
        weights: Weights of the decoder.
        tokens: Visual tokens of a picture.
    """

    weights: float
    tokens: int


def tokens_for(budget_flops: float, weights: float, text_rows: int) -> int:
    """Visual tokens that a decoder of this size may read within the budget; 0 for none."""
    return max(0, int(budget_flops / (_FLOPS_PER_WEIGHT * weights) - text_rows))


def best_offer(
    law: BudgetLaw,
    *,
    weights: float,
    tokens: int,
    text_rows: int,
    native_tokens: int,
    most_weights: float,
) -> Offer:
    """The best size and number of tokens for the compute of the model as planned.

    Args:
        law: What is asked of the pictures.
        weights: Weights of the planned decoder.
        tokens: Its visual tokens.
        text_rows: Rows of text.
        native_tokens: Tokens that there are before any reduction.
        most_weights: Weights that the memory takes; infinite where nothing limits them.
    """
    least = min(law.least_tokens, native_tokens)
    rows = weights * (text_rows + tokens)

    def size(count: int) -> float:
        return min(rows / (text_rows + count), most_weights)

    best = min(range(least, native_tokens + 1), key=lambda count: law.error(size(count), count))
    return Offer(weights=size(best), tokens=best)

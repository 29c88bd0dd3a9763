"""What the compute of a planned model would buy: larger decoders with fewer tokens, or the reverse.

Sizes are those that the budget law takes within the device's memory, and those that the family has
published. A decoder of another size weighs what the planned one does per weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pocketvlm.device_bench.prediction.roofline import Question
from pocketvlm.models.spec import ModelSpec
from pocketvlm.pipeline.advice.budget_law import (
    PUBLISHED_LAWS,
    BudgetLaw,
    Offer,
    best_offer,
    tokens_for,
)
from pocketvlm.pipeline.advice.measured_law import MeasuredLaw
from pocketvlm.pipeline.plan_memory import predict_memory
from pocketvlm.pipeline.predict import PREDICTED_WORKLOAD, question_of
from pocketvlm.reference.shapes import list_shapes, load_shape
from pocketvlm.stages import PlanState, Target

__all__ = ["LIMITS", "Choice", "Choices", "decoder_weights", "offer_choices"]

_DECODER_PARTS = frozenset({"decoder", "embedding", "head"})
_SAME_SIZE = 0.01
_LARGEST_FITTED = 7e9  # weights of the largest decoder that the published law was fitted to
LIMITS = (
    "fitted to decoders of 0.5 to 7 B weights that were trained with their compression; a "
    "reduction without training loses more, and --measured tells how much",
    "counts neither the tower nor attention among tokens; levers do",
    "text in pictures: buy tokens; published answers broke below 256, those about scenes below 16",
)
"""Where the law is not to be trusted."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A decoder and a number of tokens for the compute of the model as planned.

    Attributes:
        name: Whose it is: a law's, or a published shape's.
        weights: Weights of the decoder, its table included.
        tokens: Visual tokens of the picture; 0 where its text alone takes more compute.
        fits: Whether the device's memory takes it.
        weight_bytes: Predicted bytes of the whole model's weights.
        errors: What each law expects, over what it expects of the model as planned.
    """

    name: str
    weights: float
    tokens: int
    fits: bool
    weight_bytes: int
    errors: tuple[float, ...]

    def line(self) -> str:
        """The choice for people."""
        size = f"  {self.name:<30}{self.weights / 1e9:>8.2f} B"
        if self.tokens == 0:
            return f"{size}  text alone takes more than this compute"
        errors = "".join(f"{error:>18.3f}" for error in self.errors)
        fits = "" if self.fits else "  does not fit the device"
        return f"{size}{self.tokens:>8}{self.weight_bytes / 1e6:>9.0f} MB{errors}{fits}"


@dataclass(frozen=True, kw_only=True)
class Choices:
    """All of them.

    Attributes:
        text_rows: Q.
        most_weights: Weights of the largest decoder that fits; `None` where nothing limits it.
        laws: By the order of every choice's errors.
        measured: The fit of the last of them; `None` where all are as published.
        rows: The model as planned, what each law takes, and the family's published shapes.
        limits: Where the law is not to be trusted.
    """

    text_rows: int
    most_weights: float | None
    laws: tuple[BudgetLaw, ...]
    measured: MeasuredLaw | None
    rows: tuple[Choice, ...]
    limits: tuple[str, ...] = LIMITS

    def lines(self) -> list[str]:
        """The table for people."""
        fits = (
            "no device limits N"
            if self.most_weights is None
            else f"N at most {self.most_weights / 1e9:.2f} B on this device"
        )
        names = "".join(f"{law.name:>18}" for law in self.laws)
        return [
            "law            error = A / N^alpha / V^beta + D at compute 2 N (Q + V), "
            f"Q = {self.text_rows} rows of text; {fits}",
            *(() if self.measured is None else self.measured.lines()),
            f"  {'for the same compute':<30}{'N':>10}{'V':>8}{'weights':>12}{names}",
            *(choice.line() for choice in self.rows),
            *(_exponents(law, self.text_rows) for law in self.laws),
            *(f"limit          {limit}" for limit in self.limits),
        ]


def _exponents(law: BudgetLaw, text_rows: int) -> str:
    best = law.free_optimum(text_rows)
    told = "tokens before weights" if best is None else f"weights before tokens, V = {best:.0f}"
    return f"               {law.name}: alpha {law.alpha:.3f}, beta {law.beta:.3f}: {told}"


def decoder_weights(spec: ModelSpec) -> float:
    """Weights of a decoder as the law counts them: its table is among them."""
    linears = (linear for linear in spec.linears() if linear.part in _DECODER_PARTS)
    return float(sum(linear.out_features * linear.in_features for linear in linears))


def offer_choices(
    state: PlanState,
    targets: Sequence[Target],
    question: Question,
    *,
    most_bytes: float | None,
    measured: MeasuredLaw | None = None,
) -> Choices:
    """What the compute of a planned model would buy.

    Args:
        state: The model as its recipe leaves it.
        targets: What it is exported to.
        question: What is asked of it.
        most_bytes: Memory that the device gives it; `None` where nothing limits it.
        measured: The law of its own runs.
    """
    weights, tokens = decoder_weights(state.spec), question.visual_rows
    text_rows = question.text_rows
    laws = PUBLISHED_LAWS if measured is None else (*PUBLISHED_LAWS, measured.law)
    decoder_bytes, other_bytes = _weight_bytes(state, targets)
    memory = predict_memory(state, targets)
    held = memory.weight_bytes * decoder_bytes / (decoder_bytes + other_bytes)
    most = math.inf
    if most_bytes is not None:
        most = max(0.0, weights * (most_bytes - memory.total_bytes + held) / held)

    largest = min(most, max(weights, _LARGEST_FITTED))

    def choice(name: str, offer: Offer) -> Choice:
        return Choice(
            name=name,
            weights=offer.weights,
            tokens=offer.tokens,
            fits=offer.weights <= most,
            weight_bytes=round(other_bytes + decoder_bytes * offer.weights / weights),
            errors=tuple(
                law.error(offer.weights, offer.tokens) / law.error(weights, tokens) for law in laws
            ),
        )

    rows = [choice("as planned", Offer(weights=weights, tokens=tokens))]
    if most > 0:
        rows += [
            choice(
                f"best for {law.name}",
                best_offer(
                    law,
                    weights=weights,
                    tokens=tokens,
                    text_rows=text_rows,
                    native_tokens=_native_tokens(state.spec),
                    most_weights=largest,
                ),
            )
            for law in laws
        ]
    budget = 2 * weights * (text_rows + tokens)
    for name, spec in _relatives(state.spec, weights):
        size = decoder_weights(spec)
        count = min(_native_tokens(spec), tokens_for(budget, size, text_rows))
        rows.append(choice(f"shape:{name}", Offer(weights=size, tokens=count)))
    return Choices(
        text_rows=text_rows,
        most_weights=None if math.isinf(most) else most,
        laws=laws,
        measured=measured,
        rows=tuple(rows),
    )


def _native_tokens(spec: ModelSpec) -> int:
    """Visual tokens of the workload's picture before any reduction."""
    return question_of(PlanState.of(spec), PREDICTED_WORKLOAD).visual_rows


def _weight_bytes(state: PlanState, targets: Sequence[Target]) -> tuple[int, int]:
    """Bytes of the decoder and of the rest, in the files of the target that takes most."""
    parts = max(
        (target.predict(state.spec, state.layouts).part_bytes for target in targets),
        key=lambda by_part: sum(by_part.values()),
    )
    decoder = sum(count for part, count in parts.items() if part in _DECODER_PARTS)
    return decoder, sum(parts.values()) - decoder


def _relatives(spec: ModelSpec, weights: float) -> Iterator[tuple[str, ModelSpec]]:
    """Published shapes of the family whose decoders have another size."""
    for name in list_shapes():
        other = load_shape(name).spec
        same = abs(decoder_weights(other) / weights - 1) < _SAME_SIZE
        if other.family == spec.family and not same:
            yield name, other

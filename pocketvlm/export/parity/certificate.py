"""What a parity certificate says: metrics, their bounds in one table, and the verdict."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, Literal

from pocketvlm.bundle import Component
from pocketvlm.errors import ParityError

__all__ = [
    "BOUNDS",
    "Bound",
    "Check",
    "ParityReport",
    "Precision",
    "TargetParity",
    "judge",
    "precision_of",
]

Precision = Literal["float32", "float16", "integer"]
"""What a target computes in: `integer` where kernels round activations to int8, `float16` where
graphs compute in half precision, whatever their weights are."""


@dataclass(frozen=True)
class Bound:
    """How far a metric may go; `None` where it cannot fail in that direction."""

    at_least: float | None = None
    at_most: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a value is within the bound; NaN never is."""
        above = self.at_least is None or value >= self.at_least
        below = self.at_most is None or value <= self.at_most
        return above and below

    def spell(self) -> str:
        """The bound in words."""
        ends = (("at least", self.at_least), ("at most", self.at_most))
        return " and ".join(f"{word} {value:g}" for word, value in ends if value is not None)


BOUNDS: Mapping[str, Mapping[Precision, Bound]] = {
    # Bundle and checkpoint must see the same pixels and the same token ids.
    "input.pixels_max_abs": {
        "float32": Bound(at_most=0.02),
        "float16": Bound(at_most=0.02),
        "integer": Bound(at_most=0.02),
    },
    "input.prompts_equal": {
        "float32": Bound(at_least=1.0),
        "float16": Bound(at_least=1.0),
        "integer": Bound(at_least=1.0),
    },
    # Each graph by itself, on the reference's inputs.
    "vision.relative_error": {
        "float32": Bound(at_most=1e-3),
        "float16": Bound(at_most=1e-2),
        "integer": Bound(at_most=0.05),
    },
    "vision.cosine": {
        "float32": Bound(at_least=0.9999),
        "float16": Bound(at_least=0.999),
        "integer": Bound(at_least=0.99),
    },
    "vision.index_overlap": {
        "float32": Bound(at_least=0.99),
        "float16": Bound(at_least=0.95),
        "integer": Bound(at_least=0.9),
    },
    "embedding.relative_error": {
        "float32": Bound(at_most=1e-5),
        "float16": Bound(at_most=1e-3),
        "integer": Bound(at_most=1e-3),
    },
    "prefill.sqnr_db": {
        "float32": Bound(at_least=60.0),
        "float16": Bound(at_least=40.0),
        "integer": Bound(at_least=25.0),
    },
    "prefill.argmax_mismatches": {
        "float32": Bound(at_most=0.0),
        "float16": Bound(at_most=0.0),
        "integer": Bound(at_most=0.0),
    },
    # All of it together, from pixels to tokens.
    "chain.sqnr_db": {
        "float32": Bound(at_least=50.0),
        "float16": Bound(at_least=25.0),
        "integer": Bound(at_least=15.0),
    },
    "greedy.mismatch_share": {
        "float32": Bound(at_most=0.0),
        "float16": Bound(at_most=0.01),
        "integer": Bound(at_most=0.01),
    },
    # The picture decides the answer as it does in the reference.
    "image_swap.reference_change": {
        "float32": Bound(at_least=1e-4),
        "float16": Bound(at_least=1e-4),
        "integer": Bound(at_least=1e-4),
    },
    "image_swap.change_ratio": {
        "float32": Bound(at_least=0.99, at_most=1.01),
        "float16": Bound(at_least=0.8, at_most=1.25),
        "integer": Bound(at_least=0.5, at_most=2.0),
    },
    "image_swap.change_cosine": {
        "float32": Bound(at_least=0.999),
        "float16": Bound(at_least=0.99),
        "integer": Bound(at_least=0.9),
    },
    # A second turn on the cache equals the same conversation run at once.
    "two_turns.sqnr_db": {
        "float32": Bound(at_least=60.0),
        "float16": Bound(at_least=40.0),
        "integer": Bound(at_least=25.0),
    },
    "two_turns.reference_sqnr_db": {
        "float32": Bound(at_least=50.0),
        "float16": Bound(at_least=25.0),
        "integer": Bound(at_least=15.0),
    },
}
"""Every metric's bound, by precision."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One metric, its bound and the verdict."""

    metric: str
    value: float
    bound: Bound
    passed: bool

    def to_json(self) -> dict[str, Any]:
        """The check as JSON values; a value that is not finite is `null`."""
        return {**asdict(self), "value": _finite(self.value)}


@dataclass(frozen=True, kw_only=True)
class TargetParity:
    """The certificate of one target.

    Attributes:
        target: `onnx`, for one.
        variant: Which vision graph it is made with; `None` for the first.
        precision: Which column of the table applies.
        samples: Questions that it was made on.
        checks: Every metric with its verdict.
        details: What explains them: token counts, near-ties, distances without a bound.
    """

    target: str
    precision: Precision
    samples: int
    checks: tuple[Check, ...]
    details: Mapping[str, Any]
    variant: str | None = None

    @property
    def label(self) -> str:
        """What it is called: the target, and the vision graph if it is not the first."""
        return self.target if self.variant is None else f"{self.target} {self.variant}"

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The certificate as JSON values."""
        return {
            "target": self.target,
            **({} if self.variant is None else {"variant": self.variant}),
            "precision": self.precision,
            "passed": self.passed,
            "samples": self.samples,
            "checks": [check.to_json() for check in self.checks],
            "details": {name: _finite(value) for name, value in self.details.items()},
        }


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """The certificates of a bundle's targets.

    Attributes:
        targets: One for each target that was run, with each of its vision graphs.
        unverified: Targets that no engine of this host can run, with the reason.
        host: The machine that it was made on: its architecture, and the instruction sets that
            kernels choose by.
    """

    targets: tuple[TargetParity, ...]
    unverified: Mapping[str, str]
    host: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every target that was run passed; at least one was."""
        return bool(self.targets) and all(target.passed for target in self.targets)

    def failures(self) -> list[str]:
        """One line for each check that failed: target, metric, value, bound."""
        lines = [
            f"parity of {target.label}: {check.metric} is {check.value:.4g}, "
            f"{check.bound.spell()} is required"
            for target in self.targets
            for check in target.checks
            if not check.passed
        ]
        if not self.targets:
            lines.append("parity: no target could be run on this host")
        return lines

    def raise_if_failed(self) -> None:
        """Turns the verdict into an exit code.

        Raises:
            ParityError: A check failed; the message has the first, and how many there are.
        """
        lines = self.failures()
        if lines:
            more = f" ({len(lines) - 1} more)" if len(lines) > 1 else ""
            raise ParityError(lines[0] + more)

    def to_json(self) -> dict[str, Any]:
        """The certificate as JSON values."""
        return {
            "passed": self.passed,
            "targets": {target.label: target.to_json() for target in self.targets},
            "unverified": dict(self.unverified),
            "host": dict(self.host),
        }


def judge(
    metrics: Mapping[str, float],
    precision: Precision,
    *,
    wanted: Collection[str] = BOUNDS.keys(),
) -> tuple[Check, ...]:
    """Holds measured metrics against the table, in the table's order.

    Args:
        metrics: The metrics.
        precision: The column.
        wanted: The metrics that there must be: all of a certificate.

    Raises:
        ValueError: The metrics are others: a certificate is whole or it is none.
    """
    if metrics.keys() != set(wanted):
        odd = sorted(metrics.keys() ^ set(wanted))
        raise ValueError(f"metrics and bounds do not match: {', '.join(odd)}")
    return tuple(
        Check(
            metric=name,
            value=metrics[name],
            bound=columns[precision],
            passed=columns[precision].holds(metrics[name]),
        )
        for name, columns in BOUNDS.items()
        if name in metrics
    )


def precision_of(components: Sequence[Component], target: str) -> Precision:
    """What a target of a bundle computes in, by its components."""
    labels = [
        label
        for component in components
        if component.target == target
        for label in component.precision.values()
    ]
    if target == "coreml":
        # Weights are expanded before they are used: activations are floats whatever these are.
        return "float32" if set(labels) == {"float32"} else "float16"
    return "integer" if any("int" in label for label in labels) else "float32"


def _finite(value: Any) -> Any:
    """A JSON value; JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not isfinite(value) else value

"""The bounds of the release gate: which figures it looks at, and how much worse each may be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from pocketvlm.errors import InputError

__all__ = [
    "DEFAULT_BOUNDS",
    "METRICS",
    "TIMINGS",
    "is_absolute",
    "is_better_when_higher",
    "parse_bounds",
]

DEFAULT_BOUNDS: Mapping[str, float] = {
    "bundle_bytes": 0.02,
    "peak_rss_bytes": 0.10,
    "accuracy": 0.01,
    "ttft_user_ms": 0.05,
    "ttft_engine_ms": 0.05,
    "decode_ms": 0.05,
}
"""Allowed regression by figure, unless the caller gives another; `docs/reports.md` says why."""

TIMINGS = (
    "load_ms",
    "cold_ttft_user_ms",
    "preprocess_ms",
    "vision_ms",
    "tokenize_ms",
    "embed_ms",
    "prefill_ms",
    "decode_ms",
    "sample_ms",
    "detokenize_ms",
    "ttft_user_ms",
    "ttft_engine_ms",
    "prefill_tok_s",
    "decode_tok_s",
)
"""Figures with samples of many processes, hence with an interval."""

METRICS = ("bundle_bytes", "peak_rss_bytes", "accuracy", "recovery", *TIMINGS)
"""All figures that a bound can be given for."""

_HIGHER_IS_BETTER = ("_tok_s", "accuracy", "recovery")


def is_better_when_higher(metric: str) -> bool:
    """Whether less of this figure is a regression."""
    return metric.endswith(_HIGHER_IS_BETTER)


def is_absolute(metric: str) -> bool:
    """Whether its bound is a difference, and not a share of A."""
    return metric in ("accuracy", "recovery")


def parse_bounds(texts: Iterable[str]) -> dict[str, float]:
    """Parses `METRIC=SHARE` texts into bounds, on top of the defaults; `5%` means 0.05.

    Raises:
        InputError: A metric is unknown, or a share is not a number of at least 0.
    """
    bounds = dict(DEFAULT_BOUNDS)
    for text in texts:
        name, _, share = text.partition("=")
        if name not in METRICS:
            raise InputError(
                f"--max-regress {text!r}: metric {name!r} is not known; there are "
                f"{', '.join(METRICS)}"
            )
        try:
            value = float(share.removesuffix("%")) / (100 if share.endswith("%") else 1)
        except ValueError as error:
            raise InputError(
                f"--max-regress {text!r}: {share!r} is not a share; write {name}=0.05 or {name}=5%"
            ) from error
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"--max-regress {text!r}: the share must be 0 or more")
        bounds[name] = value
    return bounds

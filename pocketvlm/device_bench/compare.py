"""The gate of a release: is report B worse than report A beyond what is allowed?

A bound is a share of A (`decode_tok_s=0.05`), or for accuracy a difference in points of one
(`accuracy=0.01` is one percentage point). A figure that A has and B lacks has regressed: a gate
that cannot see has not passed. Latencies of different workloads or machines are not comparable,
and that fails too, since it is the silent way to pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pocketvlm.errors import InputError
from pocketvlm.reports.report_file import read_report

__all__ = ["DEFAULT_BOUNDS", "Comparison", "compare_documents", "compare_reports", "parse_bounds"]

Verdict = Literal["ok", "regressed", "missing", "not comparable", "not measured"]

DEFAULT_BOUNDS: Mapping[str, float] = {
    "bundle_bytes": 0.02,
    "peak_rss_bytes": 0.10,
    "accuracy": 0.01,
    "ttft_user_ms": 0.10,
    "ttft_engine_ms": 0.10,
    "prefill_tok_s": 0.10,
    "decode_tok_s": 0.10,
}
"""What may regress by how much unless the caller says otherwise."""

_HIGHER_IS_BETTER = ("_tok_s", "accuracy", "recovery")
_LATENCY = (
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
_METRICS = ("bundle_bytes", "peak_rss_bytes", "accuracy", "recovery", *_LATENCY)
_SAME_WORKLOAD = ("prompt_tokens", "new_tokens", "image_size", "image_sha256")
_SAME_MACHINE = ("processor", "machine", "cores", "threads", "device")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One figure of both reports.

    Attributes:
        metric: Its name.
        target: The target that it was measured on, or `None` for the whole bundle.
        first: Its value in A.
        second: Its value in B.
        regression: How much worse B is, as a share of A (accuracy: in points of one); negative
            where it is better.
        bound: How much worse it may be.
        verdict: The outcome.
        reason: Why, where the numbers do not say it.
    """

    metric: str
    target: str | None
    first: float | None
    second: float | None
    regression: float | None
    bound: float
    verdict: Verdict
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether B may be released as far as this figure goes."""
        return self.verdict in ("ok", "not measured")

    def line(self) -> str:
        """The row as text."""
        name = self.metric if self.target is None else f"{self.target} {self.metric}"
        if self.first is None or self.second is None or self.regression is None:
            return f"{name:<28} {self.verdict}: {self.reason}"
        change = (
            f"worse by {self.regression:.1%}"
            if self.regression > 0
            else f"better by {-self.regression:.1%}"
        )
        detail = f" ({self.reason})" if self.reason else ""
        return (
            f"{name:<28} {self.first:>14,.4g} -> {self.second:>14,.4g}  {change:<18} "
            f"allowed {self.bound:.1%}  {self.verdict}{detail}"
        )

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values."""
        return {**asdict(self), "passed": self.passed}


def parse_bounds(texts: Iterable[str]) -> dict[str, float]:
    """Bounds from `METRIC=SHARE` texts, laid over the defaults; `5%` means 0.05.

    Raises:
        InputError: A metric is unknown, or a share is no number of at least 0.
    """
    bounds = dict(DEFAULT_BOUNDS)
    for text in texts:
        name, _, share = text.partition("=")
        if name not in _METRICS:
            raise InputError(
                f"--max-regress {text!r}: metric {name!r} is not known; there are "
                f"{', '.join(_METRICS)}"
            )
        try:
            value = float(share.removesuffix("%")) / (100 if share.endswith("%") else 1)
        except ValueError as error:
            raise InputError(
                f"--max-regress {text!r}: {share!r} is no share; write {name}=0.05 or {name}=5%"
            ) from error
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"--max-regress {text!r}: the share must be 0 or more")
        bounds[name] = value
    return bounds


def compare_reports(
    first: Path, second: Path, bounds: Mapping[str, float] | None = None
) -> tuple[Comparison, ...]:
    """Compares two report files, or the report.json of two run folders.

    A run report and the document of `pocketvlm bench` serve alike.

    Raises:
        InputError: One of them cannot be read, or is no report.
    """
    return compare_documents(read_report(first), read_report(second), bounds)


def compare_documents(
    first: Mapping[str, Any], second: Mapping[str, Any], bounds: Mapping[str, float] | None = None
) -> tuple[Comparison, ...]:
    """Compares two reports, figure by figure, in the order of the bounds.

    Args:
        first: The reference, A.
        second: What must not be worse, B.
        bounds: How much worse each figure may be; `None` for the defaults.
    """
    rows = []
    obstacle = _obstacle(first, second)
    for metric, bound in (DEFAULT_BOUNDS if bounds is None else bounds).items():
        targets: tuple[str | None, ...] = (None,)
        if metric in _LATENCY:
            targets = tuple(sorted({*_latency(first), *_latency(second)})) or (None,)
        for target in targets:
            values = _value(first, metric, target), _value(second, metric, target)
            is_timed = metric in _LATENCY
            rows.append(_judge(metric, target, values, bound, obstacle if is_timed else ""))
    return tuple(rows)


def _judge(
    metric: str,
    target: str | None,
    values: tuple[float | None, float | None],
    bound: float,
    obstacle: str,
) -> Comparison:
    first, second = values
    regression: float | None = None
    verdict: Verdict
    reason = ""
    if first is None:
        verdict, reason = "not measured", "A has no such figure, so there is nothing to hold"
    elif second is None:
        verdict, reason = "missing", "A has this figure and B lacks it"
    elif obstacle:
        verdict, reason = "not comparable", obstacle
    else:
        worse_by = first - second if metric.endswith(_HIGHER_IS_BETTER) else second - first
        regression = worse_by if metric in ("accuracy", "recovery") else _share(worse_by, first)
        # Differences of decimal fractions end in binary dust, which must not decide.
        verdict = "ok" if regression <= bound + 1e-9 else "regressed"
    return Comparison(
        metric=metric,
        target=target,
        first=first,
        second=second,
        regression=regression,
        bound=bound,
        verdict=verdict,
        reason=reason,
    )


def _share(difference: float, of: float) -> float:
    if of == 0:
        return 1.0 if difference > 0 else 0.0
    return difference / abs(of)


def _bench(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The block that `bench_bundle` returned: the document itself, or the report's part."""
    block: Mapping[str, Any] = document.get("bench") or document
    return block


def _latency(document: Mapping[str, Any]) -> Mapping[str, Any]:
    latency: Mapping[str, Any] = document.get("latency") or _bench(document).get("latency") or {}
    return latency


def _value(document: Mapping[str, Any], metric: str, target: str | None) -> float | None:
    if metric in _LATENCY:
        figure = (_latency(document).get(target) or {}) if target else {}
        return _number((figure.get(metric) or {}).get("median"))
    if metric == "bundle_bytes":
        size = (document.get("size") or {}).get("bundle_bytes")
        bundle = (_bench(document).get("bundles") or {}).get("candidate") or {}
        return _number(bundle.get("stored_bytes") if size is None else size)
    if metric == "peak_rss_bytes":
        return _number((document.get("memory") or {}).get("peak_rss_bytes"))
    quality = document.get("quality") or {}
    if metric == "recovery":
        return _number(quality.get("recovery"))
    compressed = quality.get("compressed")
    if isinstance(compressed, Mapping):
        compressed = compressed.get("accuracy")
    return _number(compressed)


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else None


def _obstacle(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Why latencies of two reports cannot be compared; empty where they can."""
    blocks = _bench(first), _bench(second)
    for block, keys in (("workload", _SAME_WORKLOAD), ("environment", _SAME_MACHINE)):
        known = [document.get(block) or {} for document in blocks]
        for key in keys:
            values = [document.get(key) for document in known]
            if values[0] != values[1]:
                return f"{block} differs in {key}: {values[0]!r} and {values[1]!r}"
    return ""

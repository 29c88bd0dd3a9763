"""Printing: text to stderr, documents to stdout."""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from typing import TYPE_CHECKING, Any

from pocketvlm.printable import printable

if TYPE_CHECKING:  # a command has imported what it prints
    from pocketvlm.export.parity.certificate import ParityReport
    from pocketvlm.reports.measurement import Measurement
    from pocketvlm.reports.report import Report

__all__ = [
    "command_line",
    "one_line",
    "print_certificate",
    "print_json",
    "print_latency",
    "print_summary",
    "quiet_libraries",
    "say",
    "told_warnings",
    "uncollected",
]

_LONGEST_LINE = 1200
# Predicted memory leaves out what a runtime takes itself, beside which less than this says nothing.
_SESSION_BYTES = 100e6


def say(line: str) -> None:
    """Prints one line of text, whatever the names in it hold."""
    if sys.stderr is not None:  # `print` would use stdout instead, which is for the document
        print(printable(line).replace("\n", "\\n"), file=sys.stderr)


def one_line(text: str) -> str:
    """Untrusted text as one line of bounded length, without control characters."""
    line = " ".join(text.split())
    if len(line) > _LONGEST_LINE:
        half = _LONGEST_LINE // 2
        line = f"{line[:half]} … {line[-half:]}"
    return printable(line)


@contextmanager
def told_warnings() -> Iterator[None]:
    """Inside, each warning is one line for people, without a place in the source."""

    def tell(message: Warning | str, *_: Any, **__: Any) -> None:
        say(f"warning  {one_line(str(message))}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = tell
        yield


def print_json(document: Mapping[str, Any]) -> None:
    """Prints one document on one line, in ASCII, which is valid in every terminal's encoding."""
    print(json.dumps(document, allow_nan=False))


def quiet_libraries() -> None:
    """Keeps the libraries' own progress bars and notices off the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@contextmanager
def uncollected() -> Iterator[None]:
    """Leaves Python's collector of cycles off.

    It looks through every object again and again while modules are imported, and finds nothing: a
    fifth of the time of a command that does little else.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def command_line() -> str:
    """The command, quoted for a shell."""
    import shlex

    return shlex.join(["pocketvlm", *sys.argv[1:]])


def print_summary(report: Report) -> None:
    """Prints the results of a run: size, answers, certificate and speed."""
    size, quality = report.size, report.quality
    if size.bundle_bytes is not None and size.bundle_share is not None:
        several = len(size.parts) > 2  # noqa: PLR2004  (one target, and the processor's files)
        which = "the largest target " if several else ""
        say(
            f"size     {size.bundle_bytes / 1e6:.2f} MB, "
            f"{which}{size.bundle_share:.3f} of the source's weights"
        )
    if quality is not None:
        compressed, plain = quality.compressed.accuracy, quality.uncompressed.accuracy
        say(
            f"quality  {compressed:.1%} from the bundle, {plain:.1%} float "
            f"(n={quality.n}, {quality.metric})"
        )
    if report.source_check is not None:
        say(f"source   {report.source_check.verdict}")
    if report.parity is not None:
        say(f"parity   {'passed' if report.parity.passed else 'FAILED'}")
    print_latency(report.bench)
    for note in report.notes:
        say(f"note     {note}")


def print_certificate(certificate: ParityReport) -> None:
    """Prints every check of a certificate, with its bound."""
    for target in certificate.targets:
        say(f"{target.target}: {target.details['engine']}")
        for check in target.checks:
            value = f"{check.value:.6g}" if isfinite(check.value) else "not finite"
            verdict = "" if check.passed else "FAILED"
            say(f"  {check.metric:<28} {value:>12}  {check.bound.spell():<28} {verdict}")
        details = target.details
        if "greedy_tokens_compared" not in details:
            continue
        say(
            f"  {'greedy tokens':<28} {details['greedy_tokens_equal']:>12}  "
            f"of {details['greedy_tokens_compared']}, near-ties {details['greedy_near_ties']}"
        )


def print_latency(bench: Measurement) -> None:
    """Prints medians of every arm, and their ratios to the reference; no implausible figure."""
    width = max((len(name) for name in bench.arms), default=0)
    figures = ("vision_ms", "prefill_ms", "ttft_user_ms", "decode_tok_s")
    for name, arm in bench.arms.items():
        if arm.latency.failed is not None:
            say(f"{name:<{width}}  failed: {arm.latency.failed}")
            continue
        pieces = []
        for figure in figures:
            median, ratio = arm.latency.figure(figure).median, arm.ratios.get(figure)
            if figure in arm.withheld:
                pieces.append(f"{figure} not published")
            elif median is not None:
                pieces.append(f"{figure} {median:.1f}" + (f" ({ratio:.2f}x)" if ratio else ""))
        say(f"{name:<{width}}  " + ", ".join(pieces))
        ratios = [
            f"{row.name} {row.ratio:.2f}"
            for row in arm.predicted or ()
            if row.name in figures or (row.name == "ram_bytes" and row.predicted > _SESSION_BYTES)
        ]
        if ratios:
            say(f"{'':<{width}}  predicted over measured: {', '.join(ratios)}")
    if bench.predicted_from is not None:
        say(f"predicted  {bench.predicted_from}")

"""Printing: text to stderr, documents to stdout."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from pocketvlm.printable import printable

__all__ = [
    "command_line",
    "one_line",
    "print_certificate",
    "print_json",
    "print_latency",
    "print_summary",
    "quiet_libraries",
    "say",
]

_LONGEST_LINE = 1200


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


def print_json(document: Mapping[str, Any]) -> None:
    """Prints one document on one line, in ASCII, which is valid in every terminal's encoding."""
    print(json.dumps(document, allow_nan=False))


def quiet_libraries() -> None:
    """Keeps the libraries' own progress bars and notices off the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def command_line() -> str:
    """The command, quoted for a shell."""
    import shlex

    return shlex.join(["pocketvlm", *sys.argv[1:]])


def print_summary(document: Mapping[str, Any]) -> None:
    """Prints the results of a run: size, answers, certificate and speed."""
    size, quality = document["size"], document["quality"]
    several = len(size["parts"]) > 2  # noqa: PLR2004  (one target, and the processor's files)
    which = "the largest target " if several else ""
    say(
        f"size     {size['bundle_bytes'] / 1e6:.2f} MB, "
        f"{which}{size['bundle_share']:.3f} of the source's weights"
    )
    if quality:
        compressed, plain = quality["compressed"], quality["float"]
        say(
            f"quality  {compressed['accuracy']:.1%} from the bundle, {plain['accuracy']:.1%} float "
            f"(n={quality['n']}, {quality['metric']})"
        )
    say(f"source   {document['source_check']['verdict']}")
    verdict = "passed" if document["parity"]["passed"] else "FAILED"
    say(f"parity   {verdict}")
    if document.get("bench"):
        print_latency(document["bench"])
    for note in document["notes"]:
        say(f"note     {note}")


def print_certificate(document: Mapping[str, Any]) -> None:
    """Prints every check of a certificate, with its bound."""
    for name, target in document["targets"].items():
        say(f"{name}: {target['details']['engine']}")
        for check in target["checks"]:
            verdict = "" if check["passed"] else "FAILED"
            value = "not finite" if check["value"] is None else f"{check['value']:.6g}"
            bounds = [
                f"{word} {check['bound'][key]:g}"
                for key, word in (("at_least", "at least"), ("at_most", "at most"))
                if check["bound"][key] is not None
            ]
            say(f"  {check['metric']:<28} {value:>12}  {' and '.join(bounds):<28} {verdict}")
        details = target["details"]
        say(
            f"  {'greedy tokens':<28} {details['greedy_tokens_equal']:>12}  "
            f"of {details['greedy_tokens_compared']}, near-ties {details['greedy_near_ties']}"
        )


def print_latency(result: Mapping[str, Any]) -> None:
    """Prints medians of a benchmark, and their ratios to the baseline."""
    for target, block in result["latency"].items():
        shown = [
            f"{name} {block[name]['median']:.1f}"
            for name in ("vision_ms", "prefill_ms", "ttft_user_ms", "decode_tok_s")
            if block.get(name) and block[name]["median"] is not None
        ]
        say(f"{target:<8} " + ", ".join(shown))
    ratios = result.get("ratios") or {}
    shown = [
        f"{name} {ratios[name]:.2f} times"
        for name in ("ttft_user_ms", "decode_tok_s")
        if isinstance(ratios.get(name), int | float)
    ]
    if shown:
        say("         " + ", ".join(shown) + " the baseline's")

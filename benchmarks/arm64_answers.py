"""Answers of bundles on emulated ARM64 processors, beside this host's, over many questions.

    python benchmarks/arm64_answers.py runs/a/bundle runs/b/bundle [--cpu cortex-a76] [--n 30]

Each bundle is asked the same questions here and on every processor, each of which chooses other
kernels. Printed is how many answers are the same token for token, and how far logits are apart.
Emulation proves arithmetic; its seconds are there to plan with, and say nothing about a phone.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from pocketvlm.bundle import Bundle
from pocketvlm.context import RunContext
from pocketvlm.emulation.arm64.emulator import DEFAULT_CPU
from pocketvlm.emulation.arm64.prepare import open_emulator
from pocketvlm.pipeline.questions import Questions, choose_samples
from pocketvlm.pipeline.verify import verify_bundle

HEADER = (
    "| bundle | processor | answers equal | tokens equal | near-ties | vision error | logits (dB) "
    "| s |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def compare(path: Path, cpu: str, questions: Questions) -> dict[str, Any]:
    """One line of the table, as values."""
    ctx = RunContext()
    bundle = Bundle.open(path)
    started = time.monotonic()
    found = verify_bundle(
        bundle,
        choose_samples(bundle, questions),
        ctx,
        tokens=questions.tokens,
        emulator=open_emulator(ctx, cpu=cpu, prepare=False),
    )
    (target,) = found.found.targets
    metrics = {check.metric: check.value for check in target.checks}
    return {
        "bundle": str(path),
        "model": bundle.manifest.model,
        "cpu": cpu,
        "passed": target.passed,
        "questions": target.samples,
        "metrics": metrics,
        "details": target.details,
        "machines": found.to_json()["machines"],
        "seconds": time.monotonic() - started,
    }


def line(row: dict[str, Any]) -> str:
    """The line as Markdown."""
    details, metrics = row["details"], row["metrics"]
    cells = (
        row["bundle"],
        row["cpu"],
        f"{details['greedy_answers_equal']} of {row['questions']}",
        f"{details['greedy_tokens_equal']} of {details['greedy_tokens_compared']}",
        details["greedy_near_ties"],
        f"{metrics['vision.relative_error']:.1e}",
        f"{metrics['chain.sqnr_db']:.0f}",
        f"{row['seconds']:.0f}",
    )
    return f"| {' | '.join(map(str, cells))} |" + ("" if row["passed"] else " **FAILED**")


def main() -> None:
    """Prints the table, and all values as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--cpu", action="append")
    parser.add_argument("--n", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--data")
    options = parser.parse_args()
    questions = Questions(data=options.data, n=options.n, tokens=options.tokens)
    print(HEADER, flush=True)
    rows = []
    for path in options.bundles:
        for cpu in options.cpu or [DEFAULT_CPU]:
            rows.append(compare(path, cpu, questions))
            print(line(rows[-1]), flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()

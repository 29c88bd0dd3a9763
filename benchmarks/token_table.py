"""Tables and plots of the rows that `token_reduction.py` has measured.

    python benchmarks/token_table.py --rows rows --plots docs/methods

Prints, for each model: accuracy by method and share with the paired change against all tokens,
times and cache at one share, accuracy by kind of question, and what the best method is worth beside
each baseline. `--plots` writes accuracy against time to first token as MODEL.svg.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from token_plot import draw_plot
from token_rows import ENGINES, Row, read_rows, rows_file, undisturbed

from pocketvlm.evaluation.intervals import compare_paired, wilson_interval
from pocketvlm.reference import REFERENCE_MODELS

BASELINES = ("uniform_stride", "random_tokens", "average_pool", "thumbnail_sampled")


def joined_seeds(rows: Iterable[Row]) -> list[Row]:
    """The rows, those of several random subsets as one: a question's credit is their mean.

    Of a method that was asked twice, the row with more questions counts.
    """
    groups: dict[tuple[str, float], list[Row]] = {}
    longest = {(row.label, row.share): row for row in sorted(rows, key=lambda row: row.n)}
    for row in longest.values():
        label = "random_tokens" if row.label.startswith("random_tokens") else row.label
        groups.setdefault((label, row.share), []).append(row)
    return [
        replace(
            found[0],
            label=label,
            credits=tuple(map(statistics.fmean, zip(*(row.credits for row in found), strict=True))),
            whole_ttft_user_ms=tuple(ms for row in found for ms in row.whole_ttft_user_ms),
            ttft_user_ms=tuple(ms for row in found for ms in row.ttft_user_ms),
        )
        for (label, _), found in groups.items()
    ]


def print_model(rows: list[Row], share: float) -> None:
    """Everything about one model; `share` is that of the tables that show one alone."""
    (whole,) = (row for row in rows if not row.stages)
    low, high = wilson_interval(sum(whole.credits), whole.n)
    shares = sorted({row.share for row in rows if row.share < 1}, reverse=True)
    print(
        f"\n**`{whole.model}`**: all {whole.of} tokens of a tile {_percent(whole)} % "
        f"[{100 * low:.1f}, {100 * high:.1f}], blind "
        f"{100 * (whole.blind or 0):.1f} %, n = {whole.n}\n"
    )
    print(f"| `reducer` | {' | '.join(f'{100 * one:.0f} %' for one in shares)} |")
    print(f"| --- |{' --- |' * len(shares)}")
    for label in dict.fromkeys(row.label for row in rows if row.share < 1):
        cells = [
            next((r for r in rows if (r.label, r.share) == (label, one)), None) for one in shares
        ]
        print(f"| {_name(label)} | {' | '.join(_cell(row, whole) for row in cells)} |")
    alone = [row for row in rows if row.stages and row.share == 1]
    for row in alone:
        print(f"\n{row.label} (`limit_tiles`, all tokens): {_cell(row, whole)}")
    here = [row for row in rows if row.share == share]
    if whole.ttft_user_ms:
        print_times([whole, *alone, *here], share)
    print_kinds([whole, *alone, *here], share)
    for one in shares:
        print_best([row for row in rows if row.share == one], whole)


def print_times(rows: Sequence[Row], share: float) -> None:
    """Undisturbed times, and what the prompt leaves in the cache."""
    heads = ("`ttft_user_ms`", "share of all tokens'", "prefill rows/s", "KV bytes")
    print(f"\n| {100 * share:.0f} % | {' | '.join(heads)} |\n| --- |{' ---: |' * len(heads)}")
    for row in rows:
        rate = row.prompt_rows / undisturbed(row.prefill_ms) * 1e3
        print(
            f"| {_name(row.label)} | {undisturbed(row.ttft_user_ms):.2f} | "
            f"{row.ttft_ratio:.2f} | {rate:,.0f} | {row.cache_bytes:,} |"
        )


def print_kinds(rows: Sequence[Row], share: float) -> None:
    """Accuracy by kind of question."""
    kinds = sorted({kind for kind in rows[0].kinds if kind})
    print(f"\n| {100 * share:.0f} % | {' | '.join(kinds)} |\n| --- |{' ---: |' * len(kinds)}")
    for row in rows:
        pairs = list(zip(row.kinds, row.credits, strict=True))
        shares = (statistics.fmean(c for k, c in pairs if k == kind) for kind in kinds)
        print(f"| {_name(row.label)} | {' | '.join(f'{100 * one:.1f}' for one in shares)} |")


def print_best(rows: Sequence[Row], whole: Row) -> None:
    """The best method of one share, and how far it is from each baseline."""
    methods = [row for row in rows if row.label not in BASELINES]
    if not methods:
        return
    best = max(methods, key=lambda row: row.accuracy)
    against = ", ".join(
        f"{_name(row.label)} {_points(row.credits, best.credits)}"
        for row in rows
        if row.label in BASELINES
    )
    print(
        f"\n{100 * best.share:.0f} %: {_name(best.label)} keeps "
        f"{100 * sum(best.credits) / sum(whole.credits[: best.n]):.1f} % of the accuracy; "
        f"points above {against}"
    )


def _cell(row: Row | None, whole: Row) -> str:
    if row is None:
        return ""
    asked = max(1, round(row.share * row.of))
    at = "" if row.keep == asked else f" at {row.keep}"
    fewer = "" if row.n == whole.n else f", n = {row.n}"
    return f"{_percent(row)} ({_points(whole.credits, row.credits)}){at}{fewer}"


def _percent(row: Row) -> str:
    return f"{100 * row.accuracy:.1f}"


def _points(baseline: Sequence[float], candidate: Sequence[float]) -> str:
    """The difference on the questions that both were asked, the first ones."""
    n = min(len(baseline), len(candidate))
    found = compare_paired(baseline[:n], candidate[:n])
    values = (found.difference, found.interval_low, found.interval_high)
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in values))


def _name(label: str) -> str:
    return label if " " in label else f"`{label}`"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--engine", choices=ENGINES, default="onnx")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.25, help="of the tables of one share")
    parser.add_argument("--plots", type=Path, help="folder of the plots")
    options = parser.parse_args()
    printed = []
    for model in REFERENCE_MODELS:
        rows = joined_seeds(
            read_rows(rows_file(options.rows, model, options.engine), seed=options.seed)
        )
        if not rows:
            continue
        print_model(rows, options.share)
        if options.plots and rows[0].ttft_user_ms:
            (options.plots / f"{model}.svg").write_text(draw_plot(rows, BASELINES))
        printed += rows
    print(json.dumps({"benchmark": "token_reduction", "rows": [asdict(row) for row in printed]}))


if __name__ == "__main__":
    main()

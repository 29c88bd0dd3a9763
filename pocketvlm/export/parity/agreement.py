"""How an artifact's answers agree with what was expected: every metric that needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from pocketvlm.export.parity.artifact_side import GreedyTrace, compare_features, compare_greedy
from pocketvlm.export.parity.metrics import Floats, cosine, relative_error, sqnr_db, total_variation
from pocketvlm.export.parity.recording import Expected, Recording

__all__ = ["argmax_mismatches", "compare", "judge_greedy", "max_error"]

TIE_ERRORS = 6.0
"""Two choices are a near-tie where the reference separates them by at most this many RMS logit
errors: the errors of two logits differ by more in fewer than one case of ten thousand."""


def compare(found: Recording, expected: Expected) -> tuple[dict[str, float], dict[str, object]]:
    """Metrics of everything that was recorded, and what explains them."""
    views = list(map(compare_features, found.features, expected.features))
    first = [logits[0] for logits in expected.logits]
    traces = list(map(compare_greedy, found.answers, expected.logits))
    swap, distances = _swap_images(found, expected, first)
    tie = TIE_ERRORS * _rms_error(found.chain, first)
    mismatch_share, greedy = judge_greedy(traces, tie)
    metrics = {
        "vision.relative_error": max(view.relative_error for view in views),
        "vision.cosine": min(view.cosine for view in views),
        # Without the blank picture, whose tokens may be all alike, so that any of them will do.
        "vision.index_overlap": sum(view.overlap for view in views[:-1]) / (len(views) - 1),
        "embedding.relative_error": relative_error(found.embedding, expected.embedding),
        "chain.sqnr_db": sqnr_db(np.stack(found.chain), np.stack(first)),
        "greedy.mismatch_share": mismatch_share,
        **swap,
        # A second turn on the cache of the first, against the whole conversation run at once.
        "two_turns.sqnr_db": min(map(sqnr_db, found.in_two, found.at_once)),
        "two_turns.reference_sqnr_db": min(map(sqnr_db, found.in_two, expected.at_once)),
    }
    details: dict[str, object] = {
        "chain_max_abs_logit": max_error(found.chain, first),
        "near_tie_margin_logit": tie,
        **greedy,
        **distances,
    }
    return metrics, details


def judge_greedy(traces: Sequence[GreedyTrace], tie: float) -> tuple[float, dict[str, object]]:
    """The share of tokens that differ, near-ties left out, and how many were compared.

    Args:
        traces: Answers beside what was expected, at least one.
        tie: The margin up to which choices nearly tie, in logits.
    """
    parted = [trace for trace in traces if trace.margin is not None]
    mismatches = [trace for trace in parted if not _is_near_tie(trace, tie)]
    compared = sum(trace.compared for trace in traces)
    return len(mismatches) / compared, {
        "greedy_tokens_compared": compared,
        "greedy_tokens_equal": sum(trace.equal for trace in traces),
        "greedy_answers_equal": len(traces) - len(parted),
        "greedy_near_ties": len(parted) - len(mismatches),
        "greedy_mismatches": [asdict(trace) for trace in mismatches],
    }


def _rms_error(found: Sequence[Floats], expected: Sequence[Floats]) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.stack(found).astype(np.float64) - np.stack(expected)
        return float(np.sqrt(np.mean(gaps**2)))


def max_error(found: Sequence[Floats], expected: Sequence[Floats]) -> float:
    """The largest distance of any logit."""
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.abs(np.stack(found) - np.stack(expected)).max())


def argmax_mismatches(found: Sequence[Floats], expected: Sequence[Floats]) -> int:
    """Prompts whose first token differs, near-ties left out."""
    tie = TIE_ERRORS * _rms_error(found, expected)
    return sum(
        not float(ours.max() - ours[int(theirs.argmax())]) <= tie
        for theirs, ours in zip(found, expected, strict=True)
    )


def _is_near_tie(trace: GreedyTrace, tie: float) -> bool:
    return trace.margin is not None and trace.margin <= tie


def _swap_images(
    found: Recording, expected: Expected, first: Sequence[Floats]
) -> tuple[dict[str, float], dict[str, object]]:
    """Every question about another picture, and about none: a blank one.

    How the logits change is compared with how the other side's change: an artifact that ignores
    its picture changes by nothing, one that confuses pictures changes in another direction.
    """
    before = np.stack([first[number] for number in found.swapped_of])
    seen = [found.chain[number] for number in found.swapped_of]
    change = before - np.stack(expected.swapped)
    with np.errstate(invalid="ignore", over="ignore"):
        own = np.stack(seen) - np.stack(found.swapped)
    size = _norm(change)
    metrics = {
        "image_swap.reference_change": size / _norm(before),
        "image_swap.change_ratio": _norm(own) / size if size else 0.0,
        "image_swap.change_cosine": cosine(own, change),
    }
    distances = list(map(total_variation, found.swapped, seen))
    return metrics, {"image_swap_mean_total_variation": float(np.mean(distances))}


def _norm(values: Floats) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.linalg.norm(values.astype(np.float64)))

"""The parity certificate: whether an artifact answers like the checkpoint that was evaluated.

The reference is the reduced and quantized checkpoint in torch, not the float model: what
compression costs is the business of evaluation, what export breaks is the business of this page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from pocketvlm.bundle import Bundle, Component
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError
from pocketvlm.export.parity.certificate import ParityReport, Precision, TargetParity, judge
from pocketvlm.export.parity.metrics import Floats, cosine, relative_error, sqnr_db, total_variation
from pocketvlm.export.parity.prompts import Questions, read_questions
from pocketvlm.export.parity.sides import (
    ArtifactSide,
    CheckpointSide,
    GreedyTrace,
    compare_features,
    compare_greedy,
)
from pocketvlm.machine import describe_processor
from pocketvlm.runtime.engines import ENGINES, Engine

if TYPE_CHECKING:
    from pocketvlm.calibration.source import Sample

__all__ = ["ParityReport", "certify"]

TIE_ERRORS = 6.0
"""Two choices are a near-tie where the reference separates them by at most this many RMS logit
errors: the errors of two logits differ by more in fewer than one case of ten thousand."""


def certify(
    checkpoint: Checkpoint,
    bundle: Bundle,
    samples: Iterable[Sample],
    *,
    tokens: int = 16,
    engines: Mapping[str, Engine] = ENGINES,
    ctx: RunContext | None = None,
) -> ParityReport:
    """Runs every target of a bundle beside the checkpoint and judges what it finds.

    Args:
        checkpoint: What was evaluated.
        bundle: What was exported from it.
        samples: Questions about pictures; four to eight are enough. Those without a picture are
            left out.
        tokens: Longest greedy answer that is compared.
        engines: The engine for each target. Core ML packages are computed by the reference
            evaluator, which is not Core ML; `pocketvlm verify-coreml` asks Core ML itself.
        ctx: Threads, and whom to tell about progress.

    Raises:
        CalibrationError: No sample has a picture.
        BundleError: A target cannot be loaded.
    """
    context = ctx or RunContext()
    pictured = [sample for sample in samples if sample.images]
    if not pictured:
        raise CalibrationError("the parity certificate needs a question about a picture")
    inputs, questions = read_questions(checkpoint, bundle, pictured)
    context.report("parity", 0, 1, "torch")
    reference = CheckpointSide(checkpoint, questions.pictures)
    names = list(dict.fromkeys(component.target for component in bundle.manifest.components))
    reached: list[TargetParity] = []
    unverified: dict[str, str] = {}
    for name in names:
        if name not in engines:
            unverified[name] = "no engine on this host runs it"
            continue
        # Room for the longest question there may be: rows that are not used cost no memory.
        rows = bundle.manifest.generation.max_positions
        runner = engines[name](bundle, context.threads, rows)
        metrics, details = _measure(
            reference,
            ArtifactSide(runner, bundle, questions.pictures),
            questions,
            tokens=tokens,
            eos_token_ids=checkpoint.processor.eos_token_ids,
            report=partial(_report, context, name),
        )
        precision = _precision(bundle.manifest.components, name)
        reached.append(
            TargetParity(
                target=name,
                precision=precision,
                samples=len(questions.prompts),
                checks=judge({**inputs, **metrics}, precision),
                details=details,
            )
        )
    context.report("parity", 1, 1, f"{len(reached)} certified")
    return ParityReport(targets=tuple(reached), unverified=unverified, host=describe_processor())


def _report(ctx: RunContext, target: str, done: int, note: str) -> None:
    ctx.report(f"parity {target}", done, 5, note)


def _precision(components: Sequence[Component], target: str) -> Precision:
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


def _measure(
    reference: CheckpointSide,
    artifact: ArtifactSide,
    questions: Questions,
    *,
    tokens: int,
    eos_token_ids: Sequence[int],
    report: Callable[[int, str], None],
) -> tuple[dict[str, float], dict[str, object]]:
    """Every metric of the table but those of the inputs, and what explains them."""
    views = list(map(compare_features, artifact.features, reference.features))
    # Every token of the prompts once, the image's placeholder among them.
    ids = list(dict.fromkeys(token for p in questions.prompts for token in p.token_ids))
    embedding = relative_error(artifact.runner.embed(ids).copy(), reference.embed(ids))
    report(1, "greedy")
    rows = [reference.rows(prompt) for prompt in questions.prompts]
    own = [artifact.rows(prompt) for prompt in questions.prompts]
    answers = [artifact.generate(r, tokens=tokens, eos_token_ids=eos_token_ids) for r in own]
    along = reference.along(rows, [answer[:-1] for answer in answers])
    traces = list(map(compare_greedy, answers, along))
    report(2, "prefill")
    expected = [logits[0] for logits in along]
    prefill = [artifact.answer(row) for row in rows]
    chain = [artifact.answer(row) for row in own]
    report(3, "image swap")
    swap, distances = _swap_images(reference, artifact, questions, expected, chain)
    report(4, "two turns")
    turns = _take_two_turns(reference, artifact, questions)
    report(5, "done")
    tie = TIE_ERRORS * _rms_error(chain, expected)
    parted = [trace for trace in traces if trace.margin is not None]
    mismatches = [trace for trace in parted if not _is_near_tie(trace, tie)]
    compared = sum(trace.compared for trace in traces)
    metrics = {
        "vision.relative_error": max(view.relative_error for view in views),
        "vision.cosine": min(view.cosine for view in views),
        "vision.index_overlap": sum(view.overlap for view in views) / len(views),
        "embedding.relative_error": embedding,
        "prefill.sqnr_db": min(map(sqnr_db, prefill, expected)),
        "prefill.argmax_mismatches": float(_argmax_mismatches(prefill, expected)),
        "chain.sqnr_db": sqnr_db(np.stack(chain), np.stack(expected)),
        "greedy.mismatch_share": len(mismatches) / compared,
        **swap,
        **turns,
    }
    details: dict[str, object] = {
        "engine": artifact.runner.engine,
        "prefill_max_abs_logit": _max_error(prefill, expected),
        "chain_max_abs_logit": _max_error(chain, expected),
        "near_tie_margin_logit": tie,
        "greedy_tokens_compared": compared,
        "greedy_tokens_equal": sum(trace.equal for trace in traces),
        "greedy_near_ties": len(parted) - len(mismatches),
        "greedy_mismatches": [asdict(trace) for trace in mismatches],
        **distances,
    }
    return metrics, details


def _rms_error(found: Sequence[Floats], expected: Sequence[Floats]) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.stack(found).astype(np.float64) - np.stack(expected)
        return float(np.sqrt(np.mean(gaps**2)))


def _max_error(found: Sequence[Floats], expected: Sequence[Floats]) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.abs(np.stack(found) - np.stack(expected)).max())


def _argmax_mismatches(found: Sequence[Floats], expected: Sequence[Floats]) -> int:
    """Prompts whose first token differs, near-ties left out."""
    tie = TIE_ERRORS * _rms_error(found, expected)
    return sum(
        not float(ours.max() - ours[int(theirs.argmax())]) <= tie
        for theirs, ours in zip(found, expected, strict=True)
    )


def _is_near_tie(trace: GreedyTrace, tie: float) -> bool:
    return trace.margin is not None and trace.margin <= tie


def _swap_images(
    reference: CheckpointSide,
    artifact: ArtifactSide,
    questions: Questions,
    expected: Sequence[Floats],
    chain: Sequence[Floats],
) -> tuple[dict[str, float], dict[str, object]]:
    """Asks every question about another picture, and about none: a blank one.

    How the logits change is compared with how the checkpoint's change: an artifact that ignores
    its picture changes by nothing, one that confuses pictures changes in another direction.
    """
    swapped = questions.swapped()
    others = reference.answers([reference.rows(prompt) for _, prompt in swapped])
    candidates = [artifact.answer(artifact.rows(prompt)) for _, prompt in swapped]
    before = np.stack([expected[number] for number, _ in swapped])
    seen = np.stack([chain[number] for number, _ in swapped])
    change = before - np.stack(others)
    with np.errstate(invalid="ignore", over="ignore"):
        found = seen - np.stack(candidates)
    size = _norm(change)
    metrics = {
        "image_swap.reference_change": size / _norm(before),
        "image_swap.change_ratio": _norm(found) / size if size else 0.0,
        "image_swap.change_cosine": cosine(found, change),
    }
    distances = list(map(total_variation, candidates, seen))
    return metrics, {"image_swap_mean_total_variation": float(np.mean(distances))}


def _norm(values: Floats) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.linalg.norm(values.astype(np.float64)))


def _take_two_turns(
    reference: CheckpointSide, artifact: ArtifactSide, questions: Questions
) -> dict[str, float]:
    """A second turn on the cache of the first, against the whole conversation run at once."""
    rows = [artifact.rows(prompt) for prompt in questions.follow_ups]
    at_once = [artifact.answer(row) for row in rows]
    # Any border between the turns will do: a cache knows rows, not turns.
    in_two = [artifact.answer_in_turns(row, row.embeds.shape[1] * 2 // 3) for row in rows]
    expected = reference.answers([reference.rows(prompt) for prompt in questions.follow_ups])
    return {
        "two_turns.sqnr_db": min(map(sqnr_db, in_two, at_once)),
        "two_turns.reference_sqnr_db": min(map(sqnr_db, in_two, expected)),
    }

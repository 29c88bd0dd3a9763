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
from pocketvlm.export.agreement import (
    GreedyTrace,
    Prompt,
    Rows,
    Side,
    artifact_side,
    compare_greedy,
    compare_vision,
    in_turns,
    reference_side,
)
from pocketvlm.export.certificate import ParityReport, Precision, TargetParity, judge
from pocketvlm.export.closeness import Floats, cosine, relative_error, sqnr_db, total_variation
from pocketvlm.processor import user_message
from pocketvlm.runtime.onnx_runner import OnnxRunner
from pocketvlm.runtime.preprocess import ImagePreprocessor
from pocketvlm.runtime.runner import Runner
from pocketvlm.runtime.text import TextCodec
from pocketvlm.weights import cache_dense_weights

if TYPE_CHECKING:
    from pocketvlm.calibration.source import Sample

__all__ = ["RUNNERS", "ParityReport", "RunnerFactory", "certify"]

RunnerFactory = Callable[[Bundle, RunContext], Runner]


def _onnx_runner(bundle: Bundle, ctx: RunContext) -> Runner:
    return OnnxRunner(bundle, threads=ctx.threads)


RUNNERS: Mapping[str, RunnerFactory] = {"onnx": _onnx_runner}
"""The engines of this host, by target."""

TIE_ERRORS = 6.0
"""Two choices are a near-tie where the reference separates them by at most so many RMS logit
errors: the errors of two logits differ by more in fewer than one case of ten thousand."""

_SECOND_QUESTION = "what else?"


def certify(
    checkpoint: Checkpoint,
    bundle: Bundle,
    samples: Iterable[Sample],
    *,
    tokens: int = 16,
    runners: Mapping[str, RunnerFactory] = RUNNERS,
    ctx: RunContext | None = None,
) -> ParityReport:
    """Runs every target of a bundle beside the checkpoint and judges what it finds.

    Args:
        checkpoint: What was evaluated.
        bundle: What was exported from it.
        samples: Questions about pictures; four to eight are enough. Those without a picture are
            left out.
        tokens: Longest greedy answer that is compared.
        runners: The engine for each target.
        ctx: Threads, and whom to tell about progress.

    Raises:
        CalibrationError: No sample has a picture.
        BundleError: A target cannot be loaded.
    """
    context = ctx or RunContext()
    pictured = [sample for sample in samples if sample.image is not None]
    if not pictured:
        raise CalibrationError("the parity certificate needs a question about a picture")
    inputs, prompts, follow_ups = _read_inputs(checkpoint, bundle, pictured)
    names = list(dict.fromkeys(component.target for component in bundle.manifest.components))
    reached: list[TargetParity] = []
    unverified: dict[str, str] = {}
    with cache_dense_weights(checkpoint.model):
        reference = reference_side(checkpoint)
        for name in names:
            if name not in runners:
                unverified[name] = "no engine on this host runs it"
                continue
            artifact = artifact_side(runners[name](bundle, context), bundle.manifest)
            metrics, details = _measure(
                reference,
                artifact,
                prompts,
                follow_ups,
                tokens=tokens,
                eos_token_ids=checkpoint.processor.eos_token_ids,
                report=partial(_report, context, name),
            )
            precision = _precision(bundle.manifest.components, name)
            reached.append(
                TargetParity(
                    target=name,
                    precision=precision,
                    samples=len(prompts),
                    checks=judge({**inputs, **metrics}, precision),
                    details=details,
                )
            )
    return ParityReport(targets=tuple(reached), unverified=unverified)


def _report(ctx: RunContext, target: str, done: int, note: str) -> None:
    ctx.report(f"parity {target}", done, 6, note)


def _precision(components: Sequence[Component], target: str) -> Precision:
    labels = [
        label
        for component in components
        if component.target == target
        for label in component.precision.values()
    ]
    return "integer" if any("int" in label for label in labels) else "float32"


def _read_inputs(
    checkpoint: Checkpoint, bundle: Bundle, samples: Sequence[Sample]
) -> tuple[dict[str, float], list[Prompt], list[Prompt]]:
    """Pixels and prompts of the checkpoint, and how far the bundle's own differ from them."""
    processor = checkpoint.processor
    codec, preprocessor = TextCodec.from_bundle(bundle), ImagePreprocessor.from_bundle(bundle)
    prompts: list[Prompt] = []
    follow_ups: list[Prompt] = []
    farthest, equal = 0.0, 0
    for sample in samples:
        image = sample.open_image()
        pixels: Floats = processor.pixels([image]).numpy()
        found = preprocessor.pixels(image)
        same_shape = found.shape == pixels.shape
        farthest = max(farthest, float(np.abs(found - pixels).max()) if same_shape else np.inf)
        messages = [user_message(sample.question)]
        ids = processor.encode(messages)
        equal += codec.encode(messages) == ids
        prompts.append(Prompt(token_ids=tuple(ids), pixels=pixels))
        answered = {"role": "assistant", "content": [{"type": "text", "text": sample.answer}]}
        again = [*messages, answered, user_message(_SECOND_QUESTION, images=0)]
        follow_ups.append(Prompt(token_ids=tuple(processor.encode(again)), pixels=pixels))
    metrics = {
        "input.pixels_max_abs": farthest,
        "input.prompts_equal": equal / len(prompts),
    }
    return metrics, prompts, follow_ups


def _measure(
    reference: Side,
    artifact: Side,
    prompts: Sequence[Prompt],
    follow_ups: Sequence[Prompt],
    *,
    tokens: int,
    eos_token_ids: Sequence[int],
    report: Callable[[int, str], None],
) -> tuple[dict[str, float], dict[str, object]]:
    """Every metric of the table but those of the inputs, and what explains them."""
    report(0, "vision")
    views = [compare_vision(reference, artifact, prompt.pixels) for prompt in prompts]
    report(1, "embedding")
    embedding = max(
        relative_error(artifact.runner.embed(ids).copy(), reference.runner.embed(ids))
        for ids in (_text_ids(prompt) for prompt in prompts)
    )
    report(2, "prefill")
    rows = [reference.lay_out(prompt) for prompt in prompts]
    expected = [reference.answer(row) for row in rows]
    prefill = [artifact.answer(row) for row in rows]
    chain = [artifact.answer(artifact.lay_out(prompt)) for prompt in prompts]
    report(3, "greedy")
    traces = [
        compare_greedy(reference, artifact, prompt, tokens=tokens, eos_token_ids=eos_token_ids)
        for prompt in prompts
    ]
    report(4, "image swap")
    swap, distances = _swap_images(reference, artifact, prompts, expected, chain)
    report(5, "two turns")
    turns = _take_two_turns(reference, artifact, follow_ups, rows)
    report(6, "done")
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


def _text_ids(prompt: Prompt) -> tuple[int, ...]:
    """Every token of a prompt once, the image's placeholder among them."""
    return tuple(dict.fromkeys(prompt.token_ids))


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
    reference: Side,
    artifact: Side,
    prompts: Sequence[Prompt],
    expected: Sequence[Floats],
    chain: Sequence[Floats],
) -> tuple[dict[str, float], dict[str, object]]:
    """Asks every question about another picture, and about none: a blank one.

    How the logits change is compared with how the reference's change: an artifact that ignores
    its picture changes by nothing, one that confuses pictures changes in another direction.
    """
    ours: list[Floats] = []
    theirs: list[Floats] = []
    distances: list[float] = []
    for number, prompt in enumerate(prompts):
        other = prompts[(number + 1) % len(prompts)].pixels
        for pixels in (other, np.zeros_like(other)):
            swapped = Prompt(token_ids=prompt.token_ids, pixels=pixels)
            ours.append(expected[number] - reference.answer(reference.lay_out(swapped)))
            candidate = artifact.answer(artifact.lay_out(swapped))
            with np.errstate(invalid="ignore", over="ignore"):
                theirs.append(chain[number] - candidate)
            distances.append(total_variation(candidate, chain[number]))
    change, found = np.stack(ours), np.stack(theirs)
    size = _norm(change)
    metrics = {
        "image_swap.reference_change": size / _norm(np.stack(expected)),
        "image_swap.change_ratio": _norm(found) / size if size else 0.0,
        "image_swap.change_cosine": cosine(found, change),
    }
    return metrics, {"image_swap_mean_total_variation": float(np.mean(distances))}


def _norm(values: Floats) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.linalg.norm(values.astype(np.float64)))


def _take_two_turns(
    reference: Side,
    artifact: Side,
    follow_ups: Sequence[Prompt],
    first_turns: Sequence[Rows],
) -> dict[str, float]:
    """A second turn on the cache of the first, against the whole conversation run at once."""
    kept: list[float] = []
    right: list[float] = []
    for prompt, first in zip(follow_ups, first_turns, strict=True):
        rows = artifact.lay_out(prompt)
        at_once = artifact.answer(rows)
        turn = min(first.embeds.shape[1], rows.embeds.shape[1] - 3)
        in_two = in_turns(artifact, rows, turn)
        kept.append(sqnr_db(in_two, at_once))
        right.append(sqnr_db(in_two, reference.answer(reference.lay_out(prompt))))
    return {"two_turns.sqnr_db": min(kept), "two_turns.reference_sqnr_db": min(right)}

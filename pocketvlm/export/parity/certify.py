"""The parity certificate: whether an artifact answers like the checkpoint that was evaluated.

The reference is the reduced and quantized checkpoint in torch, not the float model: what
compression costs is the business of evaluation, what export breaks is the business of this page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pocketvlm.bundle import Bundle
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.errors import BundleError, CalibrationError
from pocketvlm.export.parity.agreement import argmax_mismatches, compare, max_error
from pocketvlm.export.parity.artifact_side import ArtifactSide, turn_border
from pocketvlm.export.parity.certificate import ParityReport, TargetParity, judge, precision_of
from pocketvlm.export.parity.checkpoint_side import CheckpointSide
from pocketvlm.export.parity.metrics import sqnr_db
from pocketvlm.export.parity.prompts import read_questions
from pocketvlm.export.parity.questions import Questions
from pocketvlm.export.parity.recording import Expected, record
from pocketvlm.machine import describe_processor
from pocketvlm.runtime.engines import ENGINES, Engine

if TYPE_CHECKING:
    from pocketvlm.calibration.source import Sample

__all__ = ["ParityReport", "certify"]


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

    Where there are several vision graphs, each of them is asked all questions; in place of the
    first, those that a tile budget chooses.

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
        BundleError: A target cannot be loaded, or the bundle has other vision graphs.
    """
    context = ctx or RunContext()
    pictured = [sample for sample in samples if sample.images]
    if not pictured:
        raise CalibrationError("the parity certificate needs a question about a picture")
    names = list(dict.fromkeys(component.target for component in bundle.manifest.components))
    visions = [*checkpoint.each_vision()], [*bundle.each_vision()]
    if len(visions[0]) != len(visions[1]):
        raise BundleError(
            f"{bundle.path}: has {len(visions[1])} vision graphs, and the checkpoint "
            f"{len(visions[0])}: it was made of another one"
        )
    if checkpoint.tile_budget is not None:
        visions[0][0], visions[1][0] = checkpoint, bundle
    reached = [
        parity
        for number, (seen, own) in enumerate(zip(*visions, strict=True))
        for parity in _certify_vision(
            seen,
            own,
            pictured,
            variant=own.manifest.variants[0].name if number else None,
            tokens=tokens,
            engines=engines,
            ctx=context,
        )
    ]
    context.report("parity", 1, 1, f"{len(reached)} certified")
    return ParityReport(
        targets=tuple(reached),
        unverified={
            name: "no engine on this host runs it" for name in names if name not in engines
        },
        host=describe_processor(),
    )


def _certify_vision(
    checkpoint: Checkpoint,
    bundle: Bundle,
    samples: Sequence[Sample],
    *,
    variant: str | None,
    tokens: int,
    engines: Mapping[str, Engine],
    ctx: RunContext,
) -> Iterator[TargetParity]:
    """The certificates of all targets with one vision graph, the only one of both sides."""
    inputs, questions = read_questions(checkpoint, bundle, samples)
    ctx.report("parity", 0, 1, "torch" if variant is None else f"torch {variant}")
    reference = CheckpointSide(checkpoint, questions.pictures)
    for name in dict.fromkeys(component.target for component in bundle.manifest.components):
        if name not in engines:
            continue
        # Room for the longest question there may be: rows that are not used cost no memory.
        rows = bundle.manifest.generation.max_positions
        runner = engines[name](bundle, ctx.threads, rows)
        metrics, details = _measure(
            reference,
            ArtifactSide(runner, bundle, questions.pictures),
            questions,
            tokens=tokens,
            eos_token_ids=checkpoint.processor.eos_token_ids,
            report=partial(_report, ctx, name),
        )
        precision = precision_of(bundle.manifest.components, name)
        yield TargetParity(
            target=name,
            variant=variant,
            precision=precision,
            samples=len(questions.prompts),
            checks=judge({**inputs, **metrics}, precision),
            details={**details, "questions": [sample.digest().hex() for sample in samples]},
        )


def _report(ctx: RunContext, target: str, done: int, note: str) -> None:
    ctx.report(f"parity {target}", done, 5, note)


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
    found = record(artifact, questions, tokens=tokens, eos_token_ids=eos_token_ids, report=report)
    rows = [reference.rows(prompt) for prompt in questions.prompts]
    swapped = [reference.rows(prompt) for _, prompt in questions.swapped()]
    follow_ups = [reference.rows(prompt) for prompt in questions.follow_ups]
    expected = Expected(
        features=reference.features,
        embedding=reference.embed(questions.token_ids()),
        logits=reference.along(rows, [answer[:-1] for answer in found.answers]),
        swapped=reference.answers(swapped),
        at_once=reference.answers(follow_ups, [turn_border(row) for row in follow_ups]),
    )
    report(4, "prefill")
    first = [logits[0] for logits in expected.logits]
    prefill = [artifact.answer(row) for row in rows]
    report(5, "done")
    metrics, details = compare(found, expected)
    decoder = {
        "prefill.sqnr_db": min(map(sqnr_db, prefill, first)),
        "prefill.argmax_mismatches": float(argmax_mismatches(prefill, first)),
    }
    explained: dict[str, object] = {
        "engine": artifact.runner.engine,
        "prefill_max_abs_logit": max_error(prefill, first),
        "answers": [list(answer) for answer in found.answers],
        **details,
    }
    return {**metrics, **decoder}, explained

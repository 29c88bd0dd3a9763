"""Distill: a compressed model learns its float teacher's answers back, and keeps its zeros.

Logit and feature distillation on pictures and questions with masked low-rank updates (SparseLoRA of
RESSA, He et al., arXiv 2404.02424). What differs: RESSA tunes the language model on labels and the
teacher's logits; here tower, projector and decoder learn together, visual tokens are compared too,
states before the head stand for the logits, and the state that held-out samples like best is
kept, the one before the first step included.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

from pocketvlm.calibration.data.prompts import Prompt, encode_samples
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.calibration.walk.activations import ActivationStore
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.distillation.objective import (
    LossWeights,
    Objective,
    fresh_visual,
    stored_visual,
)
from pocketvlm.compress.distillation.student import Student
from pocketvlm.compress.distillation.teacher import TeacherTargets, record_targets
from pocketvlm.compress.distillation.training import Schedule, Training, train
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError, RecipeError
from pocketvlm.stages import Stage, StageResult
from pocketvlm.stages.walk_options import note_synthetic
from pocketvlm.weights.modules import cache_dense_weights

__all__ = ["Distill", "TrainedPart"]

TrainedPart = Literal["tower", "projector", "decoder"]

_PARTS: tuple[TrainedPart, ...] = get_args(TrainedPart)
# Tokens, of tower and decoder, that run through the model together with their graph.
_PASS_TOKENS = 3072


@dataclass(frozen=True, kw_only=True)
class Distill(Stage):
    """Recovers a pruned or reduced model by a short distillation from its float source.

    Attributes:
        parts: Parts whose layers are trained.
        rank: Of the layers' updates; `None` trains whole matrices.
        vectors: Whether norms and biases are trained too.
        steps: Steps of the optimizer.
        batch_size: Samples per step.
        rate: Largest learning rate of the updates.
        vector_rate: Largest learning rate of norms and biases.
        warmup: Share of the steps in which rates rise; from there they fall as a cosine does.
        weight_decay: Pulls the updates back to the weights that training began with.
        clip_norm: Longest gradient.
        temperature: Of both models' logits.
        answers: Share of the answers' own cross-entropy in the loss.
        features: Weight of visual tokens' and states' relative squared distance to the teacher's.
        held_out: Share of the samples, from the end, that only judge.
        check_every: Steps between two looks at them; an interrupted run resumes at the last.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"float_weights"})
    forbids: ClassVar[frozenset[str]] = frozenset({"quantized_weights", "quantized_cache"})

    holds_model: ClassVar[bool] = True

    method: Literal["distill"] = "distill"
    parts: tuple[TrainedPart, ...] = _PARTS
    rank: int | None = 16
    vectors: bool = True
    steps: int = 300
    batch_size: int = 16
    rate: float = 6e-3
    vector_rate: float = 5e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    temperature: float = 1.0
    answers: float = 0.1
    features: float = 1.0
    held_out: float = 0.0625
    check_every: int = 50

    def __post_init__(self) -> None:
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ValueError(f"parts must name each of {', '.join(_PARTS)} at most once, and one")
        for part in self.parts:
            if part not in _PARTS:
                raise ValueError(f"part {part!r} is unknown; allowed are {', '.join(_PARTS)}")
        for name in ("steps", "batch_size", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(
                f"rank must be at least 1, or null for whole matrices, not {self.rank}"
            )
        for name in ("rate", "vector_rate", "clip_norm", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("weight_decay", "features"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        for name, most in (("answers", 1.0), ("warmup", 1.0), ("held_out", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must lie between 0 and {most}, not {getattr(self, name)}")

    @property
    def uses_device(self) -> bool:
        """All of it; the device holds both models, one after the other, and what is trained."""
        return True

    @property
    def shares_work(self) -> bool:
        """Gradients of a step are those of the samples of all processes."""
        return True

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Trains the checkpoint in place.

        Raises:
            RecipeError: The float model is not known or another one, or a layer is quantized.
            CalibrationError: A sample cannot be used or has no answer, there are fewer than two,
                or a loss is not finite.
        """
        prompts = encode_samples(checkpoint.processor, calibration)
        first_held_out = self._first_held_out(len(prompts))
        student = Student(
            checkpoint,
            parts=self.parts,
            rank=self.rank,
            trains_vectors=self.vectors,
            seed=ctx.seed,
        )
        with ExitStack() as stack:
            targets = stack.enter_context(self._targets(checkpoint, prompts, calibration, ctx))
            stack.enter_context(cache_dense_weights(targets.head))
            visual = fresh_visual(checkpoint, calibration)
            if self.parts == ("decoder",):
                store = stack.enter_context(
                    ActivationStore(ctx.scratch_dir, device=checkpoint.device)
                )
                on_step = partial(ctx.report, f"{self.method}: visual tokens")
                visual = stored_visual(visual, prompts, store, on_step)
            objective = Objective(
                checkpoint=checkpoint,
                prompts=prompts,
                visual=visual,
                targets=targets,
                weights=LossWeights(
                    temperature=self.temperature, answers=self.answers, features=self.features
                ),
            )
            training = train(
                student,
                objective,
                self._schedule(checkpoint, prompts, ctx),
                fitted=range(first_held_out),
                judging=range(first_held_out, len(prompts)),
                folder=ctx.scratch_dir,
                on_step=lambda step, note: ctx.report(self.method, step, self.steps, note),
                ranks=ctx.ranks,
            )
        rows = student.merge() if training.best.step else []
        return StageResult(
            checkpoint=checkpoint,
            layers=tuple(rows),
            metrics=self._metrics(training, student, calibration, len(prompts) - first_held_out),
            notes=_notes(training, targets, calibration),
        )

    def _first_held_out(self, count: int) -> int:
        if count < 2:  # noqa: PLR2004  (one to learn from, one to judge)
            raise CalibrationError(
                f"distill: {count} sample is too few; one to learn from and one to judge are needed"
            )
        return count - min(max(1, math.ceil(count * self.held_out)), count - 1)

    def _targets(
        self,
        checkpoint: Checkpoint,
        prompts: tuple[Prompt, ...],
        calibration: CalibrationSet,
        ctx: RunContext,
    ) -> TeacherTargets:
        if ctx.source_dir is None:
            raise RecipeError(
                "distill: the float model to learn from is not known; run the stage by a recipe, "
                "or give its directory as RunContext(source_dir=...)"
            )
        return record_targets(
            Checkpoint.load(ctx.source_dir),
            checkpoint,
            prompts,
            calibration,
            spill_folder=ctx.scratch_dir,
            on_step=partial(ctx.report, f"{self.method}: teacher"),
        )

    def _schedule(
        self, checkpoint: Checkpoint, prompts: tuple[Prompt, ...], ctx: RunContext
    ) -> Schedule:
        tower = checkpoint.spec.tower
        per_sample = max(len(prompt.token_ids) for prompt in prompts)
        if self.parts != ("decoder",):
            per_sample += tower.patches
        return Schedule(
            steps=self.steps,
            batch_size=self.batch_size,
            pass_size=max(1, _PASS_TOKENS // per_sample),
            rate=self.rate,
            vector_rate=self.vector_rate,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            check_every=self.check_every,
            seed=ctx.seed,
        )

    def _metrics(
        self, training: Training, student: Student, calibration: CalibrationSet, judging: int
    ) -> dict[str, Any]:
        return {
            "before": asdict(training.checks[0].figures),
            "after": asdict(training.best.figures),
            "best_step": training.best.step,
            "checks": [{"step": check.step, **asdict(check.figures)} for check in training.checks],
            "trained_parameters": sum(v.numel() for v in student.parameters().values()),
            "calibration": {**calibration.describe(), "held_out_samples": judging},
        }


def _notes(
    training: Training, targets: TeacherTargets, calibration: CalibrationSet
) -> tuple[str, ...]:
    notes = [*targets.reasons, *note_synthetic(calibration, done="distilled")]
    if not training.best.step:
        notes.append(
            "distill changed nothing: on held-out samples no state was better than the one before "
            "the first step"
        )
    return tuple(notes)

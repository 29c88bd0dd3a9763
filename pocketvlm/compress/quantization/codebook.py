"""Look-up tables and vector codebooks with error feedback, fitted to images and text.

VPTQ (Liu et al., arXiv 2409.17066) on the walk that every calibrated quantizer shares; with vectors
of one element, data-driven look-up tables. Small layers share codebooks, which are fitted to all of
them before the walk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.blocks import FinishedHalf, SharedInput
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.quantization.calibrated import CalibratedQuantizer, StepFitter
from pocketvlm.compress.quantization.codebook_fit import CodebookFitter, row_scales_of
from pocketvlm.compress.quantization.codebook_rules import CodebookRule
from pocketvlm.compress.quantization.codebook_tuning import tune_codebooks
from pocketvlm.compress.quantization.kmeans import cluster, sample_rows
from pocketvlm.compress.quantization.layers import FinishedLayer
from pocketvlm.compress.quantization.rules import Assignment, assign_rules_to
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.modelspec import LinearSpec, ModelSpec
from pocketvlm.planned import PlannedForm
from pocketvlm.weights import CodebookWeight, KeptIndices, SparseWeight, WeightForm, keeps_of

__all__ = ["Codebook", "CodebookRule", "share_codebooks"]

_SHARED_SAMPLE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Codebook(CalibratedQuantizer[CodebookRule]):
    """Quantizes to look-up tables and vector codebooks, calibrated on images and text.

    Attributes:
        rules: Indices and vectors; the first rule that matches a layer wins.
        error_feedback: Whether columns make up for each other's errors; without it, tables come
            from weighted k-means alone.
        rounds: Times that codes are chosen; tables are refined behind each.
        tune_steps: Steps of gradient descent on a finished half block's output, which train
            tables and row scales; 0 leaves them as they are and spares a second forward pass.
        tune_rate: Their rate, in units of each table's root mean square.
    """

    method: Literal["codebook"] = "codebook"
    rules: tuple[CodebookRule, ...]
    error_feedback: bool = True
    rounds: int = 3
    tune_steps: int = 0
    tune_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, not {self.rounds}")
        if self.tune_steps < 0:
            raise ValueError(f"tune_steps must be at least 0, not {self.tune_steps}")
        if not 0 < self.tune_rate <= 1:
            raise ValueError(f"tune_rate must lie above 0 and at most at 1, not {self.tune_rate}")

    @property
    def carries_float(self) -> bool:
        """Whether the float model has to run along."""
        return self.tune_steps > 0 or self.drift_share > 0

    def plan_forms(self, spec: ModelSpec) -> Mapping[LinearSpec, PlannedForm | None]:
        """What every layer will be stored as; shared codebooks belong to their first layer."""
        owners: set[tuple[CodebookRule, str]] = set()
        planned: dict[LinearSpec, PlannedForm | None] = {}
        for item in assign_rules_to(self.rules, spec.linears()):
            form = None if item.rule is None else item.rule.plan(item.linear)
            if form is not None and form.is_shared and item.rule is not None:
                key = (item.rule, item.linear.part)
                form = replace(form, owns_codebooks=key not in owners)
                owners.add(key)
            planned[item.linear] = form
        return planned

    def begin(
        self,
        checkpoint: Checkpoint,
        assignments: Sequence[Assignment[CodebookRule]],
        calibration: CalibrationSet,
        ctx: RunContext,
    ) -> StepFitter[CodebookRule]:
        """Fits codebooks that several layers share.

        Raises:
            RecipeError: Layers that share codebooks have fewer vectors than entries.
        """
        groups: dict[tuple[CodebookRule, str], list[LinearSpec]] = {}
        for item in assignments:
            if item.rule is not None and item.rule.plan(item.linear).is_shared:
                groups.setdefault((item.rule, item.linear.part), []).append(item.linear)
        shared = {
            key: _fit_shared(key[0], [checkpoint.form(linear.name) for linear in linears], ctx.seed)
            for key, linears in groups.items()
        }
        return _Codebooks(self, shared, ctx.seed)

    def apply(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> Checkpoint:
        """Quantizes the checkpoint in place; see `CalibratedQuantizer.apply`."""
        done = super().apply(checkpoint, calibration, ctx)
        # A run that went on took some layers from disk and made the others.
        share_codebooks(done)
        return done

    def _quantize(
        self,
        checkpoint: Checkpoint,
        step: SharedInput,
        assignments: Sequence[Assignment[CodebookRule]],
        block: int | None,
        fitter: StepFitter[CodebookRule],
    ) -> dict[str, FinishedLayer]:
        made = super()._quantize(checkpoint, step, assignments, block, fitter)
        linears = {item.linear.name: item for item in assignments}
        return {name: self._describe(linears[name], layer) for name, layer in made.items()}

    def _describe(
        self, assignment: Assignment[CodebookRule], layer: FinishedLayer
    ) -> FinishedLayer:
        """Adds what only codebooks have to a layer's row."""
        planned = assignment.rule.plan(assignment.linear) if assignment.rule else None
        row: dict[str, Any] = {**layer.row}
        if planned is not None:
            row |= {"codebook_bytes": planned.codebook_bytes(), "is_shared": planned.is_shared}
        # Projector, table and head stand in no half block that would be finished.
        if self.tune_steps and assignment.linear.block is not None:
            row["tuned"] = False
        return FinishedLayer(form=layer.form, row=row)


def share_codebooks(checkpoint: Checkpoint) -> None:
    """Lets layers with equal codebooks hold one tensor, which is then stored once."""
    known: dict[tuple[object, ...], Tensor] = {}
    for linear, form in checkpoint.forms().items():
        books = _codebooks_of(form)
        if books is None:
            continue
        key = (tuple(books.shape), books.numpy().tobytes())
        kept = known.setdefault(key, books)
        if kept is not books:
            checkpoint.set_form(linear.name, _with_codebooks(form, kept))


def _codebooks_of(form: WeightForm) -> Tensor | None:
    if isinstance(form, CodebookWeight):
        return form.main.codebooks
    if isinstance(form, SparseWeight) and isinstance(form.values, KeptIndices):
        return form.values.codebooks
    return None


def _with_codebooks(form: WeightForm, books: Tensor) -> WeightForm:
    if isinstance(form, CodebookWeight):
        return replace(form, main=replace(form.main, codebooks=books))
    if isinstance(form, SparseWeight) and isinstance(form.values, KeptIndices):
        return replace(form, values=replace(form.values, codebooks=books))
    raise TypeError(f"a weight of kind {form.kind!r} has no codebooks")


class _Codebooks(StepFitter[CodebookRule]):
    def __init__(
        self,
        stage: Codebook,
        shared: Mapping[tuple[CodebookRule, str], Tensor],
        seed: int,
    ) -> None:
        self._stage, self._shared, self._seed = stage, shared, seed

    def fitter_of(self, assignment: Assignment[CodebookRule]) -> CodebookFitter:
        rule, linear = assignment.rule, assignment.linear
        if rule is None:
            raise ValueError(f"{linear.name} is not to be quantized")
        shared = None
        if rule.plan(linear).is_shared:
            shared = self._shared[rule, linear.part]
        stage = self._stage
        return CodebookFitter(
            shared=shared,
            seed=self._seed,
            rounds=stage.rounds,
            error_feedback=stage.error_feedback,
            # A norm follows every lookup: a token of small rows bears no larger error than others.
            rows_alike=linear.part == "embedding",
            label="lut" if rule.vector_length == 1 else "vptq",
        )

    def tune(
        self, checkpoint: Checkpoint, half: FinishedHalf, layers: Mapping[str, FinishedLayer]
    ) -> Mapping[str, FinishedLayer]:
        """Trains tables and row scales on the half block's output."""
        return tune_codebooks(
            checkpoint, half, layers, steps=self._stage.tune_steps, rate=self._stage.tune_rate
        )


def _fit_shared(rule: CodebookRule, forms: Sequence[WeightForm], seed: int) -> Tensor:
    """Codebooks of several layers, from normalised vectors weighted by their layers' scales."""
    vectors, weights = [], []
    generator = torch.Generator().manual_seed(seed)
    length = rule.vector_length
    most = max(1, _SHARED_SAMPLE // len(forms))
    for form in forms:
        dense, keeps = form.dequantize(), keeps_of(form)
        scales = row_scales_of(dense, keeps).to(torch.float32)
        columns = dense.shape[1]
        normal = (dense / scales[:, None]).view(-1, length, columns)
        if keeps is None:
            chosen = sample_rows(normal.shape[0] * columns, most, generator)
        else:
            # A vector behind a mask has one element.
            places = keeps.flatten().nonzero()[:, 0]
            chosen = places[sample_rows(places.shape[0], most, generator)]
        row, column = chosen // columns, chosen % columns
        energy = scales.square().view(-1, length).mean(1)
        vectors.append(normal[row, :, column])
        # Each layer weighs the same as a whole: a loud one is no more important than a quiet one.
        weights.append(energy[row] / energy[row].mean())
    try:
        made = cluster(
            torch.cat(vectors), torch.cat(weights), 1 << (rule.index_bits or 0), seed=seed
        )
    except ValueError as error:
        raise RecipeError(f"codebooks shared by {len(forms)} layers: {error}") from error
    return made[None, None]

"""Structured pruning of width: whole FFN channels and KV groups, which makes a phone faster.

Every block loses equally many units, each its own least important ones, so that a stock class of
smaller shape loads what is left. The walk follows the order of execution: inputs that units are
scored by (FLAP) and that the survivors are fitted to are those of the model as pruned so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.walk.steps import InputMoments
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.checkpoint.tensors import keep_in_file
from pocketvlm.compress.layerwise.driver import visit_groups
from pocketvlm.compress.layerwise.hessian import diagonal_block_width
from pocketvlm.compress.pruning.uniform import require_uniform_decoder
from pocketvlm.compress.pruning.width.channels import (
    DecoderBiases,
    UnitGroup,
    Widths,
    check_dense,
    kept_units,
    narrow_spec,
    remove_units,
    unit_groups,
)
from pocketvlm.compress.pruning.width.compensation import (
    Compensation,
    InputStatistics,
    compensate,
    mean_shift,
    output_energy,
    output_loss,
)
from pocketvlm.compress.pruning.width.flap import Flap
from pocketvlm.compress.pruning.width.taylor import Taylor
from pocketvlm.compress.pruning.width.unit_scores import UnitMagnitude, UnitScorer, group_magnitude
from pocketvlm.compress.pruning.width.widths import (
    MULTIPLES,
    Multiple,
    choose_widths,
    decoder_share,
)
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError, RecipeError
from pocketvlm.models.spec import ModelSpec
from pocketvlm.stages import PlanState, Stage, StageResult
from pocketvlm.stages.walk_options import WalkOptions, note_synthetic
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.float_weights import with_values
from pocketvlm.weights.modules import FormLinear

__all__ = ["PruneWidth"]

_COMPENSATIONS = ("none", "bias", "regression")
_DEFAULT_IMPORTANCE = Flap()


@dataclass(frozen=True, kw_only=True)
class PruneWidth(Stage, WalkOptions):
    """Removes FFN channels and KV groups.

    Attributes:
        decoder_parameters: Share of the weights of the decoder's blocks that is removed, embedding
            and head not counted; `widths.choose_widths` says how it is split.
        ffn_ratio: Share of the decoder's FFN channels that is removed, instead of that.
        kv_groups: KV groups that every block keeps; `None` for all, or for what
            `decoder_parameters` asks for.
        tower_ffn_ratio: Share of the tower's FFN channels that is removed.
        multiple_of: What numbers of channels are multiples of.
        importance: What units are ranked by.
        compensate: `none`; `bias` makes up for the mean of what is removed; `regression` also
            changes the survivors by least squares on their inputs.
        biases: Whether linears of the decoder may get biases that they have not. Without,
            `bias` has nowhere to go, and `regression` fits outputs through the origin.
        damping: Share of the inputs' mean variance that pulls survivors to where they are.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"float_weights", "all_tokens"})
    forbids: ClassVar[frozenset[str]] = frozenset({"quantized_weights", "quantized_cache"})
    carries_taps: ClassVar[bool] = True

    method: Literal["prune_width"] = "prune_width"
    decoder_parameters: float | None = None
    ffn_ratio: float = 0.0
    kv_groups: int | None = None
    tower_ffn_ratio: float = 0.0
    multiple_of: Multiple = 32
    importance: Flap | Taylor | UnitMagnitude = _DEFAULT_IMPORTANCE
    compensate: Compensation = "regression"
    biases: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        for name in ("decoder_parameters", "ffn_ratio", "tower_ffn_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and not 0 <= ratio < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {ratio}")
        if self.decoder_parameters is not None and self.ffn_ratio:
            raise ValueError("decoder_parameters and ffn_ratio both say how wide the FFN becomes")
        if not (self.decoder_parameters or self.ffn_ratio or self.tower_ffn_ratio) and (
            self.kv_groups is None
        ):
            raise ValueError(
                "nothing would be removed; give decoder_parameters, ffn_ratio, kv_groups or "
                "tower_ffn_ratio"
            )
        if self.multiple_of not in MULTIPLES:
            raise ValueError(f"multiple_of must be 32 or 64, not {self.multiple_of}")
        if self.compensate not in _COMPENSATIONS:
            raise ValueError(
                f"compensate {self.compensate!r} is unknown; allowed are "
                f"{', '.join(_COMPENSATIONS)}"
            )
        if not 0 <= self.damping <= 1:
            raise ValueError(f"damping must lie between 0 and 1, not {self.damping}")
        self.check_walk_options()

    def widths(self, spec: ModelSpec) -> Widths:
        """What every block keeps.

        Raises:
            RecipeError: A width is not possible in this model, or its layers are of several kinds.
        """
        require_uniform_decoder(spec, self.method)
        return choose_widths(
            spec,
            decoder_parameters=self.decoder_parameters,
            ffn_ratio=self.ffn_ratio,
            kv_groups=self.kv_groups,
            tower_ffn_ratio=self.tower_ffn_ratio,
            multiple_of=self.multiple_of,
        )

    def spec_after(self, spec: ModelSpec) -> ModelSpec:
        """The specification of the model after this stage.

        Raises:
            RecipeError: A width is not possible in this model.
        """
        widths, before = self.widths(spec), Widths.of(spec)
        had, adds = DecoderBiases.of(spec), self.biases and self.compensate != "none"
        biases = DecoderBiases(
            attention=had.attention or (adds and widths.kv_groups < before.kv_groups),
            mlp=had.mlp or (adds and widths.ffn < before.ffn),
        )
        _require_place(spec, had, biases)
        return narrow_spec(spec, widths, biases)

    @property
    def takes_gradients(self) -> bool:
        """Whether the importance does."""
        return self.importance.takes_gradients

    def plan(self, state: PlanState) -> PlanState:
        """Leaves narrower blocks."""
        state = state.with_spec(self.spec_after(state.spec))
        if self.biases or self.compensate != "bias":
            return state
        return state.with_notes(
            "prune_width: biases is false, so the decoder's removed units are not made up for"
        )

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Cuts the checkpoint, whose weights it changes in place before it builds a smaller model.

        Raises:
            RecipeError: A weight is sparse or quantized, or a width is not possible.
            CalibrationError: A sample cannot be used, or inputs or gradients are not finite.
        """
        check_dense(checkpoint, self.method)
        before = checkpoint.spec
        expected = self.spec_after(before)
        widths = Widths.of(expected)
        counts = {
            group: getattr(widths, field)
            for field in ("tower_ffn", "kv_groups", "ffn")
            if getattr(widths, field) < getattr(Widths.of(before), field)
            for group in unit_groups(before, field)
        }
        kept: dict[UnitGroup, Tensor] = {}
        rows: list[Mapping[str, Any]] = []
        for group, units, row in self._choose(checkpoint, counts, calibration, ctx):
            kept[group] = units
            rows.append(row)
            ctx.report(self.method, len(rows), len(counts), f"{group.name}: {_note(row)}")
        narrow = remove_units(checkpoint, kept, ctx.scratch_dir) if kept else checkpoint
        # Folds are of files that stock wrote, and have their sizes.
        if replace(narrow.spec, folds=()) != replace(expected, folds=()):
            raise AssertionError("the model that was built is not the one that was planned")
        return StageResult(
            checkpoint=narrow,
            layers=tuple(rows),
            metrics={
                "widths_before": asdict(Widths.of(before)),
                "widths": asdict(widths),
                "decoder_blocks_removed": decoder_share(before, widths, with_tables=False),
                "decoder_removed": decoder_share(before, widths, with_tables=True),
                "calibration": calibration.describe(),
            },
            notes=_notes(calibration, rows),
        )

    def _choose(
        self,
        checkpoint: Checkpoint,
        counts: Mapping[UnitGroup, int],
        calibration: CalibrationSet,
        ctx: RunContext,
    ) -> Iterator[tuple[UnitGroup, Tensor, Mapping[str, Any]]]:
        """What each sublayer keeps, with the survivors in place and zeros for what goes."""
        last_run = checkpoint.spec.tower.feature_block
        idle = [group for group in counts if group.part == "tower" and group.block > last_run]
        measured = {group.last: group for group in counts if group not in idle}
        for group in idle:
            units = kept_units(group_magnitude(group, checkpoint), counts[group])
            yield group, units, _row(group, units, reason="never run: ranked by magnitude")
        scorer = self.importance.begin(checkpoint, tuple(measured.values()), calibration, ctx)
        walk = self.walk(checkpoint, calibration, ctx)
        for step, (name,) in visit_groups(walk, measured):
            group = measured[name]
            if step.moments is None:
                raise AssertionError(f"{name} is a linear, and has no inputs")
            try:
                moments = step.moments(diagonal_block_width(group.count * group.columns, ()))
                units, row = self._cut(
                    checkpoint, group, counts[group], moments, scorer, ctx.scratch_dir
                )
            except CalibrationError as error:
                raise CalibrationError(f"{name}: {error}") from error
            yield group, units, row

    def _cut(
        self,
        checkpoint: Checkpoint,
        group: UnitGroup,
        count: int,
        moments: InputMoments,
        scorer: UnitScorer,
        folder: Path | None,
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """Puts what a sublayer keeps in place: other units are read with zeros from here on."""
        layer = checkpoint.layer(group.last)
        if not isinstance(layer, FormLinear):
            raise TypeError(f"{group.last} is not a linear")
        inputs = InputStatistics.from_moment(moments.calibration, centred=True)
        scores = scorer.score(group, checkpoint, inputs)
        units = kept_units(scores, count)
        columns = group.columns_of(units)
        has_bias = layer.bias is not None or (self.biases and self.compensate != "none")
        if not has_bias:
            inputs = InputStatistics.from_moment(moments.calibration, centred=False)
        dense = layer.form.dequantize().double()
        found = compensate(dense, inputs, columns, self.compensate, self.damping)
        whole = torch.zeros_like(dense)
        whole[:, columns] = found.weight
        form = with_values(layer.form, whole)
        # The bias makes up for the rounding of the weight as well.
        stored = form.dequantize().double()[:, columns]
        shift = None if found.shift is None else mean_shift(dense, stored, inputs.mean, columns)
        judged = moments.held_out or moments.calibration
        judge = InputStatistics.from_moment(judged, centred=True)
        energy = output_energy(dense, judge)
        row = _row(
            group,
            units,
            importance_removed=_share(scores.sum() - scores[units].sum(), scores.sum()),
            loss_uncompensated=_share(
                output_loss(dense, dense[:, columns], None, judge, columns), energy
            ),
            loss=_share(output_loss(dense, stored, shift, judge, columns), energy),
            damping=found.damping,
            damping_raised=found.damping is not None and found.damping > self.damping,
            judged_on="held-out tokens" if moments.held_out else "calibration tokens",
            tokens=moments.calibration.tokens,
            covariance_blocks=len(inputs.slices),
            reason="" if bool(scores.any()) else "all units score zero: the first ones are kept",
        )
        layer.form = form
        if isinstance(form, DenseWeight):
            layer.form = DenseWeight(values=keep_in_file(form.values, folder))
        if shift is not None or (has_bias and layer.bias is None):
            added = torch.zeros(len(dense)) if shift is None else shift
            present = 0.0 if layer.bias is None else layer.bias.detach().double()
            bias = (present + added).to(torch.float32)
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return units, row


def _require_place(spec: ModelSpec, had: DecoderBiases, wanted: DecoderBiases) -> None:
    """Refuses biases that the stock class of the decoder has no place for.

    Raises:
        RecipeError: It has none.
    """
    addable = spec.decoder.addable_biases
    for has, wants, sublayer, words in (
        (had.attention, wanted.attention, "attention", "attention"),
        (had.mlp, wanted.mlp, "mlp", "feed-forward network"),
    ):
        if wants and not has and sublayer not in addable:
            raise RecipeError(
                f"biases: the stock class of this decoder has no place for biases in its {words}, "
                "which would make up for the mean of what is removed; allowed is biases: false"
            )


def _row(group: UnitGroup, units: Tensor, **figures: Any) -> dict[str, Any]:
    """The line of a sublayer in the report."""
    return {
        "name": group.name,
        "part": group.part,
        "role": group.kind,
        "block": group.block,
        "method": "pruned",
        "units": group.count,
        "kept": len(units),
        "reason": "",
        **figures,
    }


def _note(row: Mapping[str, Any]) -> str:
    if "loss" not in row:
        return str(row["reason"])
    return (
        f"{row['kept']} of {row['units']}, loss {row['loss']:.2e}, "
        f"uncompensated {row['loss_uncompensated']:.2e}"
    )


def _notes(calibration: CalibrationSet, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    notes = [*note_synthetic(calibration)]
    for row in rows:
        if row["reason"]:
            notes.append(f"{row['name']}: {row['reason']}")
        if row.get("damping_raised"):
            notes.append(f"{row['name']}: damping was raised to {row['damping']:g}")
        if row.get("covariance_blocks", 1) > 1:
            notes.append(
                f"{row['name']}: its covariance is {row['covariance_blocks']} diagonal blocks; the "
                "whole would not fit into memory"
            )
    return tuple(notes)


def _share(part: float | Tensor, whole: float | Tensor) -> float:
    return float(part) / float(whole) if float(whole) > 0 else 0.0

"""What all calibrated quantizers share: the walk over the model, layer by layer, and its record.

Walks the model in order of execution, so that every layer is calibrated on what the quantized
layers before it produce, with the visual tokens that the phone will see; compares every layer with
its plain form on tokens that it was not fitted to, and keeps the better one; says what it did in
one row a layer. A run that was killed goes on at the first layer that is missing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.data.modality import ModalityWeighting
from pocketvlm.calibration.walk.walk import BlockWalk, FinishedSublayer, LinearGroup
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.error_feedback import ORDERS, Order
from pocketvlm.compress.layerwise.hessian import diagonal_block_width, weigh_moments
from pocketvlm.compress.layerwise.layer_store import FinishedLayer, LayerStore
from pocketvlm.compress.quantization.affine.rules import (
    Assignment,
    LayerRule,
    assign_layers,
    plan_layouts,
)
from pocketvlm.compress.quantization.codebook.shared import count_shared_once, share_codebooks
from pocketvlm.compress.quantization.layer_quantizer import LayerQuantizer, fit_layer, round_layer
from pocketvlm.compress.quantization.layer_report import float_rows
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError
from pocketvlm.stages import PlanState, Stage, StageResult
from pocketvlm.stages.walk_options import WalkOptions, note_synthetic

__all__ = ["CalibratedQuantizer", "GroupQuantizer", "block_width"]

_TUNED = ".tuned"
# An element of a tied table is wrong twice: in the logits and in what enters the decoder. Chosen on
# questions of its own; see docs/methods/gptq.md.
_LOOKUP_SHARE = 0.3
_TABLE = "a lookup has no inputs to fit: each row is rounded by itself"
_TIED = "head and embedding are one weight; fitted to the head's inputs and to being looked up"

RuleT = TypeVar("RuleT", bound=LayerRule)


class GroupQuantizer(ABC, Generic[RuleT]):
    """What a stage does with one run's layers; made anew for every run, so it may remember."""

    @abstractmethod
    def fitter_of(self, assignment: Assignment[RuleT]) -> LayerQuantizer[RuleT]:
        """How a layer is quantized."""

    def tune(
        self, checkpoint: Checkpoint, half: FinishedSublayer, layers: Mapping[str, FinishedLayer]
    ) -> Mapping[str, FinishedLayer]:
        """Layers of a finished half block that are replaced by better ones; none by default."""
        return {}


@dataclass(frozen=True, kw_only=True)
class CalibratedQuantizer(Stage, WalkOptions, Generic[RuleT]):
    """The stage around a calibrated method; a subclass says what becomes of one layer.

    Attributes:
        rules: Ordered rules; the first that matches a layer wins.
        damping: Share of a Hessian's mean diagonal that is added to it. Raised tenfold, and
            reported, where the factorization fails.
        order: `group_aware` rounds the most excited columns first without tearing groups apart.
        drift_share: How much of the distance between a layer's input and the float model's is
            made up for (asymmetric calibration, arXiv 2504.02692), from 0 to 1; more than 0 costs
            a second forward pass.
        modality_weights: Weight of visual tokens in the decoder's Hessians: `uniform`, `balanced`
            (both modalities weigh the same in total), `gradient` (every token by its gradient) or
            a number (text weighs one).
        held_out: Share of the samples that only judge whether a layer gained.
        tower_tokens: Tokens after which the tower's Hessians are taken to be known.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"float_weights"})
    provides: ClassVar[frozenset[str]] = frozenset({"quantized_weights"})
    forbids: ClassVar[frozenset[str]] = frozenset({"quantized_cache"})

    rules: tuple[RuleT, ...]
    damping: float = 0.01
    order: Order = "group_aware"
    drift_share: float = 0.0
    modality_weights: ModalityWeighting = "balanced"
    held_out: float = 0.125
    tower_tokens: int = 16384

    def __post_init__(self) -> None:
        if not self.rules:
            raise ValueError("rules must hold at least one rule")
        if not 0 <= self.damping <= 1:
            raise ValueError(f"damping must lie between 0 and 1, not {self.damping}")
        if self.order not in ORDERS:
            raise ValueError(f"order {self.order!r} is unknown; allowed are {', '.join(ORDERS)}")
        if not 0 <= self.drift_share <= 1:
            raise ValueError(f"drift_share must lie between 0 and 1, not {self.drift_share}")
        self.check_walk_options()

    @abstractmethod
    def begin(
        self,
        checkpoint: Checkpoint,
        assignments: Sequence[Assignment[RuleT]],
        calibration: CalibrationSet,
        ctx: RunContext,
    ) -> GroupQuantizer[RuleT]:
        """Whatever has to be known before the first layer."""

    @property
    def carries_float(self) -> bool:
        """Whether the float model has to run along."""
        return self.drift_share > 0

    def plan(self, state: PlanState) -> PlanState:
        """Gives each layer the layout of its rule."""
        return state.with_layouts(plan_layouts(self.rules, state.spec.linears()))

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Quantizes the checkpoint in place.

        Raises:
            RecipeError: A rule does not fit the model, or a layer is quantized already.
            CalibrationError: A sample cannot be used, or inputs of a layer are not finite.
            CheckpointError: A weight is too large for float16 scales.
        """
        assignments = assign_layers(self.rules, checkpoint)
        wanted = {item.linear.name: item for item in assignments if item.rule is not None}
        walk = self.walk(checkpoint, calibration, ctx)
        rows: dict[str, Mapping[str, Any]] = {}
        for name, layer in self._layers(walk, wanted, ctx):
            checkpoint.set_form(name, layer.form)
            is_new = name not in rows
            rows[name] = layer.row
            if is_new:
                ctx.report(self.method, len(rows), len(wanted), f"{name}: {_note(layer.row)}")
        # A run that went on took some layers from disk and made the others.
        share_codebooks(checkpoint)
        ordered = count_shared_once(checkpoint, [rows[name] for name in wanted])
        return StageResult(
            checkpoint=checkpoint,
            layers=(*ordered, *float_rows(assignments, checkpoint)),
            metrics=_metrics(walk, ordered),
            notes=_notes(walk, ordered),
        )

    def _layers(
        self, walk: BlockWalk, wanted: Mapping[str, Assignment[RuleT]], ctx: RunContext
    ) -> Iterator[tuple[str, FinishedLayer]]:
        """Finished layers one by one; a layer that is tuned later comes a second time.

        Whoever iterates puts each layer into the checkpoint before asking for the next one.
        """
        store = LayerStore(ctx.scratch_dir)
        finished = _load(store, wanted)
        tuned = _load(store, wanted, suffix=_TUNED)
        if all(name in tuned or _is_final(finished.get(name)) for name in wanted):
            yield from (finished | tuned).items()
            return
        fitter = self.begin(walk.checkpoint, tuple(wanted.values()), walk.samples, ctx)
        made: dict[str, FinishedLayer] = {}
        for step in walk:
            if isinstance(step, FinishedSublayer):
                names = (*step.half.first, step.half.last)
                waiting = {
                    name: made[name] for name in names if name in made and not _is_final(made[name])
                }
                if waiting.keys() <= tuned.keys():
                    better: Mapping[str, FinishedLayer] = {name: tuned[name] for name in waiting}
                else:
                    better = fitter.tune(walk.checkpoint, step, waiting)
                for name, layer in better.items():
                    store.save(name + _TUNED, layer)
                    made[name] = layer
                    yield name, layer
            else:
                names = tuple(name for name in step.names if name in wanted)
                missing = [wanted[name] for name in names if name not in finished]
                # From all layers of the step, so that a run that goes on cuts as the first one did.
                block = block_width([wanted[name] for name in names])
                fresh = self._quantize(walk.checkpoint, step, missing, block, fitter)
                for name in names:
                    made[name] = fresh[name] if name in fresh else finished[name]
                    if name in fresh:
                        store.save(name, made[name])
                    yield name, made[name]
            if len(made) == len(wanted) and all(map(_is_final, made.values())):
                return

    def _quantize(
        self,
        checkpoint: Checkpoint,
        step: LinearGroup,
        assignments: Sequence[Assignment[RuleT]],
        block: int | None,
        fitter: GroupQuantizer[RuleT],
    ) -> dict[str, FinishedLayer]:
        """Quantizes those layers of one step that are left; they share their input's Hessian."""
        weights = {item.linear.name: checkpoint.form(item.linear.name) for item in assignments}
        if not weights:
            return {}
        if step.moments is None:
            return {
                item.linear.name: round_layer(
                    item, weights[item.linear.name], fitter.fitter_of(item), reason=_TABLE
                )
                for item in assignments
            }
        is_tied = any(_is_tied(checkpoint, item) for item in assignments)
        widths = {item.rule.grid_columns(item.linear) for item in assignments if item.rule}
        try:
            evidence = weigh_moments(
                step.moments(block),
                sorted(widths),
                damping=self.damping,
                order=self.order,
                lookup_share=_LOOKUP_SHARE if is_tied else 0.0,
            )
        except CalibrationError as error:
            raise CalibrationError(f"{step.names[0]}: {error}") from error
        return {
            item.linear.name: fit_layer(
                item,
                weights[item.linear.name],
                evidence,
                fitter.fitter_of(item),
                drift_share=self.drift_share,
                note=_TIED if _is_tied(checkpoint, item) else "",
            )
            for item in assignments
        }


def _load(store: LayerStore, names: Iterable[str], suffix: str = "") -> dict[str, FinishedLayer]:
    """The layers that a run before this one finished."""
    found = ((name, store.load(name + suffix)) for name in names)
    return {name: layer for name, layer in found if layer is not None}


def _is_final(layer: FinishedLayer | None) -> bool:
    """Whether nothing more is done to a layer; a row says `tuned: false` until it is."""
    return layer is not None and layer.row.get("tuned") is not False


def block_width(assignments: Sequence[Assignment[RuleT]]) -> int | None:
    """Width of a wide Hessian's diagonal blocks, a whole number of groups of every size."""
    width = max((item.linear.in_features for item in assignments), default=0)
    columns = [item.rule.grid_columns(item.linear) for item in assignments if item.rule]
    return diagonal_block_width(width, columns)


def _is_tied(checkpoint: Checkpoint, assignment: Assignment[RuleT]) -> bool:
    return checkpoint.spec.decoder.tied_head and assignment.linear.part == "embedding"


def _note(row: Mapping[str, Any]) -> str:
    if "loss" not in row:
        return f"rounded, weight error {row['weight_error']:.2e}"
    return f"loss {row['loss']:.2e}, plain rounding {row['loss_rtn']:.2e}"


def _metrics(walk: BlockWalk, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counts = walk.counts
    return {
        "layers": len(rows),
        "layers_rounded": sum(row["plain"] for row in rows),
        "calibration": {
            **walk.samples.describe(),
            "held_out_samples": len(walk.samples) - walk.first_held_out,
            "visual_tokens": counts.visual,
            "text_tokens": counts.text,
            "visual_per_text_token": counts.ratio,
            "truncated_samples": sum(prompt.is_truncated for prompt in walk.prompts),
        },
    }


def _notes(walk: BlockWalk, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    notes = [*note_synthetic(walk.samples)]
    if walk.tower_samples < walk.first_held_out:
        notes.append(
            f"the tower's Hessians are those of {walk.tower_samples} of {walk.first_held_out} "
            "images"
        )
    truncated = sum(prompt.is_truncated for prompt in walk.prompts)
    if truncated:
        notes.append(f"{truncated} calibration texts were cut off at the longest length used")
    notes += [f"{row['name']}: {row['reason']}" for row in rows if row["reason"]]
    for row in rows:
        if row.get("damping_raised"):
            notes.append(f"{row['name']}: damping was raised to {row['damping']:g}")
        if row.get("hessian_blocks", 1) > 1:
            notes.append(
                f"{row['name']}: its Hessian is {row['hessian_blocks']} diagonal blocks; the "
                "whole would not fit into memory"
            )
    return tuple(notes)

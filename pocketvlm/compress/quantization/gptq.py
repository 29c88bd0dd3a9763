"""GPTQ on image and text: rounds weights so that each layer's *output* changes least.

The stage around `error_feedback`: walks the model in order of execution, so that every layer is
calibrated on what the quantized layers before it produce, with the visual tokens that the phone
will see; compares every layer with round-to-nearest on tokens that it was not fitted to, and keeps
the better one; says what it did in one row a layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.blocks import BlockWalk, SharedInput
from pocketvlm.calibration.modality import ModalityWeighting, check_weighting
from pocketvlm.checkpoint import Checkpoint, StageRecord
from pocketvlm.compress.quantization.affine import GRIDS, GridKind
from pocketvlm.compress.quantization.error_feedback import ORDERS, Order
from pocketvlm.compress.quantization.fitting import fit_layer, weigh_moments
from pocketvlm.compress.quantization.layers import (
    FinishedLayer,
    LayerStore,
    float_rows,
    stage_version,
)
from pocketvlm.compress.quantization.rtn import round_layer
from pocketvlm.compress.quantization.rules import Assignment, WeightRule, assign_layers
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError
from pocketvlm.report import peak_rss_bytes

__all__ = ["Gptq"]

# Up to this width a Hessian is kept whole; wider inputs, such as those of a projector behind a
# pixel shuffle, keep diagonal blocks of the smaller width.
_WHOLE_WIDTH = 8192
_BLOCK_WIDTH = 1024
_TABLE = "a lookup has no inputs to fit: each row is rounded on its own grid"
_TIED = "head and embedding are one weight; fitted to the head's inputs"


@dataclass(frozen=True, kw_only=True)
class Gptq:
    """Quantizes with error feedback (arXiv 2210.17323), calibrated on images and text.

    Attributes:
        rules: Ordered rules; the first that matches a layer wins.
        damping: Share of a Hessian's mean diagonal that is added to it. Raised tenfold, and
            reported, where the factorization fails.
        order: `group_aware` rounds the most excited columns first without tearing groups apart.
        static_groups: Whether grids are made from the weights as they were.
        grid: `min_max` spans each group's range, `mse` searches for the least squared error.
        modality_weights: Weight of visual tokens in the decoder's Hessians: `uniform`, `balanced`
            (both modalities weigh the same in total) or a number (text weighs one).
        held_out: Share of the samples that only judge whether a layer gained.
        tower_tokens: Tokens after which the tower's Hessians are taken to be known.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"float_weights"})
    provides: ClassVar[frozenset[str]] = frozenset({"quantized_weights"})
    forbids: ClassVar[frozenset[str]] = frozenset()

    method: Literal["gptq"] = "gptq"
    rules: tuple[WeightRule, ...]
    damping: float = 0.01
    order: Order = "group_aware"
    static_groups: bool = False
    grid: GridKind = "min_max"
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
        if self.grid not in GRIDS:
            raise ValueError(f"grid {self.grid!r} is unknown; allowed are {', '.join(GRIDS)}")
        if not 0 <= self.held_out <= 0.5:  # noqa: PLR2004  (at most half may be lost to judging)
            raise ValueError(f"held_out must lie between 0 and 0.5, not {self.held_out}")
        if self.tower_tokens < 1:
            raise ValueError(f"tower_tokens must be at least 1, not {self.tower_tokens}")
        check_weighting(self.modality_weights)

    def apply(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> Checkpoint:
        """Quantizes the checkpoint in place.

        Raises:
            RecipeError: A rule does not fit the model, or a layer is quantized already.
            CalibrationError: A sample cannot be used, or inputs of a layer are not finite.
            CheckpointError: A weight is too large for float16 scales.
        """
        started = time.perf_counter()
        assignments = assign_layers(self.rules, checkpoint)
        wanted = {item.linear.name: item for item in assignments if item.rule is not None}
        store = LayerStore(ctx.scratch_dir)
        walk = BlockWalk(
            checkpoint=checkpoint,
            samples=calibration,
            weighting=self.modality_weights,
            held_out=self.held_out,
            tower_tokens=self.tower_tokens,
            spill_folder=ctx.scratch_dir,
        )
        rows: dict[str, Mapping[str, Any]] = {}
        restored = self._restore(wanted, store)
        layers = self._walk(walk, wanted, store) if restored is None else restored
        for name, layer in layers:
            checkpoint.set_form(name, layer.form)
            rows[name] = layer.row
            ctx.report("gptq", len(rows), len(wanted), f"{name}: {_note(layer.row)}")
        ordered = [rows[name] for name in wanted]
        record = StageRecord(
            method=self.method,
            parameters=asdict(self),
            version=stage_version(),
            calibration_sha256=calibration.sha256,
            layers=(*ordered, *float_rows(assignments, checkpoint)),
            metrics=_metrics(walk, ordered),
            notes=_notes(walk, ordered),
            seconds=time.perf_counter() - started,
            peak_rss_bytes=peak_rss_bytes(),
        )
        return checkpoint.extend(record)

    @staticmethod
    def _restore(
        wanted: Mapping[str, Assignment], store: LayerStore
    ) -> list[tuple[str, FinishedLayer]] | None:
        """All layers, where a run before this one finished them all."""
        layers = []
        for name in wanted:
            layer = store.load(name)
            if layer is None:
                return None
            layers.append((name, layer))
        return layers

    def _walk(
        self, walk: BlockWalk, wanted: Mapping[str, Assignment], store: LayerStore
    ) -> Iterator[tuple[str, FinishedLayer]]:
        """Quantizes layer by layer, and goes on where a run before this one stopped.

        Whoever iterates puts each layer into the checkpoint before asking for the next one.
        """
        left = set(wanted)
        for step in walk:
            names = [name for name in step.names if name in wanted]
            found = {name: store.load(name) for name in names}
            missing = [wanted[name] for name in names if found[name] is None]
            # From all layers of the step, so that a run that goes on cuts as the first one did.
            block = _block_width([wanted[name] for name in names])
            made = self._quantize(walk.checkpoint, step, missing, block)
            for name, layer in made.items():
                store.save(name, layer)
            for name, kept in found.items():
                yield name, made[name] if kept is None else kept
            left -= found.keys()
            if not left:
                return

    def _quantize(
        self,
        checkpoint: Checkpoint,
        step: SharedInput,
        assignments: Sequence[Assignment],
        block: int | None,
    ) -> dict[str, FinishedLayer]:
        """Quantizes those layers of one step that are left; they share their input's Hessian."""
        weights = {item: checkpoint.form(item.linear.name) for item in assignments}
        if step.moments is None:
            return {
                item.linear.name: round_layer(item, weight, self.grid, reason=_TABLE)
                for item, weight in weights.items()
            }
        if not weights:
            return {}
        sizes = sorted({item.rule.group_size for item in assignments if item.rule is not None})
        try:
            evidence = weigh_moments(
                step.moments(block), sizes, damping=self.damping, order=self.order
            )
        except CalibrationError as error:
            raise CalibrationError(f"{step.names[0]}: {error}") from error
        return {
            item.linear.name: fit_layer(
                item,
                weight,
                evidence,
                grid=self.grid,
                static_groups=self.static_groups,
                note=_TIED if _is_tied(checkpoint, item) else "",
            )
            for item, weight in weights.items()
        }


def _block_width(assignments: Sequence[Assignment]) -> int | None:
    """Width of a wide Hessian's diagonal blocks, a whole number of groups of every size."""
    width = max((item.linear.in_features for item in assignments), default=0)
    if width <= _WHOLE_WIDTH:
        return None
    step = math.lcm(*(item.rule.group_size for item in assignments if item.rule is not None))
    return min(width, max(1, _BLOCK_WIDTH // step) * step)


def _is_tied(checkpoint: Checkpoint, assignment: Assignment) -> bool:
    return checkpoint.spec.decoder.tied_head and assignment.linear.part == "embedding"


def _note(row: Mapping[str, Any]) -> str:
    if "loss" not in row:
        return f"rounded, weight error {row['weight_error']:.2e}"
    return f"loss {row['loss']:.2e}, round-to-nearest {row['loss_rtn']:.2e}"


def _metrics(walk: BlockWalk, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counts = walk.counts
    return {
        "layers": len(rows),
        "layers_rounded": sum(row["method"] == "rtn" for row in rows),
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
    notes = []
    if walk.samples.is_synthetic:
        notes.append("calibrated on synthetic pictures: give a folder of real ones for quality")
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

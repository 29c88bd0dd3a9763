"""GPTQ on image and text: rounds weights so that each layer's *output* changes least.

The stage around `error_feedback`: walks the model in order of execution, so that every layer is
calibrated on what the quantized layers before it produce, with the visual tokens that the phone
will see; compares every layer with round-to-nearest on tokens that it was not fitted to, and keeps
the better one; says what it did in one row a layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.blocks import BlockWalk, InputMoments, SharedInput
from pocketvlm.calibration.modality import ModalityWeighting, check_weighting
from pocketvlm.checkpoint import Checkpoint, StageRecord
from pocketvlm.compress.quantization.affine import (
    GRIDS,
    Grid,
    GridKind,
    affine_form,
    decode,
    encode,
    group_columns,
)
from pocketvlm.compress.quantization.error_feedback import (
    ORDERS,
    Factor,
    Order,
    factorize,
    quantize_with_feedback,
)
from pocketvlm.compress.quantization.layers import (
    FinishedLayer,
    LayerStore,
    describe_layer,
    float_rows,
    row_chunks,
    stage_version,
)
from pocketvlm.compress.quantization.rtn import round_layer
from pocketvlm.compress.quantization.rules import Assignment, WeightRule, assign_layers
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError, CheckpointError
from pocketvlm.report import peak_rss_bytes

__all__ = ["Gptq"]

# Up to this width a Hessian is kept whole; wider inputs, such as those of a projector behind a
# pixel shuffle, keep diagonal blocks of the smaller width.
_WHOLE_WIDTH = 8192
_BLOCK_WIDTH = 1024
_TABLE = "a lookup has no inputs to fit: each row is rounded on its own grid"
_NOT_POSITIVE = "the Cholesky factorization failed at every damping up to 1"
_NOT_BETTER = "round-to-nearest is at least as good on held-out tokens"
_TIED = "head and embedding are one weight; fitted to the head's inputs"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Evidence:
    """What is known of one input.

    Attributes:
        slices: Columns of each diagonal block of the Hessian.
        factors: The blocks' factors by group size; `None` for one that could not be factorized.
        judge: The blocks of the Hessian that results are compared with.
        judged_on: Whose tokens those are.
        tokens: Tokens behind the factors.
    """

    slices: tuple[slice, ...]
    factors: Mapping[int, Sequence[Factor | None]]
    judge: tuple[Tensor, ...]
    judged_on: str
    tokens: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Attempt:
    """A layer after error feedback, before it is compared."""

    layer: FinishedLayer
    is_better: bool


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

        def finish(name: str, layer: FinishedLayer) -> None:
            checkpoint.set_form(name, layer.form)
            rows[name] = layer.row
            ctx.report("gptq", len(rows), len(wanted), f"{name}: {_note(layer.row)}")

        restored = {name: store.load(name) for name in wanted}
        if all(layer is not None for layer in restored.values()):
            for name, layer in restored.items():
                if layer is not None:
                    finish(name, layer)
        else:
            for step in walk:
                names = [name for name in step.names if name in wanted]
                missing = [wanted[name] for name in names if restored[name] is None]
                if missing:
                    made = self._quantize(checkpoint, step, missing)
                    for name, layer in made.items():
                        store.save(name, layer)
                        restored[name] = layer
                for name in names:
                    layer = restored.pop(name)
                    if layer is not None:
                        finish(name, layer)
                if len(rows) == len(wanted):
                    break
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

    def _quantize(
        self, checkpoint: Checkpoint, step: SharedInput, assignments: Sequence[Assignment]
    ) -> dict[str, FinishedLayer]:
        """Quantizes the layers of one step, which share their input's Hessian."""
        if step.moments is None:
            return {
                item.linear.name: round_layer(
                    item, checkpoint.form(item.linear.name), self.grid, reason=_TABLE
                )
                for item in assignments
            }
        sizes = [item.rule.group_size for item in assignments if item.rule is not None]
        try:
            block = _block_width(assignments[0].linear.in_features, sizes)
            evidence = self._weigh(step.moments(block), sizes)
        except (CalibrationError, ValueError) as error:
            raise CalibrationError(f"{step.names[0]}: {error}") from error
        finished = {}
        for item in assignments:
            name = item.linear.name
            factor = evidence.factors[item.rule.group_size] if item.rule is not None else []
            whole = [part for part in factor if part is not None]
            if len(whole) < len(factor):
                finished[name] = round_layer(
                    item, checkpoint.form(name), self.grid, reason=_NOT_POSITIVE
                )
                continue
            attempt = self._fit(checkpoint, item, whole, evidence)
            if attempt.is_better:
                finished[name] = attempt.layer
                continue
            rounded = round_layer(item, checkpoint.form(name), self.grid, reason=_NOT_BETTER)
            figures = {"method": "rtn", "reason": _NOT_BETTER}
            figures |= {key: rounded.row[key] for key in ("weight_error",)}
            finished[name] = FinishedLayer(form=rounded.form, row={**attempt.layer.row, **figures})
        return finished

    def _weigh(self, moments: InputMoments, group_sizes: Sequence[int]) -> _Evidence:
        """Factorizes the Hessian; the moments themselves are not kept."""
        fitted, held_out = moments.calibration, moments.held_out
        return _Evidence(
            slices=fitted.slices,
            factors={
                size: [
                    factorize(block, group_size=size, damping=self.damping, order=self.order)
                    for block in fitted.blocks()
                ]
                for size in set(group_sizes)
            },
            judge=(held_out or fitted).blocks(),
            judged_on="held-out tokens" if held_out else "calibration tokens",
            tokens=fitted.tokens,
        )

    def _fit(
        self,
        checkpoint: Checkpoint,
        assignment: Assignment,
        factors: Sequence[Factor],
        evidence: _Evidence,
    ) -> _Attempt:
        started = time.perf_counter()
        name, rule = assignment.linear.name, assignment.rule
        if rule is None or rule.bits is None:
            raise ValueError(f"{name} is not to be quantized")
        weight = checkpoint.form(name)
        codes, scales, zeros = [], [], []
        losses = _Losses()
        try:
            for _, rows in row_chunks(weight):
                pieces = [
                    quantize_with_feedback(
                        rows[:, part],
                        factor,
                        bits=rule.bits,
                        group_size=rule.group_size,
                        symmetric=rule.symmetric,
                        grid=self.grid,
                        static_groups=self.static_groups,
                    )
                    for part, factor in zip(evidence.slices, factors, strict=True)
                ]
                chosen = torch.cat([piece for piece, _ in pieces], dim=1)
                grid = Grid(
                    scale=torch.cat([found.scale for _, found in pieces], dim=1),
                    zero=torch.cat([found.zero for _, found in pieces], dim=1),
                    bits=rule.bits,
                )
                groups = group_columns(rows, rule.group_size)
                nearest = GRIDS[self.grid](groups, rule.bits, symmetric=rule.symmetric)
                fitted = decode(chosen.view(groups.shape), grid)
                rounded = decode(encode(groups, nearest), nearest)
                losses.add(rows, _flat(fitted, rows), _flat(rounded, rows), evidence)
                codes.append(chosen.to(torch.uint8))
                scales.append(grid.scale)
                zeros.append(grid.zero)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from error
        form = affine_form(
            torch.cat(codes),
            Grid(scale=torch.cat(scales), zero=torch.cat(zeros), bits=rule.bits),
            group_size=rule.group_size,
            in_features=weight.shape[1],
            symmetric=rule.symmetric,
        )
        tied = checkpoint.spec.decoder.tied_head and assignment.linear.part == "embedding"
        row = describe_layer(
            assignment,
            form,
            method="gptq",
            reason=_TIED if tied else "",
            weight_error=losses.share(losses.weight_error, losses.weight),
            loss=losses.share(losses.fitted, losses.output),
            loss_rtn=losses.share(losses.rounded, losses.output),
            judged_on=evidence.judged_on,
            tokens=evidence.tokens,
            damping=max(factor.damping for factor in factors),
            damping_raised=any(factor.damping > self.damping for factor in factors),
            dead_columns=sum(factor.dead for factor in factors),
            hessian_blocks=len(factors),
            seconds=time.perf_counter() - started,
        )
        return _Attempt(
            layer=FinishedLayer(form=form, row=row), is_better=losses.fitted <= losses.rounded
        )


class _Losses:
    """Sums over the rows of a layer, of squares of weights and of outputs a token.

    With D the change of the weights, the mean squared change of the outputs is tr(D H D^T): exact
    for the tokens that H was taken from.
    """

    def __init__(self) -> None:
        self.weight = self.weight_error = 0.0
        self.output = self.fitted = self.rounded = 0.0

    def add(self, rows: Tensor, fitted: Tensor, rounded: Tensor, evidence: _Evidence) -> None:
        self.weight += float(rows.square().sum())
        self.weight_error += float((fitted - rows).square().sum())
        for part, hessian in zip(evidence.slices, evidence.judge, strict=True):
            H = hessian.to(torch.float32)
            self.output += _quadratic(rows[:, part], H)
            self.fitted += _quadratic((fitted - rows)[:, part], H)
            self.rounded += _quadratic((rounded - rows)[:, part], H)

    @staticmethod
    def share(part: float, whole: float) -> float:
        """A loss relative to what it is a part of."""
        return part / whole if whole > 0 else 0.0


def _quadratic(rows: Tensor, hessian: Tensor) -> float:
    narrow = rows.to(torch.float32)
    return float((narrow @ hessian).mul_(narrow).sum(dtype=torch.float64))


def _flat(groups: Tensor, rows: Tensor) -> Tensor:
    return groups.reshape(rows.shape[0], -1)[:, : rows.shape[1]]


def _block_width(width: int, group_sizes: Sequence[int]) -> int | None:
    """Width of a wide Hessian's diagonal blocks, a whole number of groups of every size."""
    if width <= _WHOLE_WIDTH:
        return None
    step = math.lcm(*group_sizes)
    return min(width, max(1, _BLOCK_WIDTH // step) * step)


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

"""Mixed precision: each layer gets the option that the whole model can best afford.

Measures what every option costs every layer (`sensitivity`), solves for the choice of least total
loss under a budget of bytes (`bit_allocation`), and quantizes with it as all calibrated quantizers
do. Embedding, head, tower and projector take part like any other layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Literal

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.gradients.divergence import DivergenceMeter
from pocketvlm.checkpoint import Checkpoint, StageRecord
from pocketvlm.compress.layerwise.scratch import find_document
from pocketvlm.compress.quantization.affine.gptq import AffineQuantizer
from pocketvlm.compress.quantization.affine.grid import GridKind, check_grid
from pocketvlm.compress.quantization.calibrated import CalibratedQuantizer
from pocketvlm.compress.quantization.codebook.quantizer import CodebookQuantizer
from pocketvlm.compress.quantization.codebook.shared import assign_owners, fit_shared_codebooks
from pocketvlm.compress.quantization.mixed.bit_allocation import Menu, Solution, solve_menu
from pocketvlm.compress.quantization.mixed.offers import count_float, loses_mask, offer_options
from pocketvlm.compress.quantization.mixed.per_layer import PerLayerQuantizer
from pocketvlm.compress.quantization.mixed.search_space import (
    CONTAINERS,
    Container,
    Option,
    check_option,
    find_layer_bytes,
    label_of,
    plan_option,
)
from pocketvlm.compress.quantization.mixed.sensitivity import Sensitivity, measure_sensitivity
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError, RecipeError
from pocketvlm.models.layers import LinearSpec
from pocketvlm.models.spec import ModelSpec
from pocketvlm.stages import PlanState, StageResult
from pocketvlm.weights.float_weights import is_float
from pocketvlm.weights.form import total_stored_bytes
from pocketvlm.weights.layout import LayerBytes, SparseLayout
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["MixedPrecision"]

_TABLE = "sensitivity.json"


@dataclass(frozen=True, kw_only=True)
class MixedPrecision(CalibratedQuantizer):
    """Chooses an option for every layer by measured sensitivity, under a budget, and quantizes.

    A pruned layer keeps its mask: options that cannot be stored under one are not offered to it,
    and its bytes are those of mask and kept elements.

    Attributes:
        options: What a layer may become: rules without part, match or blocks. An option whose
            groups are wider than a layer is not offered to it. Codebooks that layers share are
            paid once, by whatever layers of a part take them.
        average_bits: The budget as bits per weight over all weight matrices of the model, scales,
            zero points and layers that stay float included.
        budget_bytes: The budget in bytes; exactly one of the two is given.
        pins: Rules that fix layers; the first that matches a layer takes it off the menu.
        stored_as: Whose bytes are counted: the checkpoint's own `codes`, or those of a target's
            files, such as `onnx`, which stores 3 bits as 4.
        samples: Held-out calibration samples that sensitivity is measured on.
        sensitivity: A table that an earlier run measured; `None` measures.
        grid: How a group's grid is found.
        static_groups: Whether grids are made from the weights as they were.
        held_out: Share of the samples that no Hessian sees.
    """

    method: Literal["mixed"] = "mixed"
    options: tuple[Option, ...]
    average_bits: float | None = None
    budget_bytes: int | None = None
    pins: tuple[Option, ...] = ()
    stored_as: Container = "codes"
    samples: int = 24
    sensitivity: str | None = None
    grid: GridKind = "min_max"
    static_groups: bool = False
    held_out: float = 0.1875

    def __post_init__(self) -> None:
        if not self.options:
            raise ValueError("options must hold at least one option")
        for number, option in enumerate(self.options):
            try:
                check_option(option)
            except ValueError as error:
                raise ValueError(f"options.{number}: {error}") from error
        if len({label_of(option) for option in self.options}) < len(self.options):
            raise ValueError("options holds one option twice")
        if (self.average_bits is None) == (self.budget_bytes is None):
            raise ValueError("give either average_bits or budget_bytes")
        budget = self.average_bits if self.budget_bytes is None else self.budget_bytes
        if budget is None or not budget > 0:
            raise ValueError(f"the budget must be more than 0, not {budget}")
        if self.stored_as not in CONTAINERS:
            raise ValueError(
                f"stored_as {self.stored_as!r} is unknown; allowed are {', '.join(CONTAINERS)}"
            )
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, not {self.samples}")
        check_grid(self.grid)
        super().__post_init__()

    def plan(self, state: PlanState) -> PlanState:
        """Gives each layer a layout from a given table or else from a prior.

        The budget counts masked bytes of layers that earlier stages prune.

        Raises:
            RecipeError: The budget is below the smallest possible, a rule matches nothing, or an
                option cannot keep a layer's mask.
        """
        spec = state.spec
        densities = {
            linear.name: layout.density
            for linear, layout in state.layouts.items()
            if isinstance(layout, SparseLayout)
        }
        count = find_layer_bytes(self.stored_as, state.layer_bytes)
        floats = {
            linear: count_float(count, linear, densities.get(linear.name))
            for linear in spec.linears()
        }
        menu = self._menu(spec, floats, densities, count)
        table = None if self.sensitivity is None else Sensitivity.load(Path(self.sensitivity))
        if table is not None:
            self._require_complete(table, menu)
        solved = solve_menu(menu, self._budget(menu), table)
        layouts = assign_owners(
            {
                linear: (
                    option,
                    None
                    if option.keeps_float
                    else plan_option(option, linear, densities.get(linear.name)),
                )
                for linear, option in solved.chosen.items()
            }
        )
        state = state.with_layouts(layouts)
        if table is not None:
            return state
        return state.with_notes(
            "mixed: bits by layer are solved from a prior without data; the run measures, and may "
            "choose others within the same budget"
        )

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Measures, solves and quantizes the checkpoint in place.

        Raises:
            RecipeError: The budget is below the smallest possible, a rule matches nothing, a layer
                is quantized already, or a given table was measured on another model.
            CalibrationError: A sample cannot be used, or inputs of a layer are not finite.
            CheckpointError: A weight is too large for float16 scales.
        """
        forms = checkpoint.forms()
        for linear, form in forms.items():
            if not is_float(form):
                raise RecipeError(f"{linear.name}: is quantized already; quantize a layer once")
        densities = {
            linear.name: form.density
            for linear, form in forms.items()
            if isinstance(form, SparseWeight)
        }
        count = find_layer_bytes(self.stored_as, ctx.layer_bytes)
        floats: dict[LinearSpec, int] = {}
        for linear, form in forms.items():
            size = count_float(count, linear, densities.get(linear.name))
            # Floats that the checkpoint holds in 32 bits are wider than a published one's.
            floats[linear] = size if linear.name in densities else max(size, form.stored_bytes)
        menu = self._menu(checkpoint.spec, floats, densities, count)
        budget = self._budget(menu)
        # Before hours of measuring: a budget that nothing fits into does not depend on losses.
        solve_menu(menu, budget, None)
        table = self._table(checkpoint, calibration, menu, ctx)
        solved = solve_menu(menu, budget, table)
        scratch = None if ctx.scratch_dir is None else ctx.scratch_dir / solved.digest()
        done = self.quantize(
            checkpoint,
            calibration,
            ctx.with_scratch(scratch),
            rules=solved.rules(),
            begin=lambda items: self._begin(
                checkpoint, ((item.rule, item.linear) for item in items), ctx.seed
            ),
        )
        return self._describe(done, solved, table)

    def _begin(
        self,
        checkpoint: Checkpoint,
        readers: Iterable[tuple[Option | None, LinearSpec]],
        seed: int,
    ) -> PerLayerQuantizer:
        """Fits codebooks that several layers share, under rules that they may take."""
        return PerLayerQuantizer(
            feedback=self.feedback,
            affine=AffineQuantizer(grid=self.grid, static_groups=self.static_groups),
            codebook=CodebookQuantizer(
                shared=fit_shared_codebooks(checkpoint, readers, seed), seed=seed
            ),
        )

    def _budget(self, menu: Menu) -> int:
        """Bytes that all layers may take."""
        if self.average_bits is not None:
            return int(self.average_bits * menu.weights / 8)
        if self.budget_bytes is None:
            raise ValueError("a stage has one of its two budgets")
        return self.budget_bytes

    def _menu(
        self,
        spec: ModelSpec,
        float_bytes: Mapping[LinearSpec, int],
        densities: Mapping[str, float],
        layer_bytes: LayerBytes,
    ) -> Menu:
        return offer_options(
            spec,
            self.options,
            self.pins,
            float_bytes=float_bytes,
            densities=densities,
            layer_bytes=layer_bytes,
        )

    def _table(
        self,
        checkpoint: Checkpoint,
        calibration: CalibrationSet,
        menu: Menu,
        ctx: RunContext,
    ) -> Sensitivity:
        """The given table, the one of a run before this one, or what is measured now."""
        table = Sensitivity(
            model=checkpoint.source.sha256,
            stages=tuple(map(_settings_of, checkpoint.history)),
            calibration=calibration.sha256,
            tokens=0,
        )
        if self.sensitivity is not None:
            given = Sensitivity.load(Path(self.sensitivity))
            if not given.holds_for(table):
                raise RecipeError(
                    f"sensitivity {self.sensitivity!r}: was measured on another model or after "
                    "other stages; leave it out to measure again"
                )
            self._require_complete(given, menu)
            return given
        path = None if ctx.scratch_dir is None else ctx.scratch_dir / _TABLE
        if path is not None and find_document(path) is not None:
            table = Sensitivity.load(path)
        wanted = menu.choices
        if not table.missing(wanted):
            return table
        walk = self.walk(checkpoint, calibration, ctx)
        judges = list(calibration.samples[walk.first_held_out :])
        if not judges:
            raise CalibrationError(
                f"{calibration.name}: sensitivity is measured on held-out samples, and held_out "
                f"{self.held_out:g} of {len(calibration)} samples are none"
            )
        if len(judges) > self.samples:
            judges = Random(ctx.seed).sample(judges, self.samples)
        meter = DivergenceMeter(checkpoint, replace(calibration, samples=tuple(judges)))
        table.tokens = meter.tokens
        method = self._begin(checkpoint, menu.readers(), ctx.seed)

        def save() -> None:
            if path is not None:
                table.save(path)

        measure_sensitivity(table, wanted, walk, meter, method, ctx, save)
        return table

    def _require_complete(self, table: Sensitivity, menu: Menu) -> None:
        missing = table.missing(menu.choices)
        if missing:
            raise RecipeError(
                f"sensitivity {self.sensitivity!r}: lacks {missing} of the layers' options; leave "
                "it out to measure them"
            )

    def _describe(self, done: StageResult, solved: Solution, table: Sensitivity) -> StageResult:
        """Adds to what the quantizer says what was chosen, and why."""
        rows = tuple({**row, **solved.describe(row["name"])} for row in done.layers)
        notes = list(done.notes)
        offered, densities = solved.menu.options, solved.menu.densities
        fixed = [linear.name for linear, options in offered.items() if len(options) == 1]
        if fixed:
            notes.append(
                f"{len(fixed)} layers had no choice, by a pin or because a single option fits: "
                f"{', '.join(fixed[:4])}{', …' if len(fixed) > len(fixed[:4]) else ''}"
            )
        masked = [linear for linear in offered if linear.name in densities]
        for option in self.options:
            without = [linear for linear in masked if loses_mask(option, linear)]
            if without:
                notes.append(
                    f"{len(without)} pruned layers were not offered {label_of(option)}: its "
                    "elements cannot be stored one by one under a mask"
                )
        if solved.price == 0:
            notes.append("the budget binds nothing: every layer has the option of least loss")
        if 0 < table.tokens < _FEW_TOKENS:
            notes.append(f"sensitivity was measured on {table.tokens} answer tokens only")
        return replace(
            done,
            layers=rows,
            notes=tuple(notes),
            metrics={
                **done.metrics,
                "budget_bytes": solved.budget,
                "chosen_bytes": solved.size,
                "chosen_average_bits": solved.size * 8 / solved.menu.weights,
                "form_bytes": total_stored_bytes(done.checkpoint.forms().values()),
                "predicted_divergence": solved.loss,
                "divergence_per_byte": solved.price,
                "sensitivity": table.to_json(),
            },
        )


_FEW_TOKENS = 32


def _settings_of(record: StageRecord) -> str:
    """Names a stage and all its settings: how much was pruned changes what a bit is worth."""
    content = json.dumps(record.parameters, sort_keys=True)
    return f"{record.method} {hashlib.sha256(content.encode()).hexdigest()[:12]}"

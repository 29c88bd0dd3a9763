"""plan: validates a recipe against a model and predicts sizes, before any compute.

Reads configuration and the headers of weight files. What a target cannot run is refused here, with
the reason and what would work. Predictions are labelled predictions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.compress.tokens.schedule.stage import DropTokens
from pocketvlm.context import PrefillTimes
from pocketvlm.device_bench.devices import Device, load_device
from pocketvlm.errors import CheckpointError, RecipeError, UnsupportedError, join_problems
from pocketvlm.models.layers import PARTS
from pocketvlm.models.spec import ModelSpec
from pocketvlm.pipeline.advice.advice import Advice, advise
from pocketvlm.pipeline.compress_memory import predict_compress_bytes
from pocketvlm.pipeline.compress_time.predict import CompressTime, predict_compress_time
from pocketvlm.pipeline.plan_memory import (
    FLOAT32_BYTES,
    TURN_TOKENS,
    predict_memory,
)
from pocketvlm.pipeline.planned_graphs import PlannedGraph, planned_graphs
from pocketvlm.pipeline.predict import DevicePrediction, predict_on
from pocketvlm.pipeline.prefill_times import prefill_times
from pocketvlm.pipeline.preflight import Findings, Readers, check_data, check_model
from pocketvlm.pipeline.sources import inspect_model
from pocketvlm.processor import PROCESSOR_FILES
from pocketvlm.recipes.load import Recipe
from pocketvlm.recipes.stages import layer_bytes_by_target
from pocketvlm.reference.shapes import Shape
from pocketvlm.stages import PlanState, Stage, Target, check_order
from pocketvlm.stages.photo import PHOTO, photo_grid, photo_tokens
from pocketvlm.stages.walk_options import WalkOptions

__all__ = ["Plan", "plan", "plan_stages", "recipe_prefill_times"]

_SOURCE_BYTES_A_WEIGHT = 2  # checkpoints are published in bf16


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The predicted outcome of a recipe for a model.

    Attributes:
        visual_tokens: Tokens per tile after reduction; a picture is one tile unless it is split.
        visual_tokens_full: Tokens per tile before it.
        tower_patches: Patches per tile that the tower's last block runs on.
        tower_patches_full: Patches per tile.
        photo_tiles: Tiles of a photo of 640 x 480.
        photo_tokens: Visual tokens of it that enter the decoder.
        photo_tokens_full: The same before reduction.
        most_tiles: Tiles of the picture that has most.
        source_bytes: Bytes of the source's weights in bf16.
        part_bytes: Predicted weight bytes by part of the model, scales included.
        weight_bytes: Predicted bytes of the largest target's weights.
        bundle_bytes: The same, with graphs and processor files.
        kv_cache_bytes: Bytes of the decoder's cache for one picture and a short chat.
        ram_bytes: Predicted memory on the device: weights as they are held, cache, activations, of
            the vision graph that needs most.
        compress_bytes: Predicted memory of `compress` itself, at the least, without the toolkits
            that targets other than ONNX convert with.
        compress_time: How long the stages take on this host; `None` where none computes.
        refused: What a target or the device cannot run, and what would work.
        warnings: What is allowed, but should be known.
        prediction: Times on the device that was asked for; `None` without one.
        advice: What pays for the model; `None` unless it was asked for.
        vision_graphs: The vision graphs where there are several; other figures are the first's, or
            those of the tile budget.
        tile_budget: Which of them sees which tile, in words; empty where the first sees all.
    """

    model: str
    recipe: str
    targets: tuple[str, ...]
    visual_tokens: int
    visual_tokens_full: int
    tower_patches: int
    tower_patches_full: int
    photo_tiles: int
    photo_tokens: int
    photo_tokens_full: int
    most_tiles: int
    source_bytes: int
    part_bytes: Mapping[str, int]
    weight_bytes: int
    bundle_bytes: int
    kv_cache_bytes: int
    ram_bytes: int
    compress_bytes: int
    compress_time: CompressTime | None
    refused: tuple[str, ...]
    warnings: tuple[str, ...]
    prediction: DevicePrediction | None = None
    advice: Advice | None = None
    vision_graphs: tuple[PlannedGraph, ...] = ()
    tile_budget: str = ""

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The plan for people."""
        return [
            f"model          {self.model}",
            f"recipe         {self.recipe} -> {', '.join(self.targets)}",
            f"visual tokens  {self.visual_tokens} of {self.visual_tokens_full}{self._tiles()}",
            *(graph.line() for graph in self.vision_graphs),
            *([f"tile budget    {self.tile_budget}"] if self.tile_budget else ()),
            *self._tower(),
            *(
                f"  {part:<12} {count / 1e6:10.2f} MB predicted"
                for part, count in self.part_bytes.items()
            ),
            f"bundle         {self.bundle_bytes / 1e6:.2f} MB predicted, "
            f"{self.bundle_bytes / self.source_bytes:.3f} of the source's "
            f"{self.source_bytes / 1e6:.2f} MB",
            f"KV cache       {self.kv_cache_bytes / 1e6:.2f} MB for a picture and "
            f"{TURN_TOKENS} tokens of text",
            f"memory         {self.ram_bytes / 1e6:.0f} MB on the device, predicted; at least "
            f"{self.compress_bytes / 1e6:.0f} MB to compress{self._toolkits()}",
            *(() if self.compress_time is None else self.compress_time.lines()),
            *(() if self.prediction is None else self.prediction.lines()),
            *(() if self.advice is None else self.advice.lines()),
            *(f"warning        {warning}" for warning in self.warnings),
            *(f"refused        {reason}" for reason in self.refused),
        ]

    def _tower(self) -> list[str]:
        if self.tower_patches == self.tower_patches_full:
            return []
        return [
            f"tower          {self.tower_patches:,} of {self.tower_patches_full:,} patches in its "
            "last block"
        ]

    def _toolkits(self) -> str:
        own = [target for target in self.targets if target != "onnx"]
        return f", beside what the toolkit of {' and of '.join(own)} takes" if own else ""

    def _tiles(self) -> str:
        if self.most_tiles == 1:
            return ""
        return (
            f" per tile; a photo of {PHOTO[0]} x {PHOTO[1]} is cut into {self.photo_tiles} "
            f"tiles, {self.photo_tokens} tokens; no picture into more than {self.most_tiles} tiles"
        )

    def raise_if_refused(self) -> None:
        """Raises the refusals as one line.

        Raises:
            UnsupportedError: Something cannot be run.
        """
        if self.refused:
            raise UnsupportedError(join_problems(self.refused))


def plan(
    model: Path | Shape,
    recipe: Recipe,
    *,
    device: str | None = None,
    calibration: CalibrationSet | None = None,
    evaluation: CalibrationSet | None = None,
    advises: bool = False,
    measured: Sequence[Path] = (),
) -> Plan:
    """Plans a recipe for a model.

    Args:
        model: A checkpoint directory, of which no weight is loaded, or a shape.
        recipe: The recipe.
        device: A device profile, by name or path: its memory must do, and times are predicted.
        calibration: The calibration set, of which every row is checked.
        evaluation: The questions to score, likewise.
        advises: Whether the plan says what pays, on the device or on this host.
        measured: Scored runs of the model, for the advice.

    Raises:
        InputError: A run is not of this model, or has no score.
        RecipeError: A rule matches nothing, a count is too large, an order is wrong.
        UnsupportedError: The model's family is not supported, or a score does not suit it.
    """
    spec, notes = inspect_model(model)
    profile = load_device(device) if device is not None else None
    state = plan_stages(recipe.stages, spec, recipe.targets)
    visions = state.each_vision()
    refused: list[str] = []
    warnings = [*notes, *state.notes]
    part_bytes: dict[str, int] = {}
    for target in recipe.targets:
        prediction = target.predict(
            state.spec, state.layouts, others=[vision.spec for vision in visions[1:]]
        )
        if target.missing_toolkit is not None:
            refused.append(f"{target.method}: {target.missing_toolkit}")
        refused += target.refuse(state)
        warnings += (*prediction.warnings, *_context_warnings(target, state))
        if sum(prediction.part_bytes.values()) > sum(part_bytes.values()):
            part_bytes = dict(prediction.part_bytes)
    weight_bytes = sum(part_bytes.values())
    row_bytes = 0 if spec.line_break is None else FLOAT32_BYTES * spec.decoder.hidden_size
    memories = [predict_memory(vision, recipe.targets) for vision in (state, *visions)]
    ram_bytes = max(memory.total_bytes for memory in memories)
    if profile is not None:
        refused += (
            *_runtime_refusals(profile, recipe.targets),
            *_memory_refusals(profile, ram_bytes),
        )
    if isinstance(model, Shape):
        file_bytes = model.text_bytes
        if calibration is not None or evaluation is not None:
            warnings.append("a shape has no tokenizer: rows of the data could not be checked")
    else:
        file_bytes = sum(file.stat().st_size for file in model.glob("*.json"))
        found = _check_processor(model, spec, recipe, state, calibration, evaluation)
        refused += found.problems
        warnings += found.notes
    source = sum(x.out_features * x.in_features for x in spec.linears()) * _SOURCE_BYTES_A_WEIGHT
    return Plan(
        model=model.name,
        recipe=recipe.name,
        targets=tuple(target.method for target in recipe.targets),
        visual_tokens=state.visual_tokens,
        visual_tokens_full=spec.visual_tokens,
        tower_patches=min(
            (state.spec.tower.patches, *(merge.patches for merge in state.spec.tower.merges))
        ),
        tower_patches_full=state.spec.tower.patches,
        photo_tiles=photo_grid(state.spec).tiles,
        photo_tokens=photo_tokens(state),
        photo_tokens_full=photo_grid(spec).placeholders(spec.visual_tokens),
        most_tiles=1 if state.spec.tiling is None else state.spec.tiling.most_tiles,
        source_bytes=source,
        part_bytes={part: part_bytes[part] for part in (*PARTS, "other") if part in part_bytes},
        weight_bytes=weight_bytes,
        bundle_bytes=weight_bytes + row_bytes + file_bytes,
        kv_cache_bytes=memories[0].cache_bytes,
        ram_bytes=ram_bytes,
        compress_bytes=predict_compress_bytes(spec, state, recipe.stages, recipe.targets),
        compress_time=predict_compress_time(
            state, recipe.stages, samples=recipe.calibration.samples
        ),
        refused=tuple(refused),
        warnings=tuple(warnings),
        prediction=None if profile is None else predict_on(profile, state, recipe.targets),
        advice=advise(state, recipe.targets, profile or load_device("host"), measured=measured)
        if advises
        else None,
        vision_graphs=planned_graphs(state, profile, recipe.targets),
        tile_budget="" if state.tile_budget is None else state.tile_budget.describe(),
    )


def _check_processor(
    model: Path,
    spec: ModelSpec,
    recipe: Recipe,
    state: PlanState,
    calibration: CalibrationSet | None,
    evaluation: CalibrationSet | None,
) -> Findings:
    """Checks the processor of a checkpoint directory, and every row of the data with it."""
    if not any((model / name).is_file() for name in PROCESSOR_FILES):
        note = "no tokenizer and no image processor are here: they could not be checked"
        return Findings(notes=(note,))
    try:
        readers = Readers.open(model, spec)
    except CheckpointError as error:
        return Findings(problems=(str(error),))
    found = check_model(readers, model)
    if found.problems:
        return found
    return found.joined(
        check_data(
            readers,
            recipe.targets,
            kept=max(vision.visual_tokens for vision in state.each_vision()),
            calibration=calibration,
            evaluation=evaluation,
        )
    )


def plan_stages(
    stages: Sequence[Stage], spec: ModelSpec, targets: Sequence[Target] = ()
) -> PlanState:
    """The state of a model after planned stages.

    Args:
        stages: The stages, in order.
        spec: The model.
        targets: The targets to export, for stages that count a target's bytes.

    Raises:
        RecipeError: A stage is in the wrong position or does not fit; the message names it.
        UnsupportedError: The model lacks what a stage needs.
    """
    check_order(stages)
    times = recipe_prefill_times(stages, spec, targets)
    state = PlanState.of(spec, layer_bytes_by_target(targets), times)
    for stage in stages:
        if spec.taps:
            _require_taps(stage, len(spec.taps))
        try:
            state = stage.plan(state)
        except RecipeError as error:
            if str(error).startswith(f"{stage.method}:"):
                raise
            raise RecipeError(f"{stage.method}: {error}") from error
    return state


def _require_taps(stage: Stage, taps: int) -> None:
    """Refuses a stage that leaves out rows which blocks of the tower add to the decoder.

    Raises:
        RecipeError: It, or an option of it, does.
    """
    if not stage.carries_taps:
        raise RecipeError(
            f"{stage.method}: {taps} blocks of the tower add rows to the decoder, which "
            f"{stage.method} does not carry; rtn, gptq, codebook, mixed, sparsegpt_gptq, awq, "
            "prune, prune_width, reduce_tokens and set_resolution do"
        )
    if stage.takes_gradients:
        raise RecipeError(
            f"{stage.method}: {taps} blocks of the tower add rows to the decoder, which gradients "
            "of the whole model do not carry; scores and orders without gradients do"
        )
    if not isinstance(stage, WalkOptions):
        return
    if stage.modality_weights == "gradient":
        raise RecipeError(
            f"{stage.method}: modality_weights 'gradient' does not carry the rows that {taps} "
            "blocks of the tower add to the decoder; allowed are uniform, balanced and a number"
        )
    if stage.carries_float:
        raise RecipeError(
            f"{stage.method}: {taps} blocks of the tower add rows to the decoder, which the float "
            "model that runs along does not have; allowed is what needs none, drift_share: 0 or "
            "update: none"
        )


def recipe_prefill_times(
    stages: Sequence[Stage], spec: ModelSpec, targets: Sequence[Target]
) -> PrefillTimes | None:
    """What prefill of a recipe's model takes, of which no visual row is dropped by the recipe.

    `None` without targets: what is exported says which kernels run.
    """
    if not targets:
        return None
    others = tuple(stage for stage in stages if not isinstance(stage, DropTokens))
    return prefill_times(lambda: plan_stages(others, spec, targets), targets)


def _context_warnings(target: Target, state: PlanState) -> list[str]:
    """What is to be said where a conversation about a photo is longer than the target's cache."""
    rows, tokens = target.capacity(state.spec), photo_tokens(state)
    if tokens + TURN_TOKENS <= rows:
        return []
    return [
        f"{target.method}: a photo of {PHOTO[0]} x {PHOTO[1]} takes {tokens:,} of the {rows:,} "
        f"tokens of a conversation, and leaves fewer than {TURN_TOKENS} for text; limit_tiles or "
        "reduce_tokens would make room"
    ]


def _runtime_refusals(profile: Device, targets: Sequence[Target]) -> list[str]:
    """Targets that the device has no runtime for; a profile that names none says nothing."""
    runtimes = [runtime.name for runtime in profile.runtimes]
    return [
        f"{profile.name}: runs {', '.join(runtimes)}, and not {target.method}"
        for target in targets
        if runtimes and target.method not in runtimes
    ]


def _memory_refusals(profile: Device, ram_bytes: int) -> list[str]:
    limit, ram = profile.app_memory_bytes.value, profile.ram_bytes.value
    if limit is not None and ram_bytes > limit:
        return [
            f"{profile.name}: needs {ram_bytes / 1e9:.2f} GB, and an app may use "
            f"{limit / 1e9:.2f} GB; fewer bits or a smaller model would fit"
        ]
    if limit is not None or ram is None or ram_bytes <= ram / 2:
        return []
    return [
        f"{profile.name}: needs {ram_bytes / 1e9:.2f} GB, and an app should stay below half of "
        f"the device's {ram / 1e9:.0f} GB; fewer bits or a smaller model would fit"
    ]

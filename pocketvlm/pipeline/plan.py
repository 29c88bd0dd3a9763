"""plan: validates a recipe against a model and predicts sizes, before any compute.

Reads configuration and the headers of weight files. What a target cannot run is refused here, with
the reason and what would work. Predictions are labelled predictions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pocketvlm.calibration.data.source import CalibrationSet
from pocketvlm.device_bench.devices import Device, load_device
from pocketvlm.errors import CheckpointError, RecipeError, UnsupportedError, join_problems
from pocketvlm.models.spec import PARTS, LinearSpec, ModelSpec
from pocketvlm.pipeline.preflight import Readers, check_data, check_model
from pocketvlm.pipeline.sources import inspect_model
from pocketvlm.processor import PROCESSOR_FILES
from pocketvlm.recipes.load import Recipe
from pocketvlm.recipes.stages import Stage, Target, check_order
from pocketvlm.weights.layout import SparseLayout, WeightLayout, plan_behind_mask

__all__ = ["Plan", "kept_tokens", "plan"]

_SOURCE_BYTES_A_WEIGHT = 2  # a checkpoint is published in bf16
_FLOAT_BITS = 32  # of a number in a KV cache that no stage quantizes
_TURN_TOKENS = 256  # text of a short chat, beside the picture


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe would do to a model.

    Attributes:
        visual_tokens: Tokens an image costs after reduction.
        visual_tokens_full: Before it.
        source_bytes: The weights in bf16.
        part_bytes: Predicted weight bytes by part of the model, scales included.
        weight_bytes: Predicted bytes of the largest target's weights.
        bundle_bytes: The same with graphs and processor files.
        kv_cache_bytes: The decoder's cache for one picture and a short chat.
        ram_bytes: Predicted memory on the device: weights, cache and activations.
        refused: What a target or the device cannot run, with what would work.
        warnings: What is allowed, and should be known.
    """

    model: str
    recipe: str
    targets: tuple[str, ...]
    visual_tokens: int
    visual_tokens_full: int
    source_bytes: int
    part_bytes: Mapping[str, int]
    weight_bytes: int
    bundle_bytes: int
    kv_cache_bytes: int
    ram_bytes: int
    refused: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The plan for people."""
        return [
            f"model          {self.model}",
            f"recipe         {self.recipe} -> {', '.join(self.targets)}",
            f"visual tokens  {self.visual_tokens} of {self.visual_tokens_full}",
            *(
                f"  {part:<12} {count / 1e6:10.2f} MB predicted"
                for part, count in self.part_bytes.items()
            ),
            f"bundle         {self.bundle_bytes / 1e6:.2f} MB predicted, "
            f"{self.bundle_bytes / self.source_bytes:.3f} of the source's "
            f"{self.source_bytes / 1e6:.2f} MB",
            f"KV cache       {self.kv_cache_bytes / 1e6:.2f} MB for a picture and "
            f"{_TURN_TOKENS} tokens of text",
            f"memory         {self.ram_bytes / 1e6:.0f} MB on the device, predicted",
            *(f"warning        {warning}" for warning in self.warnings),
            *(f"refused        {reason}" for reason in self.refused),
        ]

    def raise_if_refused(self) -> None:
        """Raises the refusals as one line.

        Raises:
            UnsupportedError: Something cannot be run.
        """
        if self.refused:
            raise UnsupportedError(join_problems(self.refused))


def plan(
    model: Path,
    recipe: Recipe,
    *,
    device: str | None = None,
    calibration: CalibrationSet | None = None,
    evaluation: CalibrationSet | None = None,
) -> Plan:
    """Plans a recipe for a model.

    Args:
        model: A checkpoint directory; no weight of it is loaded.
        recipe: What would be done.
        device: Name of a device profile whose memory it must fit.
        calibration: What stages would look at, to check every row of it.
        evaluation: Questions that would be scored, likewise.

    Raises:
        RecipeError: A rule matches nothing, a count is too large, an order is wrong.
        UnsupportedError: The model's family is not supported, or a score does not suit it.
    """
    spec, notes = inspect_model(model)
    profile = load_device(device) if device is not None else None
    check_order(recipe.stages)
    kept = kept_tokens(recipe.stages, spec)
    compressed, forms = _planned_forms(recipe.stages, spec)
    cache_bits = _cache_bits(recipe.stages)
    refused: list[str] = []
    warnings = [*notes, *_notes(recipe.stages, spec)]
    part_bytes: dict[str, int] = {}
    loaded_bytes = 0
    for target in recipe.targets:
        prediction = target.predict(compressed, forms)
        refused += prediction.refused
        warnings += prediction.warnings
        refused += _cache_refusals(target, cache_bits)
        refused += _row_refusals(target, recipe.stages)
        if sum(prediction.part_bytes.values()) > sum(part_bytes.values()):
            part_bytes = dict(prediction.part_bytes)
        loaded = sum(prediction.part_bytes.values()) + prediction.unpacked_bytes
        loaded_bytes = max(loaded_bytes, loaded)
    weight_bytes = sum(part_bytes.values())
    decoder = compressed.decoder
    layer_row_bits = 2 * decoder.kv_heads * decoder.head_dim * cache_bits
    visual_layers = _visual_layers(recipe.stages, compressed)
    rows = visual_layers * kept + decoder.depth * _TURN_TOKENS
    cache_bytes = layer_row_bits // 8 * rows
    files = sum(file.stat().st_size for file in model.glob("*.json"))
    ram_bytes = loaded_bytes + cache_bytes + _activation_bytes(compressed)
    if profile is not None:
        refused += _device_refusals(profile, ram_bytes)
    if any((model / name).is_file() for name in PROCESSOR_FILES):
        try:
            readers = Readers.open(model, spec)
        except CheckpointError as error:
            refused.append(str(error))
        else:
            found = check_model(readers, model)
            if not found.problems:
                rows_found = check_data(
                    readers,
                    recipe.targets,
                    kept=kept,
                    calibration=calibration,
                    evaluation=evaluation,
                )
                found = found.joined(rows_found)
            refused += found.problems
            warnings += found.notes
    else:
        warnings.append("no tokenizer and no image processor are here: they could not be checked")
    source = sum(x.out_features * x.in_features for x in spec.linears()) * _SOURCE_BYTES_A_WEIGHT
    return Plan(
        model=model.name,
        recipe=recipe.name,
        targets=tuple(target.method for target in recipe.targets),
        visual_tokens=kept,
        visual_tokens_full=spec.visual_tokens,
        source_bytes=source,
        part_bytes={part: part_bytes[part] for part in (*PARTS, "other") if part in part_bytes},
        weight_bytes=weight_bytes,
        bundle_bytes=weight_bytes + files,
        kv_cache_bytes=cache_bytes,
        ram_bytes=ram_bytes,
        refused=tuple(refused),
        warnings=tuple(warnings),
    )


def _notes(stages: Sequence[Stage], spec: ModelSpec) -> list[str]:
    """What stages say of their own predictions and of their costs, where they have to."""
    notes: list[str] = []
    for stage in stages:
        plan_notes = getattr(stage, "plan_notes", None)
        plan_costs = getattr(stage, "plan_costs", None)
        spec_after = getattr(stage, "spec_after", None)
        notes += () if plan_notes is None else plan_notes()
        notes += () if plan_costs is None else plan_costs(spec)
        spec = spec if spec_after is None else spec_after(spec)
    return notes


def kept_tokens(stages: tuple[Stage, ...], spec: ModelSpec) -> int:
    """Visual tokens that an image costs behind the stages."""
    for stage in stages:
        reducer = getattr(stage, "reducer", None)
        if reducer is not None:
            return int(reducer(spec).keep)
    return spec.visual_tokens


def _cache_bits(stages: tuple[Stage, ...]) -> int:
    """Bits of a number in the KV cache."""
    return next(
        (int(bits) for stage in stages if (bits := getattr(stage, "cache_bits", None))), _FLOAT_BITS
    )


def _cache_refusals(target: Target, bits: int) -> list[str]:
    """A target says itself which caches it keeps, beside float32 ones."""
    supported: frozenset[int] = getattr(target, "cache_bits", frozenset())
    if bits == _FLOAT_BITS or bits in supported:
        return []
    return [
        f"{target.method}: keeps no KV cache of {bits} bits; leave quantize_cache out of the "
        "stages for this target"
    ]


def _visual_layers(stages: tuple[Stage, ...], spec: ModelSpec) -> int:
    """Layers whose cache holds visual rows; all of them where only calibration will tell."""
    for stage in stages:
        visual_layers = getattr(stage, "visual_layers", None)
        if visual_layers is not None:
            return visual_layers(spec) or spec.decoder.depth
    return spec.decoder.depth


def _row_refusals(target: Target, stages: tuple[Stage, ...]) -> list[str]:
    """A target says itself whether visual rows may end before the last layer."""
    ending = [stage.method for stage in stages if "ended_tokens" in stage.provides]
    if not ending or getattr(target, "ends_visual_rows", False):
        return []
    return [
        f"{target.method}: runs every row through every decoder layer; leave {ending[0]} out of "
        "the stages for this target (reduce_tokens runs everywhere), or export to ONNX alone"
    ]


def _planned_forms(
    stages: tuple[Stage, ...], spec: ModelSpec
) -> tuple[ModelSpec, dict[LinearSpec, WeightLayout | None]]:
    """The model behind all stages, and what each layer ends as; `None` for those that stay float.

    A stage may change which layers there are, as one that unties the head does.
    """
    forms: dict[LinearSpec, WeightLayout | None] = {}
    for stage in stages:
        spec_after = getattr(stage, "spec_after", None)
        if spec_after is not None:
            spec = spec_after(spec)
        with _naming(stage):
            found = _forms_after(stage, spec, forms)
        forms.update(
            {
                linear: _keep_mask(linear, forms.get(linear), form)
                for linear, form in found.items()
                if form is not None
            }
        )
    return spec, {linear: forms.get(linear) for linear in spec.linears()}


@contextmanager
def _naming(stage: Stage) -> Iterator[None]:
    """A refusal names its stage: several stages have rules."""
    try:
        yield
    except RecipeError as error:
        if str(error).startswith(f"{stage.method}:"):
            raise
        raise RecipeError(f"{stage.method}: {error}") from error


def _forms_after(
    stage: Stage, spec: ModelSpec, planned: Mapping[LinearSpec, WeightLayout | None]
) -> Mapping[LinearSpec, WeightLayout | None]:
    """What a stage will make of layers; empty for one that changes no weights.

    A stage that counts bytes has to know what it finds, others know a layer by its specification.
    """
    plan_forms_after = getattr(stage, "plan_forms_after", None)
    if plan_forms_after is not None:
        return dict(plan_forms_after(spec, planned))
    plan_forms = getattr(stage, "plan_forms", None)
    return {} if plan_forms is None else dict(plan_forms(spec))


def _keep_mask(
    linear: LinearSpec, before: WeightLayout | None, found: WeightLayout
) -> WeightLayout:
    """A quantizer stores the elements that an earlier stage keeps, behind the same mask."""
    if isinstance(before, SparseLayout):
        return plan_behind_mask(linear.name, before, found)
    return found


def _activation_bytes(spec: ModelSpec) -> int:
    """The widest layer of the tower, twice, in float32: what the vision graph peaks at."""
    tower = spec.tower
    tokens = tower.tokens
    return 2 * 4 * tokens * max(tower.ffn_size, 3 * tower.hidden_size)


def _device_refusals(profile: Device, ram_bytes: int) -> list[str]:
    if profile.ram_bytes is None or ram_bytes <= profile.ram_bytes // 2:
        return []
    return [
        f"{profile.name}: needs {ram_bytes / 1e9:.2f} GB, and an app should stay below half of "
        f"the device's {profile.ram_bytes / 1e9:.0f} GB; fewer bits or a smaller model would fit"
    ]

"""Predicts what a planned model takes on a device: the plan's counts at the device's rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from pocketvlm.device_bench.devices import Device
from pocketvlm.device_bench.prediction.costs import ExportedModel
from pocketvlm.device_bench.prediction.device_rates import rates_of
from pocketvlm.device_bench.prediction.rates import (
    BYTE_ROWS_KERNEL,
    FLOAT_KERNEL,
    quantized_kernel,
)
from pocketvlm.device_bench.prediction.roofline import CacheType, Question, Times, predict_times
from pocketvlm.device_bench.prediction.work import BundleWork, ModelWork, count_work
from pocketvlm.device_bench.workload import PRESETS, Workload
from pocketvlm.export.onnx.limits import container_bits
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.models.images.tilings.tile_grid import ONE_TILE, TileGrid
from pocketvlm.models.layers import LinearSpec
from pocketvlm.models.spec import ModelSpec
from pocketvlm.pipeline.plan_memory import decoder_memory, predict_memory
from pocketvlm.stages import PlanState, Target
from pocketvlm.weights.layout import AffineLayout, WeightLayout, without_mask

__all__ = [
    "PREDICTED_WORKLOAD",
    "DevicePrediction",
    "cache_type",
    "exported_model",
    "model_work",
    "predict_on",
    "predict_work",
    "question_of",
]

PREDICTED_WORKLOAD = PRESETS["vlm"]
"""What is predicted unless another workload is asked for."""

_CPU_TARGETS = ("onnx", "executorch")
_FLOAT_CACHE_BITS = 32


@dataclass(frozen=True, kw_only=True)
class DevicePrediction:
    """What a model is predicted to take on a device.

    Attributes:
        device: Name of the profile.
        basis: What the prediction is made from; where there is none, why.
        threads: Threads that it is for; `None` where nothing was predicted.
        workload: Name of the workload.
        rows: Rows of the prompt.
        tiles: Tiles of its picture.
        times: The times; `None` where they cannot be predicted.
    """

    device: str
    basis: str
    threads: int | None
    workload: str
    rows: int
    tiles: int
    times: Times | None

    def lines(self) -> list[str]:
        """The prediction for people."""
        if self.times is None:
            return [f"times          not predicted for {self.device}: {self.basis}"]
        workload = PREDICTED_WORKLOAD
        return [
            f"times          predicted for {self.device}, {self.threads} threads, {self.basis}",
            f"               workload {self.workload}: a picture of {workload.image_size} x "
            f"{workload.image_size} in {self.tiles} tiles, {self.rows} rows, "
            f"{workload.new_tokens} new tokens",
            *(
                f"  {item.name:<16} {getattr(self.times, item.name):10.1f} predicted"
                for item in fields(Times)
            ),
        ]


def predict_on(
    device: Device, state: PlanState, targets: Sequence[Target], *, workload: Workload | None = None
) -> DevicePrediction:
    """Predicts times of a planned model on a device.

    Args:
        device: The device's profile.
        state: The model as its stages leave it.
        targets: The recipe's targets, of which one has to run on the CPU.
        workload: What is asked; `PREDICTED_WORKLOAD` by default.
    """
    asked = workload or PREDICTED_WORKLOAD
    question = question_of(state, asked)
    found = rates_of(device)
    model = model_work(state, targets)
    empty = DevicePrediction(
        device=device.name,
        basis="",
        threads=None,
        workload=asked.name,
        rows=question.rows,
        tiles=question.tiles,
        times=None,
    )
    if isinstance(model, str):
        return replace(empty, basis=model)
    rates, basis = found
    if rates is None:
        return replace(empty, basis=basis)
    if not any(target.method == "onnx" for target in targets):
        basis += "; with the rates of ONNX Runtime's kernels, since others were not calibrated"
    times = predict_times(model, question, rates)
    return replace(empty, basis=basis, threads=rates.threads, times=times)


def question_of(state: PlanState, workload: Workload) -> Question:
    """A workload as rows and tiles of a model; its pictures are the generated, square ones."""
    spec, side = state.spec, workload.image_size
    pictures = 0 if side is None else workload.pictures
    grid = _grid(spec, side)
    return Question(
        text_rows=workload.prompt_tokens,
        visual_rows=pictures * state.most_rows(grid),
        tiles_by_vision=(pictures * grid.tiles,),
        picture_pixels=pictures * (side or 0) ** 2,
        new_tokens=workload.new_tokens,
        cache=cache_type(state),
    )


def predict_work(state: PlanState, targets: Sequence[Target]) -> BundleWork:
    """What a bundle's file says of its work: the counts that a plan predicts from.

    Args:
        state: The model that the bundle holds.
        targets: What it is exported to.
    """
    visions = state.each_vision()
    return BundleWork(
        model=model_work(state, targets),
        weight_bytes={
            target.method: predict_memory(state, (target,)).weight_bytes for target in targets
        },
        activation_bytes=tuple(
            predict_memory(vision, targets).activation_bytes for vision in visions
        ),
        decoder=decoder_memory(state),
    )


def model_work(state: PlanState, targets: Sequence[Target]) -> ModelWork | str:
    """What the graphs of a model compute, or why its kernels were never calibrated."""
    models = [exported_model(vision, targets) for vision in state.each_vision()]
    known = [model for model in models if not isinstance(model, str)]
    return count_work(*known) if len(known) == len(models) else str(models[0])


def cache_type(state: PlanState) -> CacheType:
    """Type of a model's KV cache."""
    return "float32" if state.cache_bits == _FLOAT_CACHE_BITS else "int8"


def exported_model(state: PlanState, targets: Sequence[Target]) -> ExportedModel | str:
    """The model with the kernel of every matrix, or why its kernels were never calibrated."""
    if not any(target.method in _CPU_TARGETS for target in targets):
        names = ", ".join(target.method for target in targets)
        return f"nothing is known of the speed of {names}; onnx and executorch run on the CPU"
    onnx = next((target for target in targets if isinstance(target, ToOnnx)), ToOnnx())
    if onnx.accuracy_level == 0:
        return "accuracy_level 0 was not calibrated; level 4 was"
    kernels: dict[LinearSpec, str] = {}
    for linear, layout in state.layouts.items():
        kernel = _kernel(layout, linear.in_features)
        if kernel is None:
            return f"{linear.name}: float zero points were not calibrated; integers were"
        kernels[linear] = kernel
    return ExportedModel(
        spec=state.spec,
        kernels=kernels,
        visual_tokens=state.visual_tokens,
        visual_schedule=state.counted_schedule,
        least_prefill_rows=onnx.prefill_rows(state.spec),
    )


def _kernel(layout: WeightLayout | None, columns: int) -> str | None:
    """What multiplies with a matrix; codebooks and what a mask makes float are dense in memory."""
    plain = without_mask(layout)
    if not isinstance(plain, AffineLayout):
        return FLOAT_KERNEL
    if plain.float_zeros:
        return None
    if plain.has_byte_rows(columns):
        return BYTE_ROWS_KERNEL
    return quantized_kernel(container_bits(plain.bits), plain.group_size)


def _grid(spec: ModelSpec, side: int | None) -> TileGrid:
    return ONE_TILE if spec.tiling is None or side is None else spec.tiling.grid(side, side)

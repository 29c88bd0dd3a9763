"""The ExecuTorch target: one program for XNNPACK, with the cache and all weights inside."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

import pocketvlm.errors
from pocketvlm.bundle import Component, TensorSignature
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.child_process import module_command, start_child
from pocketvlm.context import RunContext
from pocketvlm.errors import (
    ExportError,
    MissingExtraError,
    PocketVLMError,
    StorageError,
    UnsupportedError,
)
from pocketvlm.export.builders import embedding_signatures, vision_signatures
from pocketvlm.export.executorch.masked import find_masked
from pocketvlm.export.executorch.schema import (
    POSITION_CHANNELS,
    constant_methods,
    has_position_channels,
)
from pocketvlm.export.executorch.size import layer_bytes, predict_executorch
from pocketvlm.export.executorch.worker import (
    JOB_FILE,
    PROGRAM_FILE,
    RESULT_FILE,
    ConversionJob,
)
from pocketvlm.export.precisions import part_precisions
from pocketvlm.export.sparse_container.pack import pack_file
from pocketvlm.export.sparse_container.unmasked import describe_unmasked, unmasked_notes
from pocketvlm.files.full_disk import is_full
from pocketvlm.json_io import read_json, write_json
from pocketvlm.models.spec import LinearSpec, ModelSpec, Part
from pocketvlm.runtime.executorch.program import require_executorch
from pocketvlm.stages import Prediction, Target
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.layout import WeightLayout
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["ToExecutorch"]

_FOLDER = "executorch"
_PACKED = "model.sparse"
_CONVERSION = "conversion.json"
_STEPS = ("vision_encoder", "token_embedding", "text_decoder", "xnnpack", "load")


@dataclass(frozen=True, kw_only=True)
class ToExecutorch(Target):
    """Writes `executorch/model.pte` and `executorch/conversion.json`.

    Quantized layers run on XNNPACK's dynamically quantized kernels with the codes of the
    checkpoint: 4 bits in groups that are multiples of 32, 4 or 8 bits with one scale a row. Masked
    layers are multiplied as dense ones: integers that have an exact zero as integers, all others
    as float32.

    Attributes:
        context: Rows of KV cache, which is also the longest prompt.
        sparse_file: Whether the bundle holds the program packed, as `model.sparse`, of whose masked
            weights only what is kept is there. It has to be expanded before ExecuTorch reads it:
            fewer bytes to ship, and a slower start.
    """

    method: Literal["executorch"] = "executorch"
    context: int = 2048
    sparse_file: bool = False

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ValueError(f"context is {self.context}; allowed are 1 and more")

    def predict(
        self, spec: ModelSpec, forms: Mapping[LinearSpec, WeightLayout | None]
    ) -> Prediction:
        """What the export of a model would weigh, and what stands in its way."""
        prediction = predict_executorch(spec, forms, sparse_file=self.sparse_file)
        try:
            require_executorch()
        except MissingExtraError as error:
            refused = (f"executorch: {error}", *prediction.refused)
            return replace(prediction, refused=refused)
        return prediction

    def layer_bytes(self, layout: WeightLayout | None, shape: tuple[int, int]) -> int:
        """Bytes of one matrix [rows, columns] in the program."""
        return layer_bytes(layout, shape, sparse_file=self.sparse_file)

    def capacity(self, spec: ModelSpec) -> int:
        """Rows of KV cache: fixed when the program is made."""
        return min(self.context, spec.decoder.max_positions)

    def export(
        self, checkpoint: Checkpoint, folder: Path, ctx: RunContext
    ) -> tuple[Component, ...]:
        """Writes the program of a checkpoint below `folder`.

        Conversion runs in a process of its own, which also loads what it wrote and runs every
        method once.

        Args:
            checkpoint: What to export.
            folder: The bundle; `folder/executorch` is created.
            ctx: Told about each step.

        Returns:
            Vision, embedding and decoder: three methods of one file.

        Raises:
            MissingExtraError: ExecuTorch is not installed.
            UnsupportedError: A layer has a form without a kernel.
            ExportError: The program cannot be made, or does not load or run.
        """
        require_executorch()
        if checkpoint.cache_grid is not None:
            raise UnsupportedError(
                "executorch: an int8 KV cache has no kernel here; leave out the stage that makes it"
            )
        if checkpoint.visual_layers is not None:
            raise UnsupportedError(
                f"executorch: visual tokens run through {checkpoint.visual_layers} of "
                f"{checkpoint.spec.decoder.depth} decoder layers, and this target runs every row "
                "through all of them; leave skip_visual out, or export to ONNX"
            )
        spec, reducer = checkpoint.spec, checkpoint.reducer
        capacity = self.capacity(spec)
        job = ConversionJob(
            model=checkpoint.model,
            spec=spec,
            reducer=reducer,
            capacity=capacity,
            constants=constant_methods(
                spec,
                reducer,
                capacity=capacity,
                eos_token_ids=checkpoint.processor.eos_token_ids,
            ),
        )
        target = folder / _FOLDER
        target.mkdir(parents=True, exist_ok=True)
        result = _convert(job, target / PROGRAM_FILE, ctx)
        del result["peak_rss_bytes"]  # a signed file says nothing of the machine
        notes = _notes(result, checkpoint)
        if self.sparse_file:
            notes += _pack(target, checkpoint)
        write_json(target / _CONVERSION, result)
        return _components(checkpoint, notes, is_packed=self.sparse_file)


def _pack(folder: Path, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Packs the program of a folder; returns what could not be."""
    forms = {linear.name: form for linear, form in checkpoint.forms().items()}
    found = find_masked((folder / PROGRAM_FILE).read_bytes(), forms)
    pack_file(folder / PROGRAM_FILE, folder / _PACKED, found.places)
    if not found.missing:
        return ()
    return (f"{len(found.missing)} masked layers are stored dense in the packed file",)


def _convert(job: ConversionJob, file: Path, ctx: RunContext) -> dict[str, Any]:
    """Runs a job in a process of its own, and moves its program to `file`."""
    with tempfile.TemporaryDirectory(dir=file.parent) as name:
        scratch = Path(name)
        torch.save(job, scratch / JOB_FILE)
        command = [*module_command("pocketvlm.export.executorch.worker"), name]
        with (
            (scratch / "stderr.txt").open("w+", encoding="utf-8", errors="replace") as complaints,
            start_child(command, stdout=subprocess.PIPE, stderr=complaints) as process,
        ):
            for line in process.stdout or ():
                _report_step(line, ctx)
            code = process.wait()
            complaints.seek(0)
            last = complaints.read().strip().rpartition("\n")[2]
        if not (scratch / RESULT_FILE).is_file():
            if is_full(scratch):
                raise StorageError(f"{file.parent}: No space left on device")
            raise ExportError(f"executorch: the conversion ended with code {code}: {last}")
        result = read_json(scratch / RESULT_FILE)
        if "error" in result:
            error_type = getattr(pocketvlm.errors, result["error"])
            error: PocketVLMError = error_type(result["message"])
            raise error
        (scratch / PROGRAM_FILE).replace(file)
    ctx.report("executorch", len(_STEPS), len(_STEPS), "done")
    return result


def _report_step(line: str, ctx: RunContext) -> None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return  # something else that a library printed
    ctx.report("executorch", _STEPS.index(step), len(_STEPS), step)


def _notes(result: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[str, ...]:
    """What a reader of the report must know."""
    notes = []
    for method, found in result["delegation"].items():
        if found["delegates"]:
            others = ", ".join(sorted(found["fallback"]))
            notes.append(
                f"{method}: XNNPACK runs {found['share']:.0%} of the operators in "
                f"{found['delegates']} delegates; ExecuTorch's own kernels run {others}"
            )
    roundings = result["scale_roundings"]
    if roundings:
        notes.append(
            f"{len(roundings)} layers: scales are stored in bfloat16, which changes them by up to "
            f"{max(roundings.values()):.2%}"
        )
    if result["dense"]:
        notes.append(f"{len(result['dense'])} compressed layers are stored as dense float32")
    return (*notes, *unmasked_notes(checkpoint.forms().values()))


def _components(
    checkpoint: Checkpoint, notes: tuple[str, ...], *, is_packed: bool
) -> tuple[Component, ...]:
    spec, reducer = checkpoint.spec, checkpoint.reducer
    kept = spec.visual_tokens if reducer is None else reducer.keep
    width = spec.decoder.hidden_size
    width += POSITION_CHANNELS if has_position_channels(reducer) else 0
    (pixels,), (_, indices) = vision_signatures(spec, kept)
    (ids,), _ = embedding_signatures(spec)
    rows = TensorSignature(name="rows", dtype="float32", shape=(1, "length", width))
    picture = TensorSignature(name="rows", dtype="float32", shape=(1, kept, width))
    start = TensorSignature(name="input_pos", dtype="int64", shape=(1,))
    logits = TensorSignature(name="logits", dtype="float32", shape=(1, 1, spec.decoder.vocab_size))
    head: Part = "embedding" if spec.decoder.tied_head else "head"
    roles: tuple[tuple[Literal["vision", "embedding", "decoder"], Any, Any, Iterable[Part]], ...]
    roles = (
        ("vision", (pixels,), (picture, indices), ("tower", "projector")),
        ("embedding", (ids,), (rows,), ("embedding",)),
        ("decoder", (rows, start), (logits,), ("decoder", head)),
    )
    file = f"{_FOLDER}/{_PACKED if is_packed else PROGRAM_FILE}"
    describe = partial(_precision, is_packed=is_packed)
    return tuple(
        Component(
            target="executorch",
            role=role,
            file=file,
            sparse_file=file if is_packed else None,
            inputs=inputs,
            outputs=outputs,
            precision=part_precisions(checkpoint.forms(), parts, describe),
            notes=notes if role == "decoder" else (),
        )
        for role, inputs, outputs, parts in roles
    )


def _precision(form: WeightForm, *, is_packed: bool) -> str:
    if isinstance(form, SparseWeight):
        return describe_unmasked(form, wide="float32", is_packed=is_packed)
    if not isinstance(form, AffineWeight):
        return "float32"
    is_row = form.group_size >= form.in_features
    group = "a row" if is_row else f"g{form.group_size}"
    return f"int{form.bits} {group}, int8 activations"

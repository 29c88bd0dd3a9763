"""The ExecuTorch target: one program for XNNPACK, with the cache and all weights inside."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

import pocketvlm.errors
from pocketvlm.bundle import Component, TensorSignature
from pocketvlm.bundle.manifest import RuntimeNeeds
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.child_process import module_command, start_child
from pocketvlm.context import RunContext
from pocketvlm.errors import (
    ExportError,
    MissingExtraError,
    PocketVLMError,
    StorageError,
)
from pocketvlm.export.executorch.limits import explain
from pocketvlm.export.executorch.schema import (
    VISION,
    VisionPart,
    constant_methods,
    row_channels,
)
from pocketvlm.export.executorch.size import graph_bytes, layer_bytes, vision_bytes
from pocketvlm.export.executorch.worker import (
    JOB_FILE,
    PROGRAM_FILE,
    RESULT_FILE,
    ConversionJob,
)
from pocketvlm.export.precisions import masked_notes, part_precisions
from pocketvlm.export.signatures import embedding_signatures, vision_signatures
from pocketvlm.files.full_disk import is_full
from pocketvlm.json_io import read_json, write_json
from pocketvlm.models.layers import LinearSpec, Part
from pocketvlm.models.spec import ModelSpec
from pocketvlm.runtime.executorch.program import require_executorch
from pocketvlm.stages import Explanation, Target
from pocketvlm.weights.layout import WeightLayout

__all__ = ["ToExecutorch"]

_FOLDER = "executorch"
_CONVERSION = "conversion.json"
_STEPS = ("vision_encoder", "token_embedding", "text_decoder", "xnnpack", "load")


@dataclass(frozen=True, kw_only=True)
class ToExecutorch(Target):
    """Writes `executorch/model.pte` and `executorch/conversion.json`.

    Quantized layers run on XNNPACK's dynamically quantized kernels with the codes of the
    checkpoint: 4 bits in groups that are multiples of 32, 4 or 8 bits with one scale per row.
    Masked layers are multiplied as dense ones: integers that have an exact zero as integers, all
    others as float32.

    Attributes:
        context: Rows of KV cache, which is also the longest prompt.
    """

    method: Literal["executorch"] = "executorch"
    context: int = 2048

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ValueError(f"context is {self.context}; allowed are 1 and more")

    @property
    def missing_toolkit(self) -> str | None:
        """How to install ExecuTorch, where it is missing."""
        try:
            require_executorch()
        except MissingExtraError as error:
            return str(error)
        return None

    def explain(
        self, layout: WeightLayout | None, shape: tuple[int, int], *, is_table: bool = False
    ) -> Explanation:
        """What XNNPACK makes of a matrix."""
        return explain(layout, shape, is_table=is_table)

    def layer_bytes(self, layout: WeightLayout | None, shape: tuple[int, int]) -> int:
        """Bytes of one matrix [rows, columns] in the program."""
        return layer_bytes(layout, shape)

    def graph_bytes(
        self, spec: ModelSpec, layouts: Mapping[LinearSpec, WeightLayout | None]
    ) -> Mapping[str, int]:
        """Bytes of the graphs, of what is not a weight matrix, and of a tied table's own scales."""
        return graph_bytes(spec, layouts)

    def vision_bytes(self, spec: ModelSpec, *, is_new_size: bool) -> int:
        """Bytes of one more vision method."""
        return vision_bytes(spec, is_new_size=is_new_size)

    def capacity(self, spec: ModelSpec) -> int:
        """Rows of KV cache: fixed when the program is made."""
        return min(self.context, spec.decoder.max_positions)

    def runtime_needs(self, folder: Path, components: Sequence[Component]) -> RuntimeNeeds:
        """The version of ExecuTorch: a runtime reads programs of its own version and older ones."""
        file = folder / components[0].file
        with file.open("rb") as stream:
            identifier = stream.read(8)[4:]  # of a flatbuffer: `ET12`
        if identifier[:2] != b"ET":
            raise ExportError(f"{file}: is not an ExecuTorch program")
        return RuntimeNeeds(
            runtime="ExecuTorch",
            lowest_version=metadata.version("executorch").partition("+")[0],
            formats={"program": int(identifier[2:])},
        )

    def write(self, checkpoint: Checkpoint, folder: Path, ctx: RunContext) -> tuple[Component, ...]:
        """Writes the program below `folder/executorch`: all methods in one file.

        Conversion runs in a separate process, which also loads what it wrote and runs every
        method once.

        Raises:
            MissingExtraError: ExecuTorch is not installed.
            ExportError: The program cannot be made, or does not load or run.
        """
        require_executorch()
        capacity = self.capacity(checkpoint.spec)
        visions = _vision_parts(checkpoint)
        job = ConversionJob(
            model=checkpoint.model,
            visions=visions,
            capacity=capacity,
            constants=constant_methods(
                visions,
                capacity=capacity,
                eos_token_ids=checkpoint.processor.eos_token_ids,
            ),
        )
        target = folder / _FOLDER
        target.mkdir(parents=True, exist_ok=True)
        result = _convert(job, target / PROGRAM_FILE, ctx)
        del result["peak_rss_bytes"]  # a signed file says nothing of the machine
        notes = _notes(result, checkpoint)
        write_json(target / _CONVERSION, result)
        return self._components(checkpoint, notes)

    def _components(self, checkpoint: Checkpoint, notes: tuple[str, ...]) -> tuple[Component, ...]:
        spec = checkpoint.spec
        width = row_channels(spec, checkpoint.reducer)
        (ids,), _ = embedding_signatures(spec)
        rows = TensorSignature(name="rows", dtype="float32", shape=(1, "length", width))
        start = TensorSignature(name="input_pos", dtype="int64", shape=(1,))
        logits = TensorSignature(
            name="logits", dtype="float32", shape=(1, 1, spec.decoder.vocab_size)
        )

        def component(
            role: Literal["vision", "embedding", "decoder"],
            inputs: Sequence[TensorSignature],
            outputs: Sequence[TensorSignature],
            parts: Iterable[Part],
        ) -> Component:
            return Component(
                target="executorch",
                role=role,
                file=f"{_FOLDER}/{PROGRAM_FILE}",
                inputs=tuple(inputs),
                outputs=tuple(outputs),
                precision=part_precisions(self, checkpoint, parts),
                notes=notes if role == "decoder" else (),
            )

        pictures = []
        for seen, part in zip(checkpoint.each_vision(), _vision_parts(checkpoint), strict=True):
            pixels, (_, indices) = vision_signatures(part.spec, part.kept)
            picture = TensorSignature(name="rows", dtype="float32", shape=(1, part.kept, width))
            found = component("vision", pixels, (picture, indices), ("tower", "projector"))
            if checkpoint.other_vision:
                name = seen.vision_variant.name
                found = replace(found, function=part.method, variant=name)
            pictures.append(found)
        head: Part = "embedding" if spec.decoder.tied_head else "head"
        return (
            *pictures,
            component("embedding", (ids,), (rows,), ("embedding",)),
            component("decoder", (rows, start), (logits,), ("decoder", head)),
        )


def _vision_parts(checkpoint: Checkpoint) -> tuple[VisionPart, ...]:
    """What each vision method is made of; the first has the name that runners know."""
    return tuple(
        VisionPart(
            method=f"{VISION}_{seen.vision_variant.name}" if number else VISION,
            spec=seen.spec,
            reducer=seen.reducer,
        )
        for number, seen in enumerate(checkpoint.each_vision())
    )


def _convert(job: ConversionJob, file: Path, ctx: RunContext) -> dict[str, Any]:
    """Runs a job in a separate process, and moves its program to `file`."""
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
    known = VISION if step.startswith(VISION) else step
    ctx.report("executorch", _STEPS.index(known), len(_STEPS), step)


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
    return (*notes, *masked_notes(form.layout for form in checkpoint.forms().values()))

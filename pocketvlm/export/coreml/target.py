"""The Core ML target: packages for the Neural Engine, GPU and CPU of Apple devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pocketvlm.bundle import Component, TensorSignature
from pocketvlm.bundle.manifest import RuntimeNeeds
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.emulation.mil.package import MilPackage
from pocketvlm.emulation.mil.systems import LOWEST_SYSTEMS
from pocketvlm.errors import UnsupportedError
from pocketvlm.export.coreml.cache import (
    PassedCache,
    StatefulCache,
    cache_signatures,
    round_up,
)
from pocketvlm.export.coreml.conv_states import ConvStates, conv_state_signatures
from pocketvlm.export.coreml.limits import DEPLOYMENTS, explain
from pocketvlm.export.coreml.ops import MilOps
from pocketvlm.export.coreml.positions import DecoderPositions
from pocketvlm.export.coreml.reducer import convert_merge, convert_reducer
from pocketvlm.export.coreml.size import graph_bytes, layer_bytes, vision_bytes
from pocketvlm.export.coreml.toolkit import INSTALL, has_coremltools, listen
from pocketvlm.export.coreml.writer import PackageWriter
from pocketvlm.export.precisions import part_precisions
from pocketvlm.export.signatures import Signatures, vision_signatures
from pocketvlm.graph.builders import build_decoder, build_embedding, build_vision
from pocketvlm.models.layers import LinearSpec, Part
from pocketvlm.models.spec import ModelSpec
from pocketvlm.stages import Explanation, PlanState, Target
from pocketvlm.weights.layout import WeightLayout

__all__ = ["ToCoreml"]

_FOLDER = "coreml"
_PRECISIONS = ("float16", "float32")
_MAIN = "main"


@dataclass(frozen=True, kw_only=True)
class ToCoreml(Target):
    """Writes `coreml/vision.mlpackage` and `coreml/decoder.mlpackage`.

    For iOS 18 the decoder keeps its cache itself and has three functions over one set of weights,
    `embedding`, `prefill` and `decode`. For iOS 17, which has neither states nor functions, the
    cache goes in and out of one function, and the embedding is a separate package.

    Attributes:
        deployment: The oldest system that has to run it: `iOS18` or `iOS17`.
        precision: What the graphs compute in.
        chunk: Rows of one call of `prefill` and `embedding`.
        context: Rows of the cache, rounded up to a multiple of 32.
    """

    method: Literal["coreml"] = "coreml"
    deployment: Literal["iOS17", "iOS18"] = "iOS18"
    precision: Literal["float16", "float32"] = "float16"
    chunk: int = 32
    context: int = 2048

    def __post_init__(self) -> None:
        for name, allowed in (("deployment", DEPLOYMENTS), ("precision", _PRECISIONS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")
        if self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}; allowed are 1 and more")
        if self.context < self.chunk:
            raise ValueError(
                f"context is {self.context}; allowed are {self.chunk} (chunk) and more"
            )

    @property
    def missing_toolkit(self) -> str | None:
        """How to install coremltools, where it is missing."""
        return None if has_coremltools() else INSTALL

    def explain(
        self, layout: WeightLayout | None, shape: tuple[int, int], *, is_table: bool = False
    ) -> Explanation:
        """What Core ML makes of a matrix; a table is expanded as every other."""
        del is_table
        return explain(layout, shape, deployment=self.deployment, precision=self.precision)

    def layer_bytes(self, layout: WeightLayout | None, shape: tuple[int, int]) -> int:
        """Bytes of one matrix [rows, columns] in the weight file.

        Raises:
            UnsupportedError: No operator can hold such a matrix.
        """
        refusal = self.explain(layout, shape).refusal
        if refusal:
            raise UnsupportedError(f"coreml: {refusal}")
        return layer_bytes(layout, shape, deployment=self.deployment, float_bytes=self._float_bytes)

    def graph_bytes(
        self, spec: ModelSpec, layouts: Mapping[LinearSpec, WeightLayout | None]
    ) -> Mapping[str, int]:
        """Bytes of the graphs, of what is not a weight matrix, and of what is stored twice."""
        parts = graph_bytes(
            spec,
            layouts,
            deployment=self.deployment,
            float_bytes=self._float_bytes,
            capacity=self.capacity(spec),
        )
        if self.deployment == "iOS17" and spec.decoder.tied_head:
            # Without functions that share weights, a tied head is stored with the decoder again.
            for linear, layout in layouts.items():
                if linear.part == "embedding" and not self.explain(layout, linear.shape).refusal:
                    parts["embedding"] = self.layer_bytes(layout, linear.shape)
        return parts

    def vision_bytes(self, spec: ModelSpec, *, is_new_size: bool) -> int:
        """Bytes of one more vision function."""
        return vision_bytes(spec, float_bytes=self._float_bytes, is_new_size=is_new_size)

    @property
    def _float_bytes(self) -> int:
        return 2 if self.precision == "float16" else 4

    def runtime_needs(self, folder: Path, components: Sequence[Component]) -> RuntimeNeeds:
        """The oldest system that reads the packages, by the version of their format."""
        files = sorted({component.file for component in components})
        version = max(MilPackage.open(folder / file).specification_version for file in files)
        return RuntimeNeeds(
            runtime="iOS",
            lowest_version=LOWEST_SYSTEMS[version].ios,
            formats={"specification": version},
        )

    def write(self, checkpoint: Checkpoint, folder: Path, ctx: RunContext) -> tuple[Component, ...]:
        """Writes the packages below `folder/coreml`; each component names its function.

        Raises:
            MissingExtraError: coremltools is not installed.
            UnsupportedError: An activation has no operator, or a value does not fit into float16.
            ExportError: The token reducer cannot be converted, or a package cannot be read back.
        """
        (folder / _FOLDER).mkdir(parents=True, exist_ok=True)
        with listen() as said:
            vision = self._export_vision(checkpoint, folder)
            ctx.report("coreml", 1, 2, "vision")
            write = self._export_stateful if self.deployment == "iOS18" else self._export_passed
            rest = write(checkpoint, folder)
            ctx.report("coreml", 2, 2, "decoder")
        return (replace(vision[0], notes=tuple(said)), *vision[1:], *rest)

    def capacity(self, spec: ModelSpec) -> int:
        """Rows of the cache."""
        return round_up(min(self.context, spec.decoder.max_positions))

    def refuse(self, state: PlanState) -> tuple[str, ...]:
        """What of a model the target cannot run; also prompts that must come in one call."""
        found = super().refuse(state)
        if state.other_vision and self.deployment == "iOS17":
            found = (
                *found,
                "coreml: several vision graphs are functions that share weights, which iOS17 does "
                "not have; set deployment to iOS18",
            )
        most = max(vision.visual_tokens for vision in state.each_vision())
        if state.spec.decoder.mutual_rows != "prompt" or most < self.chunk:
            return found
        return (
            *found,
            "coreml: all rows of a prompt see each other and come in one call, and a picture has "
            f"{most}; set chunk ({self.chunk}) to these and the longest question",
        )

    def _prefill_rows(self, checkpoint: Checkpoint) -> int:
        """Rows of a call of the decoder: a tile's at least, where they see each other."""
        if checkpoint.spec.decoder.mutual_rows != "tile":
            return self.chunk
        return max(self.chunk, *(seen.visual_tokens for seen in checkpoint.each_vision()))

    def _export_vision(self, checkpoint: Checkpoint, folder: Path) -> tuple[Component, ...]:
        package = self._package()
        file = f"{_FOLDER}/vision.mlpackage"
        several = bool(checkpoint.other_vision)
        components = []
        for seen in checkpoint.each_vision():
            program = None
            if seen.reducer is not None:
                program = convert_reducer(seen.reducer, seen.spec, self.deployment)
            merges = {
                merge.block: convert_merge(merge, seen.spec, self.deployment)
                for merge in seen.spec.tower.merges
            }
            inputs, outputs = _as_int32(vision_signatures(seen.spec, seen.visual_tokens))
            name = seen.vision_variant.name if several else None
            with package.function(name or _MAIN, inputs) as function:
                ops = MilOps(function, seen, reducer=program, merges=merges)
                embeds, indices = build_vision(ops, seen.spec, function.inputs["pixel_values"])
                function.output(embeds, "embeds", "float32")
                function.output(indices, "indices", "int32")
            components.append(
                Component(
                    target="coreml",
                    role="vision",
                    file=file,
                    inputs=inputs,
                    outputs=outputs,
                    precision=part_precisions(self, checkpoint, ("tower", "projector")),
                    function=name,
                    variant=name,
                )
            )
        package.save(folder / file, default=components[0].function)
        return tuple(components)

    def _export_stateful(self, checkpoint: Checkpoint, folder: Path) -> tuple[Component, ...]:
        spec = checkpoint.spec
        file = f"{_FOLDER}/decoder.mlpackage"
        package = self._package()
        capacity = self.capacity(spec)
        states = cache_signatures(spec, capacity, package.float_type)
        components = [self._write_embedding(package, checkpoint, file, "embedding")]
        for name, length in (("prefill", self._prefill_rows(checkpoint)), ("decode", 1)):
            inputs, outputs = _decoder_signatures(spec, length, is_padded=length > 1)
            with package.function(name, inputs, states) as function:
                positions = DecoderPositions(function, spec, capacity, length)
                cache, convs = (
                    StatefulCache(function, spec, capacity, length),
                    ConvStates(function, spec),
                )
                ops = MilOps(function, checkpoint, positions=positions, cache=cache, states=convs)
                logits = build_decoder(ops, spec, ops.enter(function.inputs["embeds"]))
                function.output(logits, "logits", "float32")
                convs.finish()
            components.append(
                Component(
                    target="coreml",
                    role="decoder",
                    file=file,
                    inputs=inputs,
                    outputs=outputs,
                    precision=part_precisions(self, checkpoint, _decoder_parts(spec)),
                    function=name,
                    states=states,
                )
            )
        package.save(folder / file, default="decode")
        return tuple(components)

    def _export_passed(self, checkpoint: Checkpoint, folder: Path) -> tuple[Component, ...]:
        spec = checkpoint.spec
        package = self._package()
        file = f"{_FOLDER}/embedding.mlpackage"
        embedding = self._write_embedding(package, checkpoint, file, None)
        package.save(folder / file)
        package = self._package()
        file = f"{_FOLDER}/decoder.mlpackage"
        capacity = self.capacity(spec)
        rows = self._prefill_rows(checkpoint)
        inputs, outputs = _decoder_signatures(spec, rows, is_padded=True)
        inputs = (*inputs, *cache_signatures(spec, capacity, package.float_type))
        outputs = (
            *outputs,
            *cache_signatures(spec, capacity, package.float_type, is_output=True),
        )
        with package.function(_MAIN, inputs) as function:
            positions = DecoderPositions(function, spec, capacity, rows)
            cache = PassedCache(function, spec, capacity, positions.slots)
            convs = ConvStates(function, spec)
            ops = MilOps(function, checkpoint, positions=positions, cache=cache, states=convs)
            logits = build_decoder(ops, spec, ops.enter(function.inputs["embeds"]))
            function.output(logits, "logits", "float32")
            convs.finish()
            cache.finish()
        package.save(folder / file)
        decoder = Component(
            target="coreml",
            role="decoder",
            file=file,
            inputs=inputs,
            outputs=outputs,
            precision=part_precisions(self, checkpoint, _decoder_parts(spec)),
        )
        return (embedding, decoder)

    def _write_embedding(
        self, package: PackageWriter, checkpoint: Checkpoint, file: str, name: str | None
    ) -> Component:
        spec = checkpoint.spec
        width = spec.row_width
        inputs = (TensorSignature(name="input_ids", dtype="int32", shape=(1, self.chunk)),)
        outputs = (TensorSignature(name="embeds", dtype="float32", shape=(1, self.chunk, width)),)
        with package.function(name or _MAIN, inputs) as function:
            ops = MilOps(function, checkpoint)
            embeds = build_embedding(ops, spec, function.inputs["input_ids"])
            function.output(embeds, "embeds", "float32")
        return Component(
            target="coreml",
            role="embedding",
            file=file,
            inputs=inputs,
            outputs=outputs,
            precision=part_precisions(self, checkpoint, ("embedding",)),
            function=name,
        )

    def _package(self) -> PackageWriter:
        wide: dict[str, type[np.floating[Any]]] = {"float16": np.float16, "float32": np.float32}
        return PackageWriter(self.deployment, wide[self.precision])


def _decoder_parts(spec: ModelSpec) -> tuple[Part, ...]:
    return ("decoder", "embedding" if spec.decoder.tied_head else "head")


def _decoder_signatures(spec: ModelSpec, length: int, *, is_padded: bool) -> Signatures:
    decoder = spec.decoder
    shapes: list[tuple[str, str, tuple[int, ...]]] = [
        ("embeds", "float32", (1, length, spec.row_width)),
        ("position_ids", "int32", (decoder.rope.axes, length)),
        ("past_length", "int32", (1,)),
    ]
    if is_padded:
        shapes.append(("length", "int32", (1,)))
        if decoder.mutual_rows is not None:
            shapes.append(("mutual", "int32", (1, length)))
    rows = (TensorSignature(name=name, dtype=kind, shape=shape) for name, kind, shape in shapes)
    logits = TensorSignature(name="logits", dtype="float32", shape=(1, 1, decoder.vocab_size))
    return (
        (*rows, *conv_state_signatures(spec)),
        (logits, *conv_state_signatures(spec, is_output=True)),
    )


def _as_int32(signatures: Signatures) -> Signatures:
    """Core ML has no int64 at its borders."""
    inputs, outputs = signatures
    return (
        inputs,
        tuple(replace(item, dtype=item.dtype.replace("int64", "int32")) for item in outputs),
    )

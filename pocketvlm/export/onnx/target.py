"""The ONNX target: graphs for ONNX Runtime's CPU provider and one file of weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from pocketvlm.bundle import Component, Role
from pocketvlm.bundle.manifest import RuntimeNeeds
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.export.onnx.limits import explain
from pocketvlm.export.onnx.needs import read_needs
from pocketvlm.export.onnx.ops import OnnxOps
from pocketvlm.export.onnx.prefill import held_bytes, made_bytes, refuse_prefill, write_prefill
from pocketvlm.export.onnx.row_drops import OnnxRowDrops
from pocketvlm.export.onnx.size import graph_bytes, layer_bytes, vision_bytes
from pocketvlm.export.onnx.writer import GraphWriter, WeightFile
from pocketvlm.export.precisions import masked_notes, part_precisions
from pocketvlm.export.signatures import (
    Signatures,
    decoder_signatures,
    embedding_signatures,
    vision_signatures,
)
from pocketvlm.graph.builders import build_decoder, build_embedding, build_vision
from pocketvlm.models.layers import LinearSpec, Part
from pocketvlm.models.spec import ModelSpec
from pocketvlm.stages import Explanation, PlanState, Prediction, Target
from pocketvlm.weights.layout import AffineLayout, WeightLayout, without_mask

__all__ = ["ToOnnx"]

_FOLDER = "onnx"
_WEIGHTS = "weights.bin"
_TRACED_OPSET = 18  # the version that torch's exporter writes natively
_RMS_NORM_OPSET = 23  # the first with RMSNormalization
_ACCURACY_LEVELS = (0, 4)
_PREFILL_ROWS = range(2, 1 << 16)


@dataclass(frozen=True, kw_only=True)
class ToOnnx(Target):
    """Writes `onnx/vision.onnx`, `onnx/embedding.onnx`, `onnx/decoder.onnx` and their weights.

    With `int8_prefill_rows`, `onnx/prefill.onnx` and `onnx/unpack.onnx` as well.

    Quantized layers keep the very codes of the checkpoint: in groups as `MatMulNBits`, int8 with
    one scale per row as products of integers, the faster ones where many rows are multiplied.
    Codebooks become float32 products whose weights are small in the file and are expanded when a
    session starts. What is not quantized becomes float32 products, stored as narrowly as is exact.

    Masked layers are multiplied as dense ones: integers that have an exact zero as integers, all
    others as floats.

    Attributes:
        accuracy_level: How the decoder's quantized products compute: 4 rounds activations to
            int8, which is what makes them fast; 0 stays in float32.
        tower_accuracy_level: The same for tower and projector.
        int8_prefill_rows: Rows of a prompt from which the decoder's products run on int8 rows,
            which a runner makes of the codes when it starts: about twice as fast, for a byte of
            memory a weight. `null` for no such graph.
    """

    method: Literal["onnx"] = "onnx"
    accuracy_level: int = 4
    tower_accuracy_level: int = 4
    int8_prefill_rows: int | None = None

    cache_bits: ClassVar[frozenset[int]] = frozenset({8})
    supports_schedules: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("accuracy_level", "tower_accuracy_level"):
            value = getattr(self, name)
            if value not in _ACCURACY_LEVELS:
                allowed = ", ".join(map(str, _ACCURACY_LEVELS))
                raise ValueError(f"{name} is {value!r}; allowed are {allowed}")
        rows = self.int8_prefill_rows
        if rows is None:
            return
        if rows not in _PREFILL_ROWS:
            raise ValueError(
                f"int8_prefill_rows is {rows}; allowed are {_PREFILL_ROWS[0]} to "
                f"{_PREFILL_ROWS[-1]}, or null"
            )
        if not self.accuracy_level:
            raise ValueError(
                "int8_prefill_rows rounds what enters a product, and accuracy_level 0 says that "
                "nothing is rounded; leave one of them out"
            )

    def explain(
        self, layout: WeightLayout | None, shape: tuple[int, int], *, is_table: bool = False
    ) -> Explanation:
        """What ONNX Runtime makes of a matrix."""
        del is_table  # which does not matter to its kernels
        return explain(layout, shape[1])

    def layer_bytes(self, layout: WeightLayout | None, shape: tuple[int, int]) -> int:
        """Bytes of one matrix [rows, columns] in the files."""
        return layer_bytes(layout, shape)

    def graph_bytes(
        self, spec: ModelSpec, layouts: Mapping[LinearSpec, WeightLayout | None]
    ) -> Mapping[str, int]:
        """Bytes of the graphs, and of everything that is not a weight matrix."""
        has_prefill = self.prefill_rows(spec) is not None
        return graph_bytes(spec, layouts, has_prefill=has_prefill)

    def vision_bytes(self, spec: ModelSpec, *, is_new_size: bool) -> int:
        """Bytes of one more vision graph."""
        return vision_bytes(spec, is_new_size=is_new_size)

    def predict(
        self,
        spec: ModelSpec,
        layouts: Mapping[LinearSpec, WeightLayout | None],
        *,
        others: Sequence[ModelSpec] = (),
    ) -> Prediction:
        """What the files would weigh and cost."""
        found = super().predict(spec, layouts, others=others)
        prices = tuple(f"onnx: {price}" for price in self._prices(spec, layouts))
        return replace(found, warnings=(*found.warnings, *prices))

    def prefill_bytes(
        self, spec: ModelSpec, layouts: Mapping[LinearSpec, WeightLayout | None]
    ) -> int:
        """Bytes of memory that the graph for long calls takes."""
        return 0 if self.prefill_rows(spec) is None else held_bytes(spec, layouts)

    def made_bytes(self, spec: ModelSpec, layouts: Mapping[LinearSpec, WeightLayout | None]) -> int:
        """Bytes of these that a runner makes when it starts, and may keep in a file."""
        return 0 if self.prefill_rows(spec) is None else made_bytes(spec, layouts)

    def prefill_rows(self, spec: ModelSpec) -> int | None:
        """Rows of a call from which a model has another graph; `None` where it has none.

        Where all rows of a prompt see each other, none can be left to another call.
        """
        return None if spec.decoder.mutual_rows == "prompt" else self.int8_prefill_rows

    def refuse(self, state: PlanState) -> tuple[str, ...]:
        """What of a model ONNX Runtime cannot run."""
        refused = super().refuse(state)
        if self.prefill_rows(state.spec) is None:
            return refused
        return (*refused, *(f"onnx: {reason}" for reason in refuse_prefill(state)))

    def capacity(self, spec: ModelSpec) -> int:
        """Rows of KV cache: chosen when a session starts, up to the whole context."""
        return spec.decoder.context_length

    def runtime_needs(self, folder: Path, components: Sequence[Component]) -> RuntimeNeeds:
        """Opsets, operators, and the version of ONNX Runtime that reads them as intended."""
        return read_needs(folder, components)

    def write(self, checkpoint: Checkpoint, folder: Path, ctx: RunContext) -> tuple[Component, ...]:
        """Writes vision, embedding and decoder below `folder/onnx`.

        Of several vision graphs, all but the first have their variant's name in their file's.

        Raises:
            UnsupportedError: An activation has no kernel.
            ExportError: The token reducer cannot be traced, or a graph is not valid.
        """
        spec = checkpoint.spec
        target = folder / _FOLDER
        target.mkdir(parents=True, exist_ok=True)
        components: list[Component] = []
        prefill_rows = self.prefill_rows(spec)
        graphs = 3 + len(checkpoint.other_vision) + 2 * (prefill_rows is not None)

        def finish(
            graph: GraphWriter,
            role: Role,
            signatures: Signatures,
            parts: Iterable[Part] = (),
            variant: str | None = None,
            notes: tuple[str, ...] = (),
        ) -> None:
            inputs, outputs = signatures
            # The first vision graph has the name that it has where it is alone.
            label = role if variant is None or not components else f"{role}_{variant}"
            precision = part_precisions(self, checkpoint, parts)
            if role == "decoder" and checkpoint.cache_grid is not None:
                precision["kv_cache"] = f"int{checkpoint.cache_grid.bits} a channel"
            graph.save(target / f"{label}.onnx", inputs, outputs)
            components.append(
                Component(
                    target="onnx",
                    role=role,
                    file=f"{_FOLDER}/{label}.onnx",
                    inputs=inputs,
                    outputs=outputs,
                    precision=precision,
                    variant=variant,
                    least_rows=prefill_rows if role == "prefill" else None,
                    notes=(*_notes(checkpoint, frozenset(parts)), *notes),
                )
            )
            ctx.report("onnx", len(components), graphs, label)

        with WeightFile(target / _WEIGHTS) as weights:
            for seen in checkpoint.each_vision():
                graph = GraphWriter("vision", weights, opset=_vision_opset(spec))
                ops = OnnxOps(
                    graph,
                    seen,
                    accuracy_level=self.tower_accuracy_level,
                    rounded_over="tile",
                )
                embeds, indices = build_vision(ops, seen.spec, "pixel_values")
                ops.output(embeds, "embeds")
                ops.output(indices, "indices")
                finish(
                    graph,
                    "vision",
                    vision_signatures(seen.spec, seen.visual_tokens),
                    ("tower", "projector"),
                    seen.vision_variant.name if checkpoint.other_vision else None,
                )

            graph = GraphWriter("embedding", weights, opset=_TRACED_OPSET)
            ops = OnnxOps(graph, checkpoint, accuracy_level=self.accuracy_level)
            ops.output(build_embedding(ops, spec, "input_ids"), "embeds")
            finish(graph, "embedding", embedding_signatures(spec), ("embedding",))

            graph = GraphWriter("decoder", weights, opset=_RMS_NORM_OPSET)
            ops = OnnxOps(graph, checkpoint, accuracy_level=self.accuracy_level)
            schedule = checkpoint.visual_schedule
            drops = None if schedule is None else OnnxRowDrops(ops, graph, checkpoint, schedule)
            ops.output(build_decoder(ops, spec, "embeds", drops), "logits")
            head: Part = "embedding" if spec.decoder.tied_head else "head"
            cache = "float32" if checkpoint.cache_grid is None else "int8"
            prices = self._prices(spec, PlanState.of_checkpoint(checkpoint).layouts)
            finish(
                graph,
                "decoder",
                decoder_signatures(spec, cache, schedule),
                ("decoder", head),
                notes=prices,
            )
            if prefill_rows is not None:
                made = write_prefill(checkpoint, weights)
                finish(made.prefill, "prefill", made.signatures[0])
                finish(made.unpack, "unpack", made.signatures[1])
        return tuple(components)

    def _prices(
        self, spec: ModelSpec, layouts: Mapping[LinearSpec, WeightLayout | None]
    ) -> tuple[str, ...]:
        """What the graph for long calls costs, or why there is none."""
        if self.int8_prefill_rows is None:
            return ()
        if self.prefill_rows(spec) is None:
            return (
                "int8_prefill_rows changes nothing: the rows of this model's prompts all see each "
                "other, and none of them can be left to another call",
            )
        return (
            f"prompts of {self.int8_prefill_rows} rows and more run on int8 rows, which a runner "
            f"makes of the decoder's codes: {self.prefill_bytes(spec, layouts):,} bytes of memory",
        )


def _notes(checkpoint: Checkpoint, parts: Collection[Part]) -> tuple[str, ...]:
    forms = [form for linear, form in checkpoint.forms().items() if linear.part in parts]
    plain = [(without_mask(form.layout), form.shape[1]) for form in forms]
    rows = sum(
        isinstance(layout, AffineLayout) and layout.has_byte_rows(columns)
        for layout, columns in plain
    )
    notes = masked_notes(form.layout for form in forms)
    if not rows:
        return notes
    return (
        *notes,
        f"{rows} layers are products of integers, which x86 processors without VNNI sum exactly "
        "only where a session sets session.x64quantprecision to 1, as this package's runners do",
    )


def _vision_opset(spec: ModelSpec) -> int:
    before = f"{spec.decoder.prefix}."
    norms = (norm for norm in spec.norms() if not norm.name.startswith(before))
    return _TRACED_OPSET if all(norm.has_bias for norm in norms) else _RMS_NORM_OPSET

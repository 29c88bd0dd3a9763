"""The ONNX target: three graphs for ONNX Runtime's CPU provider and one file of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from pocketvlm.bundle import Component
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.export.builders import (
    Signatures,
    TextRows,
    build_decoder,
    build_embedding,
    build_vision,
    decoder_signatures,
    embedding_signatures,
    vision_signatures,
)
from pocketvlm.export.onnx.ops import OnnxOps
from pocketvlm.export.onnx.packing import container_bits
from pocketvlm.export.onnx.size import layer_bytes, predict_onnx
from pocketvlm.export.onnx.writer import GraphWriter, WeightFile
from pocketvlm.export.precisions import part_precisions
from pocketvlm.export.sparse_container.pack import pack_file
from pocketvlm.export.sparse_container.unmasked import describe_unmasked, unmasked_notes
from pocketvlm.models.spec import LinearSpec, ModelSpec, Part
from pocketvlm.stages import Prediction, Target
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.codebook import CodebookWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.layout import WeightLayout
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["ToOnnx"]

_FOLDER = "onnx"
_WEIGHTS = "weights.bin"
_PACKED = "weights.sparse"
_TRACED_OPSET = 18  # the version that torch's exporter writes natively
_DECODER_OPSET = 23  # the first with RMSNormalization
_ACCURACY_LEVELS = (0, 4)


@dataclass(frozen=True, kw_only=True)
class ToOnnx(Target):
    """Writes `onnx/vision.onnx`, `onnx/embedding.onnx`, `onnx/decoder.onnx` and their weights.

    Quantized layers become `MatMulNBits` with the very codes of the checkpoint. Layers of codebooks
    become float32 products whose weights are small in the file and are expanded when a session
    starts. What is not quantized becomes float32 products, stored as narrowly as is exact.

    Masked layers are multiplied as dense ones: integers that have an exact zero as integers, all
    others as floats.

    Attributes:
        accuracy_level: How the decoder's quantized products compute: 4 rounds activations to
            int8, block by block, which is what makes them fast; 0 stays in float32.
        tower_accuracy_level: The same for tower and projector.
        sparse_file: Whether the bundle holds masked weights packed, as `weights.sparse`, which is
            expanded in memory when it is loaded: fewer bytes to ship, and a slower start.
    """

    method: Literal["onnx"] = "onnx"
    accuracy_level: int = 4
    tower_accuracy_level: int = 4
    sparse_file: bool = False

    cache_bits: ClassVar[frozenset[int]] = frozenset({8})
    supports_visual_cutoff: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("accuracy_level", "tower_accuracy_level"):
            value = getattr(self, name)
            if value not in _ACCURACY_LEVELS:
                allowed = ", ".join(map(str, _ACCURACY_LEVELS))
                raise ValueError(f"{name} is {value!r}; allowed are {allowed}")

    def predict(
        self, spec: ModelSpec, grids: Mapping[LinearSpec, WeightLayout | None]
    ) -> Prediction:
        """What the export of a model would weigh, and which layers no kernel can run."""
        return predict_onnx(spec, grids, sparse_file=self.sparse_file)

    def layer_bytes(self, layout: WeightLayout | None, shape: tuple[int, int]) -> int:
        """Bytes of one matrix [rows, columns] in the files."""
        return layer_bytes(layout, shape, sparse_file=self.sparse_file)

    def capacity(self, spec: ModelSpec) -> int:
        """Rows of KV cache: chosen when a session starts, up to the whole context."""
        return spec.decoder.context_length

    def export(
        self, checkpoint: Checkpoint, folder: Path, ctx: RunContext
    ) -> tuple[Component, ...]:
        """Writes the graphs of a checkpoint below `folder`.

        Args:
            checkpoint: What to export.
            folder: The bundle; `folder/onnx` is created.
            ctx: Told about each graph.

        Returns:
            Vision, embedding and decoder, with paths relative to `folder`.

        Raises:
            UnsupportedError: A layer has a form, group size or activation without a kernel.
            ExportError: The token reducer cannot be traced, or a graph is not valid.
        """
        spec = checkpoint.spec
        target = folder / _FOLDER
        target.mkdir(parents=True, exist_ok=True)
        components: list[Component] = []

        def finish(
            graph: GraphWriter,
            role: Literal["vision", "embedding", "decoder"],
            signatures: Signatures,
            parts: Iterable[Part],
        ) -> None:
            inputs, outputs = signatures
            describe = partial(_precision, is_packed=self.sparse_file)
            precision = part_precisions(checkpoint.forms(), parts, describe)
            if role == "decoder" and checkpoint.cache_grid is not None:
                precision["kv_cache"] = f"int{checkpoint.cache_grid.bits} a channel"
            graph.save(target / f"{role}.onnx", inputs, outputs)
            components.append(
                Component(
                    target="onnx",
                    role=role,
                    file=f"{_FOLDER}/{role}.onnx",
                    inputs=inputs,
                    outputs=outputs,
                    precision=precision,
                    notes=unmasked_notes(
                        form for linear, form in checkpoint.forms().items() if linear.part in parts
                    ),
                )
            )
            ctx.report("onnx", len(components), 3, role)

        with WeightFile(target / _WEIGHTS) as weights:
            kept = spec.visual_tokens if checkpoint.reducer is None else checkpoint.reducer.keep
            graph = GraphWriter("vision", weights, opset=_TRACED_OPSET)
            ops = OnnxOps(graph, checkpoint, accuracy_level=self.tower_accuracy_level)
            embeds, indices = build_vision(ops, spec, "pixel_values")
            ops.output(embeds, "embeds")
            ops.output(indices, "indices")
            finish(graph, "vision", vision_signatures(spec, kept), ("tower", "projector"))

            graph = GraphWriter("embedding", weights, opset=_TRACED_OPSET)
            ops = OnnxOps(graph, checkpoint, accuracy_level=self.accuracy_level)
            ops.output(build_embedding(ops, "input_ids"), "embeds")
            finish(graph, "embedding", embedding_signatures(spec), ("embedding",))

            graph = GraphWriter("decoder", weights, opset=_DECODER_OPSET)
            ops = OnnxOps(graph, checkpoint, accuracy_level=self.accuracy_level)
            late = checkpoint.visual_layers
            text_rows = None if late is None else TextRows(layers=late, select=ops.select_text)
            ops.output(build_decoder(ops, spec, "embeds", text_rows), "logits")
            head: Part = "embedding" if spec.decoder.tied_head else "head"
            cache = "float32" if checkpoint.cache_grid is None else "int8"
            finish(graph, "decoder", decoder_signatures(spec, cache, late), ("decoder", head))
        if not self.sparse_file:
            return tuple(components)
        pack_file(target / _WEIGHTS, target / _PACKED, weights.masked)
        return tuple(replace(c, sparse_file=f"{_FOLDER}/{_PACKED}") for c in components)


def _precision(form: WeightForm, *, is_packed: bool) -> str:
    if isinstance(form, CodebookWeight):
        _, _, entries, length = form.main.codebooks.shape
        bits = form.main.index_bits / length
        if form.residual is not None:
            bits += form.residual.index_bits / form.residual.vector_length
        residual = "" if form.residual is None else " with residual"
        return f"{bits:g}-bit codebook v{length} k{entries}{residual}, float32 in memory"
    if isinstance(form, SparseWeight):
        return describe_unmasked(form, wide="float32", is_packed=is_packed)
    if not isinstance(form, AffineWeight):
        return "float32"
    grid = "symmetric" if form.zeros is None else "asymmetric"
    if form.has_float_zeros:
        grid = "float zeros"
    label = f"int{form.bits} g{form.group_size} {grid}"
    container = container_bits(form.bits)
    return label if container == form.bits else f"{label} in {container}-bit containers"

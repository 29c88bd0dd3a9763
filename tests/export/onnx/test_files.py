"""The files: valid, deterministic, every weight once, and refusals that say what would fit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import Progress, RunContext
from pocketvlm.errors import ExportError, UnsupportedError
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.export.onnx.writer import GraphWriter, WeightFile
from pocketvlm.files.signed_folder import sign_files
from pocketvlm.models.reducer import ReducerInputs, TokenReducer
from pocketvlm.runtime.onnx.engine import onnxruntime
from tests.export.rig import ReceivedAttention, quantize_affine, quantize_checkpoint

ROLES = ("vision", "embedding", "decoder")


def load_graph(folder: Path, role: str) -> onnx.GraphProto:
    return onnx.load(folder / "onnx" / f"{role}.onnx", load_external_data=False).graph


def place(graph: onnx.GraphProto, suffix: str) -> dict[str, str]:
    (tensor,) = [t for t in graph.initializer if t.name.endswith(suffix)]
    return {entry.key: entry.value for entry in tensor.external_data}


def test_a_name_has_one_content(tmp_path: Path) -> None:
    with WeightFile(tmp_path / "weights.bin") as weights:
        graph = GraphWriter("test", weights, opset=18)
        for count in (1, 5000):  # in the graph, and in the weight file
            name, zeros = f"values.{count}", np.zeros(count, np.float32)
            assert graph.constant(name, zeros) == graph.constant(name, zeros) == name
            for other in (zeros + 1, zeros.astype(np.int32), zeros[None]):
                with pytest.raises(ValueError, match=f"constant {name} of graph test has two"):
                    graph.constant(name, other)


def test_same_checkpoint_same_bytes(tiny_paths: dict[str, Path], tmp_path: Path) -> None:
    signed = []
    for name in ("one", "two"):
        checkpoint = quantize_checkpoint(Checkpoint.load(tiny_paths["llava"]), 4)
        checkpoint = replace(checkpoint, reducer=ReceivedAttention(keep=3, positions="original"))
        ToOnnx().export(checkpoint, tmp_path / name, RunContext(seed=len(signed)))
        signed.append(sign_files(tmp_path / name, frozenset()))
    assert sorted(signed[0]) == [
        "onnx/decoder.onnx",
        "onnx/embedding.onnx",
        "onnx/vision.onnx",
        "onnx/weights.bin",
    ]
    assert signed[0] == signed[1]
    # Nothing in them tells where they were made.
    for role in ROLES:
        content = (tmp_path / "one" / "onnx" / f"{role}.onnx").read_bytes()
        assert b".py" not in content
        assert str(Path.cwd()).encode() not in content


@pytest.mark.parametrize("bits", [None, 4])
def test_tied_head_and_embedding_are_the_same_bytes(
    tiny_paths: dict[str, Path], tmp_path: Path, ctx: RunContext, bits: int | None
) -> None:
    tied = Checkpoint.load(tiny_paths["llava"])
    untied = Checkpoint.load(tiny_paths["smolvlm"])
    suffixes = {None: (".weight",), 4: (".codes", ".scales")}[bits]
    for checkpoint, same in ((tied, True), (untied, False)):
        if bits is not None:
            quantize_checkpoint(checkpoint, bits)
        folder = tmp_path / str(same)
        ToOnnx().export(checkpoint, folder, ctx)
        embedding, decoder = load_graph(folder, "embedding"), load_graph(folder, "decoder")
        for suffix in suffixes:
            first, second = place(embedding, suffix), place(decoder, f"lm_head{suffix}")
            assert (first == second) == same


def test_every_byte_of_the_weights_is_used_once(
    tiny_checkpoint: Checkpoint, tmp_path: Path, ctx: RunContext
) -> None:
    ToOnnx().export(quantize_checkpoint(tiny_checkpoint, 4), tmp_path, ctx)
    spans = set()
    for role in ROLES:
        for tensor in load_graph(tmp_path, role).initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if entries:
                assert entries["location"] == "weights.bin"
                start = int(entries["offset"])
                spans.add((start, start + int(entries["length"])))
    ordered = sorted(spans)
    for (_, end), (start, _) in pairwise(ordered):
        assert 0 <= start - end < 4096
    assert ordered[0][0] == 0
    assert ordered[-1][1] == (tmp_path / "onnx" / "weights.bin").stat().st_size


def test_scales_are_cast_when_the_session_starts(
    tiny_checkpoint: Checkpoint, tmp_path: Path, ctx: RunContext
) -> None:
    # Casts and rotary tables that were left in the graph would be paid again at every token.
    ToOnnx().export(quantize_checkpoint(tiny_checkpoint, 4), tmp_path, ctx)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        tmp_path / "onnx" / "decoder.onnx", options, providers=["CPUExecutionProvider"]
    )
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    kinds = [node.op_type for node in nodes]
    assert kinds.count("Cast") == 1  # of the one integer that says how long the sequence is
    assert not {"Cos", "Sin", "Range", "Identity"} & set(kinds)
    depth = tiny_checkpoint.spec.decoder.depth
    assert kinds.count("MatMulNBits") == 4 * depth + 1
    assert kinds.count("GroupQueryAttention") == depth


def test_components_describe_the_graphs(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    seen: list[Progress] = []
    checkpoint = quantize_checkpoint(tiny_checkpoint, 3)
    components = ToOnnx().export(checkpoint, tmp_path, RunContext(on_progress=seen.append))
    assert [c.role for c in components] == list(ROLES)
    assert [p.note for p in seen] == list(ROLES)
    for component in components:
        session = onnxruntime.InferenceSession(
            tmp_path / component.file, providers=["CPUExecutionProvider"]
        )
        for described, actual in (
            (component.inputs, session.get_inputs()),
            (component.outputs, session.get_outputs()),
        ):
            assert [(s.name, list(s.shape)) for s in described] == [
                (a.name, a.shape) for a in actual
            ]
        for label in component.precision.values():
            assert label == "int3 g32 asymmetric in 4-bit containers"
    assert sorted(components[0].precision) == ["projector", "tower"]


def test_group_sizes_without_kernel_name_the_layer(
    tiny_checkpoint: Checkpoint, tmp_path: Path, ctx: RunContext
) -> None:
    name = f"{tiny_checkpoint.spec.decoder.stack}.1.mlp.down_proj"
    weight = tiny_checkpoint.form(name).dequantize()
    tiny_checkpoint.set_form(name, quantize_affine(weight, 4, 48))
    with pytest.raises(UnsupportedError, match=r"1\.mlp\.down_proj: group size 48.*16, 32, 64"):
        ToOnnx().export(tiny_checkpoint, tmp_path, ctx)


class Unexportable(TokenReducer):
    """Uses an operator that ONNX has no equivalent of."""

    def forward(self, inputs: ReducerInputs) -> tuple[Tensor, Tensor]:
        order = torch.linalg.svd(inputs.features).S[:, : self.keep].to(torch.int64)
        return inputs.features[:, : self.keep], order


def test_reducers_that_cannot_be_traced_are_named(
    tiny_paths: dict[str, Path], tmp_path: Path, ctx: RunContext
) -> None:
    checkpoint = Checkpoint.load(tiny_paths["llava"])
    checkpoint = replace(checkpoint, reducer=Unexportable(keep=2, positions="original"))
    with pytest.raises(ExportError, match=r"Unexportable: cannot become ONNX: .*linalg_svd"):
        ToOnnx().export(checkpoint, tmp_path, ctx)


@pytest.mark.parametrize("field", ["accuracy_level", "tower_accuracy_level"])
def test_accuracy_levels_are_checked(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is 3; allowed are 0, 4"):
        ToOnnx(**{field: 3})

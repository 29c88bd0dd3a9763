"""What is counted of a tower that merges tokens is what its exported graph holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.tower.mergers import MergeImportant, MergeSimilar
from pocketvlm.compress.tokens.tower.stage import MergeTokens
from pocketvlm.context import RunContext
from pocketvlm.device_bench.prediction.costs import ExportedModel, vision_operators
from pocketvlm.device_bench.prediction.operators import Operator, Product, TowerAttention
from pocketvlm.device_bench.prediction.rates import FLOAT_KERNEL
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.models.spec import ModelSpec
from pocketvlm.reference.shapes import load_shape
from pocketvlm.stages import PlanState

CTX = RunContext(threads=1)


def counted(spec: ModelSpec) -> list[Operator]:
    kernels = dict.fromkeys(spec.linears(), FLOAT_KERNEL)
    model = ExportedModel(spec=spec, kernels=kernels, visual_tokens=spec.visual_tokens)
    return list(vision_operators(model))


def macs(operators: list[Operator]) -> int:
    return sum(one.macs for one in operators if isinstance(one, Product | TowerAttention))


@pytest.mark.parametrize(
    "stage",
    [MergeTokens(), MergeTokens(merger=MergeImportant(), blocks=1)],
    ids=["similar", "important"],
)
def test_every_product_of_a_merge_is_counted(
    tiny_checkpoint: Checkpoint, tmp_path: Path, stage: MergeTokens
) -> None:
    merged = stage.apply(tiny_checkpoint, CalibrationSet.from_reference(0, 1), CTX)
    ToOnnx().export(merged, tmp_path, CTX)
    graph = onnx.load(tmp_path / "onnx/vision.onnx", load_external_data=False).graph
    found = Counter(node.op_type for node in graph.node)
    operators = counted(merged.spec)
    products = [one for one in operators if isinstance(one, Product)][1:]  # the first is a Conv
    assert found["MatMul"] + found["FusedMatMul"] == len(products)
    attentions = sum(isinstance(one, TowerAttention) for one in operators)
    assert found["MultiHeadAttention"] == attentions


def test_half_of_the_patches_are_little_more_than_half_of_the_work() -> None:
    """At the shape of SmolVLM-256M, by hand: 12 blocks, of which one and an attention run whole."""
    spec = load_shape("smolvlm-256m").spec
    stage = MergeTokens(merger=MergeSimilar(), first_block=1, blocks=1)
    merged = stage.plan(PlanState.of(spec)).spec
    tokens, half, width, inner = 1024, 512, 768, 3072
    attention = 4 * width * width
    ffn = 2 * width * inner
    patches = tokens * 3 * 16 * 16 * width
    projector = 64 * 16 * width * 576
    whole = 12 * (tokens * (attention + ffn) + 2 * tokens**2 * width) + patches + projector
    assert macs(counted(spec)) == whole
    left = (
        2 * (tokens * attention + 2 * tokens**2 * width)
        + tokens * ffn
        + 11 * half * ffn
        + 10 * (half * attention + 2 * half**2 * width)
        + patches
        + projector
        + half**2 * 64
        + half * tokens * width
    )
    assert macs(counted(merged)) == left
    assert 1.6 < whole / left < 2

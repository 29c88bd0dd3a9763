"""Masked weights in a program: the very codes, exact zeros, and what torch computes with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pocketvlm.bundle import Bundle
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.depth.blocks import Block, remove_blocks
from pocketvlm.context import RunContext
from pocketvlm.export.executorch.target import ToExecutorch
from pocketvlm.export.executorch.weights import integer_matrix
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.reference_graph.forward import decode_logits
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.executorch.native_runner import answer_with_multimodal_runner
from pocketvlm.runtime.executorch.runner import ExecutorchRunner
from pocketvlm.stages import PlanState
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.layout import AffineLayout
from pocketvlm.weights.nonzeros import AffineNonzeros
from tests.export.onnx.test_sparse import make_masked
from tests.export.rig import make_prompt

GRIDS = (
    None,
    *(
        AffineLayout(bits=bits, group_size=size, symmetric=symmetric)
        for bits, size, symmetric in (
            (4, 32, True),
            (4, 32, False),
            (8, 32, False),
            (8, 1024, True),
            (8, 1024, False),
            (3, 32, False),
            (4, 1024, False),
        )
    ),
)
PATTERNS = ("unstructured", "2:4", "blocks")


@pytest.fixture(scope="module")
def masked(
    tiny_paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, Bundle]:
    """Every grid and every pattern in turn, in one program; embedding and head are not."""
    # A block of each stack has matrices enough, and lowering takes seconds for each.
    checkpoint = remove_blocks(
        Checkpoint.load(tiny_paths["llava"]), [Block(stack="decoder", index=1)]
    )
    for index, linear in enumerate(checkpoint.spec.linears()):
        if linear.part in ("embedding", "head"):
            continue
        values, pattern = GRIDS[index % len(GRIDS)], PATTERNS[index % len(PATTERNS)]
        form, _ = make_masked(checkpoint.form(linear.name), values, pattern, index)
        checkpoint.set_form(linear.name, form)
    folder = tmp_path_factory.mktemp("masked")
    target = ToExecutorch(context=96)
    write_graphs(checkpoint, [target], folder, "0" * 64, RunContext(threads=1))
    return checkpoint, Bundle.open(folder)


def test_masked_elements_are_zero_and_the_others_their_codes() -> None:
    dense = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    for seed, values in enumerate(GRIDS[1:]):
        form, _ = make_masked(DenseWeight(values=dense), values, "unstructured", seed)
        plain = form.without_mask()
        assert isinstance(plain, AffineWeight)
        assert isinstance(form.values, AffineNonzeros)
        keeps = form.keeps()
        assert torch.equal(plain.codes()[:, :96][keeps], form.stored())
        matrix = integer_matrix(plain)
        found = matrix.dequantize()
        assert not found[~keeps].any()
        torch.testing.assert_close(found, form.dequantize(), rtol=1e-6, atol=1e-7)


def test_the_manifest_says_what_became_of_them(masked: tuple[Checkpoint, Bundle]) -> None:
    checkpoint, bundle = masked
    component = bundle.component("executorch", "decoder")
    assert "masked int4 g32 asymmetric, stored dense" in str(component.precision)
    assert any("zeros save no time" in note for note in component.notes)
    state = PlanState.of_checkpoint(checkpoint)
    warnings = ToExecutorch().predict(state.spec, state.layouts).warnings
    assert sum("masked" in warning for warning in warnings) == 2  # integers, and floats


def test_it_runs_as_torch_does(masked: tuple[Checkpoint, Bundle]) -> None:
    checkpoint, bundle = masked
    pixels, visual, prompt = make_prompt(checkpoint)
    runner = ExecutorchRunner(bundle, threads=1)
    embeds, _ = runner.encode_image(pixels.numpy())
    error = np.linalg.norm(embeds - visual.embeds.numpy()) / np.linalg.norm(visual.embeds.numpy())
    assert error < 0.05
    with torch.inference_mode():
        expected = decode_logits(checkpoint, prompt, last_only=True)[0, 0].numpy()
    found = runner.decode(prompt.embeds.numpy(), prompt.positions.numpy())
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.1


def test_multimodal_runner_reads_it_too(masked: tuple[Checkpoint, Bundle]) -> None:
    _, bundle = masked
    rng = np.random.default_rng(0)
    runner = ExecutorchRunner(bundle, threads=1)
    for _ in range(10):
        picture = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        expected = Conversation(bundle, runner=runner).ask("What?", picture, max_new_tokens=3).text
        # Special tokens, which a random model may say, are words to MultimodalRunner alone.
        if expected:
            break
    assert expected
    found = answer_with_multimodal_runner(
        bundle, "What?", picture, max_new_tokens=3, process=runner.process
    )
    assert found == expected

"""Masked weights in a program: the very codes, exact zeros, and a packed file that runs alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pocketvlm.bundle import Bundle
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.errors import BundleError
from pocketvlm.export.executorch.forms import integer_matrix
from pocketvlm.export.executorch.masked import find_masked
from pocketvlm.export.executorch.size import predict_executorch
from pocketvlm.export.executorch.target import ToExecutorch
from pocketvlm.export.sparse_container.unmasked import unmasked
from pocketvlm.models.spec import LinearSpec
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.reference_graph.forward import decode_logits
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.executorch.native_runner import answer_with_multimodal_runner
from pocketvlm.runtime.executorch.runner import ExecutorchRunner
from pocketvlm.runtime.sparse_file import expand
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.layout import AffineLayout, WeightLayout
from pocketvlm.weights.nonzeros import AffineNonzeros
from pocketvlm.weights.sparse import SparseWeight
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
) -> tuple[Checkpoint, Bundle, dict[LinearSpec, WeightLayout | None]]:
    """Every grid and every pattern in turn, in one packed program; embedding and head are not."""
    checkpoint = Checkpoint.load(tiny_paths["llava"])
    plans: dict[LinearSpec, WeightLayout | None] = {}
    for index, linear in enumerate(checkpoint.spec.linears()):
        plans[linear] = None
        if linear.part in ("embedding", "head"):
            continue
        values, pattern = GRIDS[index % len(GRIDS)], PATTERNS[index % len(PATTERNS)]
        form, plans[linear] = make_masked(checkpoint.form(linear.name), values, pattern, index)
        checkpoint.set_form(linear.name, form)
    folder = tmp_path_factory.mktemp("packed")
    target = ToExecutorch(context=96, sparse_file=True)
    write_graphs(checkpoint, [target], folder, "0" * 64, RunContext(threads=1))
    return checkpoint, Bundle.open(folder), plans


def test_masked_elements_are_zero_and_the_others_their_codes() -> None:
    dense = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    for seed, values in enumerate(GRIDS[1:]):
        form, _ = make_masked(DenseWeight(values=dense), values, "unstructured", seed)
        plain = unmasked(form)
        assert isinstance(plain, AffineWeight)
        assert isinstance(form.values, AffineNonzeros)
        keeps = form.keeps()
        assert torch.equal(plain.codes()[:, :96][keeps], form.stored())
        matrix = integer_matrix("layer", plain)
        found = matrix.dequantize()
        assert not found[~keeps].any()
        torch.testing.assert_close(found, form.dequantize(), rtol=1e-6, atol=1e-7)


def test_every_masked_weight_is_packed(masked: tuple[Checkpoint, Bundle, dict]) -> None:
    checkpoint, bundle, _ = masked
    component = bundle.component("executorch", "decoder")
    assert component.file == component.sparse_file == "executorch/model.sparse"
    assert not (bundle.path / "executorch" / "model.pte").exists()
    expanded = expand(bundle.path / component.file)
    assert expanded.name == "model.pte"
    data = expanded.content.tobytes()
    forms = {linear.name: form for linear, form in checkpoint.forms().items()}
    found = find_masked(data, forms)
    assert found.missing == ()
    layers = {id(place.form) for place in found.places}
    assert layers == {id(form) for form in forms.values() if isinstance(form, SparseWeight)}
    assert len(data) > 1.2 * (bundle.path / component.file).stat().st_size
    assert "packed in the file" in component.precision["decoder"]
    assert not any("stored dense in the packed file" in note for note in component.notes)


def test_predicted_savings(masked: tuple[Checkpoint, Bundle, dict]) -> None:
    checkpoint, bundle, plans = masked
    packed = bundle.path / "executorch" / "model.sparse"
    sizes = [
        sum(predict_executorch(checkpoint.spec, plans, sparse_file=on).part_bytes.values())
        for on in (False, True)
    ]
    # Names and graphs weigh as much as the weights of a tiny model; what packing saves does not.
    saved = expand(packed).content.size - packed.stat().st_size
    assert sizes[0] - sizes[1] == pytest.approx(saved, rel=0.03)


def test_it_runs_as_torch_does(masked: tuple[Checkpoint, Bundle, dict]) -> None:
    checkpoint, bundle, _ = masked
    pixels, visual, prompt = make_prompt(checkpoint)
    runner = ExecutorchRunner(bundle, threads=1)
    assert runner.expand_ms is not None
    assert runner.expand_ms > 0
    embeds, _ = runner.encode_image(pixels.numpy())
    error = np.linalg.norm(embeds - visual.embeds.numpy()) / np.linalg.norm(visual.embeds.numpy())
    assert error < 0.05
    with torch.inference_mode():
        expected = decode_logits(checkpoint, prompt, last_only=True)[0, 0].numpy()
    found = runner.decode(prompt.embeds.numpy(), prompt.positions.numpy())
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.1


def test_multimodal_runner_reads_it_too(masked: tuple[Checkpoint, Bundle, dict]) -> None:
    _, bundle, _ = masked
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


def test_damage_is_refused(masked: tuple[Checkpoint, Bundle, dict]) -> None:
    _, bundle, _ = masked
    file = bundle.path / "executorch" / "model.sparse"
    data = file.read_bytes()
    try:
        file.write_bytes(data[: len(data) // 2])
        with pytest.raises(BundleError, match=r"model\.sparse: is no packed weight file, or is"):
            ExecutorchRunner(Bundle.open(bundle.path, verify=False))
    finally:
        file.write_bytes(data)

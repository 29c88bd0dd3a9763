"""The Core ML runner over the reference evaluator, against the checkpoint in torch."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pocketvlm.bundle import Bundle
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.errors import BundleError, InputError
from pocketvlm.export.torch_runner import TorchRunner
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.coreml.runner import CoremlRunner
from pocketvlm.runtime.engines import choose_engine, open_engine
from pocketvlm.weights.codebook import CodebookWeight, Lookup
from tests.runtime.coreml.rig import CHUNK, CONTEXT, reduced, write_coreml_bundle

KINDS = ("states", "passed", "float16", "codebook")


@dataclass(frozen=True, eq=False)
class Case:
    kind: str
    checkpoint: Checkpoint
    bundle: Bundle

    @property
    def tolerance(self) -> float:
        return 1e-2 if self.kind == "float16" else 1e-5


@pytest.fixture(scope="module")
def cases(tiny_paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("coreml")
    options = {
        "states": ("smolvlm", {"precision": "float32"}),
        "passed": ("llava", {"precision": "float32", "deployment": "iOS17"}),
        "float16": ("llava", {}),
        "codebook": ("smolvlm", {"precision": "float32"}),
    }
    made = {}
    for kind, (family, chosen) in options.items():
        checkpoint = reduced(tiny_paths[family], "original" if kind != "states" else "consecutive")
        if kind == "codebook":
            look_up_vectors(checkpoint)
        made[kind] = Case(kind, checkpoint, write_coreml_bundle(checkpoint, root / kind, **chosen))
    return made


def look_up_vectors(checkpoint: Checkpoint) -> None:
    """Two bits per weight in the decoder: 256 vectors of four, of the weights' own size."""
    generator = torch.Generator().manual_seed(0)
    for linear, form in checkpoint.forms().items():
        rows, columns = form.shape
        if linear.part in ("decoder", "embedding", "head") and rows % 4 == 0:
            scale = form.dequantize().std()
            books = torch.randn(1, 1, 256, 4, generator=generator) * scale
            indices = torch.randint(256, (rows // 4, columns), generator=generator)
            lookup = Lookup.from_indices(indices, books.half(), index_bits=8)
            checkpoint.set_form(linear.name, CodebookWeight(main=lookup))


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


def rows(case: Case, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    width = case.checkpoint.spec.decoder.hidden_size
    embeds = np.random.default_rng(seed).standard_normal((1, count, width)).astype(np.float32)
    return embeds, np.arange(count)[None]


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("count", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 3])
def test_rows_in_chunks_equal_torch_at_once(case: Case, count: int) -> None:
    ours, theirs = CoremlRunner(case.bundle), TorchRunner(case.checkpoint)
    embeds, positions = rows(case, count)
    expected = theirs.decode(embeds, positions)
    assert_close(ours.decode(embeds, positions), expected, case.tolerance)
    assert ours.length == count
    for step in range(3):
        more, place = rows(case, 1, seed=step + 1)
        place = place + count + step
        expected = theirs.decode(more, place)
        assert_close(ours.decode(more, place), expected, case.tolerance)


def test_the_cache_can_be_filled_to_its_end_and_not_beyond(case: Case) -> None:
    ours, theirs = CoremlRunner(case.bundle), TorchRunner(case.checkpoint)
    assert (ours.chunk, ours.capacity) == (CHUNK, CONTEXT)
    embeds, positions = rows(case, CONTEXT)
    # The border is not a multiple of the chunk, so that the last one no longer fits.
    for part in (slice(0, 3), slice(3, CONTEXT)):
        found = ours.decode(embeds[:, part], positions[:, part])
        expected = theirs.decode(embeds[:, part], positions[:, part])
    assert_close(found, expected, case.tolerance)
    with pytest.raises(InputError, match=f"allowed are {CONTEXT}"):
        ours.decode(*rows(case, 1))


def test_truncation_forgets_rows(case: Case) -> None:
    ours = CoremlRunner(case.bundle)
    embeds, positions = rows(case, 12)
    whole = ours.decode(embeds, positions).copy()
    ours.decode(*rows(case, 5, seed=9))
    ours.truncate(7)
    again = ours.decode(embeds[:, 7:], positions[:, 7:])
    assert_close(again, whole, case.tolerance)
    ours.reset()
    assert_close(ours.decode(embeds, positions), whole, 1e-6)


def test_vision_and_embedding_equal_torch(case: Case) -> None:
    ours, theirs = CoremlRunner(case.bundle), TorchRunner(case.checkpoint)
    tower = case.checkpoint.spec.tower
    pixels = np.random.default_rng(1).standard_normal(
        (1, tower.channels, tower.height, tower.width)
    )
    found, expected = (r.encode_image(pixels.astype(np.float32)) for r in (ours, theirs))
    np.testing.assert_array_equal(found[1], expected[1])
    assert found[1].dtype == np.int64
    assert_close(found[0], expected[0], case.tolerance)
    ids = list(range(5, 5 + 2 * CHUNK + 3))
    assert_close(ours.embed(ids), theirs.embed(ids), case.tolerance)


def test_a_conversation_runs_on_it(case: Case) -> None:
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    answers = []
    for runner in (CoremlRunner(case.bundle), TorchRunner(case.checkpoint)):
        conversation = Conversation(case.bundle, runner=runner)
        turns = [
            conversation.ask("what is it?", picture, max_new_tokens=6),
            conversation.ask("sure?", max_new_tokens=4),
        ]
        answers.append([turn.token_ids for turn in turns])
    assert answers[0] == answers[1]


def test_it_is_the_engine_of_a_bundle_without_others(cases: dict[str, Case]) -> None:
    bundle = cases["states"].bundle
    assert choose_engine(bundle) == "coreml"
    assert "not Core ML" in open_engine(bundle).engine


def test_a_bundle_whose_packages_do_not_match_is_refused(
    cases: dict[str, Case], tmp_path: Path
) -> None:
    bundle = cases["states"].bundle
    none = replace(bundle, manifest=replace(bundle.manifest, components=()))
    with pytest.raises(BundleError, match="no vision graph for target 'coreml'"):
        CoremlRunner(none)
    copy = Path(shutil.copytree(bundle.path, tmp_path / "copy"))
    document = json.loads((copy / "manifest.json").read_text())
    for component in document["components"]:
        if component["role"] == "vision":
            component["outputs"][0]["name"] = "features"
    (copy / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match="has the outputs embeds, features that only one"):
        CoremlRunner(Bundle.open(copy, verify=False))
    document["components"] = [
        {**component, "function": "chunk" if component["function"] else None}
        for component in json.loads((bundle.path / "manifest.json").read_text())["components"]
    ]
    (copy / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match="no function 'chunk'; there are"):
        CoremlRunner(Bundle.open(copy, verify=False))

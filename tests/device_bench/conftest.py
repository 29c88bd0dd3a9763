"""Real bundles, of the tiny SmolVLM and of a reference model, and made-up blocks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.reference import reference_model_path
from tests.device_bench.rig import make_block
from tests.vision_graphs import write_model_of_four_graphs


@pytest.fixture(scope="session")
def tiny_bundle(tiny_paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle's folder, which no test may change."""
    return _write_bundle(Checkpoint.load(tiny_paths["smolvlm"]), tmp_path_factory)


@pytest.fixture(scope="session")
def reference_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of pocket-smol, likewise."""
    return _write_bundle(Checkpoint.load(reference_model_path("pocket-smol")), tmp_path_factory)


@pytest.fixture(scope="session")
def graphs_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny Qwen2-VL with four vision graphs, likewise."""
    model = tmp_path_factory.mktemp("four graphs") / "model"
    return _write_bundle(write_model_of_four_graphs(model), tmp_path_factory)


def _write_bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "bundle"
    path.mkdir()
    write_graphs(checkpoint, (ToOnnx(),), path, "", RunContext(threads=1))
    return path


@pytest.fixture
def block():
    """Makes blocks."""
    return make_block


@pytest.fixture
def other(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle under another name."""
    copied = tmp_path / "base"
    shutil.copytree(tiny_bundle, copied)
    return copied

"""A real bundle of the tiny SmolVLM, and made-up blocks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline.assemble import write_graphs
from tests.device_bench.rig import make_block


@pytest.fixture(scope="session")
def tiny_bundle(tiny_paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle's folder, which no test may change."""
    path = tmp_path_factory.mktemp("bench") / "bundle"
    path.mkdir()
    checkpoint = Checkpoint.load(tiny_paths["smolvlm"])
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

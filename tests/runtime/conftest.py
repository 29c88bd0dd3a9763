"""Real bundles of the tiny models: exported, signed and opened as an app would find them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketvlm.bundle import Bundle, VisualSchedule
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.baseline.fixed import FixedReducer
from pocketvlm.context import RunContext
from pocketvlm.export.executorch.target import ToExecutorch
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.runtime.onnx.runner import OnnxRunner
from tests.shared import make_once

CAPACITY = 96
"""Rows of KV cache in the ExecuTorch program."""

KINDS = ("llava", "smolvlm", "llava-original", "smolvlm-consecutive", "smolvlm-ended")


@dataclass(frozen=True, eq=False)
class Pair:
    """A checkpoint and the bundle that was made from it."""

    checkpoint: Checkpoint
    bundle: Bundle


class CountingRunner(OnnxRunner):
    """Counts the tiles that the tower sees."""

    tiles = 0

    def encode_image(self, *arguments, **options):
        self.tiles += 1
        return super().encode_image(*arguments, **options)


def write_bundle(checkpoint: Checkpoint, path: Path) -> Bundle:
    """Exports and signs, without the certificate, which needs the runtime itself."""
    write_graphs(checkpoint, (ToOnnx(),), path, "", RunContext(threads=1))
    return Bundle.open(path)


@pytest.fixture(scope="session")
def both_targets(tiny_paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """ONNX and ExecuTorch of one float model, with gaps among the positions of its picture."""

    def make(path: Path) -> None:
        checkpoint = Checkpoint.load(tiny_paths["smolvlm"])
        reducer = FixedReducer((1, 4, 6, 11, 14), positions="original")
        targets = (ToOnnx(), ToExecutorch(context=CAPACITY))
        write_graphs(replace(checkpoint, reducer=reducer), targets, path, "", RunContext(threads=1))

    return Bundle.open(make_once(tmp_path_factory, "both-targets", make))


@pytest.fixture(scope="session")
def pairs(tiny_paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Both families, with all of their tokens and with five of sixteen under each policy; and a
    decoder in which visual rows end before the last layer."""
    root = tmp_path_factory.mktemp("bundles")
    made = {}
    for kind in KINDS:
        family, _, policy = kind.partition("-")
        checkpoint = Checkpoint.load(tiny_paths[family])
        if policy == "ended":
            # Fewer visual rows as well, none after the first layer.
            reducer = FixedReducer((1, 4, 6, 11, 14), positions="original")
            checkpoint = replace(
                checkpoint, reducer=reducer, visual_schedule=VisualSchedule.ending(1)
            )
        elif policy:
            reducer = FixedReducer((1, 4, 6, 11, 14), positions=policy)
            checkpoint = replace(checkpoint, reducer=reducer)
        made[kind] = Pair(checkpoint, write_bundle(checkpoint, root / kind))
    return made


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, pairs: dict[str, Pair]) -> Pair:
    """Each kind in turn; read-only by agreement."""
    return pairs[request.param]


@pytest.fixture
def llava(pairs: dict[str, Pair]) -> Pair:
    """One kind, where the kind makes no difference."""
    return pairs["llava"]


@pytest.fixture
def picture() -> Image.Image:
    """Noise: every pixel matters."""
    return noise(0)


def noise(seed: int, size: tuple[int, int] = (50, 40)) -> Image.Image:
    """A seeded picture of independent pixels."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values)

"""The C++ runner, built once per checkout, and bundles that it answers from."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketvlm.bundle import Bundle, VisualSchedule
from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.quantization.affine.rtn import RoundToNearest
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.kv_cache import QuantizeCache
from pocketvlm.compress.tokens.baseline.fixed import FixedReducer
from pocketvlm.compress.tokens.schedule.fast_v import FastV
from pocketvlm.compress.tokens.skip_empty_tiles import SkipEmptyTiles
from pocketvlm.context import RunContext
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.reference import reference_model_path
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.runtime.onnx.engine import onnxruntime
from tests.programs import give_up
from tests.shared import make_once
from tests.vision_graphs import write_model_of_four_graphs

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "runners" / "cpp"
BUILD = ROOT / "build" / "runners"
LIBRARY = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"), None)

REFERENCE = ("pocket-smol", "pocket-llava", "pocket-tiles")
GRAPHS = "qwen2-vl-graphs"  # four vision graphs
TINY = (
    "smolvlm-ended",
    "smolvlm-ranked",
    "smolvlm-tiles-empty",
    "internvl3",
    "qwen2.5-vl",
    "gemma3",
    "paligemma",
)


@pytest.fixture(scope="session")
def runner() -> tuple[str, ...]:
    """The command of the runner, with the library of this environment's wheel.

    `POCKETVLM_RUNNER` names one that was built elsewhere. Without a compiler and the headers there
    is nothing to test, which only CI takes for a failure.
    """
    command = os.environ.get("POCKETVLM_RUNNER") or str(_build())
    return (command, "--onnxruntime", str(LIBRARY))


def _build() -> Path:
    if shutil.which("cmake") is None or shutil.which("c++") is None or LIBRARY is None:
        give_up("cmake, a C++ compiler or ONNX Runtime's library is not there")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    BUILD.mkdir(parents=True, exist_ok=True)
    with _locked(BUILD / "lock"):
        for command in (
            [SOURCE / "fetch_headers.sh", BUILD / "headers"],
            [
                *("cmake", "-S", SOURCE, "-B", BUILD / "cpp", *generator),
                # What is quickest to build: no optimization, eight files in one.
                *("-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG="),
                "-DCMAKE_UNITY_BUILD=ON",
                f"-DONNXRUNTIME_INCLUDE_DIR={BUILD / 'headers/usr/include/onnxruntime'}",
            ],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                give_up(f"{command[0]}: {done.stderr.strip()}")
        subprocess.run(["cmake", "--build", BUILD / "cpp", "--parallel", "2"], check=True)
    return BUILD / "cpp" / "pocketvlm-runner"


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Bundles that were made so far, by name."""
    del tmp_path_factory
    return {}


@pytest.fixture
def make_bundle(bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory):
    """Makes the bundle of a reference or tiny model, once."""

    def make(name: str) -> Bundle:
        if name not in bundles:
            folder = make_once(tmp_path_factory, name, lambda folder: _write_bundle(name, folder))
            bundles[name] = Bundle.open(folder / "bundle")
        return bundles[name]

    return make


def _write_bundle(name: str, folder: Path) -> None:
    if name in REFERENCE:
        checkpoint = Checkpoint.load(reference_model_path(name))
    elif name == GRAPHS:
        checkpoint = write_model_of_four_graphs(folder / "model")
    else:
        family = re.sub("-(ended|ranked|empty)$", "", name)
        write_tiny_model(family, folder / "model")
        checkpoint = Checkpoint.load(folder / "model")
    context = RunContext(threads=1)
    target = ToOnnx()
    if name == "pocket-smol":  # 4-bit codes, a graph for long calls, and an int8 cache
        target = ToOnnx(int8_prefill_rows=24)
        samples = CalibrationSet.from_reference(0, 9)
        rules = (WeightRule(bits=4),)
        checkpoint = RoundToNearest(rules=rules).apply(checkpoint, samples, context)
        checkpoint = QuantizeCache().apply(checkpoint, samples, context)
    elif name == "smolvlm-tiles-empty":
        samples = CalibrationSet.synthetic(1)
        checkpoint = SkipEmptyTiles(contrast=148).apply(checkpoint, samples, context)
    elif name == "smolvlm-ended":  # fewer visual rows with gaps, none after the first layer
        reducer = FixedReducer((1, 4, 6, 11, 14), positions="original")
        checkpoint = replace(checkpoint, reducer=reducer, visual_schedule=VisualSchedule.ending(1))
    elif name == "smolvlm-ranked":  # half of the visual rows in the second layer
        schedule = FastV(first_layers=1).plan(2, checkpoint.spec.visual_tokens)
        checkpoint = replace(checkpoint, visual_schedule=schedule)
    path = folder / "bundle"
    path.mkdir()
    write_graphs(checkpoint, (target,), path, "", context)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    """Picture files of several sizes: smooth areas, so that every filter shows."""
    folder = tmp_path_factory.mktemp("pictures")
    files = []
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(200, 150), (90, 310), (128, 128), (400, 60)]):
        blocks = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
        picture = Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)
        file = folder / f"{number}.{'png' if number % 2 else 'jpg'}"
        picture.save(file)
        files.append(file)
    return files

"""A runtime that is older than a bundle's files need is refused before it answers."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from pocketvlm.bundle import Bundle, RuntimeNeeds
from pocketvlm.emulation.mil.package import MilPackage
from pocketvlm.errors import BundleError
from pocketvlm.runtime.coreml.apple import require_system
from pocketvlm.runtime.executorch.program import find_program
from pocketvlm.runtime.onnx import runner as onnx_runner
from pocketvlm.runtime.onnx.runner import OnnxRunner
from pocketvlm.runtime.onnx.versions import (
    FLOAT_ZEROS_2BIT_VERSION,
    INT8_CACHE_VERSION,
    LOWEST_ONNX_VERSION,
)
from pocketvlm.runtime.versions import is_older


@pytest.mark.parametrize(
    ("found", "lowest", "older"),
    [
        ("1.25.0", "1.25.0", False),
        ("1.25", "1.25.0", False),
        ("1.24.4", "1.25.0", True),
        ("1.9.9", "1.25.0", True),
        ("2.0", "1.25.0", False),
        ("1.27.0+cpu", "1.27", False),
        ("1.27.0.dev20260101", "1.27.1", True),
        ("unknown", "1.25.0", True),
    ],
)
def test_versions_are_compared_by_their_numbers(found, lowest, older):
    assert is_older(found, lowest) == older


def with_needs(bundle: Bundle, target: str, version: str) -> Bundle:
    needs = RuntimeNeeds(runtime="The runtime", lowest_version=version)
    return replace(bundle, manifest=replace(bundle.manifest, runtimes={target: needs}))


def test_an_older_onnx_runtime_is_refused(pairs, monkeypatch):
    bundle = pairs["smolvlm-consecutive"].bundle
    assert bundle.manifest.runtimes["onnx"].lowest_version == LOWEST_ONNX_VERSION
    monkeypatch.setattr(onnx_runner.ort, "__version__", "1.24.4")
    with pytest.raises(
        BundleError, match=r"its onnx files need ONNX Runtime 1\.25\.0 or newer; 1\.24\.4 is"
    ):
        OnnxRunner(bundle)
    # Written before the field was: taken as it is.
    OnnxRunner(replace(bundle, manifest=replace(bundle.manifest, runtimes={})), threads=1)


def test_an_older_executorch_is_refused(pairs):
    pytest.importorskip("executorch")
    bundle = pairs["smolvlm-consecutive"].bundle
    program = replace(bundle.manifest.components[0], target="executorch", role="decoder")
    bundle = replace(bundle, manifest=replace(bundle.manifest, components=(program,)))
    with pytest.raises(BundleError, match="its executorch files need The runtime 99 or newer"):
        find_program(with_needs(bundle, "executorch", "99"))


def test_an_older_system_is_refused(monkeypatch):
    package = MilPackage(path=Path("p"), functions={}, specification_version=9)
    monkeypatch.setattr(MilPackage, "open", lambda _: package)
    require_system(Path("p"), "15.0")
    require_system(Path("p"), "26.1")
    with pytest.raises(BundleError, match=r"specification 9 needs macOS 15\.0 .* this is macOS 14"):
        require_system(Path("p"), "14.7")


@pytest.mark.parametrize("version", ["", "one", "1..2", "1.2.3.4.5", "1.27.0\n", "-1"])
def test_a_version_is_numbers(version):
    with pytest.raises(ValueError, match="lowest_version"):
        RuntimeNeeds(runtime="ONNX Runtime", lowest_version=version)


def test_bundles_need_no_newer_version_than_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    bound = next(text for text in project["dependencies"] if text.startswith("onnxruntime"))
    lowest = bound.removeprefix("onnxruntime>=")
    assert not is_older(lowest, LOWEST_ONNX_VERSION)
    assert not is_older(lowest, INT8_CACHE_VERSION)
    assert not is_older(lowest, FLOAT_ZEROS_2BIT_VERSION)

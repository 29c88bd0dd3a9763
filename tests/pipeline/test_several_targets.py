"""Several targets in one run: one that fails takes nothing from the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

from pocketvlm.bundle import Bundle, Component
from pocketvlm.bundle.manifest import RuntimeNeeds
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.errors import ExportError, MissingExtraError
from pocketvlm.export.executorch.target import ToExecutorch
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.models.layers import LinearSpec
from pocketvlm.models.spec import ModelSpec
from pocketvlm.pipeline.plan import plan
from pocketvlm.pipeline.run import run
from pocketvlm.recipes.load import Recipe, load_recipe
from pocketvlm.runtime.executorch import program as executorch_program
from pocketvlm.stages import Explanation, Target
from pocketvlm.weights.layout import WeightLayout

REASON = "a toolkit ended in the middle of a graph"


@dataclass(frozen=True, kw_only=True)
class Broken(Target):
    """A target that writes half of a file and fails, as a toolkit does."""

    method: Literal["broken"] = "broken"

    def explain(
        self, layout: WeightLayout | None, shape: tuple[int, int], *, is_table: bool = False
    ) -> Explanation:
        return Explanation(stored="float32")

    def graph_bytes(
        self, spec: ModelSpec, layouts: Mapping[LinearSpec, WeightLayout | None], /
    ) -> Mapping[str, int]:
        return {"other": 0}

    def vision_bytes(self, spec: ModelSpec, /, *, is_new_size: bool) -> int:
        return 0

    def layer_bytes(self, layout: WeightLayout | None, shape: tuple[int, int], /) -> int:
        return 0

    def runtime_needs(self, folder: Path, components: Sequence[Component]) -> RuntimeNeeds:
        raise AssertionError("nothing was exported")

    def capacity(self, spec: ModelSpec) -> int:
        return spec.decoder.context_length

    def write(self, checkpoint: Checkpoint, folder: Path, ctx: RunContext) -> tuple[Component, ...]:
        (folder / "broken").mkdir()
        (folder / "broken" / "half.bin").write_bytes(b"half")
        raise ExportError(REASON)


def run_with(targets, model: Path, out: Path):
    recipe = load_recipe("float")
    document = Recipe.to_document

    # The table of targets does not know this one, and a run writes its recipe down.
    class Unlisted(Recipe):
        def to_document(self):
            return document(recipe)

    unlisted = Unlisted(**{**recipe.__dict__, "targets": targets})
    return run(
        model,
        unlisted,
        out=out,
        calibration=CalibrationSet.synthetic(n=2),
        ctx=RunContext(threads=1),
    )


def test_the_other_target_is_whole_and_the_reason_is_told(tiny_paths, tmp_path):
    result = run_with((Broken(), ToOnnx()), tiny_paths["llava"], tmp_path / "run")
    bundle = Bundle.open(tmp_path / "run" / "bundle")
    assert {component.target for component in bundle.manifest.components} == {"onnx"}
    assert not (bundle.path / "broken").exists()
    assert not any("broken" in name for name in bundle.manifest.files)
    assert result.failures == (f"broken was not exported: {REASON}",)
    assert result.report.document["failures"] == list(result.failures)
    assert result.report.parity.passed


def test_a_run_without_any_target_leaves_what_was_there(tiny_paths, tmp_path):
    out = tmp_path / "run"
    run_with((ToOnnx(),), tiny_paths["llava"], out)
    before = Bundle.open(out / "bundle").manifest
    with pytest.raises(ExportError, match=REASON):
        run_with((Broken(),), tiny_paths["llava"], out)
    assert Bundle.open(out / "bundle").manifest == before


def test_a_missing_toolkit_is_refused_before_any_compute(tiny_paths, monkeypatch, tmp_path):
    known = executorch_program.importlib.util.find_spec
    monkeypatch.setattr(
        executorch_program.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "executorch" else known(name, *rest),
    )
    recipe = replace(load_recipe("float"), targets=(ToExecutorch(),))
    planned = plan(tiny_paths["llava"], recipe)
    assert "pip install 'pocketvlm[executorch]'" in planned.refused[0]
    with pytest.raises(MissingExtraError, match=r"pocketvlm\[executorch\]"):
        ToExecutorch().export(Checkpoint.load(tiny_paths["llava"]), tmp_path, RunContext())


def test_plan_says_what_executorch_runs_at_a_price_and_what_not(tiny_paths):
    settings = ["stages.0.rules=[{bits: 4, group_size: 32}]"]
    recipe = load_recipe("int8-safe", settings)
    dear = plan(tiny_paths["llava"], replace(recipe, targets=(ToExecutorch(),)))
    assert not dear.refused
    assert any("symmetric: true" in warning for warning in dear.warnings)
    settings = ["stages.0.rules=[{bits: 4, group_size: 32, symmetric: true}]"]
    recipe = load_recipe("int8-safe", settings)
    cheap = plan(tiny_paths["llava"], replace(recipe, targets=(ToExecutorch(),)))
    assert not cheap.warnings
    assert cheap.weight_bytes < dear.weight_bytes
    settings = ["stages.0.rules=[{bits: 4, group_size: 16, symmetric: true}]"]
    recipe = load_recipe("int8-safe", settings)
    refused = plan(tiny_paths["llava"], replace(recipe, targets=(ToExecutorch(),)))
    assert "group size 16 has no XNNPACK kernel; allowed are multiples of 32" in refused.refused[0]

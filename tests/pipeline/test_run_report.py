"""The report that a run writes is the value that it hands back, and no key of it is unknown."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.context import RunContext
from pocketvlm.device_bench.workload import Workload
from pocketvlm.json_io import decode, read_json
from pocketvlm.pipeline.run import RunResult, run
from pocketvlm.pipeline.sources import load_evaluation
from pocketvlm.recipes.load import load_recipe
from pocketvlm.reports.report import Report
from pocketvlm.reports.report_file import read_report

EXPECT = """
expect:
  bundle_share: {max: 0.0001}
  decode_speedup: {min: 2.0}
"""


@pytest.fixture(scope="module")
def measured(
    tiny_paths: dict[str, Path],
    recipe_path: Path,
    questions: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> RunResult:
    """A run with everything in it: stages, source check, parity, quality, and a measurement."""
    folder = tmp_path_factory.mktemp("measured")
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe_path.read_text() + EXPECT)
    return run(
        tiny_paths["llava"],
        load_recipe(str(recipe)),
        out=folder / "run",
        calibration=CalibrationSet.synthetic(2),
        ctx=RunContext(threads=1),
        evaluation=load_evaluation(str(questions), 2),
        workload=Workload(name="tiny", image_size=64, prompt_tokens=48, new_tokens=4),
        command="pocketvlm compress",
    )


def test_every_key_that_a_run_writes_has_a_field(measured: RunResult) -> None:
    document = read_json(measured.out / "report.json")
    measured_blocks = {name: block for name, block in document.items() if block is not None}
    assert document.keys() == measured_blocks.keys()
    assert measured_blocks.keys() == {field.name for field in fields(Report)} - {"document"}
    decode(Report, measured_blocks)  # which refuses keys of a block that it does not know


def test_the_file_reads_back_as_the_value_of_the_run(measured: RunResult) -> None:
    assert read_report(measured.out) == measured.report
    assert measured.report.document == read_json(measured.out / "report.json")
    quality = measured.report.quality
    assert quality is not None
    assert quality.n == len(quality.compressed.credits) == 2


def test_bounds_of_the_recipe_are_held_against_the_typed_figures(measured: RunResult) -> None:
    (failure,) = measured.failures
    share = measured.report.size.bundle_share
    assert failure == f"bundle_share is {share:.3f}, expected at most 0.0001"
    # There was no baseline, so the speed-up is not measured, and what is not measured passes.
    assert [arm.ratios for arm in measured.report.bench.arms.values()] == [{}]

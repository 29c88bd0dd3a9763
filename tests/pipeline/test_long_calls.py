"""A checkpoint of a run is evaluated with the long calls of the bundle beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.errors import InputError
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.pipeline.sources import long_call_rows, score_subject
from tests.export.rig import quantize_checkpoint

NOTE = "note     prompts of 9 rows and more run on int8 rows, as in the bundle beside it"


def test_the_arithmetic_is_that_of_the_bundle_beside_it(tiny_paths, tmp_path, run_cli) -> None:
    checkpoint = quantize_checkpoint(Checkpoint.load(tiny_paths["smolvlm"]), 4)
    checkpoint.save(tmp_path / "checkpoint")
    asked = ("eval", tmp_path / "checkpoint", "--n", 1, "--threads", 1, "--arithmetic")
    assert long_call_rows(str(tmp_path / "checkpoint")) is None
    assert long_call_rows("reference:pocket-smol") is None
    code, out, err = run_cli(*asked, "onnx")
    assert code == 0
    assert "note" not in out + err
    bundle: Path = tmp_path / "bundle"
    bundle.mkdir()
    write_graphs(checkpoint, (ToOnnx(int8_prefill_rows=9),), bundle, "", RunContext(threads=1))
    assert long_call_rows(str(tmp_path / "checkpoint")) == 9
    for arithmetic, is_noted in (("onnx", True), ("float32", False)):
        code, out, err = run_cli(*asked, arithmetic)
        assert code == 0
        assert (NOTE in out + err) == is_noted


def test_rows_without_the_arithmetic_that_has_them_are_refused(tiny_paths) -> None:
    samples = CalibrationSet.from_reference(0, 1)
    with pytest.raises(InputError, match="goes with arithmetic 'onnx', not with 'executorch'"):
        score_subject(
            str(tiny_paths["smolvlm"]), samples, RunContext(), "executorch", int8_prefill_rows=9
        )

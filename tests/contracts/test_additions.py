"""A score, a reducer and a target that the package lacks: each is one module and one table line.

They are held to the contract suite of their table by that line alone. `benchmarks/tree_counts.py`
counts the lines of the modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.unstructured.pruner import Prune
from pocketvlm.compress.tokens.stage import REDUCERS, ReduceTokens
from pocketvlm.context import RunContext
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline.sources import load_checkpoint
from pocketvlm.weights.sparse import SparseWeight
from tests.contracts import test_reducers, test_targets
from tests.contracts.additions.reducer import LargestFeatures
from tests.contracts.additions.score import Ria, score_ria
from tests.contracts.additions.target import ToArrays

CTX = RunContext(threads=1)


@pytest.fixture
def path(tiny_paths: Mapping[str, Path]) -> Path:
    return tiny_paths["smolvlm"]


@pytest.fixture
def samples() -> CalibrationSet:
    return CalibrationSet.from_reference(0, 4)


def test_a_score_prunes_is_saved_and_exported(
    path: Path, samples: CalibrationSet, tmp_path: Path
) -> None:
    done = Prune(score=Ria(), ratio=0.5).apply(Checkpoint.load(path), samples, CTX)
    assert done.history[-1].parameters["score"] == {"kind": "ria", "exponent": 0.5}
    pruned = [form for form in done.forms().values() if isinstance(form, SparseWeight)]
    assert pruned
    for form in pruned:
        assert float((form.dequantize() == 0).double().mean()) == pytest.approx(0.5, abs=0.01)
    done.save(tmp_path / "saved")
    again = load_checkpoint(tmp_path / "saved")
    assert again.history[-1].parameters["score"] == {"kind": "ria", "exponent": 0.5}
    assert {c.role for c in ToOnnx().export(again, tmp_path / "onnx", CTX)} == {
        *("vision", "embedding", "decoder")
    }


def test_relative_importance_is_the_papers() -> None:
    """Equation 4 by hand: rows sum to 4 and 4, columns to 3 and 5, roots of norms are 2 and 3."""
    weights, mean_squares = torch.tensor([[1.0, -3.0], [2.0, 2.0]]), torch.tensor([16.0, 81.0])
    expected = [
        [(1 / 4 + 1 / 3) * 2, (3 / 4 + 3 / 5) * 3],
        [(2 / 4 + 2 / 3) * 2, (2 / 4 + 2 / 5) * 3],
    ]
    found = score_ria(weights, mean_squares, 0.5)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_a_reducer_passes_its_contract(
    monkeypatch: pytest.MonkeyPatch,
    tiny_checkpoint: Checkpoint,
    samples: CalibrationSet,
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(REDUCERS, LargestFeatures.kind, LargestFeatures)  # type: ignore[arg-type]  # a dict, declared read-only
    name = LargestFeatures.kind
    for positions in ("original", "consecutive"):
        test_reducers.test_a_reducer_keeps_as_many_tokens_as_it_says_in_order(
            name, positions, tiny_checkpoint
        )
    test_reducers.test_the_same_picture_is_reduced_alike(name, tiny_checkpoint)
    test_reducers.test_an_exported_reducer_chooses_what_torch_chooses(name, tiny_checkpoint)
    stage = ReduceTokens(reducer=LargestFeatures(norm=1), keep=4)  # type: ignore[arg-type]  # not in the union of the table
    done = stage.apply(tiny_checkpoint, samples, CTX)
    assert done.reducer is not None
    assert done.reducer.keep == 4
    assert done.history[-1].parameters["reducer"] == {"kind": name, "norm": 1}


def test_a_target_passes_its_contract(path: Path, tmp_path: Path) -> None:
    target: Any = ToArrays()
    test_targets.test_what_is_exported_is_what_was_planned(target, path, tmp_path)
    test_targets.test_other_widths_of_a_cache_are_refused(target, path)
    for layout in test_targets.LAYOUTS:
        test_targets.test_a_layout_has_one_answer_for_plan_and_export(
            target, layout, path, tmp_path
        )
    for number, stage in enumerate((test_targets.CUT, {"method": "quantize_cache"})):
        test_targets.test_a_refusal_of_the_plan_is_one_of_the_export(
            target, stage, path, tmp_path / str(number)
        )
    written = np.load(tmp_path / "arrays" / "decoder.npz")
    forms = {linear.name: form for linear, form in Checkpoint.load(path).forms().items()}
    for name in written.files:
        np.testing.assert_array_equal(
            written[name], forms[name].dequantize().numpy().astype(np.float16)
        )

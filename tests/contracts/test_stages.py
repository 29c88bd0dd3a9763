"""What every stage of the table promises; a new one is tested by one line of options."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pocketvlm.calibration import CalibrationSet, Sample
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.checkpoint.records import timeless
from pocketvlm.context import RunContext
from pocketvlm.pipeline.sources import load_checkpoint
from pocketvlm.recipes.stages import STAGES
from pocketvlm.reference.random_models import tiny_config, write_random_model
from pocketvlm.stages import FLOAT_CACHE_BITS, PlanState, Stage
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import total_stored_bytes
from tests.contracts.promises import read, require_configuration

RULES = [{"part": "decoder", "bits": 4, "group_size": 16}]
OPTIONS: dict[str, dict[str, Any]] = {
    "prune_depth": {"decoder_blocks": 1},
    "prune_width": {"ffn_ratio": 0.5},
    "prune": {"score": {"kind": "wanda"}},
    "set_resolution": {"height": 64, "width": 64},
    "limit_tiles": {"max_tiles": 1},
    "add_grid": {"fewest": 2, "most": 3},
    "choose_grid": {"rule": {"kind": "slice_count"}},
    "skip_empty_tiles": {},
    "merge_tokens": {"keep": 0.5},
    "reduce_tokens": {"keep": 0.5},
    "drop_tokens": {"schedule": {"kind": "fast_v", "first_layers": 1}},
    "distill": {"steps": 2, "batch_size": 2, "check_every": 1},
    "rotate": {"untie_head": True},
    "awq": {"rules": RULES, "grid_points": 3},
    "rtn": {"rules": RULES},
    "gptq": {"rules": RULES},
    "sparsegpt_gptq": {"rules": [{"bits": 4, "group_size": 16}]},
    "codebook": {"rules": [{"index_bits": 3, "vector_length": 2}], "rounds": 1},
    "mixed": {
        "options": [{"bits": 2, "group_size": 16}, {"bits": 4, "group_size": 16}],
        "average_bits": 4.0,
        "samples": 2,
    },
    "quantize_cache": {},
}
# Models of the stages that suit few; others are tested with one whose tiles have markers.
MODELS = {"add_grid": "internvl3"}
# Solved from new measurements, and so planned only to the same budget.
MEASURED = {"mixed"}


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A stage that was applied twice to the same folder."""

    stage: Stage
    path: Path
    samples: CalibrationSet
    planned: PlanState
    source: Checkpoint
    source_fields: dict[str, Any]
    source_digests: tuple[dict[str, str], dict[str, str]]
    done: Checkpoint
    saved: Path
    again: Path


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def fields_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """All that a checkpoint says of its model, whose weights belong to the stage."""
    return {
        "spec": checkpoint.spec,
        "config": json.dumps(dict(checkpoint.config)),
        "source": checkpoint.source,
        "reducer": checkpoint.reducer,
        "cache_grid": checkpoint.cache_grid,
        "visual_schedule": checkpoint.visual_schedule,
        "history": checkpoint.history,
    }


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that cut pictures into tiles, by their names."""
    folders = {
        name: tmp_path_factory.mktemp("tiles") / name
        for name in ("smolvlm-tiles", *MODELS.values())
    }
    for name, folder in folders.items():
        write_random_model(tiny_config(name), folder, tiles_per_edge=2)
    return folders


def samples_of_many_shapes() -> CalibrationSet:
    """Four questions, about pictures of five, three, three and five tiles."""
    found = CalibrationSet.from_reference(0, 4)
    sizes = ((96, 96), (128, 40), (40, 128), (96, 96))
    pictures = [sample.open_image().resize(size) for sample, size in zip(found, sizes, strict=True)]
    samples = [
        Sample(image=picture, question=sample.question, answer=sample.answer, where=sample.where)
        for sample, picture in zip(found, pictures, strict=True)
    ]
    return replace(found, samples=tuple(samples))


@pytest.fixture(scope="module", params=[kind.method for kind in STAGES])
def applied(
    request: pytest.FixtureRequest,
    paths: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Applied:
    path = paths[MODELS.get(request.param, "smolvlm-tiles")]
    stage = read("stages", request.param, OPTIONS[request.param])
    samples = samples_of_many_shapes()
    ctx = RunContext(source_dir=path, threads=1)
    folder = tmp_path_factory.mktemp(request.param)
    source = Checkpoint.load(path)
    before, files = fields_of(source), digests(path)
    planned = stage.plan(PlanState.of(source.spec))
    done = stage.apply(source, samples, ctx)
    done.save(folder / "saved")
    stage.apply(Checkpoint.load(path), samples, ctx).save(folder / "again")
    return Applied(
        stage=stage,
        path=path,
        samples=samples,
        planned=planned,
        source=source,
        source_fields=before,
        source_digests=(files, digests(path)),
        done=done,
        saved=folder / "saved",
        again=folder / "again",
    )


def test_every_stage_is_tested():
    assert {kind.method for kind in STAGES} == OPTIONS.keys()


@pytest.mark.parametrize("kind", STAGES, ids=lambda kind: kind.method)
def test_a_stage_is_its_configuration(kind):
    stage = read("stages", kind.method, OPTIONS[kind.method])
    assert type(stage) is kind
    require_configuration("stages", stage)


def test_the_plan_says_what_apply_does(applied):
    planned, done = applied.planned, applied.done
    assert planned.spec == done.spec
    reducer, cache = done.reducer, done.cache_grid
    assert planned.visual_tokens == (done.spec.visual_tokens if reducer is None else reducer.keep)
    assert planned.visual_schedule == done.visual_schedule
    assert planned.cache_bits == (FLOAT_CACHE_BITS if cache is None else cache.bits)
    forms = done.forms()
    assert planned.layouts.keys() == forms.keys()
    kinds = {
        linear.name: None if isinstance(form, DenseWeight) else type(form).__name__[:-6]
        for linear, form in forms.items()
    }
    expected = {
        linear.name: None if layout is None else type(layout).__name__[:-6]
        for linear, layout in planned.layouts.items()
    }
    assert kinds == expected
    if applied.stage.method in MEASURED:
        return
    made = {linear: layout for linear, layout in planned.layouts.items() if layout is not None}
    # In all, because codebooks that layers share are counted once.
    assert total_stored_bytes(forms[linear] for linear in made) == sum(
        layout.stored_bytes(*forms[linear].shape) for linear, layout in made.items()
    )


def test_a_plan_leaves_the_state_before_it(applied):
    spec = applied.source_fields["spec"]
    assert PlanState.of(spec) == PlanState.of(Checkpoint.load(applied.path).spec)
    assert applied.stage.plan(PlanState.of(spec)) == applied.planned


def test_the_source_is_left_alone(applied):
    before, after = applied.source_digests
    assert before == after
    assert fields_of(applied.source) == applied.source_fields
    assert applied.done is not applied.source


def test_the_same_work_ends_in_the_same_bytes(applied):
    assert digests(applied.saved) == digests(applied.again)


def test_the_record_says_what_was_done(applied):
    (record,) = applied.done.history
    assert record.method == applied.stage.method
    assert dict(record.parameters) == asdict(applied.stage)
    assert record.version
    assert record.calibration_sha256 in (None, applied.samples.sha256)
    assert record.seconds > 0
    assert record.peak_rss_bytes > 0
    assert all(isinstance(note, str) and "\n" not in note for note in record.notes)
    names = [row["name"] for row in record.layers]
    assert len(set(names)) == len(names)
    assert record.layers or record.metrics
    json.dumps(timeless(record), allow_nan=False)


def test_a_saved_checkpoint_is_the_same_when_loaded(applied, tmp_path):
    loaded = load_checkpoint(applied.saved)
    assert loaded.spec == applied.done.spec
    for name, vector in applied.done.vectors().items():
        assert torch.equal(loaded.vectors()[name], vector)
    for linear, form in applied.done.forms().items():
        assert torch.equal(loaded.form(linear.name).dequantize(), form.dequantize())
    loaded.save(tmp_path / "resaved")
    assert digests(tmp_path / "resaved") == digests(applied.saved)

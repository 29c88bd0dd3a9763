"""The one walk: what a method sees of which layers, and what an interrupted run keeps."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.walk.walk import BlockWalk
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.driver import (
    LayerMethod,
    LayerwiseRun,
    compress_layers,
    visit_groups,
)
from pocketvlm.compress.layerwise.layer_store import FinishedLayer
from pocketvlm.compress.quantization.affine.gptq import Gptq
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.context import RunContext
from pocketvlm.models.layers import LinearSpec
from pocketvlm.weights.dense import DenseWeight

SAMPLES = CalibrationSet.from_reference(0, 6)


@dataclass(frozen=True, kw_only=True)
class Task:
    linear: LinearSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class Halved(LayerMethod[Task]):
    """Halves every weight; a revised layer is doubled again."""

    tokens: dict[str, int | None] = field(default_factory=dict)
    revised: list[str] = field(default_factory=list)

    def compress(self, task, weight, hessian):
        name = task.linear.name
        self.tokens[name] = None if hessian is None else hessian.tokens
        form = DenseWeight(values=weight.dequantize() / 2)
        return FinishedLayer(form=form, row={"name": name, "times": 1})

    def revise(self, checkpoint, sublayer, layers):
        self.revised.extend(layers)
        return {
            name: FinishedLayer(
                form=DenseWeight(values=layer.form.dequantize() * 2),
                row={**layer.row, "times": 2},
            )
            for name, layer in layers.items()
        }


def tasks_of(checkpoint, part="decoder"):
    return {
        linear.name: Task(linear=linear)
        for linear in checkpoint.spec.linears()
        if linear.part == part
    }


def run_of(checkpoint, method, *, tasks=None, revised=(), walk=True):
    return LayerwiseRun(
        title="halved",
        tasks=tasks_of(checkpoint) if tasks is None else tasks,
        begin=lambda: method,
        walk=BlockWalk(checkpoint=checkpoint, samples=SAMPLES, carry_float=bool(revised))
        if walk
        else None,
        revised=frozenset(revised),
        note=lambda row: str(row["times"]),
    )


def test_layers_are_visited_once_in_order_of_execution(tiny_checkpoint):
    spec = tiny_checkpoint.spec
    tasks = {linear.name: Task(linear=linear) for linear in spec.linears()}
    before = {name: tiny_checkpoint.form(name).dequantize() for name in tasks}
    method, progress = Halved(), []
    rows = compress_layers(
        tiny_checkpoint,
        run_of(tiny_checkpoint, method, tasks=tasks),
        RunContext(on_progress=progress.append),
    )
    assert list(rows) == list(method.tokens)
    assert rows.keys() == tasks.keys()
    # A table that is only looked up has no input.
    looked_up = [name for name, tokens in method.tokens.items() if tokens is None]
    assert looked_up == ([] if spec.decoder.tied_head else [spec.decoder.embedding])
    assert [(step.done, step.total) for step in progress] == [
        (done, len(tasks)) for done in range(1, len(tasks) + 1)
    ]
    for name, dense in before.items():
        assert torch.equal(tiny_checkpoint.form(name).dequantize(), dense / 2)


def test_without_a_walk_nothing_is_measured(tiny_checkpoint):
    method = Halved()
    compress_layers(tiny_checkpoint, run_of(tiny_checkpoint, method, walk=False), RunContext())
    assert method.tokens == dict.fromkeys(tasks_of(tiny_checkpoint))


def test_a_revised_layer_is_what_the_next_sublayer_sees(tiny_checkpoint, tmp_path):
    names = [block.attention.output for block in tiny_checkpoint.spec.decoder.blocks]
    before = {name: tiny_checkpoint.form(name).dequantize() for name in names}
    method, ctx = Halved(), RunContext(scratch_dir=tmp_path)
    rows = compress_layers(tiny_checkpoint, run_of(tiny_checkpoint, method, revised=names), ctx)
    assert method.revised == names
    assert [name for name, row in rows.items() if row["times"] == 2] == names
    for name in names:
        assert torch.equal(tiny_checkpoint.form(name).dequantize(), before[name])
    # All is on disk: the method is not made again.
    run = run_of(tiny_checkpoint, None, revised=names)
    assert compress_layers(tiny_checkpoint, run, ctx) == rows


def test_an_interrupted_run_makes_only_what_is_missing(tiny_path, tmp_path):
    class StopError(Exception):
        pass

    def stop(progress):
        if progress.done == 4:
            raise StopError

    whole = Checkpoint.load(tiny_path)
    names = [block.ffn.output for block in whole.spec.decoder.blocks]
    compress_layers(whole, run_of(whole, Halved(), revised=names), RunContext())
    first = Checkpoint.load(tiny_path)
    with pytest.raises(StopError):
        compress_layers(
            first,
            run_of(first, Halved(), revised=names),
            RunContext(scratch_dir=tmp_path, on_progress=stop),
        )
    second, method = Checkpoint.load(tiny_path), Halved()
    compress_layers(second, run_of(second, method, revised=names), RunContext(scratch_dir=tmp_path))
    assert list(method.tokens) == list(tasks_of(second))[4:]
    for linear, form in whole.forms().items():
        assert torch.equal(second.form(linear.name).dequantize(), form.dequantize())


def test_visits_end_with_the_last_wanted_layer(tiny_checkpoint):
    block = tiny_checkpoint.spec.decoder.blocks[0]
    wanted = [block.attention.output, block.ffn.output]
    walk = BlockWalk(checkpoint=tiny_checkpoint, samples=SAMPLES, carry_float=True)
    found = [(step.names, names) for step, names in visit_groups(walk, wanted)]
    assert found == [((name,), [name]) for name in wanted]
    assert not list(visit_groups(walk, ()))


def test_a_float_path_survives_an_interruption(tiny_paths, tmp_path):
    """Drift is measured from weights that an interrupted run has replaced already."""

    class StopError(Exception):
        pass

    stage = Gptq(rules=(WeightRule(bits=3, group_size=16),), drift_share=0.5)

    path = tiny_paths["llava"]
    whole = stage.apply(Checkpoint.load(path), SAMPLES, RunContext())
    for at in (2, 5, 11):

        def stop(progress, at=at):
            if progress.done == at:
                raise StopError

        with pytest.raises(StopError):
            stage.apply(
                Checkpoint.load(path),
                SAMPLES,
                RunContext(scratch_dir=tmp_path, on_progress=stop),
            )
    resumed = stage.apply(Checkpoint.load(path), SAMPLES, RunContext(scratch_dir=tmp_path))
    for linear, form in whole.forms().items():
        again = resumed.form(linear.name).to_tensors()
        for key, values in form.to_tensors().items():
            assert torch.equal(again[key], values), f"{linear.name} {key}"
    strip = [{**row, "seconds": 0} for row in whole.history[-1].layers]
    assert [{**row, "seconds": 0} for row in resumed.history[-1].layers] == strip

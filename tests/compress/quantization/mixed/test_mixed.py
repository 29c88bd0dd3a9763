"""Mixed precision: what the solver is told, and what becomes of the model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from pocketvlm.calibration import CalibrationSet, Sample
from pocketvlm.calibration.data.prompts import encode_samples
from pocketvlm.calibration.gradients.divergence import DivergenceMeter, mean_divergence
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.quantization.affine.gptq import Gptq
from pocketvlm.compress.quantization.affine.rtn import RoundToNearest, round_to_nearest
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.codebook.stage import Codebook, CodebookRule
from pocketvlm.compress.quantization.mixed.search_space import CONTAINERS, count_codes, label_of
from pocketvlm.compress.quantization.mixed.sensitivity import Sensitivity
from pocketvlm.compress.quantization.mixed.stage import MixedPrecision
from pocketvlm.compress.tokens.stage import ReduceTokens
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError, RecipeError
from pocketvlm.recipes.stages import layer_bytes_by_target
from pocketvlm.reference_graph.forward import decode_logits, embed_prompts, encode_images
from pocketvlm.stages import PlanState
from pocketvlm.weights.form import total_stored_bytes

MENU = tuple(WeightRule(bits=bits, group_size=32) for bits in (2, 4, 8))


@pytest.fixture(scope="module")
def samples():
    return CalibrationSet.from_reference(0, 8)


@pytest.fixture
def smol_path(tiny_paths):
    """One family is enough where nothing depends on it."""
    return tiny_paths["smolvlm"]


def stored(checkpoint):
    return {
        linear.name: {
            key: value.view(torch.uint8).numpy().tobytes()
            for key, value in form.to_tensors().items()
        }
        for linear, form in checkpoint.forms().items()
    }


def whole_divergence(checkpoint, changed, samples):
    """By two forward passes of each sample alone, as the phone would run it."""
    per_token = []
    for prompt, sample in zip(
        encode_samples(checkpoint.processor, samples), samples.samples, strict=True
    ):
        found = []
        for model in (checkpoint, changed):
            visual = encode_images(model, model.processor.pixels([sample.open_image()]))
            inputs = embed_prompts(model, torch.tensor([prompt.token_ids]), visual)
            logits = decode_logits(model, inputs)[0].double()
            behind = len(prompt.token_ids) - prompt.answer_start + 1
            length = prompt.answer_end - prompt.answer_start
            found.append(logits[-behind:][:length].log_softmax(dim=-1))
        per_token += (found[0].exp() * (found[0] - found[1])).sum(dim=-1).tolist()
    return sum(per_token) / len(per_token)


@pytest.mark.parametrize("keep", [None, 0.5])
def test_the_suffix_measures_what_the_whole_model_would(tiny_path, samples, keep):
    def load():
        checkpoint = Checkpoint.load(tiny_path)
        if keep is not None:
            checkpoint = ReduceTokens(keep=keep).apply(checkpoint, samples, RunContext())
        return checkpoint

    checkpoint, changed = load(), load()
    before = stored(checkpoint)
    few = samples.take(3)
    meter = DivergenceMeter(checkpoint, few)
    decoder = checkpoint.spec.decoder
    linears = checkpoint.spec.linears()
    chosen = [linears[0], *linears[7::6], linears[-1]]
    if decoder.tied_head:  # which is walked at the end, though it acts from the splice on
        chosen.append(next(item for item in linears if item.part == "embedding"))
    shares = []
    with torch.no_grad():
        for linear in chosen:
            form, _ = round_to_nearest(
                checkpoint.form(linear.name), scheme=WeightRule(bits=2).scheme, group_size=16
            )
            present = changed.form(linear.name)
            changed.set_form(linear.name, form)
            expected = whole_divergence(checkpoint, changed, few)
            changed.set_form(linear.name, present)
            assert meter.divergence(linear.name, form) == pytest.approx(
                expected, rel=1e-2, abs=1e-10
            )
            assert expected > 1e-9
            shares.append(meter.share_of_forward(linear.name))
    assert shares[0] == 1
    assert min(shares) < 0.3
    assert stored(checkpoint) == before
    with pytest.raises(ValueError, match="in order of execution"):
        meter.divergence(linears[0].name, checkpoint.form(linears[0].name))


def test_divergence_is_that_of_the_definition():
    p, q = torch.tensor([[0.5, 0.5], [1.0, 1e-30]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    expected = (0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2 / 3))) / 2
    expected += torch.log(torch.tensor(2.0)) / 2
    assert mean_divergence(p.log(), q.log()) == pytest.approx(float(expected), rel=1e-5)


def test_the_budget_is_met_and_everything_is_said(tiny_path, samples):
    stage = MixedPrecision(options=MENU, average_bits=4.0, samples=1)
    seen = []
    done = stage.apply(Checkpoint.load(tiny_path), samples, RunContext(on_progress=seen.append))
    record = done.history[-1]
    metrics = record.metrics
    weights = sum(form.shape[0] * form.shape[1] for form in done.forms().values())
    assert metrics["budget_bytes"] == weights // 2
    actual = sum(form.stored_bytes for form in done.forms().values())
    assert actual == metrics["chosen_bytes"] == metrics["form_bytes"] <= metrics["budget_bytes"]
    assert actual > 0.97 * metrics["budget_bytes"]
    table = metrics["sensitivity"]["layers"]
    assert metrics["predicted_divergence"] == pytest.approx(
        sum(row["divergence"] for row in record.layers)
    )
    bits = set()
    for row in record.layers:
        mine = next(rule for rule in MENU if rule.bits == row["bits"])
        assert table[row["name"]][label_of(mine)] == {
            "loss": row["divergence"],
            "bytes": row["stored_bytes"],
        }
        assert row["runner_up"] in table[row["name"]]
        assert row["runner_up"] != label_of(mine)
        bits.add(done.form(row["name"]).bits)
    assert len(bits) > 1
    measured = [step for step in seen if step.task == "sensitivity"]
    assert [step.done for step in measured] == list(range(3 * len(table) + 1))
    cost = float(measured[0].note.split()[1])
    assert 0.3 * measured[0].total < cost < measured[0].total
    assert {step.total for step in measured} == {3 * len(table)}
    assert any(step.task == "mixed" for step in seen)
    assert record.parameters["method"] == record.method == "mixed"
    assert any("answer tokens only" in note for note in record.notes)
    json.dumps([record.layers, metrics, record.parameters], allow_nan=False)


def test_the_same_input_gives_the_same_bytes(smol_path, samples):
    stage = MixedPrecision(options=MENU, average_bits=3.5)
    first, second = (
        stage.apply(Checkpoint.load(smol_path), samples, RunContext()) for _ in range(2)
    )
    assert stored(first) == stored(second)
    assert first.history[-1].metrics == second.history[-1].metrics


class _Stop(Exception):  # noqa: N818  (a signal of the test, not an error)
    pass


def test_a_stopped_measurement_goes_on_where_it_was(smol_path, samples, tmp_path):
    stage = MixedPrecision(options=MENU, average_bits=3.5)
    whole = stage.apply(Checkpoint.load(smol_path), samples, RunContext())

    def stop(progress):
        if progress.done == 20:
            raise _Stop

    with pytest.raises(_Stop):
        stage.apply(
            Checkpoint.load(smol_path), samples, RunContext(scratch_dir=tmp_path, on_progress=stop)
        )
    kept = Sensitivity.load(tmp_path / "sensitivity.json")
    assert len(kept.layers) == 6  # of the seventh, two of three options were measured
    seen = []
    resumed = stage.apply(
        Checkpoint.load(smol_path),
        samples,
        RunContext(scratch_dir=tmp_path, on_progress=seen.append),
    )
    assert [step.done for step in seen[:2]] == [18, 19]
    assert stored(resumed) == stored(whole)
    assert resumed.history[-1].metrics == whole.history[-1].metrics


def test_a_given_table_is_not_measured_again(smol_path, tiny_paths, samples, tmp_path):
    ctx = RunContext(scratch_dir=tmp_path)
    stage = MixedPrecision(options=MENU, average_bits=4.0)
    stage.apply(Checkpoint.load(smol_path), samples, ctx)
    path = tmp_path / "sensitivity.json"
    tighter = replace(stage, average_bits=3.0, sensitivity=str(path))
    seen = []
    done = tighter.apply(Checkpoint.load(smol_path), samples, RunContext(on_progress=seen.append))
    assert {step.task for step in seen} == {"mixed"}
    again = replace(tighter, sensitivity=None).apply(
        Checkpoint.load(smol_path), samples, RunContext()
    )
    assert stored(done) == stored(again)
    # What `plan` says of a measured table is what the stage does.
    state = tighter.plan(PlanState.of(done.spec))
    assert state.notes == ()
    planned = state.layouts
    for linear, form in done.forms().items():
        plan = planned[linear]
        assert (plan.bits, plan.group_size) == (form.bits, form.group_size)
    with pytest.raises(RecipeError, match="lacks|another model"):
        tighter.apply(Checkpoint.load(tiny_paths["llava"]), samples, RunContext())
    more = replace(tighter, options=(*MENU, WeightRule(bits=3, group_size=32)))
    with pytest.raises(RecipeError, match="lacks .* of the layers' options"):
        more.apply(Checkpoint.load(smol_path), samples, RunContext())
    path.write_text('{"schema": 1}')
    with pytest.raises(RecipeError, match="not a table of measured sensitivity"):
        tighter.apply(Checkpoint.load(smol_path), samples, RunContext())


def test_mixed_beats_uniform_at_its_own_size(tiny_paths):
    path = tiny_paths["llava"]
    calibration = CalibrationSet.from_reference(0, 12)
    judging = CalibrationSet.from_reference(3, 6, split="evaluation")
    menu = (MENU[0], WeightRule(bits=2, group_size=64), WeightRule(bits=4, group_size=64))

    def run(stage):
        done = stage.apply(Checkpoint.load(path), calibration, RunContext())
        size = sum(form.stored_bytes for form in done.forms().values())
        with torch.no_grad():
            return whole_divergence(Checkpoint.load(path), done, judging), size

    uniform, size = run(Gptq(rules=(MENU[0],)))
    mixed, smaller = run(MixedPrecision(options=menu, budget_bytes=size, held_out=0.5))
    assert smaller <= size
    assert mixed < 0.9 * uniform


def test_pins_and_narrow_layers_have_no_choice(tiny_checkpoint, samples):
    stage = MixedPrecision(
        options=(WeightRule(bits=2, group_size=32), WeightRule(bits=4, group_size=96)),
        average_bits=5.0,
        pins=(
            WeightRule(part="projector", bits=None),
            WeightRule(part="embedding", bits=8, group_size=16),
        ),
    )
    spec = tiny_checkpoint.spec
    floats = {
        linear.name: tiny_checkpoint.form(linear.name).stored_bytes for linear in spec.linears()
    }
    done = stage.apply(tiny_checkpoint, samples, RunContext())
    record = done.history[-1]
    for row in record.layers:
        linear = next(item for item in spec.linears() if item.name == row["name"])
        if linear.part == "projector":
            assert row["bits"] is None
            assert row["chosen_bytes"] == floats[linear.name]
        elif linear.part == "embedding":
            assert (row["bits"], row["group_size"]) == (8, 16)
        elif linear.in_features < 96:
            assert row["bits"] == 2
        else:
            continue
        assert row["runner_up"] is None
        assert row["name"] not in record.metrics["sensitivity"]["layers"]
    assert any("had no choice" in note for note in record.notes)
    assert any("binds nothing" in note for note in record.notes)


def test_codebooks_are_on_the_menu(smol_path, samples):
    table = CodebookRule(index_bits=2, vector_length=1, share="layer")
    stage = MixedPrecision(
        options=(MENU[0], table),
        average_bits=3.8,
        pins=(WeightRule(part="tower", bits=4), WeightRule(part="decoder", blocks=(0,), bits=4)),
    )
    done = stage.apply(Checkpoint.load(smol_path), samples, RunContext())
    metrics = done.history[-1].metrics
    kinds = {form.kind for form in done.forms().values()}
    assert kinds == {"affine", "codebook"}
    assert metrics["form_bytes"] == metrics["chosen_bytes"] <= metrics["budget_bytes"]
    for layer in metrics["sensitivity"]["layers"].values():
        assert 0 <= layer[label_of(table)]["loss"] < float("inf")


def test_a_shared_codebook_is_paid_once(tiny_path, samples, tmp_path):
    """Vectors of four at 4 bits: alone, no layer of these could pay for a table."""
    shared = CodebookRule(index_bits=4, share="part")
    pin = CodebookRule(part="projector", index_bits=4, share="part")
    stage = MixedPrecision(
        options=(WeightRule(bits=2, group_size=16), shared), average_bits=1.9, pins=(pin,)
    )
    checkpoint = Checkpoint.load(tiny_path)
    planned = stage.plan(PlanState.of(checkpoint.spec)).layouts
    ctx = RunContext(scratch_dir=tmp_path)
    done = stage.apply(checkpoint, samples, ctx)
    record = done.history[-1]
    actual = total_stored_bytes(done.forms().values())
    assert actual == record.metrics["chosen_bytes"] == record.metrics["form_bytes"]
    assert actual <= record.metrics["budget_bytes"]
    size = sum(
        form.stored_bytes(linear.out_features, linear.in_features)
        for linear, form in planned.items()
    )
    assert size <= record.metrics["budget_bytes"]
    # All layers of a part read one tensor, and the rows of the report add up to what is stored.
    books = {}
    for linear, form in done.forms().items():
        if form.kind == "codebook":
            books.setdefault(linear.part, []).append(form.main.codebooks)
    assert len(books["decoder"]) > 1
    assert all(book is parts[0] for parts in books.values() for book in parts)
    assert sum(row["stored_bytes"] for row in record.layers) == actual
    weights = {linear.name: linear.out_features * linear.in_features for linear in done.forms()}
    spread = sum(row["bits_per_weight"] * weights[row["name"]] for row in record.layers) / 8
    assert spread == pytest.approx(actual)
    assert {row["is_shared"] for row in record.layers if "is_shared" in row} == {True}
    assert {row["grid"] for row in record.layers if row["part"] == "projector"} == {pin.label}
    # Layers that a run finds on disk share again.
    again = stage.apply(Checkpoint.load(tiny_path), samples, ctx)
    assert total_stored_bytes(again.forms().values()) == actual
    assert again.history[-1].layers == record.layers


def test_sharing_is_never_worse_than_its_uniform_row(smol_path, samples):
    """Every layer may do what the uniform stage does, at the same bytes: nothing predicts worse."""
    rule = CodebookRule(index_bits=4, share="part")
    checkpoint = Checkpoint.load(smol_path)
    uniform = Codebook(rules=(rule,)).apply(checkpoint, samples, RunContext())
    size = total_stored_bytes(uniform.forms().values())
    menu = (rule, WeightRule(bits=2, group_size=16), WeightRule(bits=4, group_size=32))
    done = MixedPrecision(options=menu, budget_bytes=size).apply(
        Checkpoint.load(smol_path), samples, RunContext()
    )
    metrics = done.history[-1].metrics
    assert metrics["chosen_bytes"] <= size
    table = metrics["sensitivity"]["layers"]
    assert metrics["predicted_divergence"] <= sum(
        row[label_of(rule)]["loss"] for row in table.values()
    )
    alone = MixedPrecision(options=(replace(rule, share="layer"),), budget_bytes=size)
    with pytest.raises(RecipeError, match="below the smallest that the options allow"):
        alone.plan(PlanState.of(checkpoint.spec))


def test_every_target_may_be_counted_and_has_to_be_passed(tiny_checkpoint):
    counted = layer_bytes_by_target(())
    assert ("codes", *counted) == CONTAINERS
    layers = [
        (linear.out_features, linear.in_features) for linear in tiny_checkpoint.spec.linears()
    ]
    for group_size in (16, 32):
        # Float zero points weigh what scales weigh in an ONNX file, and pass for no integers.
        options = (WeightRule(bits=2, group_size=group_size, zero_point="float"),)
        layout = options[0].plan(tiny_checkpoint.spec.linears()[0])
        least = sum(counted["onnx"](layout, shape) for shape in layers)
        stage = MixedPrecision(options=options, budget_bytes=least - 1, stored_as="onnx")
        with pytest.raises(RecipeError, match=f"smallest that the options allow: {least} bytes"):
            stage.plan(PlanState.of(tiny_checkpoint.spec, counted))
        replace(stage, budget_bytes=least).plan(PlanState.of(tiny_checkpoint.spec, counted))
    with pytest.raises(RecipeError, match="stored_as 'onnx': nothing here counts bytes"):
        stage.plan(PlanState.of(tiny_checkpoint.spec))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_bytes_are_those_that_are_stored(tiny_checkpoint, bits, symmetric):
    rule = WeightRule(bits=bits, group_size=32, symmetric=symmetric)
    for linear, dense in tiny_checkpoint.forms().items():
        form, _ = round_to_nearest(dense, scheme=rule.scheme, group_size=32)
        planned = rule.plan(linear)
        assert count_codes(planned, form.shape) == form.stored_bytes


def test_what_a_target_stores_wider_is_not_picked(tiny_checkpoint, samples):
    """In ONNX 3 bits cost what 4 bits cost."""
    spec = tiny_checkpoint.spec
    menu = (*MENU, WeightRule(bits=3, group_size=32))
    picked = {
        container: {
            form.bits
            for form in MixedPrecision(options=menu, average_bits=4.0, stored_as=container)
            .plan(PlanState.of(spec, layer_bytes_by_target(())))
            .layouts.values()
        }
        for container in ("codes", "onnx")
    }
    assert 3 in picked["codes"]
    assert 3 not in picked["onnx"]
    assert {2, 4} <= picked["onnx"]


def test_the_plan_keeps_the_budget_and_says_what_it_is(tiny_checkpoint):
    spec = tiny_checkpoint.spec
    stage = MixedPrecision(options=MENU, average_bits=4.0)
    state = stage.plan(PlanState.of(spec))
    forms = state.layouts
    weights = sum(linear.out_features * linear.in_features for linear in forms)
    planned = sum(
        form.stored_bytes(linear.out_features, linear.in_features) for linear, form in forms.items()
    )
    assert 0.97 * weights / 2 < planned <= weights / 2
    assert "prior" in state.notes[0]


def test_budgets_that_nothing_fits_are_refused_before_any_work(tiny_checkpoint, samples):
    before = stored(tiny_checkpoint)
    seen = []
    with pytest.raises(RecipeError, match=r"below the smallest .* bytes, 2\.\d+ bits") as caught:
        MixedPrecision(options=MENU, average_bits=2.0).apply(
            tiny_checkpoint, samples, RunContext(on_progress=seen.append)
        )
    assert not seen
    fits = float(str(caught.value).split()[-2])
    MixedPrecision(options=MENU, average_bits=fits + 0.001).plan(PlanState.of(tiny_checkpoint.spec))
    with pytest.raises(RecipeError, match="no option fits"):
        MixedPrecision(options=(WeightRule(bits=4, group_size=1024),), average_bits=4.5).apply(
            tiny_checkpoint, samples, RunContext()
        )
    with pytest.raises(RecipeError, match="pins: .*matches none"):
        MixedPrecision(
            options=MENU, average_bits=4, pins=(WeightRule(match="nothing", bits=8),)
        ).apply(tiny_checkpoint, samples, RunContext())
    silent = CalibrationSet(
        name="silent",
        samples=tuple(replace(sample, answer="") for sample in samples.samples),
    )
    with pytest.raises(CalibrationError, match="every sample needs one"):
        MixedPrecision(options=MENU, average_bits=4).apply(tiny_checkpoint, silent, RunContext())
    with pytest.raises(CalibrationError, match="held-out samples.* are none"):
        MixedPrecision(options=MENU, average_bits=4).apply(
            tiny_checkpoint, samples.take(1), RunContext()
        )
    text_only = Sample(image=None, question="?", answer="!", where="data.jsonl:1")
    with pytest.raises(CalibrationError, match="has no image"):
        MixedPrecision(options=MENU, average_bits=4, held_out=0.5).apply(
            tiny_checkpoint, CalibrationSet(name="bad", samples=(text_only,) * 2), RunContext()
        )
    assert stored(tiny_checkpoint) == before
    once = RoundToNearest(rules=MENU[:1]).apply(tiny_checkpoint, samples, RunContext())
    with pytest.raises(RecipeError, match="is quantized already"):
        MixedPrecision(options=MENU, average_bits=4).apply(once, samples, RunContext())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"options": ()}, "at least one option"),
        ({"options": (WeightRule(part="tower", bits=4),)}, "options.0: .*name layers in pins"),
        ({"options": (WeightRule(bits=None),)}, "options.0: keeps a layer float"),
        ({"options": (MENU[0], MENU[0])}, "one option twice"),
        ({"average_bits": None}, "either average_bits or budget_bytes"),
        ({"budget_bytes": 1000}, "either average_bits or budget_bytes"),
        ({"average_bits": 0.0}, "must be more than 0"),
        (
            {"stored_as": "zip"},
            "stored_as 'zip' is unknown; allowed are codes, onnx, coreml, executorch",
        ),
        ({"samples": 0}, "samples must be at least 1"),
        ({"grid": "best"}, "grid 'best' is unknown"),
        ({"held_out": 0.9}, "held_out must lie between"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MixedPrecision(**{"options": MENU, "average_bits": 4.0, **options})

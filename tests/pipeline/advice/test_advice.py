"""What `plan --advise` says of a model is what `plan` says of it with the advice taken."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pocketvlm.compress.tokens.limit_tiles import LimitTiles
from pocketvlm.compress.tokens.schedule.exit import Exit
from pocketvlm.compress.tokens.schedule.stage import DropTokens
from pocketvlm.compress.tokens.set_resolution import SetResolution
from pocketvlm.compress.tokens.stage import ReduceTokens
from pocketvlm.compress.tokens.tower.stage import MergeTokens
from pocketvlm.pipeline.advice.choices import decoder_weights
from pocketvlm.pipeline.plan import plan
from pocketvlm.pipeline.sources import select_targets
from pocketvlm.recipes.load import load_recipe
from pocketvlm.reference.shapes import load_shape

FLOAT = load_recipe("float")
PHONE = "galaxy-s25"


def advice_of(name, recipe=FLOAT, device=PHONE):
    return plan(load_shape(name), recipe, device=device, advises=True).advice


def lever(advice, name):
    return next(row for row in advice.levers.rows if row.name == name)


def saved(advice, name):
    return advice.levers.planned.times.ttft_user_ms - lever(advice, name).times.ttft_user_ms


@pytest.mark.parametrize(
    ("shape", "name", "stage"),
    [
        ("smolvlm-256m", "tiles", LimitTiles(max_tiles=8)),
        ("smolvlm-256m", "tokens in tower", MergeTokens(keep=512)),
        ("smolvlm-256m", "tokens before decoder", ReduceTokens(keep=32)),
        ("smolvlm-256m", "tokens in decoder", DropTokens(schedule=Exit(first_layers=15))),
        ("qwen2-vl-2b", "resolution", SetResolution(height=308, width=308)),
    ],
)
def test_a_lever_is_what_the_plan_predicts_with_its_stage(shape, name, stage):
    found = lever(advice_of(shape), name)
    made = plan(load_shape(shape), replace(FLOAT, stages=(stage,)), device=PHONE)
    assert found.times == made.prediction.times
    assert found.cache_bytes == made.kv_cache_bytes


def test_the_model_as_planned_is_what_the_plan_predicts():
    made = plan(load_shape("smolvlm-256m"), FLOAT, device=PHONE, advises=True)
    assert made.advice.levers.planned.times == made.prediction.times


def test_levers_start_from_what_the_recipe_leaves():
    half = replace(
        FLOAT, stages=(ReduceTokens(keep=32), DropTokens(schedule=Exit(first_layers=16)))
    )
    rows = advice_of("smolvlm-256m", half).levers.rows
    assert {row.stage for row in rows} >= {
        "reduce_tokens: keep 16 of 32",
        "drop_tokens: exit after 8 of 16",
    }


def test_levers_stand_in_the_order_of_what_they_save():
    times = [row.times.ttft_user_ms for row in advice_of("smolvlm-256m").levers.rows]
    assert times == sorted(times)


def test_which_lever_pays_depends_on_the_model():
    """A large decoder after a small tower waits for tokens; a small one after tiles does not."""
    large, small = advice_of("llava-1.5-7b"), advice_of("smolvlm-256m")

    def share(advice):
        return saved(advice, "tokens before decoder") / advice.levers.planned.times.ttft_user_ms

    assert share(large) > 0.3
    assert share(small) < 0.15
    assert small.levers.rows[0].name == "tiles"
    assert saved(small, "tokens in tower") > 5 * saved(small, "tokens before decoder")
    assert saved(large, "tokens before decoder") > 5 * saved(large, "tokens in tower")


def test_what_a_model_or_a_target_cannot_have_is_said():
    assert "see later rows" in lever(advice_of("gemma-3-4b"), "tokens in decoder").refused
    other = select_targets(FLOAT, ("executorch",))
    assert "runs every row" in lever(advice_of("smolvlm-256m", other), "tokens in decoder").refused


def test_sizes_cost_the_same_compute_and_fit_the_device():
    advice = advice_of("smolvlm-500m", load_recipe("int4-balanced"), "iphone-14").choices
    planned = advice.rows[0]
    budget = planned.weights * (advice.text_rows + planned.tokens)
    by_name = {row.name: row for row in advice.rows}
    for row in advice.rows:
        if row.tokens:
            assert row.weights * (advice.text_rows + row.tokens) <= budget * 1.0001
            assert row.fits == (row.weights <= advice.most_weights)
    assert by_name["best for scenes"].weights > planned.weights
    assert by_name["best for text in pictures"].tokens > by_name["best for scenes"].tokens
    assert {"shape:smolvlm-256m", "shape:smolvlm-2.2b"} <= set(by_name)
    assert by_name["shape:smolvlm-2.2b"].weights == decoder_weights(load_shape("smolvlm-2.2b").spec)


def test_a_decoder_that_is_said_to_fit_is_planned_to_fit():
    advice = advice_of("smolvlm-256m", FLOAT, "iphone-14").choices
    made = plan(load_shape("smolvlm-256m"), FLOAT)
    decoder = sum(made.part_bytes[part] for part in ("decoder", "embedding"))
    held = made.ram_bytes * decoder / sum(made.part_bytes.values())
    assert advice.most_weights > decoder_weights(load_shape("smolvlm-256m").spec)
    limit = 0.5 * 6e9
    assert held * advice.most_weights / advice.rows[0].weights < limit


def test_a_machine_without_rates_gets_the_law_and_the_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = plan(load_shape("smolvlm-256m"), FLOAT, advises=True)
    assert made.advice.levers is None
    assert "bench --calibrate-host" in "\n".join(made.lines())
    assert made.advice.choices.rows[0].errors == (1.0, 1.0)


def test_the_command_prints_advice_and_one_document(run_cli):
    code, out, err = run_cli("plan", "shape:smolvlm-256m", "--device", PHONE, "--advise", "--json")
    assert code == 0, err
    document = json.loads(out)["advice"]
    assert len(document["levers"]["rows"]) >= 3
    assert "as planned" in err
    assert "text in pictures: buy tokens" in err


def test_bad_runs_are_refused_in_one_line(run_cli, tmp_path):
    shape = ("plan", "shape:smolvlm-256m")
    code, _, err = run_cli(*shape, "--measured", tmp_path)
    assert (code, err.splitlines()[-1]) == (
        2,
        "error: --measured: is for the advice; add --advise",
    )
    code, _, err = run_cli(*shape, "--advise", "--measured", tmp_path)
    assert code == 2
    assert "report.json" in err.splitlines()[-1]

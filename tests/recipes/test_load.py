from __future__ import annotations

import pytest
import yaml

from pocketvlm.errors import RecipeError
from pocketvlm.recipes.load import list_recipes, load_recipe, recipe_from_document
from pocketvlm.recipes.stages import STAGES, TARGETS

GPTQ = {"method": "gptq", "rules": [{"part": "decoder", "bits": 4}]}


PRUNE = {"method": "prune", "score": {"kind": "wanda"}}


def document(**changes):
    return {
        "schema": 1,
        "name": "test",
        "stages": [GPTQ],
        "targets": [{"method": "onnx"}],
        **changes,
    }


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_every_shipped_recipe_is_valid_and_survives_a_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    file = tmp_path / "again.yaml"
    file.write_text(yaml.safe_dump(recipe.to_document()))
    again = load_recipe(file)
    assert again == recipe
    assert again.sha256() == recipe.sha256()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (document(schema=2), "schema: is 2; allowed is 1"),
        (document(stagez=[]), "stagez: unknown key; allowed are schema, name"),
        (document(stages=[{**GPTQ, "bitz": 4}]), r"stages\.0\.bitz: unknown key"),
        (document(stages=[{"method": "magic"}]), r"stages\.0\.method: is .magic.; allowed are"),
        (document(stages=["gptq"]), r"stages\.0\.method"),
        (document(stages={"gptq": 1}), "stages: must be a list"),
        (
            document(stages=[{"method": "gptq", "rules": [{"part": "decoder", "bits": "four"}]}]),
            r"stages\.0\.rules\.0\.bits",
        ),
        (
            document(stages=[{"method": "gptq", "rules": [{"part": "decoder", "bits": 5}]}]),
            r"stages\.0\.rules\.0.*5",
        ),
        (
            document(stages=[{"method": "gptq", "rules": [{"part": "eyes", "bits": 4}]}]),
            r"stages\.0\.rules\.0\.part",
        ),
        (document(calibration={"samples": 0}), "samples must be at least 1"),
        (document(expect={"beauty": {"min": 1}}), r"expect\.beauty: unknown key"),
        (document(stages=[GPTQ, GPTQ]), r"stages\.1 \(gptq\): .*float_weights"),
        (document(stages=[{"method": "prune"}]), r"stages\.0\.score: is missing"),
        (
            document(stages=[{**PRUNE, "score": {"kind": "beauty"}}]),
            r"stages\.0\.score\.kind: is .beauty.; allowed are magnitude, wanda, gblm, sparsegpt",
        ),
        (
            document(stages=[{**PRUNE, "score": {"alpha": 2.0}}]),
            r"stages\.0\.score\.kind: is null; allowed are magnitude",
        ),
        (
            document(stages=[{**PRUNE, "score": "gblm"}]),
            r"stages\.0\.score: is .gblm.; write \{kind: gblm\}",
        ),
        (
            document(stages=[{**PRUNE, "score": {"kind": "gblm", "damping": 0.1}}]),
            r"stages\.0\.score\.damping: unknown key of kind gblm; its options are gradient, norm",
        ),
        (
            document(stages=[{**PRUNE, "score": {"kind": "wanda", "alpha": 2.0}}]),
            r"stages\.0\.score\.alpha: unknown key of kind wanda; it has no options",
        ),
        (
            document(stages=[{**PRUNE, "score": {"kind": "gblm", "alpha": "much"}}]),
            r"stages\.0\.score\.alpha: .*not .much.",
        ),
        (
            document(stages=[{**PRUNE, "score": {"kind": "gblm", "alpha": -1.0}}]),
            r"stages\.0\.score: alpha must be at least 0",
        ),
        (
            document(stages=[{**PRUNE, "allocation": {"kind": "uniform", "order": "first"}}]),
            r"stages\.0\.allocation\.order: unknown key of kind uniform; it has no options",
        ),
        (document(targets=[{"method": "vhs"}]), r"targets\.0\.method: is .vhs.; allowed are onnx"),
    ],
)
def test_a_wrong_recipe_gets_one_line_with_its_path(content, message):
    with pytest.raises(RecipeError, match=message) as caught:
        recipe_from_document(content, where="test.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"method": "wanda", "ratio": 0.5},
            r"stages.0.method: wanda is a score of prune; "
            r"write {method: prune, score: {kind: wanda}}",
        ),
        (
            {"method": "gblm", "alpha": 2.0, "ratio": 0.5},
            r"stages.0.method: gblm is a score of prune; "
            r"write {method: prune, score: {kind: gblm, alpha: 2.0}}",
        ),
        (
            {"method": "reduce_tokens", "score": "auto", "keep": 0.5, "seed": 0},
            "stages.0.score: is no longer an option; write reducer: {kind: auto}",
        ),
        (
            {"method": "reduce_tokens", "score": "random_tokens", "seed": 3},
            "stages.0.score: is no longer an option; write reducer: {kind: random_tokens, seed: 3}",
        ),
        (
            {
                "method": "prune_depth",
                "importance": "block_influence",
                "modality_weights": "balanced",
            },
            "stages.0.importance: an importance has its own options; "
            "write importance: {kind: block_influence, modality_weights: balanced}",
        ),
        (
            {"method": "prune_depth", "decoder_blocks": 1, "modality_weights": "balanced"},
            "stages.0.modality_weights: an importance has its own options; "
            "write importance: {kind: greedy}",
        ),
    ],
)
def test_a_former_spelling_says_the_new_one(stage, message):
    with pytest.raises(RecipeError) as caught:
        recipe_from_document(document(stages=[stage]), where="test.yaml")
    assert str(caught.value) == f"test.yaml: {message}"


def test_reducing_after_quantizing_is_refused():
    """The quantizer must be calibrated on the sequence that the phone will run."""
    stages = [GPTQ, {"method": "reduce_tokens", "keep": 0.5}]
    with pytest.raises(RecipeError, match="reduce_tokens"):
        recipe_from_document(document(stages=stages), where="test.yaml")


def test_settings_change_a_recipe():
    recipe = load_recipe("int4-balanced", ["stages.0.keep=0.25", "stages.1.rules.0.bits=4"])
    assert recipe.stages[0].keep == 0.25
    assert recipe.stages[1].rules[0].bits == 4
    assert recipe.sha256() != load_recipe("int4-balanced").sha256()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stages.0.keep", "expected a.b=c"),
        ("stages.9.keep=1", "not an index below"),
        ("name.x=1", "holds no settings"),
    ],
)
def test_a_wrong_setting_is_refused(setting, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("int4-balanced", [setting])


def test_an_unknown_recipe_names_the_shipped_ones():
    with pytest.raises(RecipeError, match="int4-balanced"):
        load_recipe("int5")


def test_broken_yaml_is_one_line(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("stages: [")
    with pytest.raises(RecipeError, match="is not valid YAML") as caught:
        load_recipe(file)
    assert "\n" not in str(caught.value)


def test_tags_are_unique():
    tags = [kind.__dataclass_fields__["method"].default for kind in (*STAGES, *TARGETS)]
    assert len(set(tags)) == len(tags)

"""What a recipe file and a setting may hold, and everything else, in one line."""

from __future__ import annotations

import os
import time

import pytest
import yaml

from pocketvlm.errors import RecipeError
from pocketvlm.files.yaml_document import parse_yaml, read_yaml
from pocketvlm.recipes.document import apply_overrides
from pocketvlm.recipes.load import list_recipes, load_recipe, recipe_from_document

LAUGHS = "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1e-3", {"a": 0.001}),
        ("a: 1.", {"a": 1.0}),
        ("a: -0x1F", {"a": "-0x1F"}),
        ("a: 0x1F", {"a": 31}),
        ("a: 1:30:00", {"a": "1:30:00"}),
        ("a: 1_000", {"a": "1_000"}),
        ("a: 2024-01-01", {"a": "2024-01-01"}),
        ("a: on", {"a": True}),
        ("a: ~", {"a": None}),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("", None),
    ],
)
def test_values_are_plain(text, value):
    assert parse_yaml(text, "x.yaml") == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML: .*line 1"),
        ("a: 1\na: 2", "key 'a' stands twice .line 2"),
        ("? [a]\n: b", "a key is not text"),
        ("1: b", "a key is not text"),
        ("on: b", "a key is not text"),
        ("a: &a [*a]", "is not valid YAML|nested more than"),
        ("a: &a {b: *a}", "is not valid YAML|nested more than"),
        ("a: " + "[" * 30 + "]" * 30, "nested too deeply"),
        ("a: " + "{b: " * 30 + "}" * 30, "nested too deeply"),
        ("".join(f"{' ' * i}a:\n" for i in range(30)), "nested more than 24"),
        ("a: " + "[" * 5000, "nested too deeply|is not valid YAML"),
        (LAUGHS, "holds more than 20,000 values|nested"),
        (MERGES, "could not determine|a key is not text|is nested|more than"),
        ("a: !!python/object/apply:os.system [echo]", "is not valid YAML: could not determine"),
        ("a: !!binary aGk=", "could not determine a constructor"),
        ("a: !!set {x}", "could not determine a constructor"),
        ("a: !!timestamp 2024-99-99", "could not determine a constructor"),
        ("a: !!int x", "is not valid YAML"),
        ("a: !!float x", "is not valid YAML"),
        ("a: !!bool x", "is not valid YAML"),
        ("a: .inf", "a: must be a finite number"),
        ("a: [1, .nan]", "a.1: must be a finite number"),
        ("a: 1e999", "a: must be a finite number"),
        ("a: 99999999999999999999", "a: must fit into 64 bits"),
        ("a: " + "9" * 5000, "is not valid YAML"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: \x00", "is not valid YAML"),
        ("a: \x1b[31m", "is not valid YAML"),
        ('a: "\\ud800"', "half of a surrogate|is not valid YAML"),
        ("*nobody", "undefined alias"),
    ],
)
def test_everything_else_is_one_line(text, message):
    start = time.monotonic()
    with pytest.raises(RecipeError, match=message) as caught:
        parse_yaml(text, "x.yaml")
    assert time.monotonic() - start < 5
    assert str(caught.value).startswith("x.yaml: ")
    assert "\n" not in str(caught.value)


def test_files_of_every_kind(tmp_path):
    file = tmp_path / "x.yaml"
    for encoding in ("utf-8", "utf-16", "utf-8-sig"):
        file.write_bytes("a: é".encode(encoding))
        assert read_yaml(file, "a recipe") == {"a": "é"}
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(RecipeError, match="is not a regular file"):
            load_recipe(tmp_path / name)
    for content, message in [
        (b"", "a recipe is a mapping, not empty"),
        (b"- a", "a recipe is a mapping, not a list"),
        (b"caf\xe9: 1", "is not UTF-8 text: byte 3"),
        (b"a: 1\n" * 300_000, "more than 131,072 bytes"),
    ]:
        file.write_bytes(content)
        with pytest.raises(RecipeError, match=message):
            load_recipe(file)
    for name in ("", "x" * 5000, "a\0b"):
        with pytest.raises(RecipeError, match="is neither a file nor one of|not a regular file"):
            load_recipe(name)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("", "expected a.b=c"),
        ("=1", "has an empty step"),
        ("a..b=1", "has an empty step"),
        (".a=1", "has an empty step"),
        ("stages.=1", "has an empty step"),
        ("stages.-1.keep=1", "not an index below"),
        ("stages.99999999999999999999.keep=1", "not an index below"),
        ("stages." + "9" * 5000 + "=1", "not an index below"),
        ("stages.²=1", "not an index below"),
        ("stages.0.keep=[", "is not valid YAML"),
        ("stages.0.keep=&a [*a]", "is not valid YAML|nested more than"),
        ("stages.0.keep=*a", "undefined alias"),
        ("stages.0.keep=.nan", "must be a finite number"),
        ("stages.0.keep=!!python/name:os.system ", "is not valid YAML"),
        ("stages.0.keep=true", r"stages\.0.*keep"),
        ("stages.0.keep='0.5'", r"stages\.0.*keep"),
        ("stages.0.keep=", r"stages\.0.*keep"),
        ("stages.0={...}", "is not valid YAML|method"),
        ("stages.0.method=[gptq]", r"stages\.0\.method: is"),
        ("stages.0.method={a: b}", r"stages\.0\.method: is"),
        ("stages.1.rules.0.bits=true", r"bits"),
        ("stages.1.rules.0.bits='4'", r"bits"),
        ("stages.1.rules.0.bits=4.0", r"bits"),
        ("schema=true", "schema: is true; allowed is 1"),
        ("schema=1.0", "schema: is 1.0; allowed is 1"),
        ("schema.a=1", "holds no settings"),
        ("name=[a]", "name"),
        ("stages=none", "stages: must be a list"),
        ("expect=[1]", "expect"),
        ("calibration=3", "calibration"),
        ("calibration.samples=true", "calibration.samples"),
        ("targets.0.method=ONNX", "allowed are onnx"),
    ],
)
def test_a_setting_of_any_kind_is_one_line(setting, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe("int4-balanced", [setting])
    assert "\n" not in str(caught.value)


def test_settings_reach_everywhere():
    document = yaml.safe_load(list_recipes()["int4-balanced"].read_text())
    changed = apply_overrides(
        document, ["a.b.c=[1, {d: 2}]", "stages.0={method: rotate}", "stages.1.x=a=b"]
    )
    assert changed["a"] == {"b": {"c": [1, {"d": 2}]}}
    assert changed["stages"][0] == {"method": "rotate"}
    assert changed["stages"][1]["x"] == "a=b"
    assert "a" not in document


def test_a_document_made_in_python_is_held_to_the_same(tmp_path):
    for value in (float("nan"), 10**30, object(), {1: 2}, tmp_path):
        with pytest.raises(RecipeError):
            recipe_from_document({"schema": 1, "name": "x", "stages": value}, where="x")

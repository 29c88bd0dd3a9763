from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from pocketvlm.errors import RecipeError
from pocketvlm.pipeline.identity import RunIdentity, model_sha256, stage_keys
from pocketvlm.pipeline.journal import Journal
from pocketvlm.pipeline.run_lock import hold_lock, refuse_if_held

IDENTITY = RunIdentity(model="m", weights="w", recipe="r", calibration="c", seed=0)
KEY = "k" * 64

HOLDS_AND_WAITS = """
import sys, time
from pathlib import Path
from pocketvlm.pipeline.run_lock import hold_lock
with hold_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def start(out, identity=IDENTITY, what="a of b"):
    """Opens a run folder and leaves it unfinished, as a kill does."""
    with Journal.open(out, identity, what) as journal:
        return journal


def finish_a_stage(journal, key=KEY):
    folder = journal.stage_dir(key) / "checkpoint"
    folder.mkdir(parents=True)
    for name in ("pocketvlm.json", "chat_template.jinja", "model.safetensors"):
        (folder / name).write_text(f"content of {name}")
    journal.finish_stage(key, {"seconds": 1.5})
    return folder


def test_a_stage_s_key_covers_everything_before_it():
    keys = stage_keys("model", "data", stages=[{"a": 1}, {"b": 2}, {"c": 3}])
    changed = stage_keys("model", "data", stages=[{"a": 1}, {"b": 9}, {"c": 3}])
    assert keys[0] == changed[0]
    assert keys[1] != changed[1]
    assert keys[2] != changed[2]
    assert not set(stage_keys("other", "data", stages=[{"a": 1}])) & set(keys)
    assert not set(stage_keys("model", "other", stages=[{"a": 1}])) & set(keys)


def test_a_model_is_more_than_its_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("a card")
    before = model_sha256(tmp_path, "w")
    (tmp_path / "README.md").write_text("another card")
    assert model_sha256(tmp_path, "w") == before
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    with_template = model_sha256(tmp_path, "w")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0] }}")
    found = {before, with_template, model_sha256(tmp_path, "w"), model_sha256(tmp_path, "v")}
    assert len(found) == 4


@pytest.mark.parametrize("name", ["model", "recipe", "calibration", "seed"])
def test_a_folder_belongs_to_one_run(tmp_path, name):
    out = tmp_path / "run"
    start(out)
    start(out)
    before = (out / "run.json").read_bytes()
    other = replace(IDENTITY, **{name: 7 if name == "seed" else "other"})
    with pytest.raises(RecipeError, match=rf"holds another run \(a of b\), of another {name};"):
        start(out, other)
    assert (out / "run.json").read_bytes() == before


@pytest.mark.parametrize("name", ["run.json.partial", "run.json.01234567.partial", ".work/lock"])
def test_a_run_that_was_killed_while_it_began_begins_again(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"key": "ab')
    start(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".work", "run.json"]


def test_no_damage_of_run_json_leaves_a_folder_stuck(tmp_path):
    start(tmp_path)
    marker = tmp_path / "run.json"
    whole = marker.read_bytes()
    damaged = [whole[:length] for length in range(0, len(whole), 5)]
    damaged += [b"\0" * len(whole)]
    for bit in range(0, len(whole) * 8, 11):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(content))
    for content in damaged:
        marker.write_bytes(content)
        start(tmp_path)
        assert marker.read_bytes() == whole


def test_results_of_another_run_are_not_replaced_where_run_json_is_damaged(tmp_path):
    start(tmp_path)
    (tmp_path / "run.json").write_bytes(b"")
    (tmp_path / "bundle").mkdir()
    manifest = tmp_path / "bundle" / "manifest.json"
    manifest.write_text(json.dumps({"source_sha256": "w", "recipe_sha256": "other"}))
    with pytest.raises(RecipeError, match="holds another run, whose run.json is damaged"):
        start(tmp_path)
    assert (tmp_path / "run.json").read_bytes() == b""
    manifest.write_text(json.dumps({"source_sha256": "w", "recipe_sha256": "r"}))
    start(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("thesis.tex", "precious"),
        ("run.json", '{"scripts": {"build": "make"}}'),
        ("run.json", "steps: [build]"),
        ("checkpoint", "mine"),
        (".work/notes", "mine"),
        ("run.json.mine.partial", "mine"),
    ],
)
def test_a_folder_of_somebody_else_is_never_touched(tmp_path, name, content):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(RecipeError, match="choose another --out"):
        start(tmp_path)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    assert (tmp_path / name).read_text() == content


def test_a_stage_counts_as_finished_while_every_file_is_as_it_was(tmp_path):
    journal = start(tmp_path / "run")
    assert journal.finished_checkpoint(KEY) is None
    folder = finish_a_stage(journal)
    assert journal.finished_checkpoint(KEY) == folder
    assert journal.stage_record(KEY) == {"seconds": 1.5}
    for path in (*folder.iterdir(), folder.with_name("finished.json")):
        content = path.read_bytes()
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 4]) + content[-2:])
        assert journal.finished_checkpoint(KEY) is None, path
        path.write_bytes(content)
        assert journal.finished_checkpoint(KEY) == folder
    (folder / "chat_template.json").write_text("looked for first")
    assert journal.finished_checkpoint(KEY) is None
    journal.clean()
    assert journal.finished_checkpoint(KEY) is None


def test_what_a_run_keeps_is_found_under_its_key_alone(tmp_path):
    journal = start(tmp_path / "run")
    journal.keep("quality", "key", {"accuracy": 0.5})
    assert journal.find("quality", "key") == {"accuracy": 0.5}
    assert journal.find("quality", "other") is None
    path = tmp_path / "run" / ".work" / "quality.json"
    path.write_text(path.read_text().replace("0.5", "0.9"))
    assert journal.find("quality", "key") is None


@pytest.mark.parametrize("content", [b"", b"\x00\xff garbage", b'[1, 2]\n{"event": "sta', b"\n\n"])
def test_no_damage_of_the_log_matters(tmp_path, content):
    journal = start(tmp_path)
    (tmp_path / "log.jsonl").write_bytes(content)
    journal = start(tmp_path)
    journal.log("stage", value=1)
    last = (tmp_path / "log.jsonl").read_bytes().splitlines()[-1]
    assert json.loads(last)["value"] == 1


def test_another_process_is_named_and_a_dead_one_is_not_in_the_way(tmp_path):
    folder = tmp_path / "run" / ".work"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS_AND_WAITS, str(folder)], stdout=subprocess.PIPE
    )
    assert process.stdout.readline()
    message = rf"run: is being written by process {process.pid} on .*, since 20\d\d-"
    with pytest.raises(RecipeError, match=message), hold_lock(folder):
        pass
    with pytest.raises(RecipeError, match=message):
        refuse_if_held(folder)
    (folder / "lock").write_bytes(b"\xff no owner")
    with pytest.raises(RecipeError, match="is being written by another process; wait"):
        start(tmp_path / "run")
    process.kill()
    process.communicate()
    refuse_if_held(folder)
    start(tmp_path / "run")


def test_a_run_that_ends_takes_its_lock_along(tmp_path):
    with Journal.open(tmp_path / "run", IDENTITY, "a of b") as journal:
        journal.clean()
        assert not (tmp_path / "run" / ".work").exists()
        start(tmp_path / "run")

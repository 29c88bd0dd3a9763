from __future__ import annotations

import pytest

from pocketvlm.errors import RecipeError
from pocketvlm.pipeline.journal import Journal, stage_keys


def test_a_stage_s_key_covers_everything_before_it():
    keys = stage_keys("model", "data", [{"a": 1}, {"b": 2}, {"c": 3}])
    changed = stage_keys("model", "data", [{"a": 1}, {"b": 9}, {"c": 3}])
    assert keys[0] == changed[0]
    assert keys[1] != changed[1]
    assert keys[2] != changed[2]
    assert not set(stage_keys("other", "data", [{"a": 1}])) & set(keys)
    assert not set(stage_keys("model", "other", [{"a": 1}])) & set(keys)


def test_a_folder_belongs_to_one_run(tmp_path):
    out = tmp_path / "run"
    Journal.open(out, "key", "a of b")
    Journal.open(out, "key", "a of b")
    with pytest.raises(RecipeError, match=r"holds another run \(a of b\)"):
        Journal.open(out, "other", "c of d")


def test_the_last_matching_event_is_found_past_a_torn_line(tmp_path):
    journal = Journal.open(tmp_path / "run", "key", "x")
    assert journal.last("stage") is None
    journal.log("stage", key="a", value=1)
    journal.log("stage", key="a", value=2)
    journal.log("stage", key="b", value=3)
    with (journal.out / "log.jsonl").open("a") as stream:
        stream.write('{"event": "stage", "key": "a", "val')
    assert journal.last("stage", key="a")["value"] == 2
    assert journal.last("stage", key="c") is None


def test_a_checkpoint_counts_as_finished_once_its_manifest_is_there(tmp_path):
    journal = Journal.open(tmp_path / "run", "key", "x")
    folder = journal.stage_dir("k" * 64) / "checkpoint"
    folder.mkdir(parents=True)
    assert journal.finished_checkpoint("k" * 64) is None
    (folder / "pocketvlm.json").write_text("{}")
    assert journal.finished_checkpoint("k" * 64) == folder
    journal.clean()
    assert journal.finished_checkpoint("k" * 64) is None

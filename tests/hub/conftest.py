"""Folders that can be pushed, and a hub on this machine that the real client talks to."""

from __future__ import annotations

import pytest
import yaml
from huggingface_hub import HfApi, constants

from pocketvlm.json_io import write_json
from tests.bundle.rig import write_signed_bundle
from tests.hub.stand_in import TOKEN, running_hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub; the client of this process is allowed to ask it, and keeps its cache in `tmp_path`."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with running_hub() as running:
        yield running


@pytest.fixture
def api(hub):
    """The owner's client."""
    return HfApi(endpoint=hub.endpoint, token=TOKEN)


def write_bundle(path, content=b"graph"):
    """A signed bundle with its card; `content` is that of its graph."""
    write_signed_bundle(path, content)
    (path / "README.md").write_text("# A measured card\n")
    (path / "report.html").write_text("<html></html>")
    return path


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def run(tmp_path, tiny_checkpoint):
    """A finished run as `compress` leaves it."""
    folder = tmp_path / "run"
    write_bundle(folder / "bundle", b"graph" * 100)
    tiny_checkpoint.save(folder / "checkpoint")
    write_json(folder / "report.json", {"schema": 1})
    (folder / "report.html").write_text("<html></html>")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"schema": 1}))
    (folder / ".work").mkdir()
    (folder / ".work" / "log.jsonl").write_text("{}")
    (folder / "notes.txt").write_text("of nobody's business")
    return folder

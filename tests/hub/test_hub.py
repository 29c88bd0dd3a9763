"""What is pushed comes back equal, and what must not be published or put in place is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, constants

from pocketvlm.bundle import Bundle
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.checkpoint.convert import save_layout
from pocketvlm.cli.app import run_command
from pocketvlm.cli.failures import run_to_exit_code
from pocketvlm.errors import BundleError, CheckpointError, HubError, InputError, PocketVLMError
from pocketvlm.hub import pull, push
from tests.hub.conftest import write_bundle
from tests.hub.stand_in import TOKEN
from tests.weights.formats.test_save_layout import quantize_affine

# huggingface_hub 2.4 hands its HTTP library the bytes of an upload by a name that it gave up.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPOSITORY = "owner/small-model"


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_run_comes_back_with_its_card(hub, api, run, tmp_path):
    pushed = push(run, REPOSITORY, base_model="stock/model", api=api)
    stored = hub.repositories[REPOSITORY]
    assert (pushed.kind, pushed.commit, stored.private) == ("run", stored.head, False)
    _, front, card = stored.files("main")[1]["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "pocketvlm",
        "pipeline_tag": "image-text-to-text",
        "tags": ["pocketvlm"],
        "base_model": "stock/model",
        "base_model_relation": "quantized",
    }
    assert card.strip() == "# A measured card"
    pulled = pull(REPOSITORY, tmp_path / "again", api=api)
    assert (pulled.kind, pulled.commit) == ("run", pushed.commit)
    found, sent = files_of(tmp_path / "again"), files_of(run)
    assert found.pop("README.md").endswith(b"# A measured card\n")
    assert sent.pop("notes.txt")
    assert sent.pop(".work/log.jsonl")
    assert found == sent
    assert Checkpoint.load(tmp_path / "again" / "checkpoint").spec.model_type


def test_a_bundle_comes_back_and_an_earlier_push_leaves_nothing(hub, api, bundle, tmp_path):
    first = push(bundle, REPOSITORY, api=api)
    stored = hub.repositories[REPOSITORY]
    stored.commit({**stored.files("main")[1], "LICENSE": b"the owner's"})
    shutil.rmtree(bundle)
    write_bundle(bundle, b"another graph")
    (bundle / "report.html").unlink()
    second = push(bundle, REPOSITORY, api=api)
    assert second.removed == ("report.html",)
    pull(REPOSITORY, tmp_path / "second", api=api)
    opened = Bundle.open(tmp_path / "second")
    assert opened.file("onnx/decoder.onnx").read_bytes() == b"another graph"
    assert {"LICENSE", ".gitattributes"} <= set(stored.files("main")[1])
    pull(REPOSITORY, tmp_path / "first", revision=first.commit, api=api)
    assert Bundle.open(tmp_path / "first").file("onnx/decoder.onnx").read_bytes() == b"graph"


def test_checkpoints_come_back_in_either_form(api, tiny_checkpoint, tmp_path):
    quantize_affine(tiny_checkpoint)
    tiny_checkpoint.save(tmp_path / "own")
    save_layout(tiny_checkpoint, tmp_path / "layout", layout="compressed-tensors")
    for name, kind in (("own", "checkpoint"), ("layout", "layout")):
        assert push(tmp_path / name, f"owner/{name}", api=api).kind == kind
        pull(f"owner/{name}", tmp_path / "again" / name, api=api)
        found = Checkpoint.load(tmp_path / "again" / name)
        for linear, form in tiny_checkpoint.forms().items():
            assert found.form(linear.name).dequantize().equal(form.dequantize()), linear.name


def test_a_private_repository_is_seen_by_its_owner_alone(hub, api, bundle, tmp_path):
    push(bundle, REPOSITORY, private=True, api=api)
    assert hub.repositories[REPOSITORY].private
    stranger = HfApi(endpoint=hub.endpoint, token=False)
    with pytest.raises(HubError, match=r"small-model: there is no such repository"):
        pull(REPOSITORY, tmp_path / "out", api=stranger)
    push(bundle, "owner/open", api=api)
    with pytest.raises(HubError, match=r"open: is public, and --private"):
        push(bundle, "owner/open", private=True, api=api)


def test_a_repository_of_something_else_is_left_alone(hub, api, run, bundle, tmp_path):
    api.create_repo(REPOSITORY)
    stored = hub.repositories[REPOSITORY]
    stored.commit({"config.json": b'{"model_type": "llava"}', "thesis.txt": b"years of work"})
    before = stored.head
    with pytest.raises(HubError, match=r"holds something else \(config\.json, thesis\.txt\)"):
        push(bundle, REPOSITORY, api=api)
    with pytest.raises(HubError, match=r"holds no run, bundle or checkpoint of pocketvlm"):
        pull(REPOSITORY, tmp_path / "out", api=api)
    assert stored.head == before
    push(run, "owner/run", api=api)
    with pytest.raises(HubError, match="holds a run of pocketvlm"):
        push(bundle, "owner/run", api=api)


def test_what_is_damaged_is_neither_published_nor_put_in_place(hub, api, bundle, tmp_path):
    push(bundle, REPOSITORY, api=api)
    stored = hub.repositories[REPOSITORY]
    stored.commit({**stored.files("main")[1], "onnx/decoder.onnx": b"other"})
    with pytest.raises(BundleError, match="was changed after signing"):
        pull(REPOSITORY, tmp_path / "out", api=api)
    assert not (tmp_path / "out").exists()
    (bundle / "onnx" / "decoder.onnx").write_bytes(b"wrong")
    head = stored.head
    with pytest.raises(BundleError, match="was changed after signing"):
        push(bundle, REPOSITORY, api=api)
    assert stored.head == head


def test_a_checkpoint_that_was_changed_is_not_published(api, run):
    (run / "checkpoint" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json: was changed"):
        push(run, REPOSITORY, api=api)


def test_a_push_that_another_one_overtook_is_refused(hub, api, bundle):
    push(bundle, REPOSITORY, api=api)
    hub.refusals["POST .*/commit/"] = 412
    (bundle / "README.md").write_text("# Another card\n")
    with pytest.raises(HubError, match="someone else has changed the repository"):
        push(bundle, REPOSITORY, api=api)


@pytest.mark.parametrize(
    ("name", "message"),
    [("a/b/c", "does not name a repository"), ("owner/none", "there is no such repository")],
)
def test_names_of_nothing(api, name, message, tmp_path):
    with pytest.raises(HubError, match=message) as caught:
        pull(name, tmp_path / "out", api=api)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "message"), [(401, "log in with"), (403, "does not allow"), (400, "refused")]
)
def test_a_refusal_is_one_line(hub, api, bundle, code, message):
    hub.refusals["POST /api/repos/create"] = code
    with pytest.raises(HubError, match=message) as caught:
        push(bundle, REPOSITORY, api=api)
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_one_line(hub, bundle, tmp_path, monkeypatch):
    nobody = HfApi(endpoint="http://127.0.0.1:9", token=TOKEN)
    for act in (
        lambda: push(bundle, REPOSITORY, api=nobody),
        lambda: pull(REPOSITORY, tmp_path / "out", api=nobody),
    ):
        with pytest.raises(HubError, match="cannot be reached") as caught:
            act()
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        push(bundle, REPOSITORY, api=HfApi(endpoint=hub.endpoint, token=TOKEN))


def test_folders_that_hold_nothing_to_push(api, run, tiny_path, tmp_path):
    (tmp_path / "empty").mkdir()
    link = tmp_path / "linked"
    shutil.copytree(run / "bundle", link)
    (link / "more.bin").symlink_to(run / "report.json")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    (unfinished / "report.json").unlink()
    cases = {
        tmp_path / "none": "is not a folder",
        tmp_path / "empty": "holds no finished run",
        tiny_path: "holds no finished run",
        unfinished: "holds no finished run",
        link: "is a link",
    }
    for folder, message in cases.items():
        with pytest.raises(PocketVLMError, match=message):
            push(folder, REPOSITORY, api=api)


def test_a_folder_of_other_things_is_left_alone(api, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    for out in (tmp_path / "full", tmp_path / "full" / "thesis.txt"):
        with pytest.raises(InputError, match="holds something"):
            pull(REPOSITORY, out, api=api)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"


def test_an_upload_that_is_refused_is_one_line(hub, api, bundle):
    hub.refusals["PUT /objects/"] = 403
    with pytest.raises(HubError, match="does not allow") as caught:
        push(bundle, REPOSITORY, api=api)
    assert "\n" not in str(caught.value)
    assert set(hub.repositories[REPOSITORY].files("main")[1]) == {".gitattributes"}


def test_the_command_line_pushes_and_pulls(hub, bundle, tmp_path, monkeypatch, capsys):
    """By the client of the environment."""
    files = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run_command(["push", str(bundle), REPOSITORY, "--base-model", "a/b", "--json"])
    pushed = json.loads(capsys.readouterr().out)
    assert pushed["commit"] == hub.repositories[REPOSITORY].head
    run_command(["pull", REPOSITORY, "--out", str(tmp_path / "out"), "--json"])
    assert json.loads(capsys.readouterr().out)["kind"] == "bundle"
    assert Bundle.open(tmp_path / "out").manifest.model == "m"
    arguments = ["pull", "owner/none", "--out", str(tmp_path / "other")]
    assert run_to_exit_code(lambda: run_command(arguments)) == 2
    assert capsys.readouterr().err.count("\n") == 1

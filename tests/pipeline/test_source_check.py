"""The source check passes what stock transformers reads alike, and names what it does not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from pocketvlm.bundle import Bundle
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint, read_model_folder
from pocketvlm.context import RunContext
from pocketvlm.errors import SourceMismatchError
from pocketvlm.pipeline import run as run_module
from pocketvlm.pipeline.run import run
from pocketvlm.pipeline.source_check import BOUNDS, SourceReport, check_source, verify_folder
from pocketvlm.recipes.load import load_recipe
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.weights.dense import DenseWeight
from tests.forked import fork_cli


def test_a_checkpoint_that_is_read_alike_passes_to_the_last_bit(tiny_path):
    report = verify_folder(tiny_path)
    assert report.verdict == "passed", report.lines()
    assert report.notes == ()
    assert {check.metric for check in report.checks} == set(BOUNDS)
    for check in report.checks:
        assert check.value == (1.0 if check.metric.endswith("_equal") else 0.0), check
    assert SourceReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert report.run_notes() == []


def scale_the_head(checkpoint):
    decoder = checkpoint.spec.decoder
    name = decoder.embedding if decoder.tied_head else decoder.head
    values = checkpoint.form(name).dequantize()
    values[7] *= 40
    checkpoint.set_form(name, DenseWeight(values=values))
    return checkpoint


def darken(checkpoint):
    processor = checkpoint.processor.image_processor
    processor.stock.image_mean = (0.1, 0.1, 0.1)
    return checkpoint


def runtime_alone(checkpoint):
    processor = checkpoint.processor
    images = processor.image_processor
    settings = replace(images.settings, resample=0)
    images = replace(images, settings=settings)
    return replace(checkpoint, processor=replace(processor, image_processor=images))


@pytest.mark.parametrize(
    ("change", "metric", "difference"),
    [
        (scale_the_head, "prefill_relative_error", "logits after the prompt differ by"),
        (darken, "pixels_max_abs", "pixels differ by up to"),
        (runtime_alone, "runtime_pixels_max_abs", "pixels differ by up to"),
    ],
)
def test_each_kind_of_difference_is_found(tiny_path, change, metric, difference):
    checkpoint = change(Checkpoint.load(tiny_path))
    report = check_source(checkpoint, read_model_folder(tiny_path))
    assert report.verdict == "failed"
    failed = {check.metric: check for check in report.checks if not check.passed}
    assert difference in failed[metric].difference
    with pytest.raises(SourceMismatchError, match="is not what stock transformers makes") as caught:
        report.raise_if_failed()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_another_prompt_is_shown_at_its_first_difference(tiny_path, tmp_path):
    """The folder's template changes behind the checkpoint's back."""
    path = shutil.copytree(tiny_path, tmp_path / "model")
    checkpoint = Checkpoint.load(path)
    template = (path / "chat_template.jinja").read_text()
    (path / "chat_template.jinja").write_text(f"Z{template}")
    report = check_source(checkpoint, read_model_folder(path))
    failed = [check for check in report.checks if check.metric == "prompt_ids_equal"]
    assert all("token 0 of" in check.difference for check in failed)
    assert "in stock" in report.line()


def test_what_stock_cannot_load_is_said_not_to_be_verified(tiny_paths, tmp_path, monkeypatch):
    Checkpoint.load(tiny_paths["llava"]).save(tmp_path / "ours")
    report = verify_folder(tmp_path / "ours")
    assert report.line() == (
        "not verified: the folder was written by pocketvlm, not by transformers"
    )
    report.raise_if_failed()
    assert report.run_notes() == [f"source check: {report.line()}"]

    path = shutil.copytree(tiny_paths["llava"], tmp_path / "model")
    combined = json.loads((path / "processor_config.json").read_text())
    del combined["patch_size"]
    (path / "processor_config.json").write_text(json.dumps(combined))
    assert verify_folder(path).line().startswith("not verified: transformers cannot run it")

    monkeypatch.setattr("psutil.virtual_memory", type("Free", (), {"available": 1000}))
    assert "in float32 needs" in verify_folder(tiny_paths["llava"]).line()


def test_smolvlm_is_verified_without_the_packages_for_videos(tiny_paths, tmp_path):
    path = shutil.copytree(tiny_paths["smolvlm"], tmp_path / "model")
    combined = json.loads((path / "processor_config.json").read_text())
    combined["processor_class"] = "SmolVLMProcessor"
    (path / "processor_config.json").write_text(json.dumps(combined))
    report = verify_folder(path)
    assert report.verdict == "passed", report.lines()


@pytest.mark.parametrize("family", ["llava", "smolvlm-tiles", "internvl3"])
@pytest.mark.parametrize("place", ["chat_template.json", "tokenizer_config.json"])
def test_templates_are_verified_wherever_a_folder_has_them(family, place, tmp_path):
    """Also where another class stands in, or the library gives its processor no template."""
    write_tiny_model(family, tmp_path)
    settings = tmp_path / "processor_config.json"
    combined = json.loads(settings.read_text())
    if family == "smolvlm-tiles":
        settings.write_text(json.dumps({**combined, "processor_class": "SmolVLMProcessor"}))
    template = tmp_path / "chat_template.jinja"
    file = tmp_path / place
    document = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**document, "chat_template": template.read_text()}))
    template.unlink()
    report = verify_folder(tmp_path)
    assert report.verdict == "passed", report.lines()
    is_borrowed = place == "tokenizer_config.json"
    assert any("template is the tokenizer's" in note for note in report.notes) == is_borrowed


def test_pictures_are_split_as_stock_splits_them(tiny_paths, tmp_path):
    path = shutil.copytree(tiny_paths["smolvlm"], tmp_path / "model")
    own = json.loads((path / "preprocessor_config.json").read_text())
    own |= {"do_image_splitting": True, "size": {"longest_edge": 128}}
    (path / "preprocessor_config.json").write_text(json.dumps(own))
    report = verify_folder(path)
    assert report.verdict == "passed", report.lines()


def test_a_template_of_single_questions_is_asked_single_questions(tiny_path, tmp_path):
    folder = tmp_path / "single"
    shutil.copytree(tiny_path, folder)
    template = folder / "chat_template.jinja"
    refusal = "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
    template.write_text(refusal + template.read_text(encoding="utf-8"), encoding="utf-8")
    report = verify_folder(folder)
    assert report.verdict == "passed", report.lines()
    assert {check.sample for check in report.checks} == {"one turn", "wide picture"}
    assert [note for note in report.notes if "one turn alone is compared" in note]


@pytest.fixture
def start(tiny_paths, tmp_path):
    def start(**options):
        return run(
            tiny_paths["llava"],
            load_recipe("float"),
            out=tmp_path / "run",
            calibration=CalibrationSet.synthetic(n=2, seed=0),
            ctx=RunContext(seed=0, threads=1),
            **options,
        )

    return start


def test_a_mismatch_stops_a_run_before_any_stage(start, tmp_path, monkeypatch):
    load = run_module.load_checkpoint
    monkeypatch.setattr(run_module, "load_checkpoint", lambda path: scale_the_head(load(path)))
    with pytest.raises(SourceMismatchError, match="logits after the prompt differ"):
        start()
    assert not (tmp_path / "run" / "checkpoint").exists()
    # The result is kept with the run, which continues only if that is allowed.
    monkeypatch.setattr(run_module, "check_source", None)
    result = start(source_check="allow")
    assert result.failures == ()
    assert result.report.source_check.verdict == "failed"
    assert any("source check: failed" in note for note in result.report.notes)
    assert "source FAILED" in (tmp_path / "run" / "report.html").read_text()
    assert Bundle.open(tmp_path / "run" / "bundle")


def test_a_run_that_was_told_not_to_look_says_so(start):
    report = start(source_check="skip").report
    assert report.source_check.verdict == "skipped"
    assert "source check: skipped: --no-verify-source" in report.notes


def test_plan_verifies_alone(tiny_paths):
    done = fork_cli(
        "plan", tiny_paths["llava"], "--recipe", "float", "--verify-source", "--json", check=0
    )
    assert "source check   passed" in done.stderr
    assert json.loads(done.stdout)["source_check"]["verdict"] == "passed"

"""What the runtime would refuse is refused before any compute, with file and line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer

from pocketvlm.calibration.data.sample import Sample
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import read_config, read_spec
from pocketvlm.cli import main
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError, CheckpointError
from pocketvlm.export.executorch.target import ToExecutorch
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline.plan import plan
from pocketvlm.pipeline.preflight import (
    Readers,
    certificate_samples,
    check_data,
    check_model,
)
from pocketvlm.pipeline.run import run
from pocketvlm.prompt.messages import Turn, user_turn
from pocketvlm.recipes.load import recipe_from_document

RECIPE = {"schema": 1, "name": "test", "stages": [], "targets": [{"method": "onnx"}]}
PICTURE = Image.effect_noise((40, 30), 80).convert("RGB")


def readers_of(path: Path) -> Readers:
    return Readers.open(path, read_spec(read_config(path)))


def refusal_of(path: Path) -> str:
    """What `plan` says of a model, whether or not it continues after that."""
    with pytest.raises(CheckpointError) as caught:
        plan(path, recipe_from_document(RECIPE, where="test")).raise_if_refused()
    return str(caught.value)


@pytest.fixture
def model(tiny_paths: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a tiny model to alter."""
    return Path(shutil.copytree(tiny_paths["llava"], tmp_path / "model"))


@pytest.fixture(scope="module")
def readers(tiny_paths: dict[str, Path]) -> Readers:
    return readers_of(tiny_paths["llava"])


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def sample(question: str = "what?", *, pictures: int = 1, row: int = 1, **values: object) -> Sample:
    options = {"answer": "red", **values}
    where = f"data.jsonl:{row}"
    return Sample(images=(PICTURE,) * pictures, question=question, where=where, **options)


def data_of(*samples: Sample) -> CalibrationSet:
    return CalibrationSet(name="data", samples=samples)


def test_sound_models_pass(tiny_path: Path) -> None:
    assert check_model(readers_of(tiny_path), tiny_path).problems == ()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ 'Q: ' + m['content'] }}{% endfor %}", "can only concatenate"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "writes '<image>' 0 times"),
        ("<image>", "made for text alone"),
        ("{% for m in messages %}{% if loop.index > 1 %}{{ raise_exception('one turn') }}"
         "{% endif %}<image>{{ m['content'][-1]['text'] }}{% endfor %}", "one turn"),
        ("<image>{% for m in messages %}<image>{{ m['content'][-1]['text'] }}{% endfor %}",
         "writes '<image>' 2 times"),
    ],
)  # fmt: skip
def test_templates_that_cannot_ask_about_a_picture(
    model: Path, template: str, message: str
) -> None:
    (model / "chat_template.jinja").write_text(template)
    assert message in refusal_of(model)


def test_a_broken_template_names_the_models_own_file(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(CheckpointError, match=rf"^{model}.*chat") as caught:
        readers_of(model)
    assert str(caught.value).isprintable()
    assert refusal_of(model) == str(caught.value)


def test_image_processors_that_the_runtime_cannot_follow(model: Path) -> None:
    file = model / "preprocessor_config.json"
    change(file, size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    assert "24 x 24, but the tower of config.json takes 32" in refusal_of(model)


def test_pixels_that_would_differ_are_refused(readers: Readers, tmp_path: Path) -> None:
    altered = replace(readers.preprocessor, table=readers.preprocessor.table + 1e-3)
    other = Readers(processor=readers.processor, codec=readers.codec, preprocessor=altered)
    (problem,) = check_model(other, tmp_path).problems
    assert "other pixels" in problem


def test_tokens_beyond_the_table_are_known_before(model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(f"<animal{index}>") for index in range(40)])
    tokenizer.save(str(model / "tokenizer.json"))
    readers = readers_of(model)
    found = check_model(readers, model)
    assert not found.problems
    (note,) = found.notes
    assert note.startswith("40 tokens of the tokenizer, such as '<animal0>', have no row")
    row = sample("is the <animal39> red?")
    for sets in ({"calibration": data_of(row), "evaluation": None},
                 {"calibration": None, "evaluation": data_of(row)}):  # fmt: skip
        (problem,) = check_data(readers, (ToOnnx(),), kept=16, **sets).problems
        assert problem.startswith("data.jsonl:1: the prompt holds '<animal39>', token 359")


def test_every_row_is_looked_at(readers: Readers, tmp_path: Path) -> None:
    damaged = tmp_path / "a.png"
    PICTURE.save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:600])
    bad = Sample(image=damaged, question="what?", answer="red", where="data.jsonl:3")
    long = sample("word " * 600, row=2)
    found = check_data(
        readers,
        (ToOnnx(),),
        kept=16,
        calibration=data_of(long, sample(pictures=2, row=4), sample(pictures=0, row=5), bad),
        evaluation=data_of(
            long, bad, sample(pictures=3), sample(pictures=0), sample(answer=" ", row=6)
        ),
    )
    lines = [problem.split(": ")[0] for problem in found.problems]
    assert lines == [f"data.jsonl:{row}" for row in (4, 5, 3, 2, 3, 6)]
    assert "has 2 images" in found.problems[0]
    assert "damaged or truncated" in found.problems[2]
    assert "the context has 512" in found.problems[3]
    (note,) = found.notes
    assert note == "data: 1 of 4 conversations are longer than what calibration uses, and are cut"


def test_the_cache_of_the_target_counts(readers: Readers) -> None:
    row = data_of(sample("word " * 60))
    for targets, fits in (((ToOnnx(),), True), ((ToOnnx(), ToExecutorch(context=64)), False)):
        found = check_data(readers, targets, kept=16, calibration=None, evaluation=row)
        assert (not found.problems) is fits
    assert "rows of KV cache and its answer up to 16; the runtime has 64" in found.problems[0]


def test_the_certificate_asks_rows_that_leave_room(readers: Readers) -> None:
    text = sample("no picture?", pictures=0)
    long = sample("why?", answer="word " * 400)
    chosen, found = certificate_samples(
        readers,
        (ToOnnx(),),
        kept=16,
        calibration=data_of(sample("never asked")),
        evaluation=data_of(text, long, sample("one?"), long, sample("two?", pictures=2)),
    )
    assert [row.question for row in chosen] == ["one?", "two?"]
    assert not found.notes
    long_only = data_of(long)
    chosen, found = certificate_samples(
        readers, (ToOnnx(),), kept=16, calibration=long_only, evaluation=data_of(text)
    )
    assert len(chosen) == 8
    assert all(row.where.startswith("synthetic") for row in chosen)
    assert "synthetic questions" in found.notes[0]


def test_a_run_refuses_before_anything_is_written(
    tiny_paths: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    rows = data_of(sample(), sample("word " * 600, row=2))
    with pytest.raises(CalibrationError, match="data.jsonl:2: the question takes"):
        run(
            tiny_paths["llava"],
            recipe_from_document(RECIPE, where="test"),
            out=out,
            calibration=CalibrationSet.synthetic(2),
            ctx=RunContext(),
            evaluation=rows,
        )
    assert not out.exists()


def test_plan_checks_the_rows_of_folders(
    tiny_paths: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    PICTURE.save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "what?", "answer": "red"}
    rows = [row, {**row, "question": "word " * 600}, {**row, "id": 3}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["pocketvlm", "plan", str(tiny_paths["llava"]), "--recipe", "float"]
    for options, code, said in (
        (["--calibration", str(tmp_path)], 0, "1 of 3 conversations are longer"),
        (["--calibration", str(tmp_path)], 0, "keys that are not read: 'id' (1 rows)"),
        (["--data", str(tmp_path)], 2, "data.jsonl:2: the question takes"),
        (["--data", str(tmp_path), "--n", "1"], 0, "the first 1 of 3 rows are used"),
    ):
        monkeypatch.setattr("sys.argv", [*command, *options])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == code
        assert said in capsys.readouterr().err.replace("\n", " ")


def test_a_role_that_the_template_refuses_is_a_row(model: Path) -> None:
    file = model / "chat_template.jinja"
    refusal = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{% endfor %}"
    )
    file.write_text(refusal + file.read_text())
    turns = (Turn(role="system", parts=("be brief",)), user_turn("what?"))
    row = Sample(image=PICTURE, turns=turns, answer="red", where="data.jsonl:7")
    readers = readers_of(model)
    assert not check_model(readers, model).problems
    found = check_data(
        readers, (ToOnnx(),), kept=16, calibration=data_of(row), evaluation=data_of(row)
    )
    assert len(found.problems) == 2
    assert all(line.startswith("data.jsonl:7: ") and "no system" in line for line in found.problems)

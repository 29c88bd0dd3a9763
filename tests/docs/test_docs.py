"""What the documentation shows: every command parses, every recipe loads, every snippet runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.cli.app import app
from pocketvlm.context import RunContext
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline.assemble import build_bundle
from pocketvlm.pipeline.sources import load_checkpoint
from pocketvlm.recipes.load import list_recipes, load_recipe, recipe_from_document
from tests.forked import fork_snippet

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language):
    for page in PAGES:
        for number, (found, content) in enumerate(BLOCK.findall(page.read_text())):
            if found == language:
                yield pytest.param(content, id=f"{page.relative_to(ROOT)}-{number}")


def commands():
    for block in blocks("bash"):
        for written in block.values[0].splitlines():
            line = re.sub(r"^torchrun .* -m (?=pocketvlm )", "", written)
            if line.startswith("pocketvlm "):
                yield pytest.param(line, id=f"{block.id}: {line[:60]}")


@pytest.mark.parametrize("line", list(commands()))
def test_every_command_shown_is_one_that_parses(line):
    name, *arguments = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app).commands[name]
    context = command.make_context(name, arguments)
    assert context.params


@pytest.mark.parametrize("content", list(blocks("yaml")))
def test_every_recipe_shown_loads(content):
    document = yaml.safe_load(content)
    if isinstance(document, dict) and "stages" in document:
        recipe_from_document({"schema": 1, "name": "docs", **document}, where="docs")


@pytest.fixture(scope="session")
def workplace(tiny_paths, tmp_path_factory):
    """A folder with what the snippets take for granted: `bundle/` and `photo.jpg`."""
    folder = tmp_path_factory.mktemp("workplace")
    calibration = CalibrationSet.synthetic(n=2)
    ctx = RunContext(threads=1)
    build_bundle(
        load_checkpoint(tiny_paths["llava"]),
        load_recipe("float"),
        (ToOnnx(),),
        folder / "bundle",
        tuple(calibration),
        ctx,
    )
    calibration.samples[0].open_image().save(folder / "photo.jpg")
    return folder


@pytest.mark.parametrize("content", list(blocks("python")))
def test_every_snippet_runs(content, workplace):
    assert fork_snippet(content, workplace) is None


def test_a_snippet_that_fails_says_why(tmp_path):
    said = fork_snippet("print('before')\nnothing()", tmp_path)
    assert said.startswith("before")
    assert "NameError: name 'nothing' is not defined" in said


def test_every_link_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_make_target_shown_exists():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"^make ([\w-]+)", page.read_text(), re.MULTILINE):
            assert f"\n{target}:" in makefile


def test_every_shipped_recipe_is_in_the_table():
    page = (ROOT / "docs" / "recipes.md").read_text()
    for name in list_recipes():
        assert f"| `{name}` |" in page


def test_the_repository_names_no_machine():
    pattern = re.compile(r"/(?:root|home|work|tmp)/\w")
    for page in PAGES:
        assert not pattern.search(page.read_text()), page


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_every_example_runs(example, tmp_path):
    assert fork_snippet(example.read_text(), tmp_path) is None


def test_the_workflow_for_pull_requests_uses_commands_that_parse():
    text = (ROOT / "examples" / "benchmark_pull_request.yml").read_text()
    workflow = yaml.safe_load(text)
    steps = workflow["jobs"]["compare"]["steps"]
    lines = [line.strip() for step in steps for line in step.get("run", "").splitlines()]
    commands = [line.partition(" || ")[0] for line in lines if line.startswith("pocketvlm ")]
    assert {command.split()[1] for command in commands} == {
        "compress",
        "bench",
        "compare",
        "report",
    }
    for command in commands:
        name, *arguments = shlex.split(command.partition(">>")[0])[1:]
        typer.main.get_command(app).commands[name].make_context(name, arguments)
    assert workflow[True] == {"pull_request": None}  # YAML 1.1 reads the key "on" as true
    assert workflow["permissions"] == {"contents": "read", "pull-requests": "write"}

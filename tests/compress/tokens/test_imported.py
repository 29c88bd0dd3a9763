"""Reducers from outside the package: found, held to the contract, never imported for a stranger."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens import ReduceTokens
from pocketvlm.compress.tokens.imported import TRUSTED, Imported
from pocketvlm.context import RunContext
from pocketvlm.errors import CheckpointError, RecipeError
from pocketvlm.models.spec import ModelSpec
from pocketvlm.pipeline.identity import stage_settings
from pocketvlm.pipeline.sources import load_checkpoint
from pocketvlm.recipes.load import Recipe, recipe_from_document

ROOT = Path(__file__).parents[3]
NO_CALIBRATION: Any = None  # token reduction looks at no data

SOURCE = '''
from dataclasses import dataclass

import torch

from pocketvlm.compress.tokens import Ranking, Reducer, TokenReducer


@dataclass(frozen=True, kw_only=True)
class Good(Ranking):
    kind: str = "good"
    power: float = 1.0

    def score(self, inputs):
        return inputs.features.abs().pow(self.power).sum(-1)


class Undecorated(Ranking):
    pass


@dataclass(frozen=True, kw_only=True)
class Tagless(Good):
    kind: int = 3


class Module(TokenReducer):
    body = None

    def forward(self, inputs):
        return type(self).body(inputs, self.keep)


def first(inputs, keep):
    places = torch.arange(keep).expand(inputs.features.shape[0], -1)
    return inputs.features[:, :keep], places


def reducer(name, body, more=0, build=None, blocks=()):
    """A reducer whose module runs `body`, and says that it keeps `more` tokens too many."""

    module = type(name, (Module,), {"body": staticmethod(body)})

    def made(self, spec, *, keep, positions):
        return module(keep=keep + more, positions=positions, earlier_blocks=blocks)

    members = {"build": build or made, "__annotations__": {"kind": str}, "kind": name.lower()}
    return dataclass(frozen=True, kw_only=True)(type(name, (Reducer,), members))


def sorted_norms(inputs, keep):
    places = inputs.features.norm(dim=-1).argsort(dim=-1)[:, :keep].sort(dim=-1).values
    return torch.stack([f[p] for f, p in zip(inputs.features, places)]), places


def of_the_batch(inputs, keep):
    score = inputs.features.sum(-1).mean(0).expand(inputs.features.shape[0], -1)
    places = ascending(score.topk(keep).indices)
    return first(inputs, keep)[0], places


def ascending(places):
    return -((-places.float()).topk(places.shape[1]).values).long()


def drawn(inputs, keep):
    scores = torch.rand(inputs.features.shape[:2])
    return first(inputs, keep)[0], ascending(scores.topk(keep).indices)


Sorting = reducer("Sorting", sorted_norms)
Batched = reducer("Batched", of_the_batch)
Drawn = reducer("Drawn", drawn)
Backwards = reducer("Backwards", lambda i, k: (first(i, k)[0], first(i, k)[1].flip(1)))
Outside = reducer("Outside", lambda i, k: (first(i, k)[0], first(i, k)[1] + i.features.shape[1]))
Wide = reducer("Wide", lambda i, k: (i.features, first(i, k)[1]))
Narrow = reducer("Narrow", lambda i, k: (first(i, k)[0][..., :1], first(i, k)[1]))
Halved = reducer("Halved", lambda i, k: (first(i, k)[0].half(), first(i, k)[1]))
Short = reducer("Short", lambda i, k: (first(i, k)[0], first(i, k)[1].int()))
Infinite = reducer("Infinite", lambda i, k: (first(i, k)[0] / 0, first(i, k)[1]))
Single = reducer("Single", lambda i, k: first(i, k)[0])
Failing = reducer("Failing", lambda i, k: i.beauty)
Greedy = reducer("Greedy", first, more=1)
Later = reducer("Later", first, blocks=(0, 99))
Bare = reducer("Bare", first, build=lambda self, spec, *, keep, positions: keep)
Building = reducer("Building", first, build=lambda self, spec, *, keep, positions: 1 // 0)
Branching = reducer("Branching", lambda i, k: first(i, k) if i.features.sum() > 0 else first(i, k))
'''

BROKEN: Mapping[str, str] = {
    "own:Missing": "own has no dataclass Missing that derives from",
    "own:Undecorated": "own has no dataclass Undecorated that derives from",
    "own:torch": "own has no dataclass torch that derives from",
    "nowhere:Good": "there is no module nowhere among what is installed or in PYTHONPATH",
    "broken:Good": "broken cannot be imported: ZeroDivisionError: ",
    "leaving:Good": "leaving cannot be imported: SystemExit: 3",
    "wanting:Good": "wanting cannot be imported: ModuleNotFoundError: No module named 'nowhere'",
    "own:Tagless": "its kind must be text, not 3",
    "own:Building": "does not build: ZeroDivisionError",
    "own:Bare": "build returns int, not a TokenReducer",
    "own:Greedy": r"keep and positions are \(5, 'original'\); asked for are \(4, 'original'\)",
    "own:Later": r"earlier_blocks are \(0, 99\); allowed are blocks 0 to \d+, ascending",
    "own:Failing": "does not run: AttributeError: .*beauty",
    "own:Single": "does not run: ValueError: not enough values to unpack",
    "own:Wide": r"two pictures give features \[2, 16, \d+\]",
    "own:Narrow": r"two pictures give features \[2, 4, 1\]",
    "own:Halved": "features are torch.float16",
    "own:Short": "indices torch.int32; needed are float32 and int64",
    "own:Infinite": "features are not finite",
    "own:Backwards": r"indices must ascend within 0 to 15, each once; .* \[3, 2, 1, 0\]",
    "own:Outside": "indices must ascend within 0 to 15",
    "own:Drawn": "reduced otherwise the second time",
    "own:Batched": "a picture is reduced otherwise alone than beside another",
    "own:Sorting": "uses argsort, sort, which not every target can run",
    "own:Branching": "cannot be traced",
}


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which Python looks, and nothing of it is left afterwards."""
    folder = tmp_path / "modules"
    folder.mkdir()
    texts = {"own": SOURCE, "broken": "1 / 0", "leaving": "raise SystemExit(3)"}
    texts["wanting"] = "import nowhere"
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv(TRUSTED, raising=False)
    yield folder
    for name in texts:
        sys.modules.pop(name, None)


@pytest.fixture
def spec(tiny_paths: Mapping[str, Path]) -> ModelSpec:
    return Checkpoint.load(tiny_paths["smolvlm"]).spec


def stage(name: str, **options: Any) -> ReduceTokens:
    return ReduceTokens(reducer=Imported(name=name, options=options), keep=4)


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_the_contract_is_refused_in_one_line(name: str, spec: ModelSpec) -> None:
    with pytest.raises(RecipeError, match=BROKEN[name]) as caught:
        stage(name).build(spec)
    assert str(caught.value).startswith(f"reduce_tokens: reducer {name}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("modules")
def test_options_that_it_does_not_take_are_refused(spec: ModelSpec) -> None:
    assert stage("own:Good", power=2.0).build(spec).keep == 4
    with pytest.raises(RecipeError, match=r"options \{'beauty': 1\} are refused: TypeError"):
        stage("own:Good", beauty=1).build(spec)


@pytest.mark.parametrize("name", ["own", "own:", ":Good", "own:Good.x", "own/a:Good", "own:Go od"])
def test_a_name_is_a_module_and_a_class(name: str) -> None:
    document = {
        "schema": 1,
        "stages": [{"method": "reduce_tokens", "reducer": {"kind": "imported", "name": name}}],
    }
    with pytest.raises(RecipeError, match=r"reducer.*name is .*; allowed is module:Class"):
        recipe_from_document(document, where="recipe")


def test_a_checkpoint_imports_nothing_that_nobody_trusts(
    tiny_paths: Mapping[str, Path],
    modules: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = stage("own:Good", power=2.0).apply(
        Checkpoint.load(tiny_paths["smolvlm"]), NO_CALIBRATION, RunContext()
    )
    assert done.history[-1].metrics["reducer"] == "good"
    done.save(tmp_path / "saved")
    assert load_checkpoint(tmp_path / "saved").reducer is not None, "imported before"
    del sys.modules["own"]
    (modules / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n{SOURCE}"
    )
    with pytest.raises(CheckpointError, match=f"imports no code; allow it with {TRUSTED}=own"):
        load_checkpoint(tmp_path / "saved")
    assert not (tmp_path / "ran").exists()
    monkeypatch.setenv(TRUSTED, "other, own")
    assert load_checkpoint(tmp_path / "saved").reducer is not None
    assert (tmp_path / "ran").exists()


def test_a_finished_stage_is_made_again_when_the_code_changed(modules: Path) -> None:
    recipe = Recipe(name="own", stages=(stage("own:Good"),))
    before = stage_settings(recipe)
    assert before == stage_settings(recipe)
    (modules / "own.py").write_text(f"{SOURCE}\n")
    assert stage_settings(recipe) != before
    other = Recipe(name="own", stages=(replace(stage("own:Good"), keep=5),))
    assert stage_settings(other) != stage_settings(recipe)


def test_the_example_goes_from_a_recipe_to_a_bundle_that_needs_it_no_more(
    tmp_path: Path, tiny_paths: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "schema: 1\nstages:\n  - method: reduce_tokens\n    keep: 0.5\n"
        "    reducer: {kind: imported, name: 'local_contrast:LocalContrast', options: {reach: 2}}\n"
        "targets:\n  - {method: onnx}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "pocketvlm", "compress", tiny_paths["llava"]]
    command += ["--recipe", recipe, "--out", out, "--no-bench", "--n", "4"]

    def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=tmp_path)

    refused = run(*command)
    assert refused.returncode == 2
    assert "there is no module local_contrast" in refused.stderr
    assert not out.exists()
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'examples'}")
    finished = run(*command)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((out / "report.json").read_text())["parity"]["passed"]
    for file in (out / "bundle").rglob("*"):
        if file.is_file() and file.name not in ("README.md", "report.html"):
            assert b"local_contrast" not in file.read_bytes(), file
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    inspected = run(sys.executable, "-m", "pocketvlm", "inspect", out / "bundle")
    assert inspected.returncode == 0, inspected.stderr

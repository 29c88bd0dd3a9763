"""Fixtures that every test may use: tiny models of both families, written once per run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

FAMILIES = ("llava", "smolvlm")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds what `make test-exhaustive` passes."""
    parser.addoption(
        "--exhaustive", action="store_true", help="also run what another test covers, in minutes"
    )


# The same examples each time: a run that fails can be run again.
settings.register_profile("seeded", derandomize=True)
settings.load_profile("seeded")


@pytest.fixture(scope="session")
def tiny_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of the tiny random models by family."""
    from pocketvlm.reference.random_models import tiny_config, write_random_model

    root = tmp_path_factory.mktemp("tiny")
    for family in FAMILIES:
        write_random_model(tiny_config(family), root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def tiny_path(request: pytest.FixtureRequest, tiny_paths: dict[str, Path]) -> Path:
    """One directory of a tiny random model, each family in turn; read-only by agreement."""
    return tiny_paths[request.param]


@pytest.fixture
def tiny_checkpoint(tiny_path: Path):
    """A fresh checkpoint of a tiny random model, each family in turn."""
    from pocketvlm.checkpoint import Checkpoint

    return Checkpoint.load(tiny_path)


def notes_of_ours(notes: Sequence[str]) -> tuple[str, ...]:
    """Notes but the one that stock's processors before transformers 5.24 give a reason for.

    They add `<end_of_utterance>` to a SmolVLM tokenizer that has none, beyond a tiny model's table.
    """
    return tuple(note for note in notes if "has 1 tokens beyond the 320 rows" not in note)


@pytest.fixture(scope="session")
def deep_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of tiny models whose decoders have four layers, by family."""
    from pocketvlm.reference.random_models import tiny_config, write_random_model

    root = tmp_path_factory.mktemp("deep")
    for family in FAMILIES:
        config = tiny_config(family)
        config["text_config"]["num_hidden_layers"] = 4
        write_random_model(config, root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def deep_path(request: pytest.FixtureRequest, deep_paths: dict[str, Path]) -> Path:
    """One directory of a tiny model with four decoder layers, each family in turn; read-only."""
    return deep_paths[request.param]


@pytest.fixture
def deep_checkpoint(deep_path: Path):
    """A fresh checkpoint of a tiny model with four decoder layers, each family in turn."""
    from pocketvlm.checkpoint import Checkpoint

    return Checkpoint.load(deep_path)

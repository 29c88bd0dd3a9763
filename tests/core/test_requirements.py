"""The lock and the lower bounds: what is installed is named, and stays within what is declared."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "requirements"


@pytest.fixture(scope="module")
def declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(text) for texts in (project["dependencies"], *extras) for text in texts]


@pytest.fixture(scope="module")
def locked():
    text = (FOLDER / "lock.txt").read_text(encoding="utf-8")
    text += (FOLDER / "torch.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==([^\s\\]+)", text, re.MULTILINE))


def test_every_requirement_is_locked_within_its_range(locked):
    """Of extras, those that `make lock` names: the others ask for different versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = re.findall(r"--extra (\w+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert "dev" in extras
    texts = [project["optional-dependencies"][extra] for extra in extras]
    for text in (*project["dependencies"], *(text for extra in texts for text in extra)):
        requirement = Requirement(text)
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


def test_every_locked_file_has_a_digest_and_no_index_is_named():
    text = (FOLDER / "lock.txt").read_text(encoding="utf-8")
    pins = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(pins) > 50
    assert all("--hash=sha256:" in pin for pin in pins)
    assert not re.search(r"://|--\w*index|--find-links|file:|\+cpu", text)


def test_lower_bounds_are_those_of_the_project(declared):
    spec = importlib.util.spec_from_file_location("lower_bounds", FOLDER / "lower_bounds.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for requirement in declared:
        name, _, version = module.lower_bound(str(requirement)).partition("==")
        assert name == requirement.name
        assert requirement.specifier.contains(version)
    with pytest.raises(ValueError, match="'numpy<3' names 0 lower bounds"):
        module.lower_bound("numpy<3")

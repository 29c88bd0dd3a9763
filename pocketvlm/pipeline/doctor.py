"""Checks whether the installed versions fit together, and what each target lacks."""

from __future__ import annotations

import platform
import shutil
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement

from pocketvlm.runtime.onnx.versions import INT8_CACHE_VERSION, LOWEST_ONNX_VERSION
from pocketvlm.runtime.versions import is_older

__all__ = ["Finding", "examine"]

_PLUGIN = "pocketvlm-optimum"
_MIN_FREE_BYTES = 2_000_000_000


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was checked.

    Attributes:
        verdict: `ok`, `missing` (optional) or `broken`.
    """

    name: str
    verdict: Literal["ok", "missing", "broken"]
    detail: str

    def line(self) -> str:
        """The finding in one line."""
        return f"{self.verdict:<8} {self.name:<16} {self.detail}"

    def to_json(self) -> dict[str, Any]:
        """The finding as JSON values."""
        return asdict(self)


def examine() -> tuple[Finding, ...]:
    """Checks Python, every requirement of package and extras, the plugin, memory and disk."""
    return (
        Finding(name="python", verdict="ok", detail=platform.python_version()),
        *(_check_requirement(text) for text in metadata.requires("pocketvlm") or ()),
        _check_plugin(),
        _check_memory(),
        _check_disk(),
    )


def _check_requirement(text: str) -> Finding:
    requirement = Requirement(text)
    extra = _extra_of(requirement)
    wanted = str(requirement.specifier) or "any version"
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        if extra is None:
            return Finding(
                name=requirement.name, verdict="broken", detail=f"not installed; needs {wanted}"
            )
        return Finding(
            name=requirement.name,
            verdict="missing",
            detail=f"pip install 'pocketvlm[{extra}]' installs it",
        )
    if requirement.specifier.contains(found, prereleases=True):
        told = _told(requirement.name, found)
        return Finding(name=requirement.name, verdict="ok", detail=f"{found}{told}")
    return Finding(
        name=requirement.name, verdict="broken", detail=f"{found} is installed; needs {wanted}"
    )


def _check_plugin() -> Finding:
    """The command that optimum finds; a separate distribution, which no extra can name."""
    try:
        found = metadata.version(_PLUGIN)
    except metadata.PackageNotFoundError:
        detail = "pip install ./plugins/optimum adds optimum-cli export pocketvlm"
        return Finding(name=_PLUGIN, verdict="missing", detail=detail)
    return Finding(name=_PLUGIN, verdict="ok", detail=f"{found}; optimum-cli export pocketvlm")


def _told(name: str, found: str) -> str:
    """Adds to a runtime's version what it means for bundles."""
    if name != "onnxruntime":
        return ""
    told = f"; bundles need {LOWEST_ONNX_VERSION} or newer in an app"
    if is_older(found, INT8_CACHE_VERSION):
        told += f", those with an int8 cache or 2-bit float zero points {INT8_CACHE_VERSION}"
    return told


def _extra_of(requirement: Requirement) -> str | None:
    """The extra that a requirement belongs to, as hatchling writes it into the marker."""
    if requirement.marker is None:
        return None
    _, _, quoted = str(requirement.marker).partition("extra == ")
    return quoted.strip("\"' ") or None


def _check_memory() -> Finding:
    memory = psutil.virtual_memory()
    detail = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    return Finding(name="memory", verdict="ok", detail=detail)


def _check_disk() -> Finding:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    return Finding(
        name="disk",
        verdict="ok" if free >= _MIN_FREE_BYTES else "broken",
        detail=f"{free / 1e9:.1f} GB free in {folder}",
    )

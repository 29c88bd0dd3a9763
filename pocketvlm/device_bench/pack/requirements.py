"""The packages that a packed runner needs, pinned with digests as the project's lock pins them.

Which they are follows from what the packed modules import and from what those packages require.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pocketvlm.errors import MissingExtraError, PocketVLMError

__all__ = ["Pin", "distributions_of", "locked_pins", "torch_pin"]

# What a distribution requires and a runner never reaches.
_UNREACHED = {
    "tokenizers": {"huggingface-hub"},  # for downloads; a bundle has its tokenizer
}


class Pin(str):
    """One entry of the lock: `name==version` and the digest of every file of it."""

    __slots__ = ()

    @property
    def digests(self) -> frozenset[str]:
        """The sha256 of every file that may be installed for it, in hexadecimal."""
        return frozenset(re.findall(r"--hash=sha256:([0-9a-f]{64})", self))


def distributions_of(modules: Iterable[str]) -> tuple[str, ...]:
    """The distributions that bring some modules, and those that these require, sorted.

    Args:
        modules: Top-level names of modules that are installed here.

    Raises:
        MissingExtraError: One is not installed, so that its requirements are not known.
    """
    homes = metadata.packages_distributions()
    waiting: list[str] = []
    for module in modules:
        if module not in homes:
            raise MissingExtraError(
                f"{module} is not installed here, so what it requires is not known: install what "
                "the runner will need on the device, then pack again"
            )
        waiting.append(homes[module][0])
    found: set[str] = set()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            texts = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            texts = []
        required = (Requirement(text) for text in texts)
        waiting += [
            one.name
            for one in required
            if (one.marker is None or one.marker.evaluate({"extra": ""}))
            and canonicalize_name(one.name) not in _UNREACHED.get(name, set())
        ]
    return tuple(sorted(found))


def locked_pins(distributions: Iterable[str]) -> dict[str, Pin]:
    """The lock's entries of some distributions, by name.

    Raises:
        PocketVLMError: The lock has no such entry.
    """
    entries = _entries(_requirements_file("lock.txt").read_text(encoding="utf-8"))
    pins = {}
    for name in distributions:
        if name not in entries:
            raise PocketVLMError(f"{name} is not in the lock of this version of pocketvlm")
        pins[name] = entries[name]
    return pins


def torch_pin() -> str:
    """The pin of torch, without a digest: builds for CPUs are other files of that version."""
    text = _requirements_file("torch.txt").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith("torch=="))
    return line


def _entries(text: str) -> Mapping[str, Pin]:
    entries: dict[str, Pin] = {}
    for block in re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]:
        lines = [line for line in block.splitlines() if not line.lstrip().startswith("#")]
        entries[canonicalize_name(block.partition("==")[0])] = Pin("\n".join(lines).strip())
    return entries


def _requirements_file(name: str) -> Path:
    """A wheel has the file beside this module; a checkout in its own folder."""
    packed = Path(__file__).with_name(name)
    return packed if packed.exists() else Path(__file__).parents[3] / "requirements" / name

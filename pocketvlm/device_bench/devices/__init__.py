"""Device profiles: what is known about a device without a measurement.

A profile holds the memory that plans are checked against and, for orientation, published figures
of others with their sources. These are never mixed with measured figures, because models, runtimes
and protocols differ.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from pocketvlm.errors import InputError

__all__ = ["Device", "PublishedFigure", "list_devices", "load_device"]

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class PublishedFigure:
    """A figure published by others; not measured here.

    Attributes:
        model: The model.
        runtime: The runtime and its precision.
        metric: Its name, unit included, such as `decode_tok_s`.
        value: Its value.
        source: Where it was published.
        unit: The processor that ran it; `None` if the source does not say.
    """

    model: str
    runtime: str
    metric: str
    value: float
    source: str
    unit: Literal["cpu", "gpu", "npu"] | None = None


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device.

    Attributes:
        name: Its name on the command line.
        description: One line about it.
        transport: How it is measured; `None` if this version cannot reach it.
        ram_bytes: Physical memory of the named variant, from its maker (for Apple, which publishes
            none, from the trade press); `None` for the host, where it is measured.
        notes: What a reader must know.
        published: Figures of others, for orientation.
    """

    name: str
    description: str
    transport: Literal["host"] | None = None
    ram_bytes: int | None = None
    notes: tuple[str, ...] = ()
    published: tuple[PublishedFigure, ...] = ()


def list_devices() -> tuple[Device, ...]:
    """All profiles, the host first."""
    names = sorted(file.stem for file in _FOLDER.glob("*.yaml"))
    return tuple(load_device(name) for name in sorted(names, key=lambda name: name != "host"))


def load_device(name: str) -> Device:
    """The profile of this name.

    Raises:
        InputError: There is none, or it is not valid.
    """
    known = sorted(file.stem for file in _FOLDER.glob("*.yaml"))
    if name not in known:
        raise InputError(f"device {name!r} is not known; there are {', '.join(known)}")
    file = _FOLDER / f"{name}.yaml"
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    unknown = set(document) - {field.name for field in fields(Device)}
    if unknown:
        raise InputError(f"{file.name}: unknown key {min(unknown)!r}")
    return Device(
        **{
            **document,
            "name": name,
            "notes": tuple(document.get("notes", ())),
            "published": tuple(_figure(row) for row in document.get("published", ())),
        }
    )


def _figure(row: dict[str, Any]) -> PublishedFigure:
    return PublishedFigure(**row)

"""Reads device profiles: those of this package by name, a user's own by path."""

from __future__ import annotations

from pathlib import Path

from pocketvlm.device_bench.devices.profile import Device
from pocketvlm.errors import InputError
from pocketvlm.files.yaml_document import read_yaml
from pocketvlm.json_io import DecodeError, decode

__all__ = ["TEMPLATE", "device_names", "list_devices", "load_device", "names_profile"]

TEMPLATE = "template"
"""A profile to copy, which says what belongs where; it stands for nothing that exists."""

_FOLDER = Path(__file__).parent
_SCHEMA = 1
_ENDINGS = (".yaml", ".yml")


def device_names() -> tuple[str, ...]:
    """Names of all devices, the host first."""
    names = sorted(file.stem for file in _FOLDER.glob("*.yaml") if file.stem != TEMPLATE)
    return tuple(sorted(names, key=lambda name: name != "host"))


def list_devices() -> tuple[Device, ...]:
    """All profiles, the host first."""
    return tuple(load_device(name) for name in device_names())


def load_device(name: str) -> Device:
    """A profile.

    Args:
        name: Its name, or the path of a YAML file: what ends in `.yaml` or `.yml`, or has a
            separator.

    Raises:
        InputError: There is none, or it is not valid; the line names file and key.
    """
    if _names_file(name):
        return _read(Path(name))
    if name not in device_names():
        raise InputError(
            f"device {name!r} is not known; there are {', '.join(sorted(device_names()))}; a "
            "profile of your own is a path that ends in .yaml"
        )
    return _read(_FOLDER / f"{name}.yaml")


def names_profile(name: str) -> bool:
    """Whether a name is that of a shipped profile, or a file's."""
    return _names_file(name) or name in device_names()


def _names_file(name: str) -> bool:
    return name.endswith(_ENDINGS) or "/" in name or "\\" in name


def _read(file: Path) -> Device:
    document = read_yaml(file, "a device profile", error=InputError)
    schema = document.pop("schema", None)
    if type(schema) is not int or schema != _SCHEMA:
        raise InputError(f"{file}: schema: is {schema!r}; allowed: {_SCHEMA}")
    if "name" in document:
        raise InputError(f"{file}: name: a profile is called after its file")
    try:
        return decode(Device, {**document, "name": file.stem})
    except DecodeError as error:
        raise InputError(f"{file}: {error}") from error

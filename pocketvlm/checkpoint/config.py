"""Configuration: config.json of a model directory, and the specification read from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pocketvlm.checkpoint.config_limits import check_sizes
from pocketvlm.errors import CheckpointError, UnsupportedError, join_problems
from pocketvlm.files.reader import locate
from pocketvlm.json_io import read_json
from pocketvlm.models.config_keys import find_unread
from pocketvlm.models.families.table import read_model_spec, supported_families
from pocketvlm.models.families.unsupported import advise
from pocketvlm.models.spec import ModelSpec
from pocketvlm.processor.foreign_code import plain_config, refuse_foreign_code

__all__ = ["nest_config", "parse_config", "read_config", "read_spec", "read_spec_and_ignored"]


def read_config(path: Path) -> dict[str, Any]:
    """Content of a checkpoint directory's config.json.

    Raises:
        CheckpointError: It is missing, not a JSON object, or asks for its own code.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: is not a directory; a model is a local directory")
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: no checkpoint here: config.json is missing")
    config = read_json(locate(path, file.name, error=CheckpointError), error=CheckpointError)
    check_sizes(config, str(file))
    refuse_foreign_code(path, advise(config, supported_families()) or _advise_stock(config))
    return config


def _advise_stock(config: Mapping[str, Any]) -> str:
    """What to do with the code of a model of which no converted repository is known."""
    if config.get("model_type") not in supported_families():
        return (
            f"no conversion of model_type {config.get('model_type')!r} to a supported class is "
            f"known; supported are {', '.join(supported_families())}"
        )
    return (
        f"transformers itself has a class for model_type {config['model_type']!r}: what that "
        "loads and saves needs no code"
    )


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The specification of a config.json, with the defaults of its class filled in.

    Raises:
        UnsupportedError: The family, or an option of it, is not supported: also a key that changes
            what is computed and that no field of the specification holds.
        CheckpointError: A value has a type that the family's class does not take.
    """
    return read_spec_and_ignored(config)[0]


def read_spec_and_ignored(config: Mapping[str, Any]) -> tuple[ModelSpec, tuple[str, ...]]:
    """As `read_spec`, and the paths of keys that the library's class does not know.

    Those change nothing in the library's model either.
    """
    if config.get("model_type") not in supported_families():
        return read_model_spec(config), ()  # refuses, and names what is supported
    parsed = parse_config(config)
    used: set[str] = set()
    spec = read_model_spec(parsed.to_dict(), used)
    unread: list[str] = []
    ignored: list[str] = []
    for path, value, is_known in _find_unread(parsed, used):
        if is_known:
            unread.append(f"{path} is {value!r:.60}")
        else:
            ignored.append(path)
    if unread:
        raise UnsupportedError(
            f"config.json: {join_problems(unread)}: this changes what the model computes, and is "
            "not supported"
        )
    return spec, tuple(ignored)


def nest_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same with a `text_config`, as its class reads a file that has the decoder's keys beside.

    Raises:
        CheckpointError: The library refuses a value.
    """
    if isinstance(config.get("text_config"), Mapping):
        return dict(config)
    nested: dict[str, Any] = parse_config(config).to_dict()
    return nested


def _find_unread(parsed: Any, used: set[str]) -> Iterator[tuple[str, Any, bool]]:
    try:
        defaults = _defaults(parsed)
    except Exception as error:  # as in `parse_config`
        first_line = " ".join(str(error).split())
        raise CheckpointError(f"config.json: cannot be understood: {first_line}") from error
    return find_unread(parsed.to_dict(), defaults, used)


def _defaults(parsed: Any) -> dict[str, Any]:
    """What a configuration of the same class, and of the same nested classes, holds by default."""
    defaults: dict[str, Any] = type(parsed)().to_dict()
    for key in type(parsed).sub_configs:
        own = getattr(parsed, key, None)
        if own is not None:
            defaults[key] = _defaults(own)
    return defaults


def parse_config(config: Mapping[str, Any]) -> Any:
    """The library's configuration object of a config.json.

    Raises:
        CheckpointError: The library refuses a value.
    """
    from transformers import AutoConfig

    plain, _ = plain_config(config)
    known = {key: value for key, value in plain.items() if key != "quantization_config"}
    try:
        return AutoConfig.for_model(**known)
    except Exception as error:  # its validators raise their own classes, which vary by version
        first_line = " ".join(str(error).split())
        raise CheckpointError(f"config.json: cannot be understood: {first_line}") from error

"""Configuration: config.json of a model directory, and the specification read from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketvlm.checkpoint.config_limits import check_sizes
from pocketvlm.errors import CheckpointError
from pocketvlm.files.reader import locate
from pocketvlm.json_io import read_json
from pocketvlm.models.families.table import read_model_spec, supported_families
from pocketvlm.models.spec import ModelSpec
from pocketvlm.processor.foreign_code import plain_config, refuse_foreign_code

__all__ = ["parse_config", "read_config", "read_spec"]


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
    refuse_foreign_code(path)
    return config


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The specification of a config.json, with the defaults of its class filled in.

    Raises:
        UnsupportedError: The family, or an option of it, is not supported.
        CheckpointError: A value has a type that the family's class does not take.
    """
    if config.get("model_type") not in supported_families():
        return read_model_spec(config)  # refuses, and names what is supported
    return read_model_spec(parse_config(config).to_dict())


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

"""`quantization_config` of a pack-quantized checkpoint: groups of layers that share settings.

A group lists its layers: `targets` are names, regular expressions after `re:`, or the class
`Linear`, and the more exact one decides. `ignore` names the layers that stay float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pocketvlm.errors import CheckpointError, UnsupportedError
from pocketvlm.models.patterns import compile_pattern, pattern_matches
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.formats.compressed_tensors import from_compressed_tensors
from pocketvlm.weights.formats.settings import WHOLE_ROW, AffineSettings, affine_settings

__all__ = ["CompressedTensorsLayout", "compressed_tensors_config"]

_FORMAT = "pack-quantized"
_LINEAR = "Linear"
_REGEX = "re:"
_EMPTY: tuple[object, ...] = (None, {}, [])
# What changes the meaning of a layer, or its inputs and outputs, beyond the codes of its weight.
_UNREAD_OF_ALL = ("kv_cache_scheme", "transform_config", "sparsity_config", "moe_sparsity_config")
_UNREAD_OF_GROUP = ("input_activations", "output_activations")
_UNREAD_OF_WEIGHTS = ("block_structure",)


def compressed_tensors_config(
    forms: Mapping[str, AffineWeight | None], *, quantizer: str
) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint.

    Args:
        forms: Every linear layer by name; `None` for one that stays float.
        quantizer: "name:version" of the tool that chose the codes.

    Returns:
        JSON values; most layers are in the first group.
    """
    settings = affine_settings({name: form for name, form in forms.items() if form is not None})
    targets: dict[AffineSettings, list[str]] = {}
    for name, found in settings.items():
        targets.setdefault(found, []).append(name)
    ordered = sorted(targets.items(), key=lambda item: -len(item[1]))
    return {
        "quant_method": "compressed-tensors",
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": names,
                "weights": _as_json(found),
                "input_activations": None,
                "output_activations": None,
            }
            for number, (found, names) in enumerate(ordered)
        },
        "ignore": [name for name in forms if name not in settings],
        "kv_cache_scheme": None,
        "meta": {"quantizer": [quantizer]},
    }


@dataclass(frozen=True, kw_only=True)
class CompressedTensorsLayout:
    """How the layers of a pack-quantized checkpoint are stored.

    Attributes:
        groups: Targets and settings of each group, in order.
    """

    groups: tuple[tuple[tuple[str, ...], AffineSettings], ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CompressedTensorsLayout:
        """Reads a `quantization_config`.

        Raises:
            CheckpointError: A field is missing or has no meaning.
            UnsupportedError: The variant of the layout is not known here.
        """
        sparsity = config.get("sparsity_config")
        if isinstance(sparsity, Mapping) and sparsity.get("format") == "dense":
            config = {
                **config,
                "sparsity_config": None,
            }  # how older releases say that there is none
        _refuse_unread(config, _UNREAD_OF_ALL, "quantization_config")
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise CheckpointError("quantization_config: config_groups names no group of layers")
        return cls(
            groups=tuple(
                _read_group(f"quantization_config.config_groups.{key}", group, config.get("format"))
                for key, group in groups.items()
            )
        )

    def holds(self, tensors: Sequence[str]) -> bool:
        """Whether a layer with these tensors is quantized."""
        return "weight_packed" in tensors

    def read(self, name: str, tensors: Mapping[str, Tensor]) -> AffineWeight:
        """The form of a layer; raises as `from_compressed_tensors` does."""
        return from_compressed_tensors(name, tensors, self._settings_of(name))

    def _settings_of(self, name: str) -> AffineSettings:
        for is_target in (_is_name, _is_pattern_of, _is_class):
            for targets, settings in self.groups:
                if any(is_target(target, name) for target in targets):
                    return settings
        raise CheckpointError(f"quantization_config: no group of config_groups targets {name}")


def _is_name(target: str, name: str) -> bool:
    return target == name


def _is_pattern_of(target: str, name: str) -> bool:
    return target.startswith(_REGEX) and pattern_matches(
        target.removeprefix(_REGEX), name, whole=False
    )


def _is_class(target: str, _: str) -> bool:
    return target == _LINEAR


def _read_group(
    where: str, group: object, common_format: object
) -> tuple[tuple[str, ...], AffineSettings]:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise CheckpointError(f"{where}: must be an object that has weights")
    stored = group.get("format") or common_format
    if stored != _FORMAT:
        raise UnsupportedError(f"{where}: format {stored!r} is not supported; supported: {_FORMAT}")
    _refuse_unread(group, _UNREAD_OF_GROUP, where)
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{where}: targets must be a list of texts")
    for target in targets:
        if target.startswith(_REGEX):
            try:
                compile_pattern(target.removeprefix(_REGEX))
            except ValueError as error:
                raise CheckpointError(f"{where}: target {target!r} {error}") from error
    return tuple(targets), _parse(f"{where}.weights", group["weights"])


def _parse(where: str, weights: Mapping[str, Any]) -> AffineSettings:
    _refuse_unread(weights, _UNREAD_OF_WEIGHTS, where)
    kind, strategy = weights.get("type", "int"), weights.get("strategy")
    if kind != "int" or strategy not in ("group", "channel"):
        raise UnsupportedError(
            f"{where}: type {kind!r} with strategy {strategy!r} is not supported; supported is "
            "'int' with 'group' or 'channel'"
        )
    try:
        return AffineSettings(
            bits=weights["num_bits"],
            group_size=WHOLE_ROW if strategy == "channel" else weights["group_size"],
            symmetric=weights.get("symmetric", True),
        )
    except KeyError as error:
        raise CheckpointError(f"{where}: {error.args[0]!r} is missing") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _refuse_unread(document: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key in keys:
        if document.get(key) not in _EMPTY:
            raise UnsupportedError(f"{where}: {key} is not read here, and changes what is computed")


def _as_json(settings: AffineSettings) -> dict[str, Any]:
    per_row = settings.group_size == WHOLE_ROW
    return {
        "num_bits": settings.bits,
        "type": "int",
        "symmetric": settings.symmetric,
        "strategy": "channel" if per_row else "group",
        "group_size": None if per_row else settings.group_size,
        "dynamic": False,
    }

"""`quantization_config` of a GPTQ checkpoint: one setting for most layers, rules for the rest.

`dynamic` maps regular expressions, matched at the start of a module's name, to what differs:
`+:pattern` overrides settings and `-:pattern` says that a layer is float. The first that matches
decides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from torch import Tensor

from pocketvlm.errors import CheckpointError, UnsupportedError
from pocketvlm.models.patterns import compile_pattern, pattern_matches
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.formats.gptq import from_gptq
from pocketvlm.weights.formats.settings import AffineSettings, affine_settings

__all__ = ["GptqLayout", "gptq_config"]

_FORMATS: dict[str, Literal[1, 2]] = {"gptq": 1, "gptq_v2": 2}


def gptq_config(
    forms: Mapping[str, AffineWeight | None],
    parts: Sequence[str],
    *,
    version: Literal[1, 2],
    head: str,
    quantizer: str,
) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint.

    A part of the model that is float, or different, as a whole costs one rule. The rule names the
    last piece of the part's module name alone, because other tools mount the same part elsewhere.
    transformers does not read rules, but lists of layers, which are written where one setting holds
    for all of them.

    Args:
        forms: Every linear layer by name; `None` for one that stays float.
        parts: Module names below which a single rule may speak for all layers.
        version: Of the layout.
        head: Name of the language-model head.
        quantizer: "name:version" of the tool that chose the codes.

    Returns:
        JSON values.
    """
    quantized = {name: form for name, form in forms.items() if form is not None}
    settings = affine_settings(quantized)
    base = Counter(settings.values()).most_common(1)[0][0]
    listed = {
        "block_name_to_quantize": _common_module(list(quantized)),
        "modules_in_block_to_quantize": [list(quantized)],
    }
    return {
        "quant_method": "gptq",
        **_as_json(base),
        "desc_act": False,
        "lm_head": head in quantized,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "pack_dtype": "int32",
        "dynamic": _rules({name: settings.get(name) for name in forms}, base, parts),
        **(listed if len(set(settings.values())) == 1 else {}),
        "meta": {"quantizer": [quantizer]},
    }


@dataclass(frozen=True, kw_only=True)
class GptqLayout:
    """How the layers of a GPTQ checkpoint are stored.

    Attributes:
        base: Settings of a layer that no rule speaks of.
        rules: Pattern and overrides, in order.
        version: 1 where zero points are stored minus one.
    """

    base: AffineSettings
    rules: tuple[tuple[str, Mapping[str, Any]], ...]
    version: Literal[1, 2]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GptqLayout:
        """Reads a `quantization_config`.

        Raises:
            CheckpointError: A field is missing or has no meaning.
            UnsupportedError: The variant of the layout is not known here.
        """
        stored = config.get("checkpoint_format", config.get("format", "gptq"))
        if stored not in _FORMATS:
            raise UnsupportedError(
                f"quantization_config: checkpoint_format {stored!r} is not supported; supported "
                f"are {', '.join(_FORMATS)}"
            )
        if config.get("pack_dtype", "int32") != "int32":
            raise UnsupportedError(
                f"quantization_config: pack_dtype {config['pack_dtype']!r} is not supported; "
                "supported is 'int32'"
            )
        dynamic = config.get("dynamic") or {}
        if not isinstance(dynamic, Mapping) or not all(
            isinstance(overrides, Mapping) for overrides in dynamic.values()
        ):
            raise CheckpointError("quantization_config: dynamic maps patterns to objects")
        rules = []
        for key, overrides in dynamic.items():
            # A layer that stays float is known by its tensors; its rule needs no reading.
            if not key.startswith("-:"):
                pattern = key.removeprefix("+:")
                try:
                    compile_pattern(pattern)
                except ValueError as error:
                    raise CheckpointError(
                        f"quantization_config: dynamic {key!r} {error}"
                    ) from error
                rules.append((pattern, overrides))
        return cls(base=_parse(config), rules=tuple(rules), version=_FORMATS[stored])

    def holds(self, tensors: Sequence[str]) -> bool:
        """Whether a layer with these tensors is quantized."""
        return "qweight" in tensors

    def read(self, name: str, tensors: Mapping[str, Tensor]) -> AffineWeight:
        """The form of a layer; raises as `from_gptq` does."""
        settings = self.base
        for pattern, overrides in self.rules:
            if pattern_matches(pattern, name, whole=False):
                settings = _parse({**_as_json(self.base), **overrides})
                break
        return from_gptq(name, tensors, settings, version=self.version)


def _parse(config: Mapping[str, Any]) -> AffineSettings:
    try:
        return AffineSettings(
            bits=config["bits"], group_size=config["group_size"], symmetric=config.get("sym", True)
        )
    except KeyError as error:
        raise CheckpointError(f"quantization_config: {error.args[0]!r} is missing") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"quantization_config: {error}") from error


def _common_module(names: Sequence[str]) -> str:
    """The innermost module that all layers are in."""
    paths = [name.split(".")[:-1] for name in names]
    shared = takewhile(lambda pieces: len(set(pieces)) == 1, zip(*paths, strict=False))
    return ".".join(pieces[0] for pieces in shared)


def _as_json(settings: AffineSettings) -> dict[str, Any]:
    return {
        "bits": settings.bits,
        "group_size": settings.group_size,
        "sym": settings.symmetric,
    }


def _rules(
    settings: Mapping[str, AffineSettings | None], base: AffineSettings, parts: Sequence[str]
) -> dict[str, dict[str, Any]]:
    rules: dict[str, dict[str, Any]] = {}
    left = dict(settings)
    for part in parts:
        inside = {name: value for name, value in left.items() if name.startswith(part + ".")}
        if len(set(inside.values())) == 1:
            value = next(iter(inside.values()))
            segment = re.escape(part.rpartition(".")[2])
            rules |= _rule(rf"(.*\.)?{segment}\..*", value, base)
            left = {name: value for name, value in left.items() if name not in inside}
    for name, value in left.items():
        rules |= _rule(re.escape(name) + "$", value, base)
    return rules


def _rule(
    pattern: str, settings: AffineSettings | None, base: AffineSettings
) -> dict[str, dict[str, Any]]:
    if settings is None:
        return {f"-:{pattern}": {}}
    if settings == base:
        return {}
    plain = _as_json(base)
    return {
        f"+:{pattern}": {
            key: value for key, value in _as_json(settings).items() if value != plain[key]
        }
    }

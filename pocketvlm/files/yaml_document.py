"""YAML documents that anybody may have written become plain values within bounds.

What comes out holds `None`, booleans, 64-bit whole numbers, finite numbers, text, lists and
mappings with text as keys, and nothing else: no dates, no sets, no objects, no cycles. Numbers are
those of YAML 1.2, so that `1e-3` is a number and `1:30` is not; `yes`, `no`, `on` and `off` are
booleans, as in YAML 1.1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pocketvlm.errors import PocketVLMError, RecipeError
from pocketvlm.files.reader import read_text

__all__ = ["parse_yaml", "plain_values", "read_yaml"]

_MAX_BYTES = 2**17
_MAX_VALUES = 20_000
_MAX_DEPTH = 24
_CORE = "tag:yaml.org,2002:"
_NUMBERS = {
    "int": r"[-+]?[0-9]+|0x[0-9a-fA-F]+",
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}


class _Loader(yaml.SafeLoader):
    """YAML's safe loader without dates, sets, binary data, merge keys and repeated keys."""

    def fetch_flow_collection_start(self, kind: Any) -> None:
        # The scanner looks at every open bracket again at every token.
        if self.flow_level > _MAX_DEPTH:
            raise yaml.scanner.ScannerError(None, None, "is nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(kind)

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "is not a mapping", node.start_mark)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != _CORE + "str":
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is not text", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, 16 if text.startswith("0x") else 10)

    def construct_number(self, node: yaml.ScalarNode) -> float:
        return float(self.construct_yaml_float(node))


# Tables of the class itself: those of `SafeLoader` are shared by every reader of YAML.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag in (_CORE + "null", _CORE + "bool")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(
        _CORE + _name, re.compile(f"^(?:{_pattern})$"), list("-+.0123456789")
    )
_Loader.yaml_constructors = {
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag in {_CORE + name for name in ("null", "bool", "str", "seq", "map")}
}
_Loader.add_constructor(_CORE + "int", _Loader.construct_whole_number)
_Loader.add_constructor(_CORE + "float", _Loader.construct_number)


def read_yaml(
    path: Path, what: str, *, error: type[PocketVLMError] = RecipeError
) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping.

    Args:
        path: The file.
        what: What it holds, for the message.
        error: What is raised.

    Raises:
        PocketVLMError: `error`: the file cannot be read, or is not such YAML; the message has the
            place.
    """
    text = read_text(path, error=error, max_bytes=_MAX_BYTES)
    document = parse_yaml(text, str(path), error=error)
    if not isinstance(document, dict):
        raise error(f"{path}: {what} is a mapping, not {_kind(document)}")
    return document


def parse_yaml(text: str, where: str, *, error: type[PocketVLMError] = RecipeError) -> Any:
    """Parses one YAML document.

    Args:
        text: The document.
        where: Where it comes from, for the message.
        error: What is raised.

    Raises:
        PocketVLMError: `error`: it is not YAML, holds what a document cannot hold, or is too large.
    """
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506  (a safe loader, made safer)
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        words = ", ".join(filter(None, (fault.context, fault.problem)))
        raise error(f"{where}: is not valid YAML: {words}{place}") from fault
    except yaml.YAMLError as fault:  # a character that YAML does not allow
        raise error(f"{where}: is not valid YAML: {' '.join(str(fault).split())}") from fault
    except RecursionError as fault:
        raise error(f"{where}: is nested too deeply") from fault
    except (ValueError, KeyError) as fault:  # a number of too many digits, `!!int x`, `!!bool x`
        raise error(f"{where}: is not valid YAML: {fault}") from fault
    return plain_values(value, where, error=error)


def plain_values(value: Any, where: str, *, error: type[PocketVLMError] = RecipeError) -> Any:
    """A copy that shares nothing: what aliases repeat is counted each time, a cycle has an end.

    Args:
        value: What a parser returned, or a caller wrote down.
        where: Where it comes from, for the message.
        error: What is raised.

    Raises:
        PocketVLMError: `error`: something in it is none of the values that a document may hold.
    """
    return _Copy(where, error).of(value, "", 0)


class _Copy:
    def __init__(self, where: str, error: type[PocketVLMError]) -> None:
        self._where, self._error = where, error
        self._values = 0

    def of(self, value: Any, path: str, depth: int) -> Any:
        self._values += 1
        if self._values > _MAX_VALUES:
            raise self._error(f"{self._where}: holds more than {_MAX_VALUES:,} values")
        if depth > _MAX_DEPTH:
            raise self._error(f"{self._where}: is nested more than {_MAX_DEPTH} levels deep")
        if isinstance(value, Mapping):
            texts = {str(key): item for key, item in value.items()}
            return {key: self.of(item, f"{path}.{key}", depth + 1) for key, item in texts.items()}
        if isinstance(value, list | tuple):
            return [self.of(item, f"{path}.{i}", depth + 1) for i, item in enumerate(value)]
        place = f"{self._where}: {path.removeprefix('.') or 'the value'}"
        if isinstance(value, float) and not math.isfinite(value):
            raise self._error(f"{place}: must be a finite number, not {value}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise self._error(f"{place}: must fit into 64 bits")
        if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            raise self._error(f"{place}: is not text: half of a surrogate pair")
        if value is not None and not isinstance(value, bool | int | float | str):
            raise self._error(f"{place}: is {_kind(value)}, which a document cannot hold")
        return value


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "empty", bool: "a boolean"}
    return names.get(type(value), f"a {type(value).__name__}")

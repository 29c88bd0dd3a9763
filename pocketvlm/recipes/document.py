"""Recipe documents: anybody's YAML becomes plain values within bounds, and `--set` changes them.

What comes out holds `None`, booleans, 64-bit whole numbers, finite numbers, text, lists and
mappings with text as keys, and nothing else: no dates, no sets, no objects, no cycles. Numbers are
those of YAML 1.2, so that `1e-3` is a number and `1:30` is not; `yes`, `no`, `on` and `off` are
booleans, as in YAML 1.1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pocketvlm.errors import RecipeError
from pocketvlm.files.reader import read_text

__all__ = ["apply_overrides", "parse_yaml", "plain_values", "read_document"]

_MAX_BYTES = 2**17
_MAX_VALUES = 20_000
_MAX_DEPTH = 24
_LONGEST_INDEX = 6
_SHOWN = 60
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


def read_document(path: Path) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping.

    Raises:
        RecipeError: The file cannot be read, or is not such YAML; the message has the place.
    """
    text = read_text(path, error=RecipeError, max_bytes=_MAX_BYTES)
    document = parse_yaml(text, str(path))
    if not isinstance(document, dict):
        raise RecipeError(f"{path}: a recipe is a mapping, not {_kind(document)}")
    return document


def parse_yaml(text: str, where: str) -> Any:
    """Parses one YAML document.

    Args:
        text: The document.
        where: Where it comes from, for the message.

    Raises:
        RecipeError: It is not YAML, holds what a recipe cannot hold, or is too large.
    """
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506  (a safe loader, made safer)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        words = ", ".join(filter(None, (error.context, error.problem)))
        raise RecipeError(f"{where}: is not valid YAML: {words}{place}") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise RecipeError(f"{where}: is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise RecipeError(f"{where}: is nested too deeply") from error
    except (ValueError, KeyError) as error:  # a number of too many digits, `!!int x`, `!!bool x`
        raise RecipeError(f"{where}: is not valid YAML: {error}") from error
    return plain_values(value, where)


def plain_values(value: Any, where: str) -> Any:
    """A copy that shares nothing: what aliases repeat is counted each time, a cycle has an end.

    Args:
        value: What a parser returned, or a caller wrote down.
        where: Where it comes from, for the message.

    Raises:
        RecipeError: Something in it is none of the values that a recipe may hold.
    """
    return _Copy(where).of(value, "", 0)


def apply_overrides(document: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Applies `a.b=c` settings to a recipe document, of which a changed copy is returned.

    Raises:
        RecipeError: A setting has no `=`, its path leads nowhere, or its value is not YAML.
    """
    changed: dict[str, Any] = plain_values(document, "recipe")
    for setting in overrides:
        path, separator, text = setting.partition("=")
        if not separator:
            raise RecipeError(f"--set {_shown(setting)}: expected a.b=c, such as stages.0.keep=0.5")
        *parents, last = path.split(".")
        if not all((*parents, last)):
            raise RecipeError(f"--set {_shown(setting)}: {_shown(path)} has an empty step")
        value = parse_yaml(text, f"--set {_shown(setting)}")
        place: Any = changed
        for step in parents:
            place = _descend(place, step, setting)
        if isinstance(place, list):
            place[_index(place, last, setting)] = value
        elif isinstance(place, dict):
            place[last] = value
        else:
            raise RecipeError(f"--set {_shown(setting)}: {'.'.join(parents)} holds no settings")
    return changed


class _Copy:
    def __init__(self, where: str) -> None:
        self._where = where
        self._values = 0

    def of(self, value: Any, path: str, depth: int) -> Any:
        self._values += 1
        if self._values > _MAX_VALUES:
            raise RecipeError(f"{self._where}: holds more than {_MAX_VALUES:,} values")
        if depth > _MAX_DEPTH:
            raise RecipeError(f"{self._where}: is nested more than {_MAX_DEPTH} levels deep")
        if isinstance(value, Mapping):
            texts = {str(key): item for key, item in value.items()}
            return {key: self.of(item, f"{path}.{key}", depth + 1) for key, item in texts.items()}
        if isinstance(value, list | tuple):
            return [self.of(item, f"{path}.{i}", depth + 1) for i, item in enumerate(value)]
        place = f"{self._where}: {path.removeprefix('.') or 'the value'}"
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{place}: must be a finite number, not {value}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise RecipeError(f"{place}: must fit into 64 bits")
        if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            raise RecipeError(f"{place}: is not text: half of a surrogate pair")
        if value is not None and not isinstance(value, bool | int | float | str):
            raise RecipeError(f"{place}: is {_kind(value)}, which a recipe cannot hold")
        return value


def _descend(place: Any, step: str, setting: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, step, setting)]
    if isinstance(place, dict):
        return place.setdefault(step, {})
    raise RecipeError(f"--set {_shown(setting)}: {_shown(step)} leads nowhere")


def _index(place: list[Any], step: str, setting: str) -> int:
    if not step.isdecimal() or len(step) > _LONGEST_INDEX or int(step) >= len(place):
        raise RecipeError(
            f"--set {_shown(setting)}: {_shown(step)} is not an index below {len(place)}"
        )
    return int(step)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "empty", bool: "a boolean"}
    return names.get(type(value), f"a {type(value).__name__}")

"""Dataclasses from JSON values and back; later code never meets a value of an unexpected type.

A field is the key of its own name, unless its `metadata` says otherwise: `keyed` names another key,
`WHOLE` is the object as it stands, `REST` are the keys that no other field has, and `OPTIONAL` is
left out of the document where it is `None`.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["OPTIONAL", "REST", "WHOLE", "DecodeError", "decode", "encode", "json_kind", "keyed"]

OPTIONAL: Mapping[str, str] = {"json": "optional"}
REST: Mapping[str, str] = {"json": "rest"}
WHOLE: Mapping[str, str] = {"json": "whole"}

_T = TypeVar("_T")
_SHOWN = 60


class DecodeError(ValueError):
    """A value is not what a dataclass declares; the message has its path and what is allowed."""


def keyed(key: str) -> Mapping[str, str]:
    """Metadata of a field whose key in the document cannot be the name of a field."""
    return {"key": key}


def decode(kind: type[_T], value: Any, path: str = "", *, tolerant: bool = False) -> _T:
    """Builds a dataclass, or any type that its fields are annotated with, from JSON values.

    The annotation decides: `bool` is not a number, a whole number is accepted as a `float`, a list
    becomes a tuple, unknown keys and numbers that are not finite are refused. Annotations may be
    plain types, dataclasses, `Literal`, unions, `tuple[X, ...]`, `tuple[X, Y]`, `list[X]`,
    `Mapping[str, X]`, `dict[str, X]` and `Any`.

    Args:
        kind: The type.
        value: What `json.loads` returned.
        path: Where the value is in the document, for the message.
        tolerant: Whether unknown keys are skipped, and `null` or an empty object counts as missing.

    Raises:
        DecodeError: The value does not fit, or the dataclass itself refuses it.
    """
    result: _T = _Decoder(tolerant=tolerant).decode(kind, value, path)
    return result


def encode(value: Any) -> Any:
    """The JSON values that `decode` builds this value from."""
    if is_dataclass(value) and not isinstance(value, type):
        return _encode_fields(value)
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def _encode_fields(value: Any) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for item in fields(value):
        content, role = encode(getattr(value, item.name)), item.metadata.get("json")
        if role == "whole":
            return dict(content)
        if role == "rest":
            document |= content
        elif role != "optional" or content is not None:
            document[_key(item)] = content
    return document


@dataclass(frozen=True, kw_only=True)
class _Decoder:
    tolerant: bool

    def decode(self, kind: Any, value: Any, path: str) -> Any:
        origin, arguments = get_origin(kind), get_args(kind)
        if kind is Any:
            return value
        if is_dataclass(kind) and isinstance(kind, type):
            return self._dataclass(kind, value, path)
        if origin is Literal:
            # `True == 1`, and a list has no hash: compare types as well.
            if not any(type(value) is type(known) and value == known for known in arguments):
                allowed = ", ".join(repr(known) for known in arguments)
                raise DecodeError(f"{_place(path)}is {_shown(value)}; allowed: {allowed}")
            return value
        if origin in (Union, types.UnionType):
            return self._union(arguments, value, path)
        if origin in (tuple, list):
            return self._list(kind, value, path)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            if not isinstance(value, Mapping):
                raise DecodeError(f"{_place(path)}must be an object, not {_shown(value)}")
            return {
                key: self.decode(arguments[1], item, _join(path, key))
                for key, item in value.items()
                if not self._is_missing(item, arguments[1])
            }
        return _decode_plain(kind, value, path)

    def _is_missing(self, item: Any, kind: Any) -> bool:
        """Whether an item of a list or an object is as good as none."""
        return self.tolerant and item is None and kind is not Any

    def _list(self, kind: Any, value: Any, path: str) -> Any:
        origin, kinds = get_origin(kind), get_args(kind)
        if not isinstance(value, list | tuple):
            raise DecodeError(f"{_place(path)}must be a list, not {_shown(value)}")
        if origin is tuple and kinds[-1] is not Ellipsis:
            if len(value) != len(kinds):
                raise DecodeError(f"{_place(path)}must have {len(kinds)} items")
        else:
            kinds = (kinds[0],) * len(value)
        items = [
            self.decode(k, item, _join(path, index))
            for index, (k, item) in enumerate(zip(kinds, value, strict=True))
            if not self._is_missing(item, k)
        ]
        return tuple(items) if origin is tuple else items

    def _dataclass(self, kind: type[Any], value: Any, path: str) -> Any:
        if not isinstance(value, Mapping):
            raise DecodeError(f"{_place(path)}must be an object, not {_shown(value)}")
        hints, content = get_type_hints(kind), {}
        named = {_key(item): item for item in fields(kind) if item.init and not _is_open(item)}
        rest = {key: item for key, item in value.items() if key not in named}
        collecting = next(filter(_is_open, fields(kind)), None)
        if collecting is not None:
            found = value if collecting.metadata == WHOLE else rest
            content[collecting.name] = self.decode(hints[collecting.name], found, path)
        elif rest and not self.tolerant:
            where = _place(_join(path, min(map(str, rest))))
            raise DecodeError(f"{where}unknown key; allowed: {', '.join(named)}")
        for key, item in named.items():
            is_needed = item.default is MISSING and item.default_factory is MISSING
            if key in value and (is_needed or not self.tolerant or value[key] not in (None, {})):
                content[item.name] = self.decode(hints[item.name], value[key], _join(path, key))
            elif is_needed:
                raise DecodeError(f"{_place(_join(path, key))}is missing")
        try:
            return kind(**content)
        except DecodeError:
            raise
        except ValueError as fault:  # the dataclass checks its own ranges
            raise DecodeError(f"{_place(path)}{fault}") from fault

    def _union(self, kinds: tuple[Any, ...], value: Any, path: str) -> Any:
        tagged = {tag: kind for kind in kinds if (tag := _tag(kind)) is not None}
        if tagged and isinstance(value, Mapping) and "kind" in value:
            if value["kind"] not in tagged:
                found, allowed = _shown(value["kind"]), ", ".join(tagged)
                raise DecodeError(f"{_join(path, 'kind')}: is {found}; allowed: {allowed}")
            return self.decode(tagged[value["kind"]], value, path)
        problems: list[DecodeError] = []
        for kind in kinds:
            try:
                return self.decode(kind, value, path)
            except DecodeError as fault:
                problems.append(fault)
        # The error deepest in the value is about the alternative that was intended.
        raise max(problems, key=lambda fault: str(fault).partition(":")[0].count("."))


def _tag(kind: Any) -> str | None:
    """The `kind` that tells a dataclass from the others of a union; `None` where it has none."""
    if not is_dataclass(kind):
        return None
    return next((str(item.default) for item in fields(kind) if item.name == "kind"), None)


def _decode_plain(kind: Any, value: Any, path: str) -> Any:
    if kind is None or kind is type(None):
        if value is not None:
            raise DecodeError(f"{_place(path)}must be null, not {_shown(value)}")
        return None
    if kind is float and type(value) in (int, float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise DecodeError(f"{_place(path)}must be a finite number")
        return number
    if kind not in (bool, int, str, float):
        raise TypeError(f"{kind!r} cannot be read from JSON")  # an error in the dataclass
    if type(value) is not kind:
        words = {bool: "true or false", int: "a whole number", str: "text", float: "a number"}
        raise DecodeError(f"{_place(path)}must be {words[kind]}, not {_shown(value)}")
    return value


def _key(item: Field[Any]) -> str:
    key: str = item.metadata.get("key", item.name)
    return key


def _is_open(item: Field[Any]) -> bool:
    """Whether a field collects keys instead of being one."""
    return item.metadata in (WHOLE, REST)


def _join(path: str, step: object) -> str:
    return f"{path}.{step}" if path else str(step)


def _place(path: str) -> str:
    return f"{path}: " if path else ""


def _shown(value: Any) -> str:
    text = (
        json.dumps(value, ensure_ascii=True, default=repr)
        if not isinstance(value, dict | list)
        else f"a JSON {json_kind(value)}"
    )
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def json_kind(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")

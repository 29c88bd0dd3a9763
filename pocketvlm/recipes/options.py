"""Every option that a recipe may name, written from the dataclasses that hold them.

`python -m pocketvlm.recipes.options > docs/options.md` rewrites the page; a test compares them.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from pocketvlm.recipes.stages import STAGES, TARGETS

__all__ = ["option_meanings", "render_options"]

_HEAD = """# Options

Every stage and target of a [recipe](recipes.md), with all of its options. This page is written by
`python -m pocketvlm.recipes.options`.
"""
_WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
_ENTRY = re.compile(r"^(?P<name>\w+): (?P<text>.*)$")


def render_options() -> str:
    """The page, in Markdown."""
    parts = [_HEAD]
    seen: set[type[Any]] = set()
    for title, kinds in (("Stages", STAGES), ("Targets", TARGETS)):
        parts.append(f"\n## {title}\n")
        parts += [_section(kind, f"`{kind.method}`", seen) for kind in kinds]
    return "".join(parts)


def option_meanings(kind: type[Any]) -> dict[str, str]:
    """What each option means, by its name: the `Attributes` of the class and of its bases."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        found |= dict(_attributes(inspect.cleandoc(owner.__dict__.get("__doc__") or "")))
    return found


def _section(kind: type[Any], title: str, seen: set[type[Any]]) -> str:
    """One class, and below it the classes of its options that no section has described yet."""
    summary = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    rows, nested = [], []
    hints, meanings = get_type_hints(kind), option_meanings(kind)
    for item in _own_first(kind):
        if item.name in ("method", "kind"):
            continue
        meaning = meanings.get(item.name, "")
        rows.append(f"| `{item.name}` | {_type(hints[item.name])} | {_default(item)} | {meaning} |")
        nested += list(_classes(hints[item.name]))
    table = ["| Option | Type | Default | Meaning |", "| --- | --- | --- | --- |", *rows]
    parts = [f"\n### {title}\n\n{summary}\n"]
    if rows:
        parts.append("\n" + "\n".join(table) + "\n")
    for owned in nested:
        if owned not in seen:
            seen.add(owned)
            parts.append(_section(owned, _name(owned), seen))
    return "".join(parts)


def _attributes(doc: str) -> Iterator[tuple[str, str]]:
    """Entries of a docstring's `Attributes` section, each on one line."""
    _, _, section = doc.partition("Attributes:\n")
    name, text = "", ""
    for line in textwrap.dedent(section).splitlines():
        if section and line and not line.startswith(" "):
            if name:
                yield name, text
            entry = _ENTRY.match(line)
            if entry is None:  # the next section
                return
            name, text = entry["name"], entry["text"]
        elif line.strip():
            text = f"{text} {line.strip()}"
    if name:
        yield name, text


def _type(hint: Any) -> str:
    """A type in words; a vertical line ends a cell of a table, so "or" stands for it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(item) for item in arguments)
    if origin in (tuple, list):
        return f"list of {_type(arguments[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"{_type(arguments[1])} by name"
    if hint is type(None):
        return "null"
    return _name(hint) if is_dataclass(hint) else _WORDS.get(hint, f"`{hint}`")


def _own_first(kind: type[Any]) -> list[Field[Any]]:
    """The options that a class declares itself, and after them those that it shares with others."""
    by_name = {item.name: item for item in fields(kind)}
    own = [name for name in inspect.get_annotations(kind) if name in by_name]
    return [by_name[name] for name in dict.fromkeys((*own, *by_name))]


def _name(kind: Any) -> str:
    tag = next((item for item in fields(kind) if item.name == "kind"), None)
    return f"`{{kind: {tag.default}}}`" if tag is not None else f"`{kind.__name__}`"


def _default(item: Field[Any]) -> str:
    if item.default_factory is not MISSING:
        value = item.default_factory()
    elif item.default is not MISSING:
        value = item.default
    else:
        return "required"
    text = yaml.safe_dump(_plain(value), default_flow_style=True, sort_keys=False, width=1000)
    return f"`{text.removesuffix(chr(10)).removesuffix('...').strip()}`"


def _plain(value: Any) -> Any:
    """A default as a recipe spells it; what is not set is left out."""
    if is_dataclass(value) and not isinstance(value, type):
        return {key: item for key, item in asdict(value).items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _classes(hint: Any) -> Iterator[type[Any]]:
    if is_dataclass(hint) and isinstance(hint, type):
        yield hint
    for item in get_args(hint):
        yield from _classes(item)


if __name__ == "__main__":
    sys.stdout.write(render_options())

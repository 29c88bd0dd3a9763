"""Documents changed by structure: types, ranges, names and nesting, mostly still documents.

What a parser refuses shows little of the code after it.
"""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from tests.fuzzing.damage import TEXTS, mutate_text

__all__ = ["mutate_document", "mutate_json", "mutate_lines", "mutate_value"]

NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 8, 16, 255, 256, 65_535, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53 + 1),
    *(2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**12, 10**18, 10**30, -(10**30)),
    *(0.0, -0.0, 0.5, 1.5, -1.5, 1e-300, 5e-324, 1e300, 1.8e308, -1e300),
    *(float("inf"), float("-inf"), float("nan")),
)
VALUES = (*NUMBERS, *TEXTS, True, False, None, [], {}, [[]], [None], {"": None}, [0] * 5, ["a", 1])


def mutate_value(rng: random.Random, value: Any) -> Any:
    """Another value in place of one: of its own type as often as of another."""
    kind = rng.random()
    if kind < 0.45:
        return _neighbour(rng, value)
    if kind < 0.9:
        return copy.deepcopy(rng.choice(VALUES))
    if kind < 0.95:
        return [copy.deepcopy(value)] if rng.random() < 0.5 else {"a": copy.deepcopy(value)}
    return _nested(rng)


def _neighbour(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bool):
        return rng.choice((not value, int(value), str(value), None))
    if isinstance(value, int):
        return rng.choice(
            (value + 1, value - 1, -value, value * 2, float(value), str(value), 0, *NUMBERS)
        )
    if isinstance(value, float):
        return rng.choice((-value, value * 1e6, str(value), *NUMBERS))
    if isinstance(value, str):
        place = rng.randrange(len(value) + 1)
        return rng.choice(
            (
                value[:place],
                value + value,
                value.upper(),
                value[:place] + rng.choice(TEXTS) + value[place:],
            )
        )
    if isinstance(value, list) and value:
        place = rng.randrange(len(value))
        return rng.choice(
            (
                value[:place],
                value[place:] + value[:place],
                value * rng.choice((2, 40)),
                [*value, copy.deepcopy(rng.choice(VALUES))],
                dict(enumerate(value)),
            )
        )
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        return rng.choice(
            (
                {k: v for k, v in value.items() if k != key},
                {**value, rng.choice(TEXTS): copy.deepcopy(value[key])},
                list(value.values()),
                list(value),
            )
        )
    return copy.deepcopy(rng.choice(VALUES))


def _nested(rng: random.Random) -> Any:
    value: Any = 0
    for _ in range(rng.choice((5, 50, 200))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def mutate_document(rng: random.Random, document: Any, times: int | None = None) -> Any:
    """A document with a few of its places changed."""
    document = copy.deepcopy(document)
    for _ in range(times or rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(document))
        if not places:
            return mutate_value(rng, document)
        owner, key = rng.choice(places)
        action = rng.random()
        if action < 0.2:
            del owner[key]
        elif action < 0.28 and isinstance(owner, dict) and isinstance(key, str):
            owner[_neighbour(rng, key) if rng.random() < 0.5 else rng.choice(TEXTS)] = owner.pop(
                key
            )
        elif action < 0.36:
            other, other_key = rng.choice(places)
            owner[key] = copy.deepcopy(other[other_key])
        else:
            owner[key] = mutate_value(rng, owner[key])
    return document


def _places(document: Any) -> Any:
    items = (
        list(document.items())
        if isinstance(document, dict)
        else list(enumerate(document))
        if isinstance(document, list)
        else []
    )
    # Of a long table, such as a vocabulary, a few rows stand for all.
    for key, value in items if len(items) < 200 else (*items[:20], *items[-20:]):
        yield document, key
        yield from _places(value)


def mutate_json(rng: random.Random, content: bytes) -> bytes:
    """A JSON file, mostly still JSON."""
    if rng.random() < 0.12:
        return mutate_text(rng, content)
    document = mutate_document(rng, json.loads(content))
    try:
        text = json.dumps(document, ensure_ascii=rng.random() < 0.5)
    except (ValueError, TypeError):  # a key that is not a string
        text = json.dumps(str(document))
    dress = rng.random()
    if dress < 0.02:
        return text.encode("utf-16", "surrogatepass")
    if dress < 0.04:
        return b"\xef\xbb\xbf" + text.encode("utf-8", "surrogatepass")
    if dress < 0.06:
        return (text + rng.choice(("}", "\0", ",", text))).encode("utf-8", "surrogatepass")
    return text.encode("utf-8", "surrogatepass")


def mutate_lines(rng: random.Random, content: bytes) -> bytes:
    """A file of one JSON document per line."""
    lines = content.splitlines()
    for _ in range(rng.choice((1, 1, 2))):
        place = rng.randrange(len(lines))
        action = rng.random()
        if action < 0.75:
            lines[place] = mutate_json(rng, lines[place]) if _is_json(lines[place]) else b"{"
        elif action < 0.85:
            lines.insert(
                place, rng.choice((b"", b"\x00", b"null", b"[]", b"{}", b"\xff", b"\xe2\x80\xa8"))
            )
        else:
            lines[place] = lines[place] * 2
    return rng.choice((b"\n", b"\n", b"\n", b"\r\n", b"\r", b"\x0b", b"\n\n")).join(lines)


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True

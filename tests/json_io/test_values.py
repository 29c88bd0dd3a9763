"""Fields that are more than the key of their own name, and the way back into a document."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketvlm.json_io import OPTIONAL, REST, WHOLE, DecodeError, decode, encode, keyed


@dataclass(frozen=True, kw_only=True)
class Latency:
    failed: str | None = field(default=None, metadata=OPTIONAL)
    figures: Mapping[str, float] = field(default_factory=dict, metadata=REST)


@dataclass(frozen=True, kw_only=True)
class Machine:
    cores: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict, metadata=WHOLE)


@dataclass(frozen=True, kw_only=True)
class Scores:
    plain: float | None = field(default=None, metadata=keyed("float"))
    latency: Mapping[str, Latency] = field(default_factory=dict)
    machine: Machine = field(default_factory=Machine)
    notes: tuple[str, ...] = ()
    best: Latency | None = None


DOCUMENT = {
    "float": 0.5,
    "latency": {"onnx": {"a_ms": 1.0, "b_ms": 2.0}, "coreml": {"failed": "no Mac"}},
    "machine": {"os": "Linux", "cores": 2, "governor": None},
    "notes": ["a"],
    "best": None,
}


def test_a_document_becomes_the_value_and_the_value_the_document() -> None:
    value = decode(Scores, DOCUMENT)
    assert value.plain == 0.5
    assert value.latency["onnx"] == Latency(figures={"a_ms": 1.0, "b_ms": 2.0})
    assert value.latency["coreml"].failed == "no Mac"
    assert value.machine == Machine(cores=2, facts=DOCUMENT["machine"])
    assert encode(value) == DOCUMENT
    assert list(encode(value)["machine"]) == ["os", "cores", "governor"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"float": "x"}, 'float: must be a number, not "x"'),
        ({"plain": 1.0}, "plain: unknown key; allowed: float, latency"),
        ({"latency": {"onnx": {"a_ms": "x"}}}, "latency.onnx.a_ms: must be a number"),
        ({"latency": {"onnx": {"failed": 3}}}, "latency.onnx.failed: must be"),
        ({"machine": {"cores": "two"}}, "machine.cores: must be a whole number"),
        ({"machine": 3}, "machine: must be an object, not 3"),
        ({"notes": None}, "notes: must be a list, not null"),
    ],
)
def test_a_fault_has_the_place_that_the_document_gives_it(
    change: dict[str, Any], line: str
) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(Scores, {**DOCUMENT, **change})
    assert line in str(caught.value)


def test_tolerance_is_for_what_is_missing_and_for_what_is_new() -> None:
    odd = {
        "float": None,
        "latency": {"onnx": {"a_ms": None}, "coreml": None},
        "machine": {},
        "notes": ["a", None],
        "best": {},
        "later": 3,
    }
    assert decode(Scores, odd, tolerant=True) == Scores(latency={"onnx": Latency()}, notes=("a",))
    with pytest.raises(DecodeError, match=r"notes\.0: must be text, not 3"):
        decode(Scores, {"notes": [3]}, tolerant=True)


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text("ab"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["float", "latency", "best", "failed", "a"]), inner)
    ),
    max_leaves=8,
)


@given(_JSON, st.booleans())
def test_what_is_decoded_at_all_comes_back_equal(document: Any, tolerant: bool) -> None:
    with suppress(DecodeError):
        value = decode(Scores, document, tolerant=tolerant)
        assert decode(Scores, encode(value)) == value

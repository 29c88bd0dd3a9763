"""JSON: any bytes end in a document or one line, and any document in a dataclass or one line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketvlm.errors import BundleError, RecipeError
from pocketvlm.json_io import DecodeError, decode, parse_json, read_json, write_json

_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abc"), inner),
    max_leaves=12,
)


@dataclass(frozen=True, kw_only=True)
class Part:
    kind: Literal["tower", 1]
    width: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be positive, not {self.width}")


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str
    parts: tuple[Part, ...] = ()
    size: tuple[int, int] | None = None
    names: Mapping[str, bool | str] | None = None
    extra: Any = None


_MODEL = {
    "name": "m",
    "parts": [{"kind": "tower", "width": 3}, {"kind": 1, "width": 4, "scale": 2}],
    "size": [2, 3],
    "names": {"a": True, "b": "text"},
}


def test_a_document_becomes_the_dataclass() -> None:
    assert decode(Model, _MODEL) == Model(
        name="m",
        parts=(Part(kind="tower", width=3), Part(kind=1, width=4, scale=2.0)),
        size=(2, 3),
        names={"a": True, "b": "text"},
    )


def test_what_is_written_is_decoded_to_an_equal_value(tmp_path: Path) -> None:
    model = decode(Model, _MODEL)
    write_json(tmp_path / "m.json", asdict(model))
    assert decode(Model, read_json(tmp_path / "m.json")) == model


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"name": 3}, "name: must be text, not 3"),
        ({"name": None}, "name: must be text, not null"),
        ({"parts": {}}, "parts: must be a list, not a JSON object"),
        ({"parts": [{"kind": "tower"}]}, "parts.0.width: is missing"),
        ({"parts": [{"kind": True, "width": 1}]}, "parts.0.kind: is true; allowed: 'tower', 1"),
        ({"parts": [{"kind": [], "width": 1}]}, "parts.0.kind: is a JSON array; allowed"),
        (
            {"parts": [{"kind": 1, "width": True}]},
            "parts.0.width: must be a whole number, not true",
        ),
        ({"parts": [{"kind": 1, "width": 0}]}, "parts.0: width must be positive, not 0"),
        ({"parts": [{"kind": 1, "width": 1, "scale": math.inf}]}, "scale: must be a finite number"),
        ({"parts": [{"kind": 1, "width": 1, "scale": 10**400}]}, "scale: must be a finite number"),
        ({"parts": [{"kind": 1, "width": 1, "depth": 2}]}, "parts.0.depth: unknown key; allowed"),
        ({"size": [1]}, "size: must have 2 items"),
        ({"size": [1, "x"]}, 'size.1: must be a whole number, not "x"'),
        ({"names": {"a": 2}}, "names.a: must be"),
    ],
)
def test_what_does_not_fit_is_named_by_its_path(change: dict[str, Any], line: str) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(Model, {**_MODEL, **change})
    assert line in str(caught.value)


def test_the_value_in_the_message_is_cut() -> None:
    with pytest.raises(DecodeError) as caught:
        decode(Model, {"name": 10**500})
    assert len(str(caught.value)) < 100


@given(_JSON)
def test_any_document_ends_in_a_model_or_in_a_decode_error(document: Any) -> None:
    with suppress(DecodeError):
        assert isinstance(decode(Model, document), Model)


@given(st.binary())
def test_any_bytes_end_in_a_document_or_in_one_line(content: bytes) -> None:
    with suppress(RecipeError):
        parse_json(content, "a.json", error=RecipeError)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value (line 1, column 1)"),
        ('{"a": 1,}', "column"),
        ("[" * 100_000, "it is nested too deeply"),
        ("1" * 5000, "digits"),
        (r'"\ud800"', "half of a surrogate pair"),
        (r'{"a": {"\udfff": 1}}', "half of a surrogate pair"),
        (b'"\xff"', "it is not UTF-8: byte 1"),
    ],
)
def test_what_is_not_json_is_refused_with_its_place(text: str | bytes, why: str) -> None:
    with pytest.raises(BundleError) as caught:
        parse_json(text, "a.json")
    assert str(caught.value).startswith("a.json: ")
    assert why in str(caught.value)


def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert parse_json(r'"\ud83d\ude00"', "a.json") == "\N{GRINNING FACE}"


def test_only_an_object_is_a_document(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for text, kind in (("[]", "array"), ("true", "boolean"), ("null", "null"), ("1", "number")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(BundleError, match=f"holds a JSON {kind}, not an object"):
            read_json(file)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), _JSON))
def test_a_document_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]
) -> None:
    file = tmp_path_factory.mktemp("json") / "a.json"
    write_json(file, document)
    assert read_json(file) == document


def test_what_steers_a_terminal_is_written_as_an_escape(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": "\x9b2J \u202e end"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "\x9b" not in text
    assert "\u202e" not in text
    assert json.loads(text) == {"a": "\x9b2J \u202e end"}


def test_a_number_that_json_lacks_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": math.nan})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "{}"

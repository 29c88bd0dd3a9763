"""A folder of pictures and conversations, written by people or other tools.

`data.jsonl` has one row per line, `data.json` a list of rows. The types of a row are checked first:
an error is one line that names file and row.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pocketvlm.calibration.data.sample import Sample
from pocketvlm.errors import CalibrationError
from pocketvlm.files.reader import locate, read_text
from pocketvlm.json_io import parse_json
from pocketvlm.prompt.messages import PICTURE, ROLES, Part, Role, Turn, place_pictures

__all__ = ["FolderContent", "read_folder"]

_LINES, _LIST = "data.jsonl", "data.json"
_SHOWN = 60
_LONGEST_NAME = 1024
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", re.IGNORECASE)
_KEYS = ("image", "images", "question", "answer", "messages", "conversations", "kind")
_SPEAKERS: Mapping[str, Role] = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
}
_SHAPES = (
    'a row is {"image": "a.png", "question": "...", "answer": "..."}, or has "messages" (role, '
    'content) or "conversations" (from, value) instead of question and answer'
)


@dataclass(frozen=True, kw_only=True)
class FolderContent:
    """The content of a folder.

    Attributes:
        samples: The rows.
        notes: What was left out or not read.
    """

    samples: tuple[Sample, ...]
    notes: tuple[str, ...]


def read_folder(folder: Path, *, limit: int | None, require_images: bool) -> FolderContent:
    """Reads the first rows of a folder; their pictures must exist and have a picture's header.

    Args:
        folder: The folder.
        limit: The most rows that are read; `None` for all.
        require_images: Whether a row without a picture is an error.

    Raises:
        CalibrationError: The folder or a picture is missing, or a row is not valid; the message has
            the file and the line's number.
    """
    if not folder.is_dir():
        raise CalibrationError(
            f"{folder}: is not a folder; expected one that holds {_LINES} and pictures"
        )
    samples: list[Sample] = []
    unread: Counter[str] = Counter()
    left_out = 0
    name = _LINES if (folder / _LINES).exists() or not (folder / _LIST).exists() else _LIST
    for where, row in _rows(folder, name):
        if limit is not None and len(samples) == limit:
            left_out += 1
            continue
        sample = _read_row(_parse(row, where), folder, where, unread)
        if not sample.images and require_images:
            raise CalibrationError(
                f'{where}: a conversation without a picture; expected "image" beside the text, '
                "since a vision-language model is calibrated on both"
            )
        sample.image_sizes()
        samples.append(sample)
    if not samples:
        raise CalibrationError(f"{folder / name}: is empty; {_SHAPES}")
    return FolderContent(
        samples=tuple(samples), notes=tuple(_notes(folder.name, samples, left_out, unread))
    )


def _notes(
    name: str, samples: Sequence[Sample], left_out: int, unread: Counter[str]
) -> Iterator[str]:
    if left_out:
        yield f"{name}: the first {len(samples)} of {len(samples) + left_out} rows are used"
    if unread:
        keys = ", ".join(f"{_shown(key)} ({count} rows)" for key, count in unread.most_common(5))
        yield f"{name}: keys that are not read: {keys}"
    text_alone = sum(not sample.images for sample in samples)
    if text_alone:
        yield f"{name}: {text_alone} of {len(samples)} rows have no picture"


def _rows(folder: Path, name: str) -> Iterator[tuple[str, Any]]:
    """The place of each row, and the row: a line of text, or an already parsed value."""
    if not (folder / name).exists():
        raise CalibrationError(f"{folder}: {_LINES} is missing; {_SHAPES}, one per line")
    path = locate(folder, name, error=CalibrationError)
    text = read_text(path, error=CalibrationError)
    if name == _LINES:
        # Only a line feed ends a line: U+2028, U+0085 and the like are data.
        for number, line in enumerate(io.StringIO(text, newline="\n"), start=1):
            if line.strip(" \t\r\n"):
                yield f"{path}:{number}", line
        return
    rows = parse_json(text, str(path), error=CalibrationError)
    if not isinstance(rows, list):
        raise CalibrationError(f"{path}: must be a list of rows; {_SHAPES}")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _parse(row: Any, where: str) -> Mapping[str, Any]:
    record = parse_json(row, where, error=CalibrationError) if isinstance(row, str) else row
    if not isinstance(record, dict):
        raise CalibrationError(f"{where}: is {_shown(record)}, not an object; {_SHAPES}")
    return record


def _read_row(record: Mapping[str, Any], folder: Path, where: str, unread: Counter[str]) -> Sample:
    unread.update(key for key in record if key not in _KEYS)
    kind = record.get("kind")
    if kind is not None and not isinstance(kind, str):
        raise CalibrationError(f'{where}: "kind" must be text, not {_shown(kind)}')
    pictures = _PictureNames(_listed_names(record, where), where)
    key = _conversation_key(record, where)
    turns = _read_turns(record, key, where, pictures)
    if turns[-1].pictures:
        raise CalibrationError(f"{where}: the answer has a picture; only questions may have one")
    names = pictures.finish()
    try:
        placed = place_pictures(turns[:-1], len(names), anywhere=key == "conversations")
    except ValueError as error:
        raise CalibrationError(f"{where}: {error}") from error
    if not names and not placed[-1].text.strip():
        raise CalibrationError(f"{where}: nothing is asked: the question is empty, without picture")
    return Sample(
        images=[_locate_picture(folder, name, where) for name in names],
        turns=placed,
        answer=turns[-1].text,
        kind=kind,
        where=where,
    )


def _conversation_key(record: Mapping[str, Any], where: str) -> str:
    found = [key for key in ("messages", "conversations", "question") if key in record]
    if len(found) != 1 or (found[0] != "question" and "answer" in record):
        named = ", ".join(f'"{key}"' for key in (*found, "answer") if key in record)
        raise CalibrationError(f"{where}: has {named or 'no question'}; {_SHAPES}")
    return found[0]


def _read_turns(
    record: Mapping[str, Any], key: str, where: str, pictures: _PictureNames
) -> list[Turn]:
    if key == "question":
        return [
            Turn(role="user", parts=(_text(record, "question", where),)),
            Turn(role="assistant", parts=(_text(record, "answer", where),)),
        ]
    messages = record[key]
    if not isinstance(messages, list):
        raise CalibrationError(f'{where}: "{key}" must be a list, not {_shown(messages)}')
    turns = [_read_message(message, where, pictures) for message in messages]
    if [turn.role for turn in turns[-2:]] != ["user", "assistant"]:
        raise CalibrationError(
            f'{where}: "{key}" must end with a message of the user and one of the assistant'
        )
    return turns


def _read_message(message: object, where: str, pictures: _PictureNames) -> Turn:
    if not isinstance(message, dict):
        raise CalibrationError(f"{where}: a message must be an object, not {_shown(message)}")
    speaker = message.get("role", message.get("from"))
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        allowed = ", ".join(_SPEAKERS)
        raise CalibrationError(f"{where}: role {_shown(speaker)} is unknown; allowed: {allowed}")
    key = "content" if "content" in message or "value" not in message else "value"
    content = message.get(key)
    if not isinstance(content, list):
        return Turn(role=role, parts=(_text(message, key, where),))
    return Turn(role=role, parts=tuple(_read_part(item, where, pictures) for item in content))


def _read_part(item: object, where: str, pictures: _PictureNames) -> Part:
    kind = item.get("type") if isinstance(item, dict) else None
    if not isinstance(item, dict) or kind not in ("text", "image", "image_url"):
        shown = _shown(item if kind is None else kind)
        raise CalibrationError(
            f"{where}: a part of a message is {shown}; allowed are objects of type text or image"
        )
    if kind == "text":
        return _text(item, "text", where)
    own = next((item[key] for key in ("image", "path", "url", kind) if item.get(key)), None)
    if isinstance(own, dict):
        own = own.get("url", own.get("path"))
    pictures.stand(own, item.get("index"))
    return PICTURE


class _PictureNames:
    """Which file belongs to which place, if parts of messages say so."""

    def __init__(self, listed: Sequence[str], where: str) -> None:
        self._listed = listed
        self._unused = list(range(len(listed)))
        self._placed: list[str] = []
        self._where = where

    def stand(self, name: object, index: object) -> None:
        """Fills the next place: with the part's file, a numbered one of the row, or the next."""
        if name is not None:
            self._placed.append(_picture_name(name, self._where))
            return
        number = index if type(index) is int else self._unused[0] if self._unused else None
        if number not in self._unused:
            raise CalibrationError(
                f"{self._where}: the messages have more places for pictures than the row has "
                f"pictures, which are {len(self._listed)}; each picture needs one place"
            )
        self._unused.remove(number)
        self._placed.append(self._listed[number])

    def finish(self) -> Sequence[str]:
        """Returns all pictures in the order of their places.

        Raises:
            CalibrationError: Some have a place and others do not.
        """
        if not self._placed:
            return self._listed
        if self._unused:
            spare = ", ".join(_shown(self._listed[number]) for number in self._unused)
            raise CalibrationError(
                f"{self._where}: pictures without a place in the messages: {spare}; each picture "
                "needs one place"
            )
        return self._placed


def _listed_names(record: Mapping[str, Any], where: str) -> list[str]:
    given = [record[key] for key in ("image", "images") if record.get(key) is not None]
    if len(given) > 1:
        raise CalibrationError(f'{where}: has both "image" and "images"; one of them is allowed')
    names = given[0] if given and isinstance(given[0], list) else given
    return [_picture_name(name, where) for name in names]


def _picture_name(name: object, where: str) -> str:
    if not isinstance(name, str) or not name or len(name) > _LONGEST_NAME:
        raise CalibrationError(f"{where}: a picture must be a file name, not {_shown(name)}")
    if _ADDRESS.match(name):
        raise CalibrationError(
            f"{where}: {_shown(name)} is an address; pictures are files inside the folder, so "
            "store it there"
        )
    return name


def _locate_picture(folder: Path, name: str, where: str) -> Path:
    try:
        return locate(folder, name, error=CalibrationError)
    except CalibrationError as error:
        raise CalibrationError(f"{where}: image {error}") from error


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        found = _shown(value) if key in record else "missing"
        raise CalibrationError(f'{where}: "{key}" must be text, and is {found}')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f'{where}: "{key}" holds half of a surrogate pair, which is not a character'
        ) from error
    return value


def _shown(value: object) -> str:
    names = {dict: "an object", list: "a list", type(None): "null"}
    if type(value) in names:
        return names[cast("type", type(value))]
    text = ascii(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"

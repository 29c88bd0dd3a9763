"""Messages: who says what in a conversation, and where its pictures are.

Calibration, evaluation, certificate and runtime read conversations through these types, so that the
rule for the place of a picture exists once: where a part of a message puts it, else before the text
of the user's first turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

__all__ = [
    "PICTURE",
    "PLACEHOLDER",
    "ROLES",
    "Message",
    "Part",
    "Picture",
    "Role",
    "Turn",
    "chat_messages",
    "place_pictures",
    "user_turn",
]

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)

Message = dict[str, Any]
"""One message as chat templates take it: `role`, and `content`, a list of image and text items."""

PLACEHOLDER = "<image>"
"""The placeholder in LLaVA-style data sets, whatever the model's own is."""


@dataclass(frozen=True)
class Picture:
    """The place of a picture; the order of all places says which picture it is."""


PICTURE = Picture()

Part = str | Picture
"""A part of a turn."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: The speaker.
        parts: Texts and places of pictures, in order.
    """

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """Its text, without the pictures."""
        return " ".join(part for part in self.parts if isinstance(part, str))

    @property
    def pictures(self) -> int:
        """The number of its pictures."""
        return sum(isinstance(part, Picture) for part in self.parts)

    def to_message(self) -> Message:
        """The turn as chat templates take it."""
        parts = self.parts or ("",)
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in parts
        ]
        return {"role": self.role, "content": content}


def user_turn(text: str, pictures: int = 0) -> Turn:
    """A user's turn: its pictures, then the text."""
    return Turn(role="user", parts=(*[PICTURE] * pictures, text))


def chat_messages(turns: Iterable[Turn]) -> list[Message]:
    """A conversation as chat templates take it."""
    return [turn.to_message() for turn in turns]


def place_pictures(
    turns: Sequence[Turn], count: int, *, anywhere: bool = False
) -> tuple[Turn, ...]:
    """Gives every picture its place.

    If no part is a picture's place, `<image>` at the start or at the end of a user's text is one,
    as in LLaVA's data; elsewhere it is text. If there is no place at all, the pictures come before
    the text of the user's first turn.

    Args:
        turns: The conversation.
        count: How many pictures it has.
        anywhere: Whether `<image>` in the middle of a text is a place too.

    Raises:
        ValueError: There are more or fewer places than pictures, or there is no user turn.
    """
    placed = tuple(turns)
    if (count or anywhere) and not _places(placed):
        placed = tuple(_read_placeholders(turn, anywhere=anywhere) for turn in placed)
    if count and not _places(placed):
        first = next((at for at, turn in enumerate(placed) if turn.role == "user"), None)
        if first is None:
            raise ValueError("a picture belongs to a user turn, and there is none")
        turn = placed[first]
        turn = replace(turn, parts=(*[PICTURE] * count, *turn.parts))
        placed = (*placed[:first], turn, *placed[first + 1 :])
    if _places(placed) != count:
        raise ValueError(
            f"the messages have places for {_places(placed)} pictures where {count} are given; "
            "each picture needs one place"
        )
    return placed


def _places(turns: Sequence[Turn]) -> int:
    return sum(turn.pictures for turn in turns)


def _read_placeholders(turn: Turn, *, anywhere: bool) -> Turn:
    if turn.role != "user":
        return turn
    parts: list[Part] = []
    for part in turn.parts:
        parts += _split(part, anywhere=anywhere) if isinstance(part, str) else [part]
    return replace(turn, parts=tuple(parts))


def _split(text: str, *, anywhere: bool) -> list[Part]:
    """Splits the placeholders at both ends off a text, with the line breaks between."""
    pieces = text.split(PLACEHOLDER)
    front = back = 0
    while front < len(pieces) - 1 and not pieces[front].strip():
        front += 1
    while back < len(pieces) - 1 - front and not pieces[-1 - back].strip():
        back += 1
    middle = pieces[front : len(pieces) - back]
    if front:
        middle[0] = middle[0].lstrip()
    if back:
        middle[-1] = middle[-1].rstrip()
    parts: list[Part] = [PICTURE] * front
    if anywhere:
        for number, piece in enumerate(middle):
            parts += [PICTURE] if number else []
            parts += [piece] if piece else []
    elif text_between := PLACEHOLDER.join(middle):
        parts.append(text_between)
    return parts + [PICTURE] * back

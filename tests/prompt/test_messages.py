"""The one rule for the place of a picture."""

from __future__ import annotations

import pytest

from pocketvlm.prompt.messages import PICTURE, Turn, chat_messages, place_pictures, user_turn

HI = Turn(role="assistant", parts=("hi",))
SYSTEM = Turn(role="system", parts=("<image> be brief",))


def parts(turns, count, **options):
    return [turn.parts for turn in place_pictures(turns, count, **options)]


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("what?", 0, ("what?",)),
        ("what?", 1, (PICTURE, "what?")),
        ("what?", 2, (PICTURE, PICTURE, "what?")),
        ("<image>\nwhat?", 1, (PICTURE, "what?")),
        ("<image>what?", 1, (PICTURE, "what?")),
        ("what?\n<image>", 1, ("what?", PICTURE)),
        ("<image>", 1, (PICTURE,)),
        ("<image>\n<image>\nwhich?", 2, (PICTURE, PICTURE, "which?")),
        ("<image>\nbefore or after?\n<image>", 2, (PICTURE, "before or after?", PICTURE)),
        ("<image><image>", 2, (PICTURE, PICTURE)),
        # In the middle it is text, and without a picture it is text everywhere.
        ("is <image> a tag?", 1, (PICTURE, "is <image> a tag?")),
        ("<image>\nis <image> a tag?", 1, (PICTURE, "is <image> a tag?")),
        ("<image>\nwhat?", 0, ("<image>\nwhat?",)),
    ],
)
def test_where_a_text_says_where(text, count, expected):
    assert parts([user_turn(text)], count) == [expected]


def test_what_is_written_stays_as_it_is():
    turns = [user_turn("hello"), HI, Turn(role="user", parts=("look ", PICTURE, "<image>"))]
    assert parts(turns, 1) == [turn.parts for turn in turns]
    assert parts(place_pictures(turns, 1), 1) == [turn.parts for turn in turns]


def test_else_the_users_first_turn():
    turns = [SYSTEM, user_turn("one"), HI, user_turn("two")]
    assert parts(turns, 1) == [SYSTEM.parts, (PICTURE, "one"), ("hi",), ("two",)]


def test_a_placeholder_in_a_later_turn_counts_and_one_of_another_side_does_not():
    turns = [SYSTEM, user_turn("one"), HI, user_turn("<image>\ntwo")]
    assert parts(turns, 1) == [SYSTEM.parts, ("one",), ("hi",), (PICTURE, "two")]


def test_llava_means_every_placeholder():
    turns = [user_turn("first: <image>\nsecond: <image>\nwhich?")]
    assert parts(turns, 2, anywhere=True) == [
        ("first: ", PICTURE, "\nsecond: ", PICTURE, "\nwhich?")
    ]


@pytest.mark.parametrize(
    ("turns", "count", "anywhere"),
    [
        ([user_turn("<image>\n<image>\nwhich?")], 1, False),
        ([user_turn("<image>\nwhich?")], 2, False),
        ([user_turn("which?", 2)], 1, False),
        ([user_turn("which?", 1)], 0, False),
        ([user_turn("a <image> b")], 0, True),
        ([SYSTEM], 1, False),
    ],
)
def test_places_and_pictures_must_match(turns, count, anywhere):
    with pytest.raises(ValueError, match="picture"):
        place_pictures(turns, count, anywhere=anywhere)


def test_messages_are_what_templates_take():
    turn = Turn(role="user", parts=("a", PICTURE, "b"))
    assert chat_messages([turn, Turn(role="user", parts=())]) == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a"},
                {"type": "image"},
                {"type": "text", "text": "b"},
            ],
        },
        {"role": "user", "content": [{"type": "text", "text": ""}]},
    ]
    assert (turn.text, turn.pictures) == ("a b", 1)

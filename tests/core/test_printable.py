"""Characters that steer are written out wherever text of anybody is shown."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketvlm.cli.console import say
from pocketvlm.errors import BundleError
from pocketvlm.json_io import read_json, write_json
from pocketvlm.printable import printable, printable_line

HOSTILE = "a\x1b[2J\x9b31m\r\x07\x08\x7f\u202eb\u2066\u2028c\x85\ud800\U000e0041"


def test_what_steers_is_written_out():
    assert printable(HOSTILE) == (
        r"a\x1b[2J\x9b31m\r\x07\x08\x7f\u202eb\u2066\u2028c\x85\ud800\U000e0041"
    )
    assert printable("two\nlines\tand a tab") == "two\nlines\tand a tab"
    for text in ("Grüße", "日本語", "عربي", "नमस्ते", "👩‍👩‍👧", "שָׁלוֹם", "a\u00a0b"):
        assert printable(text) == text
    assert printable_line(" a\r\n b \u2028 c") == "a b c"


@given(st.text())
def test_nothing_that_steers_is_left(text):
    shown = printable(text)
    assert printable(shown) == shown
    shown.encode("utf-8")
    assert not any(ord(sign) < 32 and sign not in "\n\t" for sign in shown)


def test_a_line_of_the_command_line_is_one_line(capsys):
    say(f"model  {HOSTILE}\nparity   passed")
    shown = capsys.readouterr().err
    assert shown == f"model  {printable(HOSTILE)}\\nparity   passed\n"


def test_progress_shows_names_and_obeys_none(monkeypatch):
    from rich import console as rich_console

    from pocketvlm.cli import progress
    from pocketvlm.context import Progress

    out = io.StringIO()
    real = rich_console.Console
    monkeypatch.setattr(
        rich_console,
        "Console",
        lambda **_: real(file=out, force_terminal=True, width=200, color_system=None),
    )
    note = "[link=http://x]layer[/link]\x9b31m\u202e\nb"
    with progress.show_progress() as report:
        report(Progress(task="t[bold]\x07", done=1, total=2, note=note))
    shown = out.getvalue()
    assert "t[bold]\\x07" in shown
    assert "[link=http://x]layer[/link]\\x9b31m\\u202e b" in shown
    assert "\x9b" not in shown
    assert "\u202e" not in shown


@pytest.mark.parametrize("text", [HOSTILE, HOSTILE.replace("\ud800", ""), '"\\', "\u2029"])
def test_documents_hold_it_as_escapes_and_give_it_back(tmp_path, text):
    write_json(tmp_path / "d.json", {text: [text]})
    written = (tmp_path / "d.json").read_text(encoding="utf-8")
    assert printable(written) == written
    assert json.loads(written) == {text: [text]}
    if "\ud800" in text:  # written so that it can be looked at; no reader takes it for text
        with pytest.raises(BundleError, match="half of a surrogate pair"):
            read_json(tmp_path / "d.json")
    else:
        assert read_json(tmp_path / "d.json") == {text: [text]}

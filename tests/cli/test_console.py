"""What the terminal is shown."""

from __future__ import annotations

import warnings

from typer.testing import CliRunner

from pocketvlm.cli.app import app
from pocketvlm.cli.console import told_warnings


def test_the_overview_says_every_command_in_a_whole_sentence():
    shown = CliRunner().invoke(app, ["--help"]).stdout.partition("Commands:\n")[2]
    lines = shown.strip().splitlines()
    assert len(lines) > 15
    assert [line for line in lines if not line.endswith(".") or line.endswith("...")] == []


def test_a_warning_is_one_line_without_a_place(capsys):
    with told_warnings():
        for _ in range(2):
            warnings.warn("phone: files were left in\n/data/x", RuntimeWarning, stacklevel=1)
    line = "warning  phone: files were left in /data/x\n"
    assert capsys.readouterr().err == 2 * line

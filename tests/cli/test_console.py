"""What the terminal is shown."""

from __future__ import annotations

import warnings

from pocketvlm.cli.console import told_warnings


def test_a_warning_is_one_line_without_a_place(capsys):
    with told_warnings():
        for _ in range(2):
            warnings.warn("phone: files were left in\n/data/x", RuntimeWarning, stacklevel=1)
    line = "warning  phone: files were left in /data/x\n"
    assert capsys.readouterr().err == 2 * line

"""The command line: parse, call the API, print. The only place that prints and draws progress.

Importing it imports no library, so that an interrupt is handled from the first moment.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Entry point: every failure is one line and an exit code."""
    from pocketvlm.cli.interrupts import install

    install()
    from pocketvlm.child_process import end_with_parent

    end_with_parent()
    from pocketvlm.cli.app import run

    run()

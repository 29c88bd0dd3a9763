"""The command line: parse, call the API, print. The only place that prints and draws progress.

Importing it imports no library, so that an interrupt is handled from the first moment.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["main", "process"]


def process() -> NoReturn:
    """Entry point of the process: `main`, and an end that does not wait for Python's."""
    try:
        main()
    except SystemExit as end:
        from pocketvlm.child_process import end_process

        end_process(end.code if isinstance(end.code, int) else 0)


def main() -> NoReturn:
    """Runs the command line; every failure is one line and an exit code, of `SystemExit`."""
    from pocketvlm.cli.interrupts import install

    install()
    from pocketvlm.child_process import end_with_parent

    end_with_parent()
    from pocketvlm.cli.app import run

    run()

"""The command line: parse, call the API, print. The only place that prints and draws progress.

Human text goes to stderr; `--json` puts one JSON document on stdout. Exit codes: 0 done, 1 a check
or bound failed, 2 the input was wrong, 130 interrupted.
"""

from __future__ import annotations

import errno
import sys
from typing import Annotated

import typer

from pocketvlm import __version__
from pocketvlm.cli import judging, making, measuring
from pocketvlm.cli.console import say
from pocketvlm.errors import PocketVLMError

__all__ = ["app", "main"]

app = typer.Typer(
    name="pocketvlm",
    help="Turn a vision-language checkpoint into a phone-ready artifact that can be trusted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)

app.command()(making.compress)
app.command()(making.plan)
app.command()(judging.ask)
app.command(name="eval")(judging.evaluate)
app.command()(measuring.bench)
app.command()(measuring.compare)
app.command()(measuring.report)
app.command()(making.convert)
app.command()(making.recipes)
app.command()(measuring.devices)
app.command()(measuring.doctor)
app.command()(judging.inspect)
app.command(name="verify-coreml")(judging.verify_coreml)
app.command()(making.demo)

_STORAGE_ERRORS = (
    errno.ENOSPC,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.ENOENT,
    errno.EISDIR,
)


def main() -> None:
    """Entry point: maps failures to one line and an exit code."""
    try:
        code = app(standalone_mode=False)
    except PocketVLMError as error:
        code = _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        code = _show_usage(error)
    except (typer.Abort, KeyboardInterrupt):
        code = _interrupted()
    except OSError as error:
        if error.errno not in _STORAGE_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        code = _fail(f"{where}{error.strerror}; nothing that was there before is lost", 2)
    sys.exit(code if isinstance(code, int) else 0)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def _fail(message: str, code: int) -> int:
    say("error: " + " ".join(message.split()))
    return code


def _show_usage(error: typer.TyperException) -> int:
    """A usage error shows itself with the command's usage line; anything else is one line."""
    show = getattr(error, "show", None)
    if show is None:
        return _fail(str(error), 2)
    show()
    return 2


def _interrupted() -> int:
    say("interrupted; the same command goes on where this one stopped")
    return 130

"""The command line: parse, call the API, print. The only place that prints and draws progress.

Human text goes to stderr; `--json` puts one JSON document on stdout. Exit codes: 0 done, 1 a check
or bound failed, 2 the input was wrong, 70 a bug in pocketvlm, 130 interrupted, 141 the reader of
the output is gone.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Annotated, NoReturn

import typer

from pocketvlm import __version__
from pocketvlm.cli import bench, compress, devices, evaluate, hub, inspect, pack, report, verify
from pocketvlm.cli.failures import check_arguments, run_to_exit_code, take_traceback_flag

__all__ = ["app", "run", "run_command"]

app = typer.Typer(
    name="pocketvlm",
    help="Turn a vision-language checkpoint into a phone-ready artifact that can be trusted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)

app.command()(compress.compress)
app.command()(compress.plan)
app.command()(evaluate.ask)
app.command(name="eval")(evaluate.evaluate)
app.command()(bench.bench)
app.command()(report.compare)
app.command()(report.report)
app.command()(compress.convert)
app.command()(compress.recipes)
app.command()(devices.devices)
app.command()(bench.doctor)
app.command()(inspect.inspect)
app.command(name="pack-runner")(pack.pack_runner)
app.command()(hub.pull)
app.command()(hub.push)
app.command()(verify.verify)
app.command(name="verify-coreml")(verify.verify_coreml)
app.command()(compress.demo)


def run() -> NoReturn:
    """Runs the process's own command line, and ends the process."""
    arguments, shows_traceback = take_traceback_flag(sys.argv[1:])
    sys.exit(run_to_exit_code(lambda: run_command(arguments), shows_traceback=shows_traceback))


def run_command(arguments: list[str]) -> object:
    """Runs one command in this process; failures are raised.

    Raises:
        PocketVLMError: Any failure that the command foresees.
    """
    # Not `app(...)`: it turns an interrupt, a closed pipe and an end of file into its own codes.
    check_arguments(arguments)
    command = _command()
    with command.make_context("pocketvlm", arguments) as context:
        return command.invoke(context)


@cache
def _command() -> typer.core.TyperGroup:
    command = typer.main.get_command(app)
    assert isinstance(command, typer.core.TyperGroup)  # noqa: S101  (an app of several commands)
    return command


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    traceback: Annotated[  # noqa: ARG001  (`run` takes it from anywhere; --help shows it here)
        bool,
        typer.Option(
            "--traceback", help="Show where a failure came from; works with every command."
        ),
    ] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit

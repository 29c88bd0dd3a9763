"""`optimum-cli export pocketvlm`: the job of `pocketvlm compress`, spoken as optimum's users do.

optimum looks for this module by its place. The options are read from the command itself, so that
there is one list of them; importing it loads neither torch nor transformers.
"""

from __future__ import annotations

import sys
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from pocketvlm.cli import main
from pocketvlm.cli.app import app

if TYPE_CHECKING:
    from typer.core import TyperOption

__all__ = ["REGISTER_COMMANDS", "PocketVLMExportCommand"]

_TASK = "image-text-to-text"
_PLACES = ("--out", "--help")
"""Options that are an argument here, or that argparse has itself."""


class _Keep(Action):
    """Keeps an option and its value as they were typed: the command itself judges them."""

    def __call__(
        self,
        _parser: ArgumentParser,
        namespace: Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        typed = [option_string] if self.nargs == 0 else [option_string, values]
        namespace.typed = [*namespace.typed, *typed]


class PocketVLMExportCommand(BaseOptimumCLICommand):
    """Compresses and exports a vision-language model into a bundle for phones."""

    COMMAND = CommandInfo(
        name="pocketvlm",
        help="Compress and export a vision-language model to ONNX, ExecuTorch and Core ML, with "
        "a certificate and a report.",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Adds the options of `pocketvlm compress`, with the model and the folder as optimum does.

        Args:
            parser: The parser of this command.
        """
        parser.add_argument(
            "-m", "--model", required=True, help="A local folder, a hub id, or reference:NAME."
        )
        parser.add_argument("output", help="The run's folder: bundle, checkpoint and report.")
        parser.add_argument("--task", choices=[_TASK], default=_TASK, help="The only one there is.")
        parser.set_defaults(typed=[])
        for option in _options():
            parser.add_argument(
                *option.opts,
                *option.secondary_opts,
                action=_Keep,
                dest="typed",
                nargs=0 if option.is_flag else None,
                metavar=option.metavar or option.name.upper(),
                help=(option.help or "").replace("%", "%%"),
            )

    def run(self) -> None:
        """Runs the command, and ends the process with its exit code."""
        typed = [str(one) for one in self.args.typed]
        sys.argv = ["pocketvlm", "compress", self.args.model, "--out", self.args.output, *typed]
        main()


def _options() -> Iterator[TyperOption]:
    for parameter in typer.main.get_command(app).commands["compress"].params:
        if parameter.param_type_name == "option" and not set(_PLACES) & set(parameter.opts):
            yield parameter


REGISTER_COMMANDS = [(PocketVLMExportCommand, ExportCommand)]

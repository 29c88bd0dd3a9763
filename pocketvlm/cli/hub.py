"""Commands that publish results on a hub, and fetch them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pocketvlm.cli.console import print_json, quiet_libraries, say
from pocketvlm.cli.options import JsonOption, out_option

__all__ = ["pull", "push"]

_RepositoryArgument = Annotated[
    str, typer.Argument(metavar="REPOSITORY", help="A model repository's id: owner/name.")
]


def push(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="A run's folder, or a bundle's, a checkpoint's, or one that `convert` wrote.",
        ),
    ],
    repository: _RepositoryArgument,
    private: Annotated[
        bool, typer.Option("--private", help="For you alone; refused if the repository is public.")
    ] = False,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", metavar="OWNER/NAME", help="The source model, for the card."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a run, bundle or checkpoint with its card on a hub.

    All of it is one commit of the repository.
    """
    quiet_libraries()
    from pocketvlm.hub import push as push_folder

    pushed = push_folder(folder, repository, private=private, base_model=base_model)
    say(f"pushed   {pushed.kind}: {pushed.files} files, {pushed.stored_bytes / 1e6:.2f} MB")
    if pushed.removed:
        say(f"removed  {len(pushed.removed)} files of an earlier push")
    say(f"commit   {pushed.url}")
    if as_json:
        print_json(asdict(pushed))


def pull(
    repository: _RepositoryArgument,
    out: Annotated[Path, out_option("A folder that does not exist or is empty.")],
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit. Default: the main branch.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch what `push` published, and check every signature.

    Nothing stands in its folder before that.
    """
    quiet_libraries()
    from pocketvlm.hub import pull as pull_repository

    pulled = pull_repository(repository, out, revision=revision)
    say(f"pulled   {pulled.kind}: {pulled.files} files, {pulled.stored_bytes / 1e6:.2f} MB")
    say(f"commit   {pulled.commit}")
    say(f"written  {out}")
    if as_json:
        print_json(asdict(pulled))

"""push: a run, bundle or checkpoint becomes one commit of a repository."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pocketvlm.errors import HubError, name_some
from pocketvlm.hub.client import naming_hub_faults
from pocketvlm.hub.content import (
    LEFT_ALONE,
    Content,
    is_own_layout,
    kind_of,
    read_content,
    written_by,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Pushed", "push"]


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What was pushed.

    Attributes:
        repository: The repository's id.
        kind: Run, bundle, checkpoint or layout.
        url: The commit's address.
        commit: Its hash.
        files: Files of the content, the card included.
        removed: Files of an earlier push that the content no longer has.
        stored_bytes: Bytes of the content.
    """

    repository: str
    kind: str
    url: str
    commit: str
    files: int
    removed: tuple[str, ...]
    stored_bytes: int


def push(
    folder: Path,
    repository: str,
    *,
    private: bool = False,
    base_model: str | None = None,
    api: HfApi | None = None,
) -> Pushed:
    """Pushes a folder's content as one commit, so that no reader ever sees half of it.

    Files of an earlier push that the content no longer has are removed by the same commit.

    Args:
        folder: A finished run, a bundle, a checkpoint, or a checkpoint in another tool's layout.
        repository: The model repository's id, owner/name; it is made if there is none.
        private: Whether it may be seen by its owner alone.
        base_model: The hub id of the source model, for the card.
        api: The hub's client; `None` for the one of the environment (HF_ENDPOINT, HF_TOKEN).

    Raises:
        HubError: The repository holds something else, is public where `private` is asked for, was
            changed meanwhile, or the hub refuses or cannot be reached.
        PocketVLMError: The folder holds nothing that can be pushed, or is damaged.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    content = read_content(folder)
    card = content.card(base_model=base_model).encode()
    api = api or HfApi()
    with naming_hub_faults(repository):
        api.create_repo(repository, private=private or None, exist_ok=True)
        info = api.model_info(repository)
        if private and not info.private:
            raise HubError(f"{repository}: is public, and --private was asked for")
        known = api.list_repo_files(repository, revision=info.sha)
        _refuse_foreign(api, repository, known, content)
        added = {*content.names, "README.md"}
        removed = tuple(name for name in known if name not in (*added, *LEFT_ALONE))
        commit = api.create_commit(
            repository,
            [
                *(
                    CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name)
                    for name in content.names
                    if name != "README.md"
                ),
                CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=card),
                *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in removed),
            ],
            commit_message=f"A {content.kind} of {written_by()}",
            parent_commit=info.sha,
        )
    return Pushed(
        repository=repository,
        kind=content.kind,
        url=str(commit.commit_url),
        commit=commit.oid,
        files=len(added),
        removed=removed,
        stored_bytes=sum((folder / name).stat().st_size for name in content.names),
    )


def _refuse_foreign(api: HfApi, repository: str, known: Collection[str], content: Content) -> None:
    """A repository may be new, empty, or hold an earlier push of the same kind."""
    others = [name for name in known if name not in LEFT_ALONE]
    if not others:
        return
    kind = kind_of(known)
    if kind == "layout":
        config = Path(api.hf_hub_download(repository, "config.json"))
        kind = "layout" if is_own_layout(config) else None
    if kind != content.kind:
        what = "something else" if kind is None else f"a {kind} of pocketvlm"
        raise HubError(
            f"{repository}: holds {what} ({name_some(others)}), and a {content.kind} was to be "
            "pushed; give a separate repository"
        )

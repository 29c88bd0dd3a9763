"""pull: what was pushed, fetched and checked before it stands in its folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pocketvlm.errors import HubError, InputError
from pocketvlm.files.publish import replace_directory
from pocketvlm.hub.client import naming_hub_faults
from pocketvlm.hub.content import LEFT_ALONE, Kind, is_own_layout, kind_of, read_content

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Pulled", "pull"]


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """What was pulled.

    Attributes:
        repository: The repository's id.
        kind: Run, bundle, checkpoint or layout.
        commit: Hash of the commit.
        files: Files of the content.
        stored_bytes: Their bytes.
    """

    repository: str
    kind: str
    commit: str
    files: int
    stored_bytes: int


def pull(
    repository: str, out: Path, *, revision: str | None = None, api: HfApi | None = None
) -> Pulled:
    """Pulls a repository that `push` filled; `out` appears when all of it is there and as signed.

    What is fetched goes through the hub's own cache, so an interrupted pull continues.

    Args:
        repository: The repository's id, owner/name.
        out: A folder that does not exist or is empty.
        revision: A branch, tag or commit; `None` for the main branch.
        api: The hub's client; `None` for the one of the environment (HF_ENDPOINT, HF_TOKEN).

    Raises:
        InputError: `out` holds something.
        HubError: The repository holds nothing of pocketvlm, or the hub refuses or cannot be
            reached.
        PocketVLMError: A file is missing, was changed, or is not listed.
    """
    from huggingface_hub import HfApi

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: holds something; give a folder that does not exist or is empty")
    api = api or HfApi()
    with naming_hub_faults(repository):
        info = api.model_info(repository, revision=revision)
        kind = kind_of(api.list_repo_files(repository, revision=info.sha))
        if kind == "layout":
            config = Path(api.hf_hub_download(repository, "config.json", revision=info.sha))
            kind = "layout" if is_own_layout(config) else None
        if kind is None:
            raise HubError(
                f"{repository}: holds no run, bundle or checkpoint of pocketvlm; a source model is "
                "read by its id, as in `pocketvlm compress owner/name`"
            )
        fetched = Path(api.snapshot_download(repository, revision=info.sha))
    with replace_directory(out) as aside:
        for name in _names(fetched, kind):
            place = aside / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fetched / name, place)
        content = read_content(aside)
    return Pulled(
        repository=repository,
        kind=content.kind,
        commit=str(info.sha),
        files=len(content.names),
        stored_bytes=sum((out / name).stat().st_size for name in content.names),
    )


def _names(folder: Path, kind: Kind) -> list[Path]:
    """Files of a snapshot, which are links into the cache, but hidden ones.

    A licence beside a signed folder is the repository's, and the folder does not list it.
    """
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    apart = set(LEFT_ALONE) - {"README.md"} if kind in ("bundle", "checkpoint") else set()
    return [
        path
        for path in found
        if path.as_posix() not in apart and not any(piece.startswith(".") for piece in path.parts)
    ]

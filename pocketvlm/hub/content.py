"""What a folder holds that can be pushed: a finished run, a bundle, a checkpoint, or a layout.

Everything is compared with its signatures first: what was damaged on this machine is not published,
and what was damaged on the way is not put in place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import yaml

from pocketvlm.bundle import Bundle
from pocketvlm.errors import CheckpointError, InputError
from pocketvlm.files.reader import read_text
from pocketvlm.json_io import read_json

__all__ = [
    "LEFT_ALONE",
    "Content",
    "Kind",
    "is_own_layout",
    "kind_of",
    "read_content",
    "written_by",
]

Kind = Literal["run", "bundle", "checkpoint", "layout"]

LEFT_ALONE = ("README.md", ".gitattributes", "LICENSE", "LICENSE.txt", "LICENSE.md")
"""Files of a repository that say nothing of its kind, and that a push does not remove."""

_KINDS: Mapping[Kind, tuple[str, ...]] = {
    "run": ("report.json", "bundle/manifest.json", "checkpoint/pocketvlm.json"),
    "bundle": ("manifest.json",),
    "checkpoint": ("pocketvlm.json",),
    "layout": ("config.json",),
}
"""The files by which a kind is known, the most telling first."""
_OF_A_RUN = ("recipe.yaml", "report.json", "report.html")
_USE: Mapping[Kind, str] = {
    "run": "pocketvlm ask DIR/bundle PICTURE QUESTION",
    "bundle": "pocketvlm ask DIR PICTURE QUESTION",
    "checkpoint": "pocketvlm eval DIR --data FOLDER",
    "layout": "pocketvlm eval DIR --data FOLDER",
}


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a folder holds.

    Attributes:
        folder: The folder.
        kind: Of what kind it is.
        names: The files that travel, relative to the folder; a card is added to them.
    """

    folder: Path
    kind: Kind
    names: tuple[str, ...]

    def card(self, *, base_model: str | None) -> str:
        """The repository's README.md: metadata that the hub reads, then the measured card.

        Args:
            base_model: The hub id of the source model, if that is known.
        """
        front: dict[str, Any] = {
            "library_name": "pocketvlm",
            "pipeline_tag": "image-text-to-text",
            "tags": ["pocketvlm", *self._targets()],
        }
        if base_model is not None:
            front |= {"base_model": base_model, "base_model_relation": "quantized"}
        text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
        return f"---\n{text}---\n\n{self._measured_card()}"

    def _targets(self) -> list[str]:
        place = {"run": "bundle", "bundle": "."}.get(self.kind)
        if place is None:
            return []
        return list(Bundle.open(self.folder / place, verify=False).manifest.runtimes)

    def _measured_card(self) -> str:
        own = self.folder / ("bundle/README.md" if self.kind == "run" else "README.md")
        if own.is_file():
            return read_text(own, error=InputError)
        return (
            f"# A {self.kind} of {written_by()}\n\n"
            f"```sh\npocketvlm pull REPOSITORY --out DIR\n{_USE[self.kind]}\n```\n"
        )


def written_by() -> str:
    """This package and its version."""
    return f"pocketvlm {metadata.version('pocketvlm')}"


def read_content(folder: Path) -> Content:
    """Recognizes a folder's content and compares it with its signatures.

    Raises:
        InputError: The folder holds nothing that can be pushed.
        BundleError: A file of a bundle is missing, was changed, or is not listed.
        CheckpointError: The same of a checkpoint.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a folder")
    names = _regular_files(folder)
    kind = kind_of(names)
    if kind is None or (kind == "layout" and not is_own_layout(folder / "config.json")):
        raise InputError(
            f"{folder}: holds no finished run, bundle, checkpoint or converted checkpoint of "
            "pocketvlm"
        )
    if kind == "run":
        names = [
            name
            for name in names
            if name in _OF_A_RUN or name.startswith(("bundle/", "checkpoint/"))
        ]
    _verify(folder, kind)
    return Content(folder=folder, kind=kind, names=tuple(names))


def kind_of(names: Collection[str]) -> Kind | None:
    """The kind of a folder or repository with these files; `None` if it is of none."""
    return next((kind for kind, needed in _KINDS.items() if set(needed) <= set(names)), None)


def is_own_layout(config: Path) -> bool:
    """Whether `pocketvlm convert` wrote the folder of this config.json."""
    document = read_json(config)
    declared = document.get("quantization_config")
    meta = declared.get("meta") if isinstance(declared, Mapping) else None
    quantizers = meta.get("quantizer") if isinstance(meta, Mapping) else None
    return isinstance(quantizers, list) and any(
        isinstance(one, str) and one.startswith("pocketvlm:") for one in quantizers
    )


def _verify(folder: Path, kind: Kind) -> None:
    from pocketvlm.checkpoint.manifest import read_manifest

    bundle = {"run": folder / "bundle", "bundle": folder}.get(kind)
    if bundle is not None:
        Bundle.open(bundle)
    checkpoint = {"run": folder / "checkpoint", "checkpoint": folder}.get(kind)
    if checkpoint is not None and read_manifest(checkpoint) is None:
        raise CheckpointError(f"{checkpoint}: pocketvlm.json is missing")


def _regular_files(folder: Path) -> list[str]:
    """Every file of the folder but hidden ones, in order; links are not followed."""
    found = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if any(piece.startswith(".") for piece in relative.parts) or not path.is_file():
            continue
        if path.is_symlink():
            raise InputError(f"{path}: is a link; what is pushed is files of its folder alone")
        found.append(relative.as_posix())
    return found

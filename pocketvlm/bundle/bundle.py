"""The artifact on disk: a folder whose manifest names, describes and signs every file in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pocketvlm.bundle.manifest import (
    Component,
    Manifest,
)
from pocketvlm.bundle.variants import VisionVariant
from pocketvlm.errors import BundleError
from pocketvlm.files.reader import locate
from pocketvlm.files.signed_folder import (
    DIGEST_KEY,
    sign_document,
    sign_files,
    verify_document,
    verify_files,
)
from pocketvlm.json_io import read_json, write_json

__all__ = ["Bundle", "sign_bundle", "write_manifest"]

_MANIFEST = "manifest.json"
_UNSIGNED = ("README.md", "report.html", ".gitattributes")
"""Files that no runtime reads: two that are written after signing, and the hub's own."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle that was opened, and checked unless told otherwise.

    Attributes:
        path: The folder.
        manifest: Its manifest.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> Bundle:
        """Opens a bundle; every file must be regular, listed, inside the folder and as signed.

        Args:
            path: The folder.
            verify: Whether to compare the folder with its manifest. A child of a process that has
                already done so can skip it.

        Raises:
            BundleError: There is no bundle, or a file is missing, was changed, or is not listed.
        """
        file = path / _MANIFEST
        if not file.is_file():
            raise BundleError(f"{path}: no bundle here: {_MANIFEST} is missing")
        document = read_json(locate(path, _MANIFEST))
        if verify:
            verify_document(document, file, error=BundleError)
        content = {key: value for key, value in document.items() if key != DIGEST_KEY}
        bundle = cls(path=path, manifest=Manifest.from_json(content, file))
        if verify:
            bundle.verify()
        return bundle

    def verify(self) -> None:
        """Compares the folder with the manifest.

        Raises:
            BundleError: A file is missing, was changed, or is not listed; the message names it.
        """
        files = self.manifest.files
        verify_files(self.path, files, _MANIFEST, _UNSIGNED, error=BundleError)
        for component in self.manifest.components:
            name = component.file
            if name not in files and not any(file.startswith(f"{name}/") for file in files):
                raise BundleError(f"{self.path / _MANIFEST}: {name!r} is used and not signed")

    def file(self, name: str) -> Path:
        """Path of a signed file.

        Raises:
            BundleError: The manifest does not list it, or it is not a file inside the bundle.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: has no signed file {name!r}")
        return locate(self.path, name)

    def has(self, name: str) -> bool:
        """Whether there is a signed file of this name."""
        return name in self.manifest.files

    def only(self, variant: VisionVariant) -> Bundle:
        """The bundle as if one of its manifest's `variants` were the only vision graph."""
        return replace(self, manifest=self.manifest.only(variant))

    def each_vision(self) -> tuple[Bundle, ...]:
        """The bundle with each of its vision graphs alone, the first one first."""
        return tuple(map(self.only, self.manifest.variants)) or (self,)

    def component(
        self, target: str, role: str, function: str | None = None, *, variant: str | None = None
    ) -> Component:
        """The graph of one target and role; the first one if no function or variant is given.

        Raises:
            BundleError: The bundle has none.
        """
        for component in self.manifest.components:
            if component.target != target or component.role != role:
                continue
            if function in (None, component.function) and variant in (None, component.variant):
                return component
        targets = sorted({c.target for c in self.manifest.components})
        named = "" if variant is None else f" {variant}"
        raise BundleError(
            f"{self.path}: no {role} graph{named} for target {target!r}; targets are "
            f"{', '.join(targets)}"
        )

    def stored_bytes(self) -> int:
        """Bytes of every signed file: what an app has to ship."""
        return sum((self.path / name).stat().st_size for name in self.manifest.files)


def sign_bundle(path: Path, manifest: Manifest) -> Manifest:
    """Adds the digest of every file in the folder to the manifest, and writes it there."""
    files = sign_files(path, (_MANIFEST, *_UNSIGNED))
    signed = replace(manifest, files=files)
    write_manifest(path, signed)
    return signed


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes the manifest of a bundle folder, with its own digest."""
    write_json(path / _MANIFEST, sign_document(manifest.to_json()))

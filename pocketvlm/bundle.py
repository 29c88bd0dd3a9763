"""The artifact on disk: a folder whose manifest names, describes and signs every file in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pocketvlm.errors import BundleError
from pocketvlm.files import file_sha256
from pocketvlm.json_io import read_json, write_json

__all__ = [
    "BUNDLE_SCHEMA",
    "Bundle",
    "Component",
    "Manifest",
    "TensorSignature",
    "sign_files",
    "write_manifest",
]

BUNDLE_SCHEMA = 1
_MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class TensorSignature:
    """One input or output of a graph; a string in `shape` names a dimension that varies."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Component:
    """One graph of one target.

    Attributes:
        target: `onnx`, `executorch` or `coreml`.
        role: `vision`, `embedding` or `decoder`.
        file: Path of the graph inside the bundle.
        precision: How its weights are stored, by part, such as `{"decoder": "int4 g32"}`.
        function: Which function of the file it is, where a file holds several that share weights.
        states: Tensors that the runtime keeps from call to call, such as the decoder's cache.
        notes: What the toolkit said while it converted the graph, and what is done at a price.
        sparse_file: Path of the packed file that the graph's weights, or the graph itself, are
            expanded from when it is loaded; `None` where nothing is packed.
    """

    target: str
    role: Literal["vision", "embedding", "decoder"]
    file: str
    inputs: tuple[TensorSignature, ...]
    outputs: tuple[TensorSignature, ...]
    precision: Mapping[str, str] = field(default_factory=dict)
    function: str | None = None
    states: tuple[TensorSignature, ...] = ()
    notes: tuple[str, ...] = ()
    sparse_file: str | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a runtime must know to answer from the bundle.

    Attributes:
        model: Name of the source model.
        family: Family of the model specification.
        source_sha256: Digest of the source checkpoint's weights.
        recipe_sha256: Digest of the resolved recipe.
        visual_tokens: Embeddings that the vision graph returns for one image, k.
        visual_tokens_full: Positions that one image takes when `positions` is `original`, N.
        positions: `original` or `consecutive`; see `reduction.TokenReducer`.
        prompt: `image_token`, `image_token_id`, `image_prefix` and `image_suffix`.
        generation: `eos_token_ids` and `max_positions`.
        kv_cache: `layers`, `kv_heads`, `head_dim` and `dtype` of the decoder's cache, and
            `visual_layers` where later layers hold rows of text alone.
        components: The graphs.
        files: sha256 of every file of the bundle but the manifest, the report and the card.
        toolchain: Versions that produced the bundle.
    """

    model: str
    family: str
    source_sha256: str
    recipe_sha256: str
    visual_tokens: int
    visual_tokens_full: int
    positions: str
    prompt: Mapping[str, Any]
    generation: Mapping[str, Any]
    kv_cache: Mapping[str, Any]
    components: tuple[Component, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    toolchain: Mapping[str, str | None] = field(default_factory=dict)
    schema: int = BUNDLE_SCHEMA

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON values; what was added later is left out where it says nothing."""
        document = asdict(self)
        for component in document["components"]:
            if component["sparse_file"] is None:
                del component["sparse_file"]
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any], where: Path) -> Manifest:
        """Reads what `to_json` wrote.

        Raises:
            BundleError: A field is missing or unknown, or the schema is of another version.
        """
        if document.get("schema") != BUNDLE_SCHEMA:
            raise BundleError(
                f"{where}: bundle schema {document.get('schema')!r}; this version reads "
                f"{BUNDLE_SCHEMA}"
            )
        try:
            components = tuple(
                Component(
                    **{
                        **component,
                        "inputs": _signatures(component["inputs"]),
                        "outputs": _signatures(component["outputs"]),
                        "states": _signatures(component.get("states", [])),
                        "notes": tuple(component.get("notes", [])),
                    }
                )
                for component in document["components"]
            )
            return cls(**{**document, "components": components})
        except (KeyError, TypeError) as error:
            raise BundleError(f"{where}: not a manifest of a bundle: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A folder with a manifest.

    Attributes:
        path: The folder.
        manifest: Its manifest.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> Bundle:
        """Opens a bundle and, unless told otherwise, checks the digest of every file.

        Raises:
            BundleError: There is no bundle, or a file is missing or was changed.
        """
        if not (path / _MANIFEST).is_file():
            raise BundleError(f"{path}: no bundle here: {_MANIFEST} is missing")
        bundle = cls(
            path=path, manifest=Manifest.from_json(read_json(path / _MANIFEST), path / _MANIFEST)
        )
        if verify:
            bundle.verify()
        return bundle

    def verify(self) -> None:
        """Compares every file with its digest.

        Raises:
            BundleError: A file is missing or was changed; the message names it.
        """
        for name, expected in self.manifest.files.items():
            file = self.path / name
            if not file.is_file():
                raise BundleError(f"{file}: named in the manifest, but missing")
            found = file_sha256(file)
            if found != expected:
                raise BundleError(
                    f"{file}: was changed after signing: sha256 {found[:12]}…, "
                    f"manifest says {expected[:12]}…"
                )

    def component(self, target: str, role: str, function: str | None = None) -> Component:
        """The graph of one target and role; the first one where no function is named.

        Raises:
            BundleError: The bundle has none.
        """
        for component in self.manifest.components:
            if component.target != target or component.role != role:
                continue
            if function in (None, component.function):
                return component
        targets = sorted({c.target for c in self.manifest.components})
        raise BundleError(
            f"{self.path}: no {role} graph for target {target!r}; targets are {', '.join(targets)}"
        )

    def stored_bytes(self) -> int:
        """Bytes of every signed file: what an app has to ship."""
        return sum((self.path / name).stat().st_size for name in self.manifest.files)


def sign_files(path: Path, unsigned: frozenset[str]) -> dict[str, str]:
    """Digests of every file below a folder, by its relative name, in sorted order."""
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return {name: file_sha256(path / name) for name in names if name not in unsigned}


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes the manifest of a bundle folder."""
    write_json(path / _MANIFEST, manifest.to_json())


def _signatures(items: list[dict[str, Any]]) -> tuple[TensorSignature, ...]:
    return tuple(TensorSignature(**{**item, "shape": tuple(item["shape"])}) for item in items)

"""The arms of a run: one (bundle, runtime) pair each, with a name that no other arm has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.figures.graph_bytes import decoder_weight_bytes, graph_file_bytes
from pocketvlm.errors import InputError, UnsupportedError
from pocketvlm.files.reader import file_sha256
from pocketvlm.reports.measurement import MeasuredBundle
from pocketvlm.runtime.engines import EMULATED, ENGINES, choose_engine
from pocketvlm.runtime.executorch.program import require_executorch

__all__ = ["Arm", "Pair", "open_arms", "pair_all"]

Pair = tuple[Path, str | None]
"""A bundle's folder, and a runtime; `None` for the first that the bundle has graphs for."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One (bundle, runtime) pair.

    Attributes:
        name: Its name in the report.
        bundle: The bundle.
        runtime: The target whose graphs are run.
    """

    name: str
    bundle: Bundle
    runtime: str

    def describe(self) -> MeasuredBundle:
        """The bundle as its manifest and its files describe it."""
        manifest = self.bundle.manifest
        return MeasuredBundle(
            model=manifest.model,
            manifest_sha256=file_sha256(self.bundle.path / "manifest.json"),
            stored_bytes=self.bundle.stored_bytes(),
            graph_bytes=graph_file_bytes(self.bundle, self.runtime),
            decoder_weight_bytes=decoder_weight_bytes(self.bundle, self.runtime),
            visual_tokens=manifest.visual_tokens,
            visual_tokens_full=manifest.visual_tokens_full,
            kv_dtype=manifest.kv_cache.dtype,
            max_positions=manifest.generation.max_positions,
            precision={
                part: label
                for component in manifest.components
                if component.target == self.runtime
                for part, label in component.precision.items()
            },
        )


def pair_all(bundles: Sequence[Path], runtimes: Sequence[str] = ()) -> tuple[Pair, ...]:
    """Every bundle with every runtime, bundle by bundle.

    Raises:
        InputError: A runtime is named twice.
    """
    for name, count in Counter(runtimes).items():
        if count > 1:
            raise InputError(f"runtime {name!r} is named {count} times")
    return tuple((bundle, runtime) for bundle in bundles for runtime in runtimes or (None,))


def open_arms(pairs: Sequence[Pair], *, is_host: bool = True) -> tuple[Arm, ...]:
    """The arms of a run.

    Args:
        pairs: Bundles with their runtimes.
        is_host: Whether the engines of this host run them.

    Raises:
        BundleError: A folder holds no bundle, or one that was changed.
        InputError: There is no pair, no such runtime, or a bundle lacks its runtime.
        MissingExtraError: An engine is not installed on this host.
        UnsupportedError: An engine would be emulated on this host, so that its speed means nothing.
    """
    if not pairs:
        raise InputError("there is no bundle to measure")
    opened = {path: Bundle.open(path) for path, _ in pairs}
    chosen = [(opened[path], _choose_runtime(opened[path], asked)) for path, asked in pairs]
    for bundle, runtime in chosen if is_host else ():
        if runtime in EMULATED:
            raise UnsupportedError(
                f"{bundle.path}: the engine of {runtime} is not on this host; `pocketvlm "
                "verify-coreml` times its graphs on an Apple machine"
            )
        if runtime == "executorch":
            require_executorch()
    names = _name_arms([bundle.path for bundle, _ in chosen], [runtime for _, runtime in chosen])
    return tuple(
        Arm(name=name, bundle=bundle, runtime=runtime)
        for name, (bundle, runtime) in zip(names, chosen, strict=True)
    )


def _choose_runtime(bundle: Bundle, asked: str | None) -> str:
    targets = sorted({component.target for component in bundle.manifest.components})
    if asked in ENGINES and asked not in targets:
        raise InputError(
            f"{bundle.path}: has no graphs for {asked}; it has {', '.join(targets) or 'none'}"
        )
    return choose_engine(bundle, asked)


def _name_arms(folders: Sequence[Path], runtimes: Sequence[str]) -> list[str]:
    """Names that differ: the folder's, with its parent's, its runtime or a number where needed."""
    places = [folder.resolve() for folder in folders]
    sharing = Counter(place.name for place in set(places))
    names: list[str] = []
    for place, runtime in zip(places, runtimes, strict=True):
        name = f"{place.parent.name}/{place.name}" if sharing[place.name] > 1 else place.name
        pairs = zip(places, runtimes, strict=True)
        if len({ran for where, ran in pairs if where == place}) > 1:
            name = f"{name} ({runtime})"
        names.append(name)
    counts = Counter[str]()
    for index, name in enumerate(names):
        counts[name] += 1
        if counts[name] > 1:
            names[index] = f"{name} #{counts[name]}"
    return names

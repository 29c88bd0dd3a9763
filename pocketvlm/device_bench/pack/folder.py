"""Packs the runner: the modules that it imports, scripts that start it, and what it needs.

```text
run, run.py, install   sh run < JOB; sh install makes an environment inside the folder
requirements.txt       the packages, with digests
lib/                   the package, as far as the runner imports it, without torch
wheels/                the packages' files, where a folder of them was given
runner.json            version, runtime, and the digest of every other file
```

The same package and the same wheels give the same bytes, with the same times.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pocketvlm.device_bench.pack.closure import import_closure
from pocketvlm.device_bench.pack.requirements import (
    Pin,
    distributions_of,
    locked_pins,
    torch_pin,
)
from pocketvlm.errors import InputError
from pocketvlm.files.publish import replace_directory
from pocketvlm.files.reader import file_sha256
from pocketvlm.machine import package_version

__all__ = ["RUNTIMES", "PackedRunner", "pack_runner"]

_WORKER = "pocketvlm.device_bench.runner.worker"
_SCRIPTS = Path(__file__).with_name("scripts")
_TIME_S = 315532800  # 1980-01-01, the first moment that every archive format knows


@dataclass(frozen=True, kw_only=True)
class _Runtime:
    """What a runtime adds to the runner.

    Attributes:
        modules: Modules that it starts by their names, in separate processes.
        packages: Top-level modules of other packages that it alone imports.
    """

    modules: tuple[str, ...] = ()
    packages: frozenset[str] = frozenset()


RUNTIMES: Mapping[str, _Runtime] = {
    "onnx": _Runtime(),
    "executorch": _Runtime(
        modules=("pocketvlm.runtime.executorch.worker",),
        packages=frozenset({"executorch", "torch"}),
    ),
    "coreml": _Runtime(packages=frozenset({"coremltools"})),
}
"""The runtimes that a runner can be packed for; each also has what `onnx` needs."""


@dataclass(frozen=True, kw_only=True)
class PackedRunner:
    """A packed runner.

    Attributes:
        path: Its folder.
        modules: How many modules of this package it holds.
        requirements: The packages that it needs, as `name==version`.
        stored_bytes: Bytes of all its files.
    """

    path: Path
    modules: int
    requirements: tuple[str, ...]
    stored_bytes: int


def pack_runner(out: Path, *, runtime: str = "onnx", wheels: Path | None = None) -> PackedRunner:
    """Writes the runner's folder; an older one of ours in its place is replaced.

    Args:
        out: The folder.
        runtime: What will run bundles, one of `RUNTIMES`.
        wheels: A folder with files of the packages, which are put into the runner if their digests
            are those of the lock.

    Raises:
        InputError: The runtime is not known, the folder holds something else, or a package has no
            file among the wheels.
        MissingExtraError: The runtime is not installed here.
    """
    if runtime not in RUNTIMES:
        raise InputError(f"runtime is {runtime!r}; allowed are {', '.join(RUNTIMES)}")
    _require_ours(out)
    root = Path(__file__).parents[3]
    closure = import_closure(root, (_WORKER, *RUNTIMES[runtime].modules))
    others = frozenset().union(*(one.packages for one in RUNTIMES.values()))
    foreign = set(closure.foreign) - (others - RUNTIMES[runtime].packages)
    needs_torch = "torch" in foreign
    pins = locked_pins(name for name in distributions_of(sorted(foreign)) if name != "torch")
    chosen = _choose_wheels(wheels, pins) if wheels is not None else {}
    with replace_directory(out) as folder:
        for file in closure.files:
            _copy(root / file, folder / "lib" / file)
        _write(folder / "lib" / f"pocketvlm-{package_version()}.dist-info" / "METADATA", _METADATA)
        for script in ("run", "run.py", "install"):
            _copy(_SCRIPTS / script, folder / script)
        _write(folder / "requirements.txt", "".join(f"{pin}\n" for pin in pins.values()))
        if needs_torch:
            _write(folder / "torch.txt", f"{torch_pin()}\n")
        for name, file in chosen.items():
            _copy(file, folder / "wheels" / name)
        _write(folder / "runner.json", _describe(folder, runtime))
        _fix_times(folder)
    return PackedRunner(
        path=out,
        modules=len(closure.files),
        requirements=tuple(pin.split()[0] for pin in pins.values())
        + ((torch_pin(),) if needs_torch else ()),
        stored_bytes=sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
    )


_METADATA = f"Metadata-Version: 2.1\nName: pocketvlm\nVersion: {package_version()}\n"


def _require_ours(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out}: is not a folder; name a new one, or an older packed runner")
    if any(out.iterdir()) and not (out / "runner.json").is_file():
        raise InputError(
            f"{out}: holds something else than a packed runner; name a new folder, or an older "
            "packed runner, which is replaced"
        )


def _choose_wheels(folder: Path, pins: Mapping[str, Pin]) -> dict[str, Path]:
    """The files of a folder that the lock knows, by name; for every package at least one."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of wheels")
    files = {file: file_sha256(file) for file in sorted(folder.glob("*.whl"))}
    chosen: dict[str, Path] = {}
    for pin in pins.values():
        fitting = [file for file, digest in files.items() if digest in pin.digests]
        if not fitting:
            raise InputError(
                f"{folder}: has no wheel of {pin.split()[0]} with a digest of the lock"
            )
        chosen |= {file.name: file for file in fitting}
    return chosen


def _describe(folder: Path, runtime: str) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    document = {
        "pocketvlm": package_version(),
        "runtime": runtime,
        "files": {file.relative_to(folder).as_posix(): file_sha256(file) for file in files},
    }
    return json.dumps(document, indent=2) + "\n"


def _copy(source: Path, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, file)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8", newline="\n")


def _fix_times(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):  # a folder after what is in it
        os.utime(path, (_TIME_S, _TIME_S))

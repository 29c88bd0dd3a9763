"""Builds the environment: downloads, checks digests, unpacks, and tries it.

Nothing is installed and nothing of the system is changed: apt-get works on private lists and
checks Debian's signatures, packages are unpacked into the folder, and pip takes nothing but the
files whose digests `wheels.txt` names.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocketvlm.context import RunContext
from pocketvlm.emulation.arm64.emulator import CPUS, DEFAULT_CPU, Emulator
from pocketvlm.emulation.arm64.environment import (
    ARCHITECTURE,
    EMULATOR_PACKAGE,
    PREPARE,
    PYTHON,
    PYTHON_PACKAGES,
    SUITE,
    Environment,
    environment_folder,
    find_environment,
    locked_wheels,
    require_foreign_host,
)
from pocketvlm.errors import InputError, MissingExtraError, PocketVLMError, UnsupportedError
from pocketvlm.files.publish import replace_directory
from pocketvlm.files.reader import file_sha256
from pocketvlm.json_io import write_json

__all__ = ["open_emulator", "prepare_environment"]

_TASK = "arm64 environment"
_STEPS = 4
_MIRROR = "DEBIAN_MIRROR"
"""The variable that names a mirror of Debian, where apt knows none."""
_ASK_MIRROR = ("apt-get", "indextargets", "--format", "$(SITE)", "Origin: Debian", "Label: Debian")
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_EMULATOR_FILE = "./usr/bin/qemu-aarch64"
_GLIBCS = (17, 27, 28)
"""Minor versions of glibc that wheels are built for; Debian's is newer than all of them."""
_TIMEOUT_S = 1800.0
_TRIAL = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "import jinja2, numpy, onnxruntime, PIL.Image, tokenizers"
)


def prepare_environment(ctx: RunContext) -> Environment:
    """Builds the environment where there is none.

    Args:
        ctx: Whom to tell about progress.

    Raises:
        UnsupportedError: This host cannot have one.
        MissingExtraError: A tool that builds it is not installed.
        PocketVLMError: Something could not be downloaded, or what was unpacked does not run.
        StorageError: There is no room for it.
    """
    require_foreign_host()
    environment = Environment(folder=environment_folder())
    if environment.is_complete:
        return environment
    _require_tools()
    with replace_directory(environment.folder) as folder:
        made = Environment(folder=folder)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            ctx.report(_TASK, 0, _STEPS, "Debian's packages")
            packages = _download_packages(Path(scratch) / "debian")
            ctx.report(_TASK, 1, _STEPS, "wheels")
            wheels = _download_wheels(Path(scratch) / "wheels")
            ctx.report(_TASK, 2, _STEPS, "unpacking")
            contents: dict[str, Any] = {
                "packages": [_unpack_package(file, made) for file in packages],
                "wheels": [_unpack_wheel(file, made) for file in wheels],
            }
        # Debian's programs look for their loader in /lib.
        (made.root / "lib").symlink_to("usr/lib")
        ctx.report(_TASK, 3, _STEPS, "first start, which compiles")
        contents["emulator"] = _try(made)
        write_json(made.contents_file, contents)
    for program in environment.programs:  # what is published loses the mode of programs
        program.chmod(0o755)
    ctx.report(_TASK, _STEPS, _STEPS, str(environment.folder))
    return environment


def open_emulator(ctx: RunContext, *, cpu: str | None, prepare: bool) -> Emulator:
    """The ARM64 environment as one processor.

    Args:
        ctx: Progress.
        cpu: The processor, one of `CPUS`; `None` for `DEFAULT_CPU`.
        prepare: Whether the environment is built if it is not there.

    Raises:
        InputError: The processor is unknown.
        UnsupportedError: This host cannot have the environment.
        MissingExtraError: It is not there, or what builds it is not.
    """
    chosen = DEFAULT_CPU if cpu is None else cpu
    if chosen not in CPUS:
        raise InputError(f"--cpu is {chosen!r}; allowed are {', '.join(CPUS)}")
    environment = prepare_environment(ctx) if prepare else find_environment()
    return Emulator(environment=environment, cpu=chosen)


def _require_tools() -> None:
    needed = {"apt-get": "apt", "dpkg-deb": "dpkg", "dpkg": "dpkg"}
    missing = sorted({needed[tool] for tool in needed if shutil.which(tool) is None})
    if not _KEYRING.is_file():
        missing.append("debian-archive-keyring")
    if missing:
        raise MissingExtraError(
            f"`{PREPARE}` needs Debian's {', '.join(missing)}, which is not installed here"
        )
    if importlib.util.find_spec("pip") is None:
        raise MissingExtraError(
            f"`{PREPARE}` needs pip; `{sys.executable} -m ensurepip` installs it"
        )


def _download_packages(folder: Path) -> list[Path]:
    """Packages of the emulator, for this host, and of its Python, from lists in `folder`."""
    for name in ("lists/partial", "cache/archives/partial", "packages"):
        (folder / name).mkdir(parents=True)
    host = _run(["dpkg", "--print-architecture"], folder, "dpkg").strip()
    (folder / "status").touch()
    known = _run(_ASK_MIRROR, folder, "apt-get indextargets").splitlines()
    mirror = known[0] if known else os.environ.get(_MIRROR)
    if not mirror:
        raise UnsupportedError(
            "apt knows no mirror of Debian: run `apt-get update` on a Debian, or name a mirror in "
            f"the variable {_MIRROR}"
        )
    (folder / "sources.list").write_text(
        f"deb [arch={ARCHITECTURE},{host} signed-by={_KEYRING}] {mirror} {SUITE} main\n",
        encoding="utf-8",
    )
    options = {
        "APT::Architecture": host,
        "APT::Architectures::": ARCHITECTURE,
        "Dir::State": folder,
        "Dir::State::lists": folder / "lists",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    _run([*apt, "update"], folder, "apt-get update")
    wanted = [f"{EMULATOR_PACKAGE}:{host}", *(f"{name}:{ARCHITECTURE}" for name in PYTHON_PACKAGES)]
    _run([*apt, "download", *wanted], folder / "packages", "apt-get download")
    return sorted((folder / "packages").glob("*.deb"))


def _download_wheels(folder: Path) -> list[Path]:
    folder.mkdir()
    lock = folder / "wheels.txt"
    lock.write_text(locked_wheels(), encoding="utf-8")
    version = PYTHON.removeprefix("python")
    own = f"cp{version.replace('.', '')}"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download"]
    command += ["--no-deps", "--require-hashes", "--only-binary=:all:", "--implementation=cp"]
    command += [f"--python-version={version}", f"--abi={own}", "--abi=abi3", "--abi=none"]
    command += [f"--platform=manylinux_2_{glibc}_aarch64" for glibc in reversed(_GLIBCS)]
    command += ["--platform=manylinux2014_aarch64", f"--requirement={lock}", f"--dest={folder}"]
    _run(command, folder, "pip download")
    return sorted(folder.glob("*.whl"))


def _unpack_package(file: Path, made: Environment) -> dict[str, Any]:
    fields = ("Package", "Version", "Architecture")
    found = _run(["dpkg-deb", "--field", str(file), *fields], file.parent, "dpkg-deb")
    about = {
        name.lower(): value
        for name, _, value in (line.partition(": ") for line in found.splitlines())
    }
    if about["package"] == EMULATOR_PACKAGE:  # a hundred emulators, of which one is needed
        _unpack_emulator(file, made.emulator)
    else:
        _run(["dpkg-deb", "--extract", str(file), str(made.root)], file.parent, "dpkg-deb")
    return {**about, "sha256": file_sha256(file)}


def _unpack_emulator(package: Path, emulator: Path) -> None:
    with (
        subprocess.Popen(  # noqa: S603  (a command of this module)
            ["dpkg-deb", "--fsys-tarfile", str(package)],  # noqa: S607  (found on PATH before)
            stdout=subprocess.PIPE,
        ) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for member in archive:
            content = archive.extractfile(member) if member.name == _EMULATOR_FILE else None
            if content is not None:
                with emulator.open("wb") as out:
                    shutil.copyfileobj(content, out)
    if not emulator.is_file():
        raise PocketVLMError(f"{package.name}: holds no {_EMULATOR_FILE.removeprefix('.')}")
    emulator.chmod(0o755)


def _unpack_wheel(file: Path, made: Environment) -> dict[str, Any]:
    name, version, *_ = file.name.split("-")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(made.site)  # noqa: S202  (its digest is locked)
    return {"name": name, "version": version, "file": file.name, "sha256": file_sha256(file)}


def _try(made: Environment) -> str:
    """Imports every wheel; returns the emulator's version."""
    emulator = Emulator(environment=made, cpu=DEFAULT_CPU)
    trial = ["-c", _TRIAL, str(made.site)]
    _run(emulator.python_command(*trial), made.folder, "the emulated Python", emulator.variables())
    return emulator.version()


def _run(
    command: Sequence[str], folder: Path, what: str, variables: Mapping[str, str] | None = None
) -> str:
    """Standard output of a command.

    Raises:
        PocketVLMError: It failed; the message has the last line that it wrote.
    """
    try:
        finished = subprocess.run(  # noqa: S603  (commands of this module)
            command,
            cwd=folder,
            env=variables,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PocketVLMError(f"{what}: did not end within {_TIMEOUT_S:g} s") from error
    if finished.returncode != 0:
        lines = finished.stderr.strip().splitlines() or finished.stdout.strip().splitlines()
        raise PocketVLMError(
            f"{what}: ended with {finished.returncode}: {lines[-1] if lines else 'no message'}"
        )
    return finished.stdout

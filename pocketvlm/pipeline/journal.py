"""The state of a run on disk, from which a killed run resumes.

A run folder belongs to one run; `run.json` says which. What an unfinished run needs is in `.work`:
one folder per stage, named by its key, with the layers that are finished and, once it is done, its
checkpoint. Everything there is stored with a digest. What is damaged, or was made under other
conditions, counts as missing and is made again, so no folder is ever stuck. `log.jsonl` is written
for people and is never read.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pocketvlm.compress.layerwise.scratch import find_document, keep_document
from pocketvlm.errors import BundleError, RecipeError
from pocketvlm.files.publish import recover
from pocketvlm.files.signed_folder import sign_files
from pocketvlm.json_io import read_json
from pocketvlm.pipeline.identity import RunIdentity
from pocketvlm.pipeline.run_lock import hold_lock, refuse_if_held

__all__ = ["Journal"]

_MARKER = "run.json"
_WORK = ".work"
_PUBLISHED = ("checkpoint", "bundle", "float-baseline")
_OWN = (
    *(_MARKER, _WORK, *_PUBLISHED, "recipe.yaml", "log.jsonl"),
    *("report.json", "report.html", "scene.png"),
)
_ASIDE = re.compile(
    "(" + "|".join(map(re.escape, _OWN)) + r")(\.[0-9a-f]{8})?(\.retired)?\.partial"
)
_BEGINNING = b'{\n  "'
_WORDS = (b'"key"', b'"what"', b'"sha256"', b'"model"')


@dataclass(frozen=True, kw_only=True)
class Journal:
    """The journal of one run folder.

    Attributes:
        out: The run folder.
        identity: The run that it belongs to.
    """

    out: Path
    identity: RunIdentity

    @classmethod
    @contextmanager
    def open(cls, out: Path, identity: RunIdentity, what: str) -> Iterator[Journal]:
        """Opens a run folder, or starts one in an empty folder, and locks it.

        Args:
            out: The run folder.
            identity: The run.
            what: The same in words, for people.

        Raises:
            RecipeError: The folder holds something else, which stays untouched, or another process
                is writing it.
        """
        _require_own(out, identity)
        out.mkdir(parents=True, exist_ok=True)
        with hold_lock(out / _WORK):
            _require_own(out, identity)
            for name in _PUBLISHED:
                recover(out / name)
            _sweep(out)
            document = {"key": identity.key, "what": what, **asdict(identity)}
            keep_document(out / _MARKER, document)
            yield cls(out=out, identity=identity)

    @staticmethod
    def refuse_if_busy(out: Path) -> None:
        """Checks, before anything is loaded, that no other process is writing a run folder.

        Raises:
            RecipeError: One does.
        """
        refuse_if_held(out / _WORK)

    @property
    def work(self) -> Path:
        """The working folder, which only an unfinished run needs."""
        return self.out / _WORK

    def stage_dir(self, stage_key: str) -> Path:
        """The folder of a stage's finished layers, and of its checkpoint once it is done."""
        return self.work / stage_key[:16]

    def finish_stage(self, stage_key: str, record: Mapping[str, Any]) -> None:
        """Records that a stage's checkpoint is complete, with the stage's record."""
        folder = self.stage_dir(stage_key)
        files = sign_files(folder / "checkpoint", ())
        keep_document(
            folder / "finished.json", {"key": stage_key, "files": files, "record": record}
        )
        self.log("stage", key=stage_key, record=record)

    def finished_checkpoint(self, stage_key: str) -> Path | None:
        """The checkpoint that a stage finished in this or an earlier attempt, if undamaged."""
        path = self.stage_dir(stage_key) / "checkpoint"
        if not path.is_dir():
            return None
        note = find_document(path.with_name("finished.json"))
        if note is None or note["key"] != stage_key:
            return None
        if sign_files(path, ()) != note["files"]:
            self.log("damaged", stage=stage_key)
            return None
        return path

    def stage_record(self, stage_key: str) -> Mapping[str, Any] | None:
        """The record of the attempt that finished a stage, with its time and memory."""
        note = find_document(self.stage_dir(stage_key) / "finished.json")
        return None if note is None else dict(note["record"])

    def keep(self, name: str, key: str, value: Mapping[str, Any]) -> None:
        """Stores a result of this run that does not belong to a stage."""
        keep_document(self.work / f"{name}.json", {"key": key, "value": value})

    def find(self, name: str, key: str) -> Mapping[str, Any] | None:
        """What `keep` stored under the same key, if it is undamaged."""
        found = find_document(self.work / f"{name}.json")
        return dict(found["value"]) if found is not None and found["key"] == key else None

    def log(self, event: str, **values: Any) -> None:
        """Appends one event to `log.jsonl`."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values}) + "\n"
        with (self.out / "log.jsonl").open("a+b") as stream:
            if stream.tell():
                stream.seek(-1, 2)
                if stream.read(1) != b"\n":  # the run was killed while writing that line
                    line = "\n" + line
            stream.write(line.encode())

    def clean(self) -> None:
        """Removes the working folder."""
        shutil.rmtree(self.work, ignore_errors=True)


def _require_own(out: Path, identity: RunIdentity) -> None:
    """Makes sure that a folder is this run's, or new.

    A folder with a damaged `run.json` counts as this run's unless something in it says otherwise.

    Raises:
        RecipeError: The folder holds something else.
    """
    if not out.exists():
        above = next(parent for parent in out.absolute().parents if parent.exists())
        if not above.is_dir():
            raise RecipeError(f"{out}: {above} is a file, and no folder can be made in it")
        return
    if not out.is_dir():
        raise RecipeError(f"{out}: is a file; --out is a folder")
    names = {path.name for path in out.iterdir()}
    marker = out / _MARKER
    if _MARKER not in names:
        # A run makes its lock first and `run.json` next, and may be killed between the two.
        has_lock = (out / _WORK / "lock").is_file()
        foreign = [name for name in names if not (_ASIDE.fullmatch(name) or name in _OWN)]
        if foreign or (names & set(_OWN) and not has_lock):
            raise RecipeError(f"{out}: is not empty and holds no run; choose another --out")
        _require_matching_results(out, identity)
        return
    found = find_document(marker)
    if found is not None and {"key", "what", *asdict(identity)} <= found.keys():
        if found["key"] == identity.key:
            return
        other = [name for name, value in asdict(identity).items() if found[name] != value]
        differing = [name for name in other if name != "weights"]
        raise RecipeError(
            f"{out}: holds another run ({found['what']}), of another {' and '.join(differing)}; "
            "choose another --out or remove it first"
        )
    if not _was_ours(marker) and not (out / _WORK / "lock").is_file():
        raise RecipeError(
            f"{out}: holds a {_MARKER} that is not of a run of pocketvlm; choose another --out"
        )
    _require_matching_results(out, identity)


def _was_ours(marker: Path) -> bool:
    """Whether an unreadable `run.json` was written here: truncated, empty or with a flipped bit."""
    try:
        content = marker.read_bytes()[:4096]
    except OSError:
        return False
    is_torn = _BEGINNING.startswith(content[: len(_BEGINNING)])
    return not content.strip(b"\0") or is_torn or any(word in content for word in _WORDS)


def _require_matching_results(out: Path, identity: RunIdentity) -> None:
    """Makes sure that no results of another run are replaced if `run.json` is unreadable."""
    expected = {
        "checkpoint/pocketvlm.json": {"source.sha256": identity.weights},
        "bundle/manifest.json": {
            "source_sha256": identity.weights,
            "recipe_sha256": identity.recipe,
        },
    }
    for name, digests in expected.items():
        try:
            document = read_json(out / name)
        except BundleError:
            continue  # it is missing, or damaged as well
        for key, digest in digests.items():
            value: Any = document
            for step in key.split("."):
                value = value.get(step) if isinstance(value, Mapping) else None
            if isinstance(value, str) and value != digest:
                raise RecipeError(
                    f"{out}: holds another run, whose {_MARKER} is damaged; choose another --out "
                    "or remove it first"
                )


def _sweep(out: Path) -> None:
    """Removes what killed attempts left half written."""
    for path in out.iterdir():
        if _ASIDE.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)

"""What a run remembers of itself, so that a killed one goes on where it stopped.

A run directory belongs to one model, one recipe and one calibration set; their joint digest is its
key. Stage i has a key of its own, which also covers the stages before it: the checkpoint that it
finished, and the layers of one that it did not, lie in a folder of that name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketvlm.errors import RecipeError
from pocketvlm.json_io import read_json, write_json

__all__ = ["Journal", "stage_keys"]


def stage_keys(source_sha256: str, calibration_sha256: str, stages: Sequence[Any]) -> list[str]:
    """One key a stage; it changes with whatever that stage's result depends on.

    Args:
        source_sha256: Digest of the source weights.
        calibration_sha256: Digest of the calibration set.
        stages: The stages' parameters, as JSON values.
    """
    key = hashlib.sha256(f"{source_sha256} {calibration_sha256}".encode()).hexdigest()
    keys = []
    for stage in stages:
        document = json.dumps(stage, sort_keys=True)
        key = hashlib.sha256(f"{key} {document}".encode()).hexdigest()
        keys.append(key)
    return keys


@dataclass(frozen=True, kw_only=True)
class Journal:
    """The memory of one run directory.

    Attributes:
        out: The run directory.
        key: What it belongs to.
    """

    out: Path
    key: str

    @classmethod
    def open(cls, out: Path, key: str, what: str) -> Journal:
        """Opens a run directory, or starts one in an empty folder.

        Raises:
            RecipeError: The folder holds something else, which is not touched.
        """
        marker = out / "run.json"
        if marker.is_file():
            found = read_json(marker)
            if found.get("key") != key:
                raise RecipeError(
                    f"{out}: holds another run ({found.get('what')}); choose another --out or "
                    "remove it first"
                )
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RecipeError(f"{out}: is not empty and holds no run; choose another --out")
        else:
            out.mkdir(parents=True, exist_ok=True)
            write_json(marker, {"key": key, "what": what})
        return cls(out=out, key=key)

    def stage_dir(self, stage_key: str) -> Path:
        """Where a stage keeps its finished layers, and its checkpoint once it is done."""
        return self.out / ".work" / stage_key[:16]

    def finished_checkpoint(self, stage_key: str) -> Path | None:
        """The checkpoint that a stage finished in this or an earlier attempt."""
        path = self.stage_dir(stage_key) / "checkpoint"
        return path if (path / "pocketvlm.json").is_file() else None

    def log(self, event: str, **values: Any) -> None:
        """Appends one event to `log.jsonl`."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values})
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def last(self, event: str, **match: Any) -> Mapping[str, Any] | None:
        """The last event of this name whose values include `match`; a torn line is passed over."""
        file = self.out / "log.jsonl"
        if not file.is_file():
            return None
        for line in reversed(file.read_text(encoding="utf-8").splitlines()):
            try:
                entry: dict[str, Any] = json.loads(line)
            except json.JSONDecodeError:
                continue  # the run was killed while it wrote this line
            if entry.get("event") == event and all(entry.get(k) == v for k, v in match.items()):
                return entry
        return None

    def clean(self) -> None:
        """Removes what only an unfinished run needs."""
        shutil.rmtree(self.out / ".work", ignore_errors=True)

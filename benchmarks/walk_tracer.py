"""Records which functions of a package lie on a walk; `tree_counts.py` loads it into a process.

A walk is followed by its stations: calls into libraries that mean the same in every version of this
package (a picture is opened, a matrix is factorized, a session is run). At each station the
functions of the package that are on the call stack are noted: those are what a reader has to pass
through to get there, and each is one hop. Lambdas and comprehensions belong to their functions.

Environment: WALK_PACKAGE is the folder of the package, WALK_NAME one of `WALKS`, WALK_OUT a folder
that gets one JSON file per process and route: the functions as "file:name", in order.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["WALKS", "start"]

WALKS = ("picture_to_code", "weight_to_file", "question_to_token")
_TARGETS = ("onnx", "coreml", "executorch")

Routes = dict[str, dict[str, None]]
Event = Callable[[FrameType, str, Any], bool]


class _Walk:
    """What is recorded: ordered functions by route."""

    def __init__(self, package: str) -> None:
        self.package = package + os.sep
        self.routes: Routes = {}

    def owns(self, frame: FrameType | None) -> bool:
        return frame is not None and frame.f_code.co_filename.startswith(self.package)

    def name(self, frame: FrameType) -> str:
        return f"{frame.f_code.co_filename[len(self.package) :]}:{frame.f_code.co_qualname}"

    def stack(self, frame: FrameType | None) -> list[str]:
        """Functions of the package that are being run, outermost first."""
        names = []
        while frame is not None:
            if self.owns(frame) and not frame.f_code.co_name.startswith("<"):
                names.append(self.name(frame))
            frame = frame.f_back
        return names[::-1]


class _PictureToCode(_Walk):
    """From the command line to the first packed codes of GPTQ.

    Stations: the picture is opened (Pillow), patches are embedded (conv2d), the Hessian is summed
    (the first addmm_ or add_ after that) and factorized (cholesky_ex), a column is rounded (clamp_)
    and its error spread (addr_), each the last before the codes are packed.
    """

    def __init__(self, package: str) -> None:
        super().__init__(package)
        self.last: dict[str, list[str]] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> bool:
        code = frame.f_code
        if event == "call":
            if code.co_name == "open" and code.co_filename.endswith("PIL/Image.py"):
                self.last["open"] = self.stack(frame)
            elif code.co_name == "pack_codes" and self.owns(frame) and "addr_" in self.last:
                order = ("open", "conv2d", "sum", "factor", "clamp_", "addr_")
                for stack in (*map(self.last.get, order), self.stack(frame)):
                    self.routes.setdefault("gptq", {}).update(dict.fromkeys(stack or ()))
                return True
        elif event == "c_call" and argument.__name__ in _OPERATORS:
            name = _OPERATORS[argument.__name__]
            if name == "conv2d":
                self.last.pop("sum", None)
            if name != "sum" or name not in self.last:
                self.last[name] = self.stack(frame)
        return False


_OPERATORS = {
    **{name: name for name in ("conv2d", "addr_", "clamp_")},
    **dict.fromkeys(("addmm_", "add_"), "sum"),
    "linalg_cholesky_ex": "factor",
}


class _WeightToFile(_Walk):
    """From the command line to one affine weight in the layout of each runtime.

    Every function of `export` that is called with the weight counts, with its callers and the
    functions that it calls directly. Of each target the first weight is followed, until the
    certificate begins.
    """

    def __init__(self, package: str) -> None:
        super().__init__(package)
        self.followed: dict[str, int] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> bool:
        file = frame.f_code.co_filename
        if (
            event == "call"
            and self.owns(frame)
            and file.startswith(f"{self.package}export{os.sep}")
        ):
            if file.endswith(("export/parity.py", "parity/certify.py")) and self.routes:
                return "certi" in frame.f_code.co_name
            caller = frame.f_back
            holds = [_affine(frame), *([_affine(caller)] if caller and self.owns(caller) else [])]
            found = next((weight for weight in holds if weight), None)
            stack = self.stack(frame) if found else []
            target = next((t for t in _TARGETS if any(f"export/{t}/" in s for s in stack)), None)
            if target and self.followed.setdefault(target, found or 0) == found:
                self.routes.setdefault(target, {}).update(dict.fromkeys(stack))
        return False


def _affine(frame: FrameType) -> int | None:
    """Which affine weight a function was called with."""
    code = frame.f_code
    for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
        value = frame.f_locals.get(name)
        if type(value).__name__ == "AffineWeight":
            return id(value)
    return None


class _QuestionToToken(_Walk):
    """From the command line to the first printed token.

    Stations: a picture is opened and resized (Pillow), text is encoded and decoded (tokenizers),
    a session is run (ONNX Runtime), and the first text after a token is printed.
    """

    has_token = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> bool:
        is_station = False
        if event == "call":
            code = frame.f_code
            is_station = code.co_name == "open" and code.co_filename.endswith("PIL/Image.py")
        elif event == "c_call":
            owner = type(getattr(argument, "__self__", None)).__module__
            name = argument.__name__
            is_token = name == "decode" and owner.startswith("tokenizers")
            self.has_token = self.has_token or is_token
            is_printed = self.has_token and name in ("print", "write")
            is_station = (
                is_token
                or is_printed
                or (name == "resize" and owner != "numpy")
                or (name == "encode" and owner.startswith("tokenizers"))
                or (name.startswith("run") and "onnxruntime" in owner)
            )
            if is_printed and any("token" in s or "ask" in s for s in self.stack(frame)):
                self.routes.setdefault("ask", {}).update(dict.fromkeys(self.stack(frame)))
                return True
        if is_station:
            self.routes.setdefault("ask", {}).update(dict.fromkeys(self.stack(frame)))
        return False


def start() -> None:
    """Follows the walk that the environment names, until it or the process ends."""
    kinds = dict(zip(WALKS, (_PictureToCode, _WeightToFile, _QuestionToToken), strict=True))
    walk: Any = kinds[os.environ["WALK_NAME"]](os.environ["WALK_PACKAGE"])
    out = Path(os.environ["WALK_OUT"])

    written: dict[str, int] = {}

    def follow(frame: FrameType, event: str, argument: Any) -> None:
        is_over = walk(frame, event, argument)
        for route, names in walk.routes.items():  # at once: a process may end without a farewell
            if written.get(route) != len(names):
                written[route] = len(names)
                file = out / f"{route}-{os.getpid()}.json"
                file.write_text(json.dumps(list(names)), encoding="utf-8")
        if is_over:
            os._exit(0)

    threading.setprofile(follow)
    sys.setprofile(follow)

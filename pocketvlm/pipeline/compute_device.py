"""Where stages compute: checked before anything is loaded, and named in what results depend on."""

from __future__ import annotations

import os
import platform
import re

import torch

from pocketvlm.errors import InputError

__all__ = ["describe_device", "resolve_device"]

_NAMES = re.compile(r"cpu|mps|cuda(:\d{1,3})?")


def resolve_device(name: str) -> str:
    """A device as torch names it; of several processes on one machine each gets its own GPU.

    Args:
        name: `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        InputError: It is unknown, or is not there.
    """
    if not _NAMES.fullmatch(name):
        raise InputError(f"--device {name!r} is unknown; allowed are cpu, cuda, cuda:N and mps")
    kind, _, number = name.partition(":")
    if kind == "cpu":
        return name
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise InputError(_missing(name, "no GPU of Apple's that torch can use"))
        return name
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise InputError(_missing(name, "no CUDA device that torch can use"))
    index = int(number or int(os.environ.get("LOCAL_RANK", "0")) % count)
    if index >= count:
        raise InputError(_missing(name, f"{count} CUDA devices, from cuda:0 to cuda:{count - 1}"))
    return f"cuda:{index}"


def describe_device(name: str) -> str:
    """The kind of a device, on which sums depend in their last bits."""
    if name.startswith("cuda"):
        return torch.cuda.get_device_name(name)
    return f"{name} {platform.machine()}"


def _missing(name: str, found: str) -> str:
    return f"--device {name}: this machine has {found}; cpu works everywhere"

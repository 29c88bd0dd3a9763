"""Memory bandwidth of this machine: an upper bound of decoding, which reads every weight per token.

It is measured with a plain reduction over an array larger than any cache, as the best of a few
passes, because other processes can only slow it down. Hand-tuned kernels reach more, so the
plausibility check allows twice as much.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

__all__ = ["last_level_cache_bytes", "memory_read_bytes_s"]

_ARRAY_BYTES = 256 * 2**20
_PASSES = 5


def memory_read_bytes_s(threads: int) -> float:
    """Bytes per second that `threads` threads read together, best of five passes."""
    array = np.ones(_ARRAY_BYTES // 8, dtype=np.float64)
    parts = np.array_split(array, threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_PASSES):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, array.nbytes / (time.perf_counter() - start))
    return best


def last_level_cache_bytes() -> int | None:
    """Size of the largest data cache, or `None` where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="utf-8").strip()
        scale = {"K": 2**10, "M": 2**20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * scale)
    return max(sizes, default=None)

"""Device profiles: what is known about a device without a measurement.

A profile holds what plans are checked against and predicted from, and, for orientation, published
figures of others. Every figure has its source. None of them is mixed with measured figures, because
models, runtimes and protocols differ.
"""

from __future__ import annotations

from pocketvlm.device_bench.devices.load import (
    device_names,
    list_devices,
    load_device,
    names_profile,
)
from pocketvlm.device_bench.devices.profile import Device, Fact, PublishedFigure

__all__ = [
    "Device",
    "Fact",
    "PublishedFigure",
    "device_names",
    "list_devices",
    "load_device",
    "names_profile",
]

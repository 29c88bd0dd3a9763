"""What a device reaches: calibrated on this host, derived from a profile elsewhere."""

from __future__ import annotations

from pocketvlm.device_bench.devices import Device
from pocketvlm.device_bench.devices.derive import derive_rates
from pocketvlm.device_bench.prediction.calibration.host_file import read_calibration
from pocketvlm.device_bench.prediction.rates import Rates

__all__ = ["rates_of"]


def rates_of(device: Device) -> tuple[Rates | None, str]:
    """Rates of a device and what they are made from; without any, why."""
    if device.transport == "host":
        calibration = read_calibration()
        if isinstance(calibration, str):
            return None, calibration
        return calibration.rates, f"calibrated {calibration.measured_at}"
    derived = derive_rates(device)
    if isinstance(derived, str):
        return None, derived
    return derived, "derived from its profile: the order of magnitude, docs/devices.md says how far"

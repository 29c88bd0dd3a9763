"""Commands about devices: what their profiles know, and the calibration of this host."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pocketvlm.cli.console import print_json, say
from pocketvlm.cli.options import JsonOption
from pocketvlm.cli.progress import show_progress

__all__ = ["calibrate", "devices"]


def devices(
    name: Annotated[
        str | None,
        typer.Argument(help="The device to show, or a profile of your own: ./my-phone.yaml."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List device profiles, or show one with its sources.

    Predictions stand beside what others published of the device.
    """
    from pocketvlm.device_bench.devices import list_devices, load_device
    from pocketvlm.json_io import encode
    from pocketvlm.pipeline.published import published_factors

    if name is None:
        profiles = list_devices()
        for profile in profiles:
            say(f"{profile.name:<18} {profile.description}")
        if as_json:
            print_json({"devices": [encode(profile) for profile in profiles]})
        return
    device = load_device(name)
    factors = published_factors(device)
    for line in device.lines():
        say(line)
    for row in factors:
        figure = row.figure
        say(
            f"predicted      {figure.metric} of {figure.model}, {figure.runtime}: "
            f"{row.predicted:.1f}, {row.factor:.2f} times the published {figure.value:g}"
        )
    if as_json:
        print_json({**encode(device), "predicted": [encode(row) for row in factors]})


def calibrate(*, threads: int | None, as_json: bool) -> None:
    """Measures what this host's kernels reach, keeps it, and says where."""
    from pocketvlm.context import RunContext
    from pocketvlm.device_bench.prediction.calibration.host import calibrate_host
    from pocketvlm.device_bench.prediction.calibration.host_file import calibration_path
    from pocketvlm.json_io import encode
    from pocketvlm.pipeline.compress_time.measure import calibrate_compress
    from pocketvlm.pipeline.compress_time.rates import compress_calibration_path

    count = threads or _physical_cores()
    with show_progress() as on_progress:
        ctx = RunContext(on_progress=on_progress)
        found = calibrate_host(count, ctx)
        compressing = calibrate_compress(count, ctx)
    rates = found.rates
    say(f"calibrated     {found.processor}, {rates.threads} threads, in {found.seconds:.0f} s")
    if found.load_average_1m is not None:
        before, after = found.load_average_1m
        say(f"load           {before:.1f} before, {after:.1f} after, on {found.cores} cores")
    say(f"memory         {rates.memory_read_bytes_s / 1e9:.1f} GB/s read")
    for kernel, product in rates.products.items():
        say(
            f"  {kernel:<12} {product.macs_s / 1e9:8.1f} G multiplications/s of many rows, "
            f"{product.weights_s / 1e9:6.1f} G weights/s of one"
        )
    for reached in compressing.rates:
        say(
            f"  compress     {reached.product_macs_s / 1e9:8.1f} G multiplications/s in float32, "
            f"{reached.threads} threads"
        )
    say(f"kept in        {calibration_path()}")
    say(f"               {compress_calibration_path()}")
    if as_json:
        own = {"path": str(compress_calibration_path()), **encode(compressing)}
        print_json({"path": str(calibration_path()), **encode(found), "compress": own})


def _physical_cores() -> int:
    import psutil

    return psutil.cpu_count(logical=False) or os.cpu_count() or 1

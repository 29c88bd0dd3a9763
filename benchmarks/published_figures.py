"""How far predictions from device profiles are from what others published of these devices.

    python benchmarks/published_figures.py

Prints every published rate of a CPU whose decoder has the sizes of a known shape beside the
prediction, the share of the memory's peak that a published decode rate implies, and the medians;
one JSON line at the end. Nothing is measured.
"""

from __future__ import annotations

import json

from pocketvlm.device_bench.devices import list_devices, load_device
from pocketvlm.device_bench.devices.derive import READ_SHARE
from pocketvlm.device_bench.prediction.rates import kernel_bits
from pocketvlm.json_io import encode
from pocketvlm.pipeline.published import PublishedFactor, median_factor, published_factors

_LARGE = 4e8


def main() -> None:
    """Prints the table."""
    rows = [row for device in list_devices() for row in published_factors(device)]
    print(
        f"{'device':<17}{'model':<22}{'runtime':<26}{'figure':<15}"
        f"{'published':>10}{'predicted':>11}{'factor':>8}{'share':>7}"
    )
    for row in rows:
        figure = row.figure
        share = implied_share(row)
        print(
            f"{row.device:<17}{figure.model:<22}{figure.runtime:<26}{figure.metric:<15}"
            f"{figure.value:>10.1f}{row.predicted:>11.1f}{row.factor:>8.2f}"
            f"{'' if share is None else f'{share:.2f}':>7}"
        )
    large = [row for row in rows if row.decoder_weights >= _LARGE]
    medians = {
        f"{size} {metric}": median_factor(chosen, metric)
        for size, chosen in (("all", rows), ("0.4 billion weights or more", large))
        for metric in ("prefill_tok_s", "decode_tok_s")
    }
    print()
    for name, factor in medians.items():
        print(f"median factor, {name}: {factor:.2f}")
    print(f"share of the memory's peak that predictions take decoding to read: {READ_SHARE}")
    document = {"rows": [encode(row) for row in rows], "medians": medians}
    print(json.dumps({"benchmark": "published_figures", **document}))


def implied_share(row: PublishedFactor) -> float | None:
    """Share of the peak that a published decode rate reads of weights; `None` for other figures."""
    figure = row.figure
    peak = load_device(row.device).memory_bandwidth_bytes_s.value
    if figure.metric != "decode_tok_s" or figure.kernel is None or peak is None:
        return None
    return figure.value * row.decoder_weights * kernel_bits(figure.kernel) / 8 / peak


if __name__ == "__main__":
    main()

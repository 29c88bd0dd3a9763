from __future__ import annotations

from pathlib import Path

import pytest

from pocketvlm.device_bench.devices import list_devices, load_device
from pocketvlm.device_bench.devices.derive import derive_rates, load_reference
from pocketvlm.device_bench.devices.load import TEMPLATE
from pocketvlm.device_bench.figures.summary import FIGURES
from pocketvlm.errors import InputError

FOLDER = Path(load_device.__code__.co_filename).parent
NEEDED = {
    "host",
    "pixel-8",
    "pixel-9",
    "galaxy-s23",
    "galaxy-s24",
    "galaxy-s25",
    "iphone-14",
    "iphone-15-pro",
    "iphone-16-pro",
    "iphone-17-pro",
    "raspberry-pi-5",
    "jetson-orin-nano",
}
TEXT = (FOLDER / f"{TEMPLATE}.yaml").read_text(encoding="utf-8")


def test_the_host_comes_first_and_its_profile_alone_says_how_it_is_measured():
    devices = list_devices()
    assert devices[0].name == "host"
    assert [device.name for device in devices if device.transport] == ["host"]
    assert {device.name for device in devices} >= NEEDED
    assert any(device.ram_bytes.value == 6e9 for device in devices)  # a mid-range phone
    assert TEMPLATE not in {device.name for device in devices}


@pytest.mark.parametrize("device", list_devices()[1:], ids=lambda device: device.name)
def test_a_profile_has_memory_cores_and_runtimes_with_sources_that_can_be_followed(device):
    assert 1e9 < device.ram_bytes.value < 64e9
    assert any("Nothing was measured on this device" in note for note in device.notes)
    assert 1 <= device.performance_cores <= 12
    assert {runtime.name for runtime in device.runtimes} >= {"onnx", "executorch"}
    assert device.instruction_sets.values
    for source in device.sources.values():
        assert "http" in source
    cited = "\n".join(device.lines())
    assert all(source in cited for source in (device.sources[device.ram_bytes.source],))
    assert {figure.metric for figure in device.published} <= set(FIGURES)
    assert all(figure.source and figure.value > 0 for figure in device.published)


@pytest.mark.parametrize("device", list_devices()[1:], ids=lambda device: device.name)
def test_every_source_of_a_profile_is_cited(device):
    cited = {
        device.ram_bytes.source,
        device.memory_bandwidth_bytes_s.source,
        device.app_memory_bytes.source,
        device.instruction_sets.source,
        *(runtime.source for runtime in device.runtimes),
        *(cluster.source for cluster in device.clusters),
        *(cluster.simd_units.source for cluster in device.clusters),
    }
    assert set(device.sources) <= cited


def test_a_figure_without_a_source_is_unknown_and_says_so():
    shown = "\n".join(load_device("pixel-8").lines())
    assert "bandwidth      unknown: LPDDR5X; no source that was read gives" in shown


def test_peaks_follow_from_cores_clocks_and_instructions():
    board = load_device("raspberry-pi-5")  # 4 cores, 2.4 GHz, 2 units of 128 bits, dot products
    assert board.float_macs_s == 4 * 2.4e9 * 2 * 4
    assert board.int8_macs_s == 4 * 2.4e9 * 2 * 16
    phone = load_device("galaxy-s25")
    assert phone.int8_macs_s == 8 * phone.float_macs_s  # i8mm


def test_derived_rates_keep_the_reference_share_of_the_peak():
    device, reference = load_device("galaxy-s25"), load_reference()
    rates = derive_rates(device)
    for kernel, peak, theirs in (
        ("float32", device.float_macs_s, reference.float_macs_s),
        ("int4 g64", device.int8_macs_s, reference.int8_macs_s),
    ):
        share = rates.products[kernel].macs_s / peak
        assert share == pytest.approx(reference.rates.products[kernel].macs_s / theirs)
        assert 0.1 < share < 1
    assert rates.threads == 8
    assert derive_rates(load_device("pixel-8")) == (
        "its profile has no source for the bandwidth of its memory"
    )


def test_an_unknown_device_is_named_with_those_there_are():
    with pytest.raises(InputError, match=r"'nokia' is not known; there are galaxy.*\.yaml"):
        load_device("nokia")


def test_a_profile_of_the_users_own_is_a_path(tmp_path):
    file = tmp_path / "my phone.yaml"
    file.write_text(TEXT, encoding="utf-8")
    device = load_device(str(file))
    assert device.name == "my phone"
    assert isinstance(derive_rates(device), str)


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("runtimes: []", "runtimes: []\nbattery: 1", "battery: unknown key; allowed: "),
        ("value: 8000000000", "value: 8 GB", 'ram_bytes.value: must be .*, not "8 GB"'),
        ("value: 8000000000", "value: -1", "ram_bytes: value is -1; it must be above 0"),
        ("8000000000, source: maker", "8000000000", "ram_bytes: a value needs a source"),
        ("source: maker, simd", "source: shop, simd", r"clusters\.0: source 'shop' is not among"),
        (
            "null, note: the system publishes none",
            "null",
            "app_memory_bytes: value is null; a note",
        ),
        ("count: 4", "count: 0", r"clusters\.0: count is 0; allowed are 1 to 64"),
        ("count: 4", "count: 4.5", r"clusters\.0\.count: must be a whole number"),
        ("max_hz: 2400000000", "max_hz: 2e12", r"clusters\.0: max_hz is 2e\+12"),
        ("role: performance, s", "role: fast, s", r"clusters\.0\.role: is \"fast\"; allowed: "),
        ("schema: 1", "schema: 2", "schema: is 2; allowed: 1"),
        ("schema: 1", "schema: 1\nname: x", "name: a profile is called after its file"),
        ("notes: []", "notes: []\nnotes: []", "key 'notes' stands twice"),
        ("notes: []", "notes: [", "is not valid YAML"),
        ("notes: []", "notes: [2020-01-01, .nan]", "must be a finite number"),
        ("description: maker", "maker", "is not valid YAML|is missing"),
    ],
)
def test_a_profile_that_is_wrong_is_refused_in_one_line(tmp_path, before, after, complaint):
    assert before in TEXT
    file = tmp_path / "mine.yaml"
    file.write_text(TEXT.replace(before, after, 1), encoding="utf-8")
    with pytest.raises(InputError, match=complaint) as refused:
        load_device(str(file))
    assert str(refused.value).startswith(f"{file}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["", "[]", "a: &a [*a]", "\0", "- " * 400_000])
def test_what_is_no_profile_at_all_is_refused_in_one_line(tmp_path, content):
    file = tmp_path / "mine.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"mine\.yaml: ") as refused:
        load_device(str(file))
    assert "\n" not in str(refused.value)


def test_a_profile_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml"):
        load_device(str(tmp_path / "none.yaml"))

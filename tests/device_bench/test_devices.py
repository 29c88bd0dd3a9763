from __future__ import annotations

import pytest

from pocketvlm.device_bench.devices import list_devices, load_device
from pocketvlm.device_bench.summary import FIGURES
from pocketvlm.errors import InputError


def test_the_host_comes_first_and_alone_can_be_measured():
    devices = list_devices()
    assert [device.name for device in devices if device.transport] == ["host"]
    assert devices[0].name == "host"
    assert len({device.name for device in devices}) == len(devices) > 4


def test_every_phone_has_memory_and_says_that_nothing_was_measured_on_it():
    for device in list_devices()[1:]:
        assert 1e9 < device.ram_bytes < 64e9, device.name
        assert any("nothing was measured on this device" in note for note in device.notes)
        assert device.published
        for figure in device.published:
            assert figure.source
            assert figure.value > 0
            assert figure.metric in FIGURES


def test_an_unknown_device_is_named_with_those_there_are():
    with pytest.raises(
        InputError, match="'nokia' is not known; there are galaxy-s24-ultra, .*host"
    ):
        load_device("nokia")

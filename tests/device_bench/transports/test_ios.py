"""Command lines for Xcode's devicectl, and what is made of its answers.

There is no devicectl but on a Mac. A program that takes the same command lines stands for it here:
it keeps the app's folder in a folder and runs a Python program as the app.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.protocol import PROTOCOL, EnvironmentJob, Failure, LoadedEvent
from pocketvlm.device_bench.transports.ios import DeviceCtl, IosTransport
from pocketvlm.errors import InputError, UnsupportedError

UDID = "00008130-001A2B3C4D5E6F70"
ANSWER = Path("/answer.json")
COMMON = ("--device", UDID, "--quiet", "--json-output", "/answer.json")
DEVICECTL = """
import json, pathlib, shutil, subprocess, sys
words = sys.argv[1:]
root = pathlib.Path(__file__).parent
with (root / "log").open("a") as log:
    log.write(json.dumps(words) + "\\n")
option = lambda name: words[words.index(name) + 1]
if (root / "fault").exists():
    sys.exit("ERROR: The device is locked.")
if words[0] == "list":
    entry = {"identifier": "AAAA-BBBB", "hardwareProperties": {"udid": "%s"},
             "connectionProperties": {"tunnelState": (root / "state").read_text()}}
    pathlib.Path(option("--json-output")).write_text(json.dumps({"result": {"devices": [entry]}}))
elif words[1] == "copy":
    source, target = pathlib.Path(option("--source")), root / "app" / option("--destination")
    if "--remove-existing-content" in words:
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
elif words[1] == "process":
    print("Launched application with org.pocketvlm.runner bundle identifier.", flush=True)
    place = root / "app" / words[words.index("--job") + 1]
    status = subprocess.run([sys.executable, root / "app.py"], stdin=place.open()).returncode
    print("App terminated.")
    sys.exit(status)
"""
APP = f"""
import json, sys
job = json.load(sys.stdin)
print('{{"event": "loaded", "load_ms": 12.5}}')
print(json.dumps({{"schema": {PROTOCOL}, "status": "ok", "result": job}}))
"""


@pytest.fixture
def mac(tmp_path):
    """A folder with a stand-in for devicectl, and a device."""
    (tmp_path / "devicectl.py").write_text(DEVICECTL % UDID)
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "state").write_text("connected")
    return tmp_path


def transport(mac: Path, device: str = UDID, app: Path | None = None) -> IosTransport:
    client = (sys.executable, str(mac / "devicectl.py"))
    return IosTransport(device=device, client=client, app=app)


def test_command_lines():
    control = DeviceCtl(device=UDID)
    assert control.list_devices(ANSWER) == (
        *("xcrun", "devicectl", "list", "devices"),
        *("--quiet", "--json-output", "/answer.json"),
    )
    assert control.install_app(Path("/Run ner.app"), ANSWER) == (
        *("xcrun", "devicectl", "device", "install", "app", *COMMON),
        "/Run ner.app",
    )
    assert control.copy(Path("/a b/$c"), "Documents/x y", ANSWER) == (
        *("xcrun", "devicectl", "device", "copy", "to", *COMMON),
        *("--domain-type", "appDataContainer", "--domain-identifier", "org.pocketvlm.runner"),
        *("--source", "/a b/$c", "--destination", "Documents/x y"),
    )
    assert control.launch(("--job", "Documents/job.json"), ANSWER) == (
        *("xcrun", "devicectl", "device", "process", "launch", *COMMON),
        *("--console", "--terminate-existing", "org.pocketvlm.runner"),
        *("--job", "Documents/job.json"),
    )


def test_a_run_copies_launches_and_leaves_nothing(mac, tiny_bundle):
    heard = []
    app = mac / "Runner.app"
    with transport(mac, app=app).connect() as connection:
        place = connection.install(Bundle.open(tiny_bundle))
        Bundle.open(mac / "app" / place)
        result = connection.run(EnvironmentJob(threads=2), timeout_s=30, on_event=heard.append)
    assert result == {"schema": PROTOCOL, "job": "environment", "threads": 2}
    assert heard == [LoadedEvent(load_ms=12.5)]
    assert not [path for path in (mac / "app").rglob("*") if path.is_file()]
    commands = [json.loads(line) for line in (mac / "log").read_text().splitlines()]
    assert [" ".join(words[1:3]) for words in commands][:2] == ["devices --quiet", "install app"]


def test_an_app_that_ends_badly_is_a_failure_with_its_events(mac):
    (mac / "app.py").write_text('print(\'{"event": "loaded", "load_ms": 12.5}\'); raise OSError(7)')
    with transport(mac).connect() as connection:
        result = connection.run(EnvironmentJob(), timeout_s=30)
    assert isinstance(result, Failure)
    assert "ended with status 1 and no result: OSError: 7" in result.reason
    assert result.events == (LoadedEvent(load_ms=12.5),)


def test_a_device_that_goes_away_is_a_failure_and_a_warning(mac):
    connection = transport(mac).connect()
    (mac / "fault").touch()
    result = connection.run(EnvironmentJob(), timeout_s=30)
    assert isinstance(result, Failure)
    assert "devicectl fails: ERROR: The device is locked." in result.reason
    with pytest.warns(RuntimeWarning, match="files were left on the device"):
        connection.close()


def test_a_device_that_is_not_there_is_refused_in_one_line(mac):
    with pytest.raises(InputError, match=f"is not known to Xcode; known: {UDID}, AAAA-BBBB"):
        transport(mac, "0000FFFF-0").connect()
    (mac / "state").write_text("unavailable")
    with pytest.raises(InputError, match="unlock and connect it"):
        transport(mac).connect()


def test_without_xcode_it_is_refused_in_one_line():
    missing = IosTransport(device=UDID, client=("no-such-xcrun", "devicectl"))
    with pytest.raises(UnsupportedError, match="needs a Mac with Xcode 15 or newer"):
        missing.connect()


@pytest.mark.parametrize("address", ["", "iPhone", "--help", f"{UDID}\n"])
def test_an_address_is_an_identifier(address):
    with pytest.raises(InputError, match="a device is ios:UDID"):
        IosTransport.parse(address)
    with pytest.raises(InputError, match=r"NAME\.app"):
        IosTransport.parse(UDID, Path("runner"))

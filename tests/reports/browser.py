"""Headless Chromium through its DevTools protocol, over a pipe: no port, no driver, no package."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.programs import require_program

__all__ = ["Browser", "Tab", "launch_browser"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # a page without scripts, made by this test; containers forbid the sandbox
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


class Browser:
    """A running Chromium; calls wait for their answer, and events are kept."""

    def __init__(self, write_fd: int, read_fd: int) -> None:
        self._write = os.fdopen(write_fd, "wb", buffering=0)
        self._read = os.fdopen(read_fd, "rb")
        self._last_id = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        self._write.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last_id:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def wait_for(self, method: str, session: str) -> None:
        while not any(
            event["method"] == method and event.get("sessionId") == session for event in self.events
        ):
            self._next()

    def _next(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self._read.read(1)) != b"\0":
            assert byte, "Chromium closed its pipe"
            message += byte
        document = json.loads(message)
        if "method" in document:
            self.events.append(document)
        return document

    def open(self, file: Path, *, width: int, height: int = 800, scheme: str = "light") -> Tab:
        """A new tab of this size that has loaded the file."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable", session)
        self.call(
            "Emulation.setDeviceMetricsOverride",
            session,
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", session, features=features)
        self.events.clear()
        self.call("Page.navigate", session, url=file.as_uri())
        self.wait_for("Page.loadEventFired", session)
        return Tab(self, session)


class Tab:
    """One loaded page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def evaluate(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str) -> None:
        code = {"Tab": 9, "Enter": 13}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)

    def close(self) -> None:
        self.call("Page.close")

    @property
    def requests(self) -> list[str]:
        """Addresses that the page asked for."""
        return [
            event["params"]["request"]["url"] for event in self._events("Network.requestWillBeSent")
        ]

    @property
    def complaints(self) -> list[str]:
        """What the console holds: messages, warnings, violations of the policy, exceptions."""
        return [
            json.dumps(event["params"])
            for method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
            for event in self._events(method)
        ]

    def _events(self, method: str) -> list[dict[str, Any]]:
        return [
            event
            for event in self._browser.events
            if event["method"] == method and event.get("sessionId") == self._session
        ]


@contextmanager
def launch_browser() -> Iterator[Browser]:
    """Chromium from the system; in CI its absence is a failure, elsewhere a skip."""
    program = require_program(*_NAMES)
    to_browser, from_browser = os.pipe(), os.pipe()
    # Chromium reads descriptor 3 and writes 4; moved away first, so that none overwrites another.
    ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (to_browser[0], from_browser[1])]
    for fd in (to_browser[0], from_browser[1]):
        os.close(fd)

    def inherit() -> None:
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=inherit,  # noqa: PLW1509  (the only way to number a child's descriptors)
            pass_fds=(3, 4),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in ends:
            os.close(fd)
        browser = Browser(to_browser[1], from_browser[0])
        try:
            yield browser
            browser.call("Browser.close")
        finally:
            process.kill()
            process.wait()
            browser._write.close()
            browser._read.close()

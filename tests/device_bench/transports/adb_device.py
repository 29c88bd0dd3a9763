"""The device's side of adb's wire protocol: a device that the real `adb connect` reaches over TCP.

Messages have a header of six words (command, two arguments, length and checksum of the data, and
the command's complement). A stream is opened by OPEN and OKAY, carries WRTE, each of which OKAY
answers before the next is sent, and ends with CLSE. The service `shell,v2` wraps what it carries
into packets: one byte that says what it is, a length, and the data.
"""

from __future__ import annotations

import os
import queue
import socket
import struct
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Literal

__all__ = ["AdbDevice"]

CNXN, AUTH, OPEN, OKAY, CLSE, WRTE = (
    int.from_bytes(name, "little")
    for name in (b"CNXN", b"AUTH", b"OPEN", b"OKAY", b"CLSE", b"WRTE")
)
VERSION = 0x01000001  # without checksums
MAX_DATA = 2**18
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)


class AdbDevice:
    """A device; its shell is this machine's `/bin/sh`."""

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        mood: Literal["device", "unauthorized", "silent"] = "device",
        features: str = "shell_v2,cmd",
    ) -> None:
        self.environment = dict(environment)
        self.mood = mood
        self.features = features
        self.commands: list[str] = []
        self._connections: list[_AdbConnection] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def break_connections(self) -> None:
        """All connections end, and what ran for them loses its input."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    def stop(self) -> None:
        """No connection is accepted any more."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.break_connections()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            connection = _AdbConnection(self, peer)
            self._connections.append(connection)
            threading.Thread(target=connection.serve, daemon=True).start()


class _AdbConnection:
    def __init__(self, device: AdbDevice, peer: socket.socket) -> None:
        self.device = device
        self._peer = peer
        self._sending = threading.Lock()
        self._streams: dict[int, _ShellStream] = {}
        self._opened = 0

    def send(self, command: int, first: int, second: int, data: bytes = b"") -> None:
        header = struct.pack("<6I", command, first, second, len(data), 0, command ^ 0xFFFFFFFF)
        with self._sending, suppress(OSError):
            self._peer.sendall(header + data)

    def serve(self) -> None:
        """Answers until the connection ends."""
        with suppress(OSError, EOFError):
            while True:
                self._handle(*self._receive())
        for stream in list(self._streams.values()):
            stream.hang_up()

    def close(self) -> None:
        with suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)
        self._peer.close()

    def forget(self, number: int) -> None:
        self._streams.pop(number, None)

    def _receive(self) -> tuple[int, int, int, bytes]:
        command, first, second, length, _, magic = struct.unpack("<6I", self._read(24))
        assert magic == command ^ 0xFFFFFFFF
        return command, first, second, self._read(length)

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self._peer.recv(size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def _handle(self, command: int, first: int, second: int, data: bytes) -> None:
        if command == CNXN:
            self._greet()
        elif command == AUTH:
            self.send(AUTH, 1, 0, os.urandom(20))  # no signature and no key is good enough
        elif command == OPEN:
            self._open(first, data.rstrip(b"\0").decode("utf-8", "surrogateescape"))
        elif command == WRTE:
            if second in self._streams:
                self._streams[second].receive(data)
            else:
                self.send(CLSE, 0, first)
        elif command == OKAY and second in self._streams:
            self._streams[second].may_send.set()
        elif command == CLSE and second in self._streams:
            self._streams.pop(second).hang_up()

    def _greet(self) -> None:
        if self.device.mood == "unauthorized":
            self.send(AUTH, 1, 0, os.urandom(20))
        elif self.device.mood == "device":
            banner = f"device::ro.product.name=simulated;features={self.device.features}"
            self.send(CNXN, VERSION, MAX_DATA, banner.encode())

    def _open(self, theirs: int, service: str) -> None:
        name, _, command = service.partition(":")
        if not name.startswith("shell,v2"):
            self.send(CLSE, 0, theirs)
            return
        self.device.commands.append(command)
        self._opened += 1
        ours = self._opened
        self._streams[ours] = _ShellStream(self, ours, theirs, command)
        self.send(OKAY, ours, theirs)
        self._streams[ours].start()


class _ShellStream:
    """A shell on the device."""

    def __init__(self, connection: _AdbConnection, ours: int, theirs: int, command: str) -> None:
        self.may_send = threading.Event()
        self.may_send.set()
        self._connection, self._ours, self._theirs = connection, ours, theirs
        self._arrived: queue.Queue[bytes | None] = queue.Queue()
        self._turn = threading.Lock()
        self._is_gone = False
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=connection.device.environment,
            cwd="/",
            start_new_session=True,
            bufsize=0,
        )

    def start(self) -> None:
        for task in (self._feed, self._finish):
            threading.Thread(target=task, daemon=True).start()

    def receive(self, data: bytes) -> None:
        self._arrived.put(data)

    def hang_up(self) -> None:
        """The other side is gone: the process loses its input, as with adbd."""
        self._is_gone = True
        self.may_send.set()
        self._arrived.put(None)

    def _feed(self) -> None:
        pending = bytearray()
        stdin = self._process.stdin
        assert stdin is not None
        while (data := self._arrived.get()) is not None:
            pending += data
            while len(pending) >= 5:
                kind, length = struct.unpack("<BI", pending[:5])
                if len(pending) < 5 + length:
                    break
                payload = bytes(pending[5 : 5 + length])
                del pending[: 5 + length]
                if kind == STDIN:
                    view = memoryview(payload)
                    with suppress(OSError):
                        while view:
                            view = view[stdin.write(view) :]
                elif kind == CLOSE_STDIN:
                    stdin.close()
            self._connection.send(OKAY, self._ours, self._theirs)
        with suppress(OSError):
            stdin.close()

    def _finish(self) -> None:
        readers = [
            threading.Thread(target=self._pass_on, args=(kind, stream), daemon=True)
            for kind, stream in ((STDOUT, self._process.stdout), (STDERR, self._process.stderr))
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        status = self._process.wait()
        self._send(EXIT, bytes([status if status >= 0 else 128 - status]))
        self.may_send.wait()
        self._connection.send(CLSE, self._ours, self._theirs)
        self._connection.forget(self._ours)
        self._arrived.put(None)

    def _pass_on(self, kind: int, stream) -> None:
        while data := os.read(stream.fileno(), 2**14):
            self._send(kind, data)
        stream.close()

    def _send(self, kind: int, data: bytes) -> None:
        with self._turn:
            self.may_send.wait()
            if not self._is_gone:
                self.may_send.clear()
                packet = struct.pack("<BI", kind, len(data)) + data
                self._connection.send(WRTE, self._ours, self._theirs, packet)

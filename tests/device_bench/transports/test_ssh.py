"""Servers that refuse, with the real OpenSSH client."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest

from pocketvlm.device_bench.transports.ssh import SshTransport
from pocketvlm.errors import InputError
from tests.device_bench.transports.rigs import SshRig


def refusal(transport: SshTransport) -> str:
    with pytest.raises(InputError) as caught:
        transport.connect()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


def altered(ssh: SshRig, old: str, new: str, tmp_path) -> SshTransport:
    """The transport with a client whose configuration is another."""
    config = (ssh.folder / "ssh_config").read_text()
    assert old in config
    (tmp_path / "config").write_text(config.replace(old, new))
    return SshTransport(
        destination="127.0.0.1", port=ssh.port, client=("ssh", "-F", str(tmp_path / "config"))
    )


def test_a_host_key_that_is_not_known(ssh, tmp_path):
    transport = altered(ssh, f"{ssh.folder}/known_hosts", "/dev/null", tmp_path)
    assert re.search("cannot be reached: Host key verification failed", refusal(transport))
    assert ssh.left() == []


def test_a_key_that_the_server_does_not_take(ssh, tmp_path):
    transport = altered(ssh, f"{ssh.folder}/user_key", f"{ssh.folder}/host_key", tmp_path)
    assert re.search(r"cannot be reached: .*Permission denied \(publickey\)", refusal(transport))


def test_nobody_listens(ssh, monkeypatch):
    made = []
    make = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **how: made.append(make(**how)) or made[-1])
    transport = SshTransport(destination="127.0.0.1", port=1, client=ssh.client)
    assert re.search("^ssh:127.0.0.1:1: cannot be reached: .*refused", refusal(transport))
    (sockets,) = made  # where the shared connection would have been
    assert not Path(sockets).exists()


def test_no_client():
    transport = SshTransport(destination="pi", client=("no-such-ssh",))
    assert "'no-such-ssh' is not installed here" in refusal(transport)


def test_a_server_that_allows_one_session_per_connection(ssh, tmp_path, packed_runner):
    """Each script then has its own connection."""
    config = ssh.folder / "sshd_config"
    text = config.read_text()
    ssh.stop()
    config.write_text(f"{text}MaxSessions 1\n")
    try:
        ssh.start()
        with ssh.transport(packed_runner).connect():
            assert ssh.left() == [".pocketvlm-bench"]
        assert ssh.left() == []
    finally:
        config.write_text(text)
        ssh.stop()


def test_a_device_without_the_runner_s_program(ssh, tmp_path):
    (tmp_path / "run").write_text("exec no-such-python\n")
    (ssh.programs / "tar").write_text("#!/bin/sh\necho 'tar: broken' >&2; exit 1\n")
    (ssh.programs / "tar").chmod(0o755)
    try:
        assert "cannot take the runner: tar: broken" in refusal(ssh.transport(tmp_path))
    finally:
        (ssh.programs / "tar").unlink()
    assert ssh.left() == []

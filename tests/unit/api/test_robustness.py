"""No client, however slow, broken or malicious, keeps the others from being served."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from _socket import AF_UNIX, SHUT_WR, SOCK_STREAM, socket

import pytest

from freezeframe.api import server as api_server
from freezeframe.api.listener import Listener
from freezeframe.api.server import ApiServer
from freezeframe.client import Connection
from freezeframe.control.vmm import Vmm
from freezeframe.errors import Busy, Refused, chain_messages
from freezeframe.testing.machines import FakeBackend

pytestmark = pytest.mark.unit

DEADLINE = 20.0


@pytest.fixture
def path(tmp_path):
    path = str(tmp_path / "s.sock")
    server = ApiServer(Vmm(FakeBackend()), Listener.bind(path))
    server.start()
    yield path
    server.close()
    assert not os.path.exists(path)


def raw(path: str) -> socket:
    sock = socket(AF_UNIX, SOCK_STREAM)
    sock.settimeout(DEADLINE)
    sock.connect(path)
    return sock


def ping(path: str) -> None:
    with Connection(path, timeout=DEADLINE) as client:
        assert client.get("vmm.ping").json()["version"] == "53.0.0"


def all_of(sock: socket) -> bytes:
    """What comes until the server hangs up."""
    data = b""
    while more := sock.recv(65536):
        data += more
    sock.close()
    return data


def test_idle_and_half_sent_requests_hold_up_nobody(path):
    idle = [raw(path) for _ in range(40)]
    for sock in idle[:20]:
        sock.sendall(b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
    ping(path)
    for sock in idle:
        sock.close()
    ping(path)


def test_a_host_without_threads_is_not_the_end_of_the_api(path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(api_server, "start_new_thread", refuse)
        assert all_of(raw(path)).startswith(b"HTTP/1.1 503 ")
    ping(path)


def test_one_byte_at_a_time(path):
    sock = raw(path)
    for byte in b"PUT /api/v1/vm.pause HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}":
        sock.sendall(bytes([byte]))
    assert sock.recv(65536).startswith(b"HTTP/1.1 400 \r\n")
    sock.close()


def test_pipelined_requests_are_answered_in_order(path):
    sock = raw(path)
    request = b"GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n"
    sock.sendall(request + b"GET /nope HTTP/1.1\r\n\r\n" + b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
    statuses = [line.split()[1] for line in all_of(sock).split(b"\r\n") if b"HTTP/1.1 " in line]
    assert statuses[0] == b"200"
    assert len(statuses) == 3


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0\0\0\0\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PUT /api/v1/vm.pause HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"PUT /api/v1/vm.pause HTTP/1.1\r\nContent-Length: 5000000\r\n\r\n" + b"x" * 100_000,
        b"PUT /api/v1/vm.pause HTTP/1.1\r\nContent-Length: 99999999999999999999999999\r\n\r\n",
        b"PUT /api/v1/vm.pause HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        b"PUT /api/v1/vm.pause HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nA\xff\xfe: b\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused(path, garbage):
    sock = raw(path)
    sock.sendall(garbage)
    reply = all_of(sock)
    assert reply.startswith(b"HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: close\r\n")
    assert reply.endswith(b'All previous unanswered requests will be dropped." }')
    ping(path)


def test_a_client_that_leaves_in_the_middle(path):
    for data in (b"", b"GET ", b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 10\r\n\r\n{"):
        sock = raw(path)
        sock.sendall(data)
        sock.close()
    ping(path)


def test_expect_100_continue(path):
    sock = raw(path)
    sock.sendall(b"PUT /api/v1/vm.create HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    assert sock.recv(100) == b"HTTP/1.1 100 \r\n\r\n"
    sock.sendall(b"{}")
    assert sock.recv(65536).startswith(b"HTTP/1.1 500 \r\n")
    sock.close()


def test_http_1_0_closes(path):
    sock = raw(path)
    sock.sendall(b"GET /api/v1/vmm.ping HTTP/1.0\r\n\r\n")
    assert b"Connection: close" in all_of(sock)


def test_not_utf8_and_deep_json(path):
    with Connection(path, timeout=DEADLINE) as client:
        for body in (b'{"destination_url": "\xff\xfe"}', b"[" * 100_000, b'{"destination_url": "a\\ud800"}', b"\xff"):
            assert client.request("PUT", "/api/v1/vm.snapshot", body).status == 400
    ping(path)


def test_bodies_are_ascii(path):
    with Connection(path, timeout=DEADLINE) as client:
        reply = client.put("vm.restore", {"source_url": "file:///nö\u2028/\U0001f600"})
        assert reply.status == 500
        assert reply.body is not None
        assert reply.body.isascii()
        assert "nö" in reply.json()[-1]


def test_the_socket_is_for_its_owner_only(path):
    assert stat.S_IMODE(os.stat(path).st_mode) & 0o077 == 0
    assert stat.S_IMODE(os.stat(f"{path}.lock").st_mode) == 0o600


def test_a_second_vmm_is_told_who_owns_the_socket(path):
    code = f"from freezeframe.api.listener import Listener; Listener.bind({path!r})"
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Busy" in second.stderr
    assert f"process {os.getpid()}" in second.stderr
    ping(path)


def test_a_socket_of_somebody_without_a_lock(tmp_path):
    path = str(tmp_path / "s.sock")
    other = socket(AF_UNIX, SOCK_STREAM)
    other.bind(path)
    other.listen(1)
    with pytest.raises(Busy) as caught:
        Listener.bind(path)
    assert f"process {os.getpid()}" in str(caught.value)
    assert f'API socket "{path}" is already in use by another running instance' in chain_messages(caught.value)
    other.close()
    Listener.bind(path).close()


def test_a_stale_socket_is_replaced_and_a_file_is_not(tmp_path):
    path = tmp_path / "s.sock"
    stale = socket(AF_UNIX, SOCK_STREAM)
    stale.bind(str(path))
    stale.close()
    Listener.bind(str(path)).close()
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(Refused):
        Listener.bind(str(path))
    assert path.read_text() == "precious"


def test_a_bug_in_an_action_is_a_500(path, monkeypatch, capsys):
    def broken(self) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("freezeframe.control.actions.ACTIONS", {})
    from freezeframe.api import routes
    from freezeframe.control.actions import Action

    monkeypatch.setitem(routes.ACTIONS, "vm.nmi", Action("vm.nmi", "PUT", broken))
    with Connection(path, timeout=DEADLINE) as client:
        reply = client.put("vm.nmi")
        assert reply.status == 500
        assert reply.json() == ["Error from API", "Internal error: RuntimeError: boom"]
    assert "boom" in capsys.readouterr().err
    ping(path)


def test_bodies_up_to_4_mib(path):
    with Connection(path, timeout=DEADLINE) as client:
        whole = b"{" + b" " * ((4 << 20) - 2) + b"}"
        reply = client.request("PUT", "/api/v1/vm.snapshot", whole)
        assert reply.json() == [
            "Failed to deserialize JSON",
            f"missing field `destination_url` at line 1 column {4 << 20}",
        ]


def test_mutated_requests_never_end_the_server(path):
    import random

    chance = random.Random(53)
    seeds = [
        b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n",
        b'PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 27\r\n\r\n{"payload":{"kernel":"k"} }',
        b'PUT /api/v1/vm.restore HTTP/1.1\r\nContent-Length: 27\r\n\r\n{"source_url":"file:///tmp"}',
        b"PUT /api/v1/vm.pause HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 0\r\n\r\n",
    ]
    for _ in range(400):
        data = bytearray(chance.choice(seeds) * chance.randint(1, 2))
        for _ in range(chance.randint(1, 6)):
            at = chance.randrange(len(data))
            match chance.randrange(4):
                case 0:
                    data[at] = chance.randrange(256)
                case 1:
                    del data[at : at + chance.randint(1, 8)]
                case 2:
                    data[at:at] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 8)))
                case _:
                    data[at:at] = data[: chance.randint(1, 20)]
            data = data or bytearray(b"x")
        if b"shutdown" in data:
            continue
        sock = raw(path)
        sock.sendall(data)
        sock.shutdown(SHUT_WR)
        reply = all_of(sock)
        assert reply == b"" or reply.startswith(b"HTTP/1.1 ")
    ping(path)

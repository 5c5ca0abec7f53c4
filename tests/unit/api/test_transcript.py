"""Our replies beside those that Cloud Hypervisor v53.0 gave to the same requests, byte for byte."""

from __future__ import annotations

import os
from _socket import AF_UNIX, SOCK_STREAM, socket

import pytest

from freezeframe.api.listener import Listener
from freezeframe.api.server import ApiServer
from freezeframe.control.vmm import Vmm
from freezeframe.testing.machines import FakeBackend

pytestmark = pytest.mark.unit

DEADLINE = 10.0
CONFIG = (
    '{"cpus":{"boot_vcpus":2,"max_vcpus":2,"profile":"Host"},"memory":{"size":536870912},'
    '"payload":{"kernel":"guest/tiny.elf","cmdline":"32"},"serial":{"mode":"File","file":"ser"},'
    '"console":{"mode":"Off"}}'
)
INFO = (
    '{"config":{"cpus":{"boot_vcpus":2,"max_vcpus":2,"kvm_hyperv":false,"max_phys_bits":46,"features":{"amx":false},'
    '"nested":true,"core_scheduling":"Vm","profile":"Host"},"memory":{"size":536870912,"mergeable":false,'
    '"hotplug_method":"Acpi","shared":false,"hugepages":false,"prefault":false,"reserve":false,"thp":true},'
    '"payload":{"kernel":"guest/tiny.elf","cmdline":"32"},"rng":{"pci_segment":0,"src":"/dev/urandom"},'
    '"serial":{"file":"ser","mode":"File"},"console":{"mode":"Off","pci_segment":0},'
    '"debug_console":{"mode":"Off","iobase":233},"pvpanic":false,"iommu":false,"watchdog":false,'
    '"landlock_enable":false},"state":"%s","memory_actual_size":536870912'
)


class Raw:
    """A plain socket client that shows what is on the wire."""

    def __init__(self, path: str) -> None:
        self._socket = socket(AF_UNIX, SOCK_STREAM)
        self._socket.settimeout(DEADLINE)
        self._socket.connect(path)

    def ask(self, method: str, target: str, body: str | None = None) -> str:
        head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n"
        if body is not None:
            head += f"Content-Length: {len(body)}\r\n"
        return self.send((head + "\r\n" + (body or "")).encode())

    def send(self, data: bytes) -> str:
        self._socket.sendall(data)
        return self.read()

    def read(self) -> str:
        reply = b""
        while b"\r\n\r\n" not in reply:
            reply += self._more()
        head, _, body = reply.partition(b"\r\n\r\n")
        length = 0
        for line in head.split(b"\r\n"):
            if line.startswith(b"Content-Length: "):
                length = int(line.split()[1])
        while len(body) < length:
            body += self._more()
        assert len(body) == length
        return (head + b"\r\n\r\n" + body).decode("ascii")

    def _more(self) -> bytes:
        more = self._socket.recv(65536)
        assert more, "the server hung up"
        return more

    def at_end(self) -> bool:
        return self._socket.recv(1) == b""

    def close(self) -> None:
        self._socket.close()


class Served:
    def __init__(self, directory) -> None:
        self.backend = FakeBackend()
        self.vmm = Vmm(self.backend)
        self.path = str(directory / "s.sock")
        self.server = ApiServer(self.vmm, Listener.bind(self.path))
        self.server.start()
        self.directory = directory
        self.clients: list[Raw] = []

    def client(self) -> Raw:
        self.clients.append(Raw(self.path))
        return self.clients[-1]

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.server.close()


@pytest.fixture
def served(tmp_path):
    served = Served(tmp_path)
    yield served
    served.close()


def replied(status: int, body: str | None = None, server: str = "Cloud Hypervisor API") -> str:
    head = f"HTTP/1.1 {status} \r\nServer: {server}\r\nConnection: keep-alive\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}\r\n{body or ''}"


NO_VM = [
    ("GET", "/api/v1/vm.info", None, 404, '["Error from API","The VM info is not available","VM is not created"]'),
    ("PUT", "/api/v1/vm.pause", None, 500, '["Error from API","The VM could not be paused","VM is not running"]'),
    ("PUT", "/api/v1/vm.resume", None, 500, '["Error from API","The VM could not resume","VM is not running"]'),
    (
        "PUT",
        "/api/v1/vm.snapshot",
        '{"destination_url": "file:///tmp"}',
        500,
        '["Error from API","The VM could not be snapshotted","VM is not running"]',
    ),
    ("GET", "/api/v1/vm.pause", None, 400, '["Bad Request"]'),
    ("PUT", "/api/v1/vm.nope", None, 404, '["Not Found"]'),
    ("PUT", "/api/v1/vm.snapshot", None, 400, '["Bad Request"]'),
    (
        "PUT",
        "/api/v1/vm.snapshot",
        "{bad json",
        400,
        '["Failed to deserialize JSON","key must be a string at line 1 column 2"]',
    ),
    (
        "PUT",
        "/api/v1/vm.snapshot",
        "{}",
        400,
        '["Failed to deserialize JSON","missing field `destination_url` at line 1 column 2"]',
    ),
    (
        "PUT",
        "/api/v1/vm.snapshot",
        '{"destination_url": "file:///tmp", "x": 1}',
        500,
        '["Error from API","The VM could not be snapshotted","VM is not running"]',
    ),
    ("PUT", "/api/v1/vm.restore", None, 400, '["Bad Request"]'),
    (
        "PUT",
        "/api/v1/vm.restore",
        "{}",
        400,
        '["Failed to deserialize JSON","missing field `source_url` at line 1 column 2"]',
    ),
    ("GET", "/", None, 404, '["Not Found"]'),
    ("PUT", "/api/v1/vm.pause", "{}", 400, '["Bad Request"]'),
    (
        "PUT",
        "/api/v1/vm.restore",
        '{"source_url": "file:///run/transcript/tr/snap", "memory_restore_mode": "ondemand"}',
        400,
        (
            '["Failed to deserialize JSON",'
            '"unknown variant `ondemand`, expected `Copy` or `OnDemand` at line 1 column 82"]'
        ),
    ),
    (
        "PUT",
        "/api/v1/vm.restore",
        '{"source_url": "file:///run/tr/missing"}',
        500,
        (
            '["Error from API","The VM could not be restored","Cannot restore VM",'
            '"Failed to send migratable component snapshot","Destination is not a directory: \\"/run/tr/missing\\""]'
        ),
    ),
    ("PUT", "/api/v1/vm.delete", None, 204, None),
    ("PUT", "/api/v1/vm.reboot", None, 404, '["Error from API","The VM could not reboot","VM is not created"]'),
    ("PUT", "/api/v1/vm.boot", None, 404, '["Error from API","The VM could not boot","VM config is missing"]'),
]


@pytest.mark.parametrize(("method", "target", "body", "status", "expected"), NO_VM)
def test_without_a_vm(served, method, target, body, status, expected):
    assert served.client().ask(method, target, body) == replied(status, expected)


def test_post_is_turned_down_by_the_library(served):
    client = served.client()
    expected = (
        '{ "error": "Invalid HTTP Method: Unsupported HTTP method.\n'
        'All previous unanswered requests will be dropped." }'
    )
    assert len(expected) == 110
    assert client.ask("POST", "/api/v1/vm.pause") == replied(400, expected, "Firecracker API")
    assert client.ask("GET", "/") == replied(404, '["Not Found"]')


def test_patch_on_a_known_route_has_no_body(served):
    assert served.client().ask("PATCH", "/api/v1/vm.pause") == replied(400, "")


def test_ping(served):
    reply = served.client().ask("GET", "/api/v1/vmm.ping")
    body = reply.partition("\r\n\r\n")[2]
    assert reply == replied(200, body)
    assert '"version":"53.0.0"' in body
    assert f'"pid":{os.getpid()}' in body


def test_the_life_of_a_machine(served):
    client = served.client()
    assert client.ask("PUT", "/api/v1/vm.create", CONFIG) == replied(204)
    assert client.ask("PUT", "/api/v1/vm.create", CONFIG) == replied(
        500, '["Error from API","The VM could not be created","VM is already created"]'
    )
    info = client.ask("GET", "/api/v1/vm.info").partition("\r\n\r\n")[2]
    assert info == INFO % "Created" + "}"
    assert client.ask("PUT", "/api/v1/vm.boot") == replied(204)
    info = client.ask("GET", "/api/v1/vm.info").partition("\r\n\r\n")[2]
    assert info == INFO % "Running" + ',"engine":{"name":"fake","reason":"tests asked for it"}}'
    assert client.ask("PUT", "/api/v1/vm.snapshot", '{"destination_url": "file:///run/tr/snap"}') == replied(
        500,
        '["Error from API","The VM could not be snapshotted","Cannot snapshot VM",'
        '"Failed to snapshot migratable component","Trying to snapshot while VM is running"]',
    )
    assert client.ask("PUT", "/api/v1/vm.resume") == replied(
        500,
        '["Error from API","The VM could not resume","Cannot resume VM",'
        '"Failed to resume migratable component","Invalid transition: InvalidStateTransition(Running, Running)"]',
    )
    assert client.ask("PUT", "/api/v1/vm.pause") == replied(204)
    assert client.ask("PUT", "/api/v1/vm.pause") == replied(
        500,
        '["Error from API","The VM could not be paused","Cannot pause VM",'
        '"Failed to pause migratable component","Invalid transition: InvalidStateTransition(Paused, Paused)"]',
    )
    assert client.ask("PUT", "/api/v1/vm.power-button") == replied(204)
    assert client.ask("PUT", "/api/v1/vm.shutdown") == replied(204)
    assert client.ask("GET", "/api/v1/vm.info").partition("\r\n\r\n")[2] == INFO % "Created" + "}"
    assert client.ask("PUT", "/api/v1/vm.restore", '{"source_url": "file:///tmp"}') == replied(
        500, '["Error from API","The VM could not be restored","VM is already created"]'
    )
    assert client.ask("PUT", "/api/v1/vm.delete") == replied(204)
    assert client.ask("PUT", "/api/v1/vmm.shutdown") == replied(200, "")
    assert served.vmm.run() == 0


DESTINATIONS = [
    ("file:///run/tr/missing", r"Destination is not a directory: \"/run/tr/missing\""),
    ("/run/tr/snap", "Could not extract path from URL: /run/tr/snap"),
    ("http://x/y", "Could not extract path from URL: http://x/y"),
    ("", "Could not extract path from URL: "),
    ("file://", r"Destination is not a directory: \"\""),
    ("file://relative", r"Destination is not a directory: \"relative\""),
    ("FILE:///tmp", "Could not extract path from URL: FILE:///tmp"),
    ("file://localhost/tmp", r"Destination is not a directory: \"localhost/tmp\""),
    ("file:///etc/passwd", r"Destination is not a directory: \"/etc/passwd\""),
    ("file:///run/tr/with%20space", r"Destination is not a directory: \"/run/tr/with%20space\""),
]


@pytest.mark.parametrize(("url", "text"), DESTINATIONS)
def test_snapshot_destinations(served, url, text):
    client = served.client()
    client.ask("PUT", "/api/v1/vm.create", CONFIG)
    client.ask("PUT", "/api/v1/vm.boot")
    client.ask("PUT", "/api/v1/vm.pause")
    assert client.ask("PUT", "/api/v1/vm.snapshot", f'{{"destination_url": "{url}"}}') == replied(
        500,
        '["Error from API","The VM could not be snapshotted","Cannot send VM snapshot",'
        f'"Failed to send migratable component snapshot","{text}"]',
    )
    assert served.vmm.state == "Paused"


def test_snapshot_and_restore(served):
    client = served.client()
    snapshot = f'{{"destination_url": "file://{served.directory}"}}'
    restore = f'{{"source_url": "file://{served.directory}/"}}'
    client.ask("PUT", "/api/v1/vm.create", CONFIG)
    client.ask("PUT", "/api/v1/vm.boot")
    client.ask("PUT", "/api/v1/vm.pause")
    assert client.ask("PUT", "/api/v1/vm.snapshot", snapshot) == replied(204)
    assert client.ask("PUT", "/api/v1/vm.snapshot", snapshot) == replied(
        500,
        '["Error from API","The VM could not be snapshotted","Cannot send VM snapshot",'
        '"Failed to send migratable component snapshot","Error creating VM config snapshot file",'
        '"File exists (os error 17)"]',
    )
    assert client.ask("PUT", "/api/v1/vm.delete") == replied(204)
    assert client.ask("PUT", "/api/v1/vm.restore", restore) == replied(204)
    assert served.vmm.state == "Paused"
    assert client.ask("PUT", "/api/v1/vm.resume") == replied(204)
    assert client.ask("PUT", "/api/v1/vm.restore", restore) == replied(
        500, '["Error from API","The VM could not be restored","VM is already created"]'
    )


def test_a_failed_restore_leaves_the_vmm_usable(served, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    client = served.client()
    assert client.ask("PUT", "/api/v1/vm.restore", f'{{"source_url": "file://{empty}"}}') == replied(
        500,
        '["Error from API","The VM could not be restored","Cannot restore VM",'
        f'"Failed to receive migratable component snapshot","Error opening VM config snapshot file \\"{empty}/vm.json\\"",'
        '"No such file or directory (os error 2)"]',
    )
    assert client.ask("GET", "/api/v1/vm.info") == replied(404, NO_VM[0][4])
    assert client.ask("PUT", "/api/v1/vm.create", CONFIG) == replied(204)

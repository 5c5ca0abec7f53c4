"""`ch-remote` towards a VMM that is not ours."""

from __future__ import annotations

import json
import sys
import threading
from _socket import AF_UNIX, SOCK_STREAM, socket

import pytest

from freezeframe.cli import ch_remote

pytestmark = pytest.mark.unit


class Server:
    """Answers each request of one connection in the same way, and keeps their first lines."""

    def __init__(self, path, document):
        self.asked = []
        self._body = json.dumps(document).encode()
        self._socket = socket(AF_UNIX, SOCK_STREAM)
        self._socket.bind(path)
        self._socket.listen(1)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        fd, _ = self._socket._accept()
        client = socket(fileno=fd)
        client.settimeout(20)
        while data := client.recv(65536):
            self.asked.append(data.split(b"\r\n")[0].decode())
            head = f"HTTP/1.1 200 \r\nContent-Length: {len(self._body)}\r\n\r\n"
            client.sendall(head.encode() + self._body)
        client.close()

    def end(self):
        self._thread.join(20)
        self._socket.close()
        return self.asked


def remote(monkeypatch, path, *words):
    monkeypatch.setattr(sys, "argv", ["ch-remote", f"--api-socket={path}", *words])
    return ch_remote.main()


@pytest.mark.parametrize("document", [{"build_version": "v53.0.0", "pid": 1}, {}, [], None])
@pytest.mark.parametrize("words", [("add-disk", "path=/a"), ("coredump", "file:///a")])
def test_a_configuration_that_is_not_translated_goes_to_no_other_vmm(monkeypatch, capsys, tmp_path, words, document):
    path = str(tmp_path / "s")
    server = Server(path, document)
    assert remote(monkeypatch, path, *words) == 1
    assert server.end() == ["GET /api/v1/vmm.ping HTTP/1.1"]
    assert f"{words[0]}: this client does not know" in capsys.readouterr().err


def test_what_is_translated_goes_to_anybody(monkeypatch, tmp_path):
    path = str(tmp_path / "s")
    server = Server(path, {})
    assert remote(monkeypatch, path, "remove-device", "_disk0") == 0
    assert server.end() == ["PUT /api/v1/vm.remove-device HTTP/1.1"]

"""HTTP/1.1 on a unix socket, byte for byte as clients of Cloud Hypervisor expect it.

Its own `ch-remote` depends on an empty reason phrase, on a header spelled `Content-Length: N`, on bodies in ASCII and
on replies that are never chunked. One thread a connection: a slow, idle or broken client holds up nobody else.
"""

from __future__ import annotations

import sys
import time
from _socket import SHUT_RDWR, SHUT_WR, socket
from _thread import allocate_lock, start_new_thread

from freezeframe._core import http_request
from freezeframe.api.routes import MAX_BODY, Reply, answer, malformed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from freezeframe.api.listener import Listener
    from freezeframe.control.vmm import Vmm

MAX_HEAD = 16 << 10
MAX_CONNECTIONS = 256
_CLOSE_TIMEOUT = 5.0
_DRAIN_TIMEOUT = 1.0


class ApiServer:
    """Serves a `Vmm` on a listening socket from `start` to `close`."""

    def __init__(self, vmm: Vmm, listener: Listener) -> None:
        self._vmm = vmm
        self._listener = listener
        self._lock = allocate_lock()
        self._connections: set[Connection] = set()
        self._closing = False
        self._started = False
        self._accepted_all = allocate_lock()

    def start(self) -> None:
        """Answer from now on; connections made before are answered too."""
        self._started = True
        self._accepted_all.acquire()
        start_new_thread(self._accept, ())

    def _accept(self) -> None:
        # What the public `socket.accept` wraps: importing `socket` takes a tenth of a whole restore.
        listening: Any = self._listener.socket
        while not self._closing:
            try:
                fd, _ = listening._accept()  # noqa: SLF001
                client = socket(fileno=fd)
            except OSError:
                if not self._closing:
                    time.sleep(0.05)  # out of descriptors: they come back when connections end
                continue
            connection = Connection(self, self._vmm, client)
            with self._lock:
                full = len(self._connections) >= MAX_CONNECTIONS
                if not full and not self._closing:
                    self._connections.add(connection)
                    try:
                        start_new_thread(connection.run, ())
                        continue
                    except RuntimeError:  # the host gives no more threads; this one must go on
                        self._connections.discard(connection)
            connection.turn_away()
        self._listener.close()
        self._accepted_all.release()

    def forget(self, connection: Connection) -> None:
        with self._lock:
            self._connections.discard(connection)

    def close(self) -> None:
        """Stop listening, let replies in the making go out, drop the rest."""
        self._closing = True
        try:
            self._listener.socket.shutdown(SHUT_RDWR)  # wakes the accepting thread
        except OSError:
            pass
        deadline = time.monotonic() + _CLOSE_TIMEOUT
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            if connection.busy.acquire(timeout=max(0.0, deadline - time.monotonic())):
                connection.busy.release()
            connection.drop()
        if not self._started:
            self._listener.close()
        elif self._accepted_all.acquire(timeout=_CLOSE_TIMEOUT):
            self._accepted_all.release()


class Connection:
    """One client. `busy` is held while a request of it is being worked on and answered."""

    def __init__(self, server: ApiServer, vmm: Vmm, sock: socket) -> None:
        self._server = server
        self._vmm = vmm
        self._socket = sock
        self._data = b""
        self.busy = allocate_lock()

    def run(self) -> None:
        try:
            while self._serve_one():
                pass
        except OSError:
            pass  # the client went away
        finally:
            self._server.forget(self)
            self._socket.close()

    def turn_away(self) -> None:
        """Tell one client too many, and hang up."""
        try:
            self._socket.settimeout(0)
            body = b'{ "error": "Too many open connections" }'
            self._socket.send(Reply(503, body, server="Firecracker API", keep_alive=False).encode())
        except OSError:
            pass
        self._socket.close()

    def drop(self) -> None:
        try:
            self._socket.shutdown(SHUT_RDWR)
        except OSError:
            pass

    def _serve_one(self) -> bool:
        """Read one request and answer it; whether another may follow."""
        try:
            head = self._read_head()
        except ValueError as error:
            return self._hang_up(malformed(f"Invalid HTTP request: {error}."))
        if head is None:
            return False
        method, target, minor, headers = head
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers:
            return self._hang_up(malformed("Unsupported header: Transfer-Encoding."))
        if not (length.isascii() and length.isdigit()):
            return self._hang_up(malformed("Invalid header: Content-Length."))
        if len(length) > 18 or int(length) > MAX_BODY:
            text = f"Request payload with size {length} is larger than the limit of {MAX_BODY} allowed by server."
            return self._hang_up(malformed(text))
        if headers.get("expect", "").lower() == "100-continue" and len(self._data) < int(length):
            self._socket.sendall(b"HTTP/1.1 100 \r\n\r\n")
        body = self._read_body(int(length))
        if body is None:
            return False
        connection = headers.get("connection", "").lower()
        keep_alive = connection != "close" and (minor >= 1 or connection == "keep-alive")
        with self.busy:
            reply = answer(self._vmm, method, target, body)
            reply.keep_alive = keep_alive
            self._socket.sendall(reply.encode())
        return keep_alive

    def _read_head(self) -> tuple[str, str, int, dict[str, str]] | None:
        """The next request's head; None at the end of the connection, `ValueError` for what is not HTTP."""
        while True:
            head = http_request(self._data) if self._data else None
            if head is not None:
                size, method, target, minor, headers = head
                if size > MAX_HEAD:
                    break
                self._data = self._data[size:]
                names = [name for name, _ in headers]
                if names.count("content-length") > 1:
                    raise ValueError("more than one Content-Length")
                return method, target, minor, dict(headers)
            if len(self._data) > MAX_HEAD:
                break
            more = self._socket.recv(64 << 10)
            if not more:
                return None
            self._data += more
        raise ValueError("head too long")

    def _read_body(self, length: int) -> bytes | None:
        parts = [self._data]
        size = len(self._data)
        while size < length:
            more = self._socket.recv(min(length - size, 1 << 20))
            if not more:
                return None
            parts.append(more)
            size += len(more)
        data = b"".join(parts)
        self._data = data[length:]
        return data[:length]

    def _hang_up(self, reply: Reply) -> bool:
        """Answer, then read on for a moment: closing with unread input would take the reply from the client."""
        self._socket.sendall(reply.encode())
        self._socket.shutdown(SHUT_WR)
        self._socket.settimeout(_DRAIN_TIMEOUT)
        deadline = time.monotonic() + _DRAIN_TIMEOUT
        while time.monotonic() < deadline and self._socket.recv(1 << 20):
            pass
        return False


def report_bug(action: str) -> None:
    """An exception that no action should raise: the client gets a 500, the terminal the traceback."""
    from traceback import print_exc

    print(f"freezeframe: bug in {action}:", file=sys.stderr)
    print_exc()

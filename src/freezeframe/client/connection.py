"""One connection to a VMM's API socket."""

from __future__ import annotations

from _socket import AF_UNIX, SOCK_STREAM, socket

from freezeframe._core import http_response, json_line
from freezeframe.errors import FreezeframeError, IoFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

ROOT = "/api/v1/"


class ClientError(FreezeframeError):
    """The server answered something that is not HTTP, or hung up."""

    code = "client"


class Response:
    """A status and a body; None when the reply had no `Content-Length`."""

    __slots__ = ("body", "status")

    def __init__(self, status: int, body: bytes | None) -> None:
        self.status = status
        self.body = body

    @property
    def ok(self) -> bool:
        return self.status in (100, 200, 204)

    def json(self) -> Any:
        """The body as Python values."""
        from json import loads

        return loads(self.body or b"null")


class Connection:
    """A kept-open connection; requests go one after the other."""

    def __init__(self, path: str, timeout: float | None = None) -> None:
        self._socket = socket(AF_UNIX, SOCK_STREAM)
        self._socket.settimeout(timeout)
        self._data = b""
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise IoFailed("Error opening HTTP socket") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def get(self, name: str) -> Response:
        """`GET /api/v1/<name>`."""
        return self.request("GET", ROOT + name)

    def put(self, name: str, body: object = None) -> Response:
        """`PUT /api/v1/<name>` with a plain value as JSON body, or none."""
        if body is None:
            return self.request("PUT", ROOT + name)
        return self.request("PUT", ROOT + name, json_line(body))

    def request(self, method: str, target: str, body: bytes | None = None) -> Response:
        """Send one request and read its reply; `IoFailed` or `ClientError` when that does not work."""
        head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n"
        if body is not None:
            head += f"Content-Length: {len(body)}\r\n"
        try:
            self._socket.sendall(f"{head}\r\n".encode() + (body or b""))
            return self._read_response()
        except OSError as error:
            raise IoFailed("Error writing to or reading from HTTP socket") from error

    def _read_response(self) -> Response:
        while True:
            try:
                head = http_response(self._data) if self._data else None
            except ValueError as error:
                raise ClientError("HTTP output is missing protocol statement") from error
            if head is not None:
                break
            self._receive()
        size, status, headers = head
        self._data = self._data[size:]
        length = dict(headers).get("content-length")
        if length is None:
            return Response(status, None)
        if not (length.isascii() and length.isdigit()):
            raise ClientError("Error parsing HTTP Content-Length field")
        while len(self._data) < int(length):
            self._receive()
        body, self._data = self._data[: int(length)], self._data[int(length) :]
        return Response(status, body)

    def _receive(self) -> None:
        more = self._socket.recv(64 << 10)
        if not more:
            raise ClientError("The server closed the connection before it answered")
        self._data += more

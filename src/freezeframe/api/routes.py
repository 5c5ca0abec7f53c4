"""Requests to actions and results to replies, with Cloud Hypervisor's status codes and error arrays."""

from __future__ import annotations

from freezeframe._core import json_line
from freezeframe.control.actions import ACTIONS
from freezeframe.control.failures import ActionFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from freezeframe.control.actions import Action
    from freezeframe.control.vmm import Vmm

ROOT = "/api/v1/"
MAX_BODY = 4 << 20
SERVER = "Cloud Hypervisor API"
# Who answers when a request is turned down before it reaches the API: the name of the HTTP library that CH uses.
LIBRARY = "Firecracker API"
_METHODS = ("GET", "PUT", "PATCH", "DELETE")


class Reply:
    """A status and a body in ASCII; None stands for no body at all (204)."""

    __slots__ = ("body", "keep_alive", "server", "status")

    def __init__(self, status: int, body: bytes | None, *, server: str = SERVER, keep_alive: bool = True) -> None:
        self.status = status
        self.body = body
        self.server = server
        self.keep_alive = keep_alive

    def encode(self) -> bytes:
        connection = "keep-alive" if self.keep_alive else "close"
        head = f"HTTP/1.1 {self.status} \r\nServer: {self.server}\r\nConnection: {connection}\r\n"
        if self.body is None:
            return f"{head}\r\n".encode("ascii")
        head += f"Content-Type: application/json\r\nContent-Length: {len(self.body)}\r\n\r\n"
        return head.encode("ascii") + self.body


def refusal(status: int, *texts: str) -> Reply:
    return Reply(status, json_line(texts))


def malformed(text: str) -> Reply:
    """What CH's HTTP library says to what it cannot read; the line break in the middle of the string is its own."""
    quoted = text.encode("ascii", "replace").decode().replace("\\", "\\\\").replace('"', '\\"')
    body = f'{{ "error": "{quoted}\nAll previous unanswered requests will be dropped." }}'
    return Reply(400, body.encode("ascii"), server=LIBRARY, keep_alive=False)


def answer(vmm: Vmm, method: str, target: str, body: bytes) -> Reply:
    """Do what a request asks for."""
    if method not in _METHODS:
        return malformed("Invalid HTTP Method: Unsupported HTTP method.")
    path = target
    if path.startswith("http://"):
        path = "/" + path.removeprefix("http://").partition("/")[2]
    action = ACTIONS.get(path.removeprefix(ROOT)) if path.startswith(ROOT) else None
    if action is None:
        return refusal(404, "Not Found")
    if method in ("PATCH", "DELETE"):
        return Reply(400, b"")
    if method != action.method or bool(body) != action.takes_body:
        return refusal(400, "Bad Request")
    return _perform(vmm, action, body)


def _perform(vmm: Vmm, action: Action, body: bytes) -> Reply:
    try:
        if action.takes_body:
            try:
                record = action.read_body(body)
            except ValueError as error:
                return refusal(400, "Failed to deserialize JSON", str(error))
            result = action.run(vmm, record)
        else:
            result = action.run(vmm)
    except ActionFailed as failure:
        vmm.log(1, f"HTTP API error response: {': '.join(failure.texts)}")
        return refusal(failure.status, "Error from API", *failure.texts)
    except Exception as error:
        from freezeframe.api.server import report_bug

        report_bug(action.name)
        return refusal(500, "Error from API", f"Internal error: {type(error).__name__}: {error}")
    if result is not None:
        return Reply(200, json_line(result))
    return Reply(200, b"") if action.empty_reply else Reply(204, None)

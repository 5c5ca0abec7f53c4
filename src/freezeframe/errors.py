"""The whole exception tree of the package; the Rust core raises these classes too.

Every error is a `FreezeframeError` with a stable `code`, an optional `hint` (what to do) and a plain `detail`; most
also inherit the builtin that a caller would catch anyway. A cause is chained (`raise ... from cause`), never repeated
in the message: `chain_messages` turns the chain into Cloud Hypervisor's list of strings, outermost first.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self


class FreezeframeError(Exception):
    """Base of every error that the package raises on purpose.

    `code`: stable, kebab-case name of the kind of failure. `exit_code`: what the command line ends with.
    """

    code = "failed"
    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, detail: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.detail: Mapping[str, object] = detail or {}
        self.chain: tuple[str, ...] = ()

    def chained(self, *chain: str) -> Self:
        """Sets the texts that Cloud Hypervisor gives for this failure, outermost first; our message comes last."""
        self.chain = chain
        return self

    def __str__(self) -> str:
        return self.message


class Refused(FreezeframeError, ValueError):
    """A request, option or value that is wrong in itself; nothing was changed."""

    code = "refused"


class NotSupported(Refused):
    """A known Cloud Hypervisor option, field or action that this VMM does not implement."""

    code = "not-supported"


class NotFound(FreezeframeError, FileNotFoundError):
    """A file, directory, device or machine that was named does not exist."""

    code = "not-found"
    exit_code = 10


class Busy(FreezeframeError):
    """Somebody else holds it: a lock on a disk or socket, or a snapshot name already taken."""

    code = "busy"
    exit_code = 11


class Damaged(FreezeframeError):
    """Content does not match its checksum or its description; `file` and `chunk` say where."""

    code = "damaged"
    exit_code = 12

    def __init__(
        self,
        message: str,
        *,
        file: str | os.PathLike[str] | None = None,
        chunk: int | None = None,
        hint: str | None = None,
        detail: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message, hint=hint, detail=detail)
        self.file = None if file is None else os.fspath(file)
        self.chunk = chunk


class Torn(Damaged):
    """A snapshot directory whose writing never ended: `vm.json` is missing, memory files may be there."""

    code = "torn"


class Incompatible(FreezeframeError):
    """Whole and undamaged, but not for this program, host or disk: unknown version, changed disk, other TSC rate."""

    code = "incompatible"
    exit_code = 13


class DeadlineExceeded(FreezeframeError, TimeoutError):
    """What was waited for did not happen in time."""

    code = "timeout"


class InvalidState(FreezeframeError):
    """The machine is not in a state that allows this."""

    code = "invalid-state"


class EngineError(FreezeframeError):
    """The CPU engine stopped: an instruction, a device or a memory chunk that it cannot go on with."""

    code = "engine"


class IoFailed(FreezeframeError, OSError):
    """The operating system refused a read, write, open or lock; the `OSError` is the cause."""

    code = "io"


def os_error_text(error: OSError) -> str:
    """An `OSError` as Rust's standard library prints it: `No such file or directory (os error 2)`."""
    if error.errno is None:
        return str(error)
    return f"{os.strerror(error.errno)} (os error {error.errno})"


def chain_messages(error: BaseException) -> list[str]:
    """The messages of an error and of its causes, outermost first; a hint follows the message that it belongs to.

    An error with a chain of its own (`chained`) says all there is: its causes are in there.
    """
    messages: list[str] = []
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, FreezeframeError):
            messages.extend(current.chain)
            messages.append(current.message if current.hint is None else f"{current.message} ({current.hint})")
            if current.chain:
                break
        elif isinstance(current, OSError):
            messages.append(os_error_text(current))
        else:
            messages.append(str(current) or type(current).__name__)
        current = current.__cause__
    return messages

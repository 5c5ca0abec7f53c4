r"""freezeframe: a virtual machine monitor whose point is snapshot and restore.

The package as a library, for machines in the program's own process:

>>> import freezeframe as ff
>>> with ff.boot(kernel=KERNEL, memory="64M") as vm:            # KERNEL: a bzImage, or an ELF file with a PVH entry
...     _ = vm.serial.expect(r"T 3\n")                          # the guest counts on its serial port
...     snapshot = vm.snapshot(DIRECTORY)                       # pauses, writes, goes on
>>> with ff.restore(snapshot) as twin:                          # another machine, at the same instruction
...     count = int(twin.serial.expect(r"T (\d+)\n")[1])
...     twin.pause()
...     twin
<Machine paused 1 cpu 64M software>
>>> count > 3
True

The commands are `cloud-hypervisor` and `ch-remote`, Cloud Hypervisor's, and `freezeframe`.
Names are loaded when they are used: start-up time is a feature.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from freezeframe.control.session import Console, Machine, Snapshot, boot, restore
    from freezeframe.errors import (
        Busy,
        Damaged,
        DeadlineExceeded,
        EngineError,
        FreezeframeError,
        Incompatible,
        InvalidState,
        IoFailed,
        NotFound,
        NotSupported,
        Refused,
        Torn,
    )
    from freezeframe.proof import Proof, Replay, prove, replay

__version__ = "0.1.0"
__all__ = [
    "Busy",
    "Console",
    "Damaged",
    "DeadlineExceeded",
    "EngineError",
    "FreezeframeError",
    "Incompatible",
    "InvalidState",
    "IoFailed",
    "Machine",
    "NotFound",
    "NotSupported",
    "Proof",
    "Refused",
    "Replay",
    "Snapshot",
    "Torn",
    "__version__",
    "boot",
    "prove",
    "replay",
    "restore",
]

_OF_SESSIONS = {"Console", "Machine", "Snapshot", "boot", "restore"}
_OF_PROOFS = {"Proof", "Replay", "prove", "replay"}


def __getattr__(name: str) -> object:
    if name in _OF_SESSIONS:
        from freezeframe.control import session

        return getattr(session, name)
    if name in _OF_PROOFS:
        from freezeframe import proof

        return getattr(proof, name)
    if name in __all__:
        from freezeframe import errors

        return getattr(errors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Which CPU engine runs a machine, and why."""

from __future__ import annotations

import functools
import os

from freezeframe.errors import NotSupported, Refused

ENGINES = ("auto", "kvm", "software")
VARIABLE = "FREEZEFRAME_ENGINE"
KVM_DEVICE = "/dev/kvm"


class EngineReport:
    """The engine in use (`software` or `kvm`) and the reason, a sentence for people."""

    __slots__ = ("name", "reason")

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason

    def __repr__(self) -> str:
        return f"<EngineReport {self.name}: {self.reason}>"

    def to_json(self) -> dict[str, str]:
        return {"name": self.name, "reason": self.reason}


def choose(asked: str | None) -> EngineReport:
    """`asked`: the option's value; None or "auto" leaves it to the environment variable, and then to us."""
    source = "the engine option"
    if asked in (None, "auto") and os.environ.get(VARIABLE):
        asked, source = os.environ[VARIABLE], f"the variable {VARIABLE}"
    if asked in (None, "auto"):
        runs, reason = _measure()
        return EngineReport("kvm" if runs else "software", reason)
    if asked == "software":
        return EngineReport("software", f"asked for by {source}")
    if asked == "kvm":
        reason = f"asked for by {source}"
        if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
            raise NotSupported(
                f"the kvm engine: {_no_device()}",
                hint="leave the engine at auto or ask for software",
            )
        return EngineReport("kvm", reason)
    raise Refused(f"no engine {asked!r} ({source}): auto, kvm or software")


def _no_device() -> str:
    if not os.path.exists(KVM_DEVICE):
        return f"there is no {KVM_DEVICE}"
    return f"{KVM_DEVICE} cannot be opened by this user"


@functools.cache
def _measure() -> tuple[bool, str]:
    """Whether this host's KVM can run an operating system, and why it is taken or not. That it exists says nothing."""
    if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return False, _no_device()
    from freezeframe import _core

    runs, found = _core.kvm_probe()
    return runs, f"{KVM_DEVICE} was tried: {found}"

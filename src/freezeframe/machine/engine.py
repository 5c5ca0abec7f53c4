"""Which CPU engine runs a machine, and why."""

from __future__ import annotations

import functools
import os

from freezeframe.errors import NotSupported, Refused

ENGINES = ("auto", "kvm", "software")
VARIABLE = "FREEZEFRAME_ENGINE"
TIERS = ("interpreter", "translator")
TIER_VARIABLE = "FREEZEFRAME_TIER"
KVM_DEVICE = "/dev/kvm"


class EngineReport:
    """The engine in use (`software` or `kvm`) and the reason, a sentence for people.

    `tier`: what runs decoded blocks in the software engine, `interpreter` or `translator`; of no meaning on KVM.
    """

    __slots__ = ("name", "reason", "tier")

    def __init__(self, name: str, reason: str, tier: str = "translator") -> None:
        self.name = name
        self.reason = reason
        self.tier = tier

    def __repr__(self) -> str:
        return f"<EngineReport {self.name}: {self.reason}>"

    def to_json(self) -> dict[str, str]:
        return {"name": self.name, "reason": self.reason}


def choose(asked: str | None, tier: str | None = None) -> EngineReport:
    """`asked`: the option's value; None or "auto" leaves it to the environment variable, and then to us.

    `tier`: likewise, of the software engine; it has no option, the translator is for everybody.
    """
    source = "the engine option"
    if asked in (None, "auto") and os.environ.get(VARIABLE):
        asked, source = os.environ[VARIABLE], f"the variable {VARIABLE}"
    if asked in (None, "auto"):
        return EngineReport("software", _why_software(), _tier(tier))
    if asked == "software":
        return EngineReport("software", f"asked for by {source}", _tier(tier))
    if asked == "kvm":
        if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
            raise NotSupported(
                f"the kvm engine: {_no_device()}",
                hint="leave the engine at auto or ask for software",
            )
        return EngineReport("kvm", f"asked for by {source}; {_measured()}")
    raise Refused(f"no engine {asked!r} ({source}): auto, kvm or software")


def _tier(asked: str | None) -> str:
    tier = asked or os.environ.get(TIER_VARIABLE) or "translator"
    if tier not in TIERS:
        raise Refused(f"no tier {tier!r} (the variable {TIER_VARIABLE}): interpreter or translator")
    return tier


def _no_device() -> str:
    if not os.path.exists(KVM_DEVICE):
        return f"there is no {KVM_DEVICE}"
    return f"{KVM_DEVICE} cannot be opened by this user"


def _why_software() -> str:
    """Why `auto` does not take KVM: until that engine has run Linux, only who asks for it gets it."""
    if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return _no_device()
    return f"{KVM_DEVICE} is there, but the kvm engine has not run Linux yet: it is taken only when asked for"


@functools.cache
def _measured() -> str:
    """What a throw-away machine says of this host's KVM: that the device exists says nothing."""
    from freezeframe import _core

    _runs, found = _core.kvm_probe()
    return f"{KVM_DEVICE} was tried: {found}"

"""Which CPU engine runs a machine, and why."""

from __future__ import annotations

import functools
import os

from freezeframe.errors import NotSupported, Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from freezeframe import _core
    from freezeframe.config import CpusConfig

ENGINES = ("auto", "kvm", "software")
VARIABLE = "FREEZEFRAME_ENGINE"
TIERS = ("interpreter", "translator")
TIER_VARIABLE = "FREEZEFRAME_TIER"
KVM_DEVICE = "/dev/kvm"


class EngineReport:
    """The engine in use (`software` or `kvm`) and the reason, a sentence for people.

    `tier`: what runs decoded blocks in the software engine, `interpreter` or `translator`; of no meaning on KVM.
    `ours`: whether the choice was left to us, so that another engine may be taken. `warning`: what may go wrong.
    """

    __slots__ = ("name", "ours", "reason", "tier", "warning")

    def __init__(
        self, name: str, reason: str, tier: str = "translator", *, ours: bool = False, warning: str | None = None
    ) -> None:
        self.name = name
        self.reason = reason
        self.tier = tier
        self.ours = ours
        self.warning = warning

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
        fit, why = _fit()
        return EngineReport("kvm" if fit else "software", why, _tier(tier), ours=True)
    if asked == "software":
        return EngineReport("software", f"asked for by {source}", _tier(tier))
    if asked == "kvm":
        if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
            raise NotSupported(
                f"the kvm engine: {_no_device()}",
                hint="leave the engine at auto or ask for software",
            )
        runs, found, _ = _measured()
        warning = None if runs else f"Linux is not expected to boot on the kvm engine of this host: {found}"
        return EngineReport("kvm", f"asked for by {source}; {KVM_DEVICE} was tried: {found}", warning=warning)
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


def _fit() -> tuple[bool, str]:
    """Whether `auto` takes KVM, and why: all that Linux needs is there, and a guest's TSC can be set."""
    if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return False, _no_device()
    _, found, fit = _measured()
    return fit, f"{KVM_DEVICE} was tried: {found}"


@functools.cache
def _measured() -> tuple[bool, str, bool]:
    """What a throw-away machine says of this host's KVM: that the device exists says nothing."""
    from freezeframe import _core

    return _core.kvm_probe()


def settle(
    report: EngineReport,
    clock: _core.Clock,
    memory: _core.Memory,
    cpus: CpusConfig,
    states: Sequence[Mapping[str, Any]] | None = None,
    *,
    needs_software: str | None = None,
) -> EngineReport:
    """The engine for one machine, before anything of it is built. `states`: of its vCPUs, when it was saved.

    Raises `NotSupported` or `Incompatible`, by name, when the engine that was asked for cannot take it. Where the
    choice is ours it falls to the software engine, and the report says why. `needs_software`: what of its configuration
    only that one has.
    """
    if report.name != "kvm":
        return report
    from freezeframe import _core

    try:
        if needs_software is not None:
            raise NotSupported(f"the kvm engine has no {needs_software}", hint="ask for the software engine")
        _core.kvm_check(clock, memory, vcpus=cpus.boot_vcpus, phys_bits=cpus.max_phys_bits, states=states)
    except NotSupported as error:
        if not report.ours:
            raise
        return EngineReport("software", f"{report.reason}; but not for this machine: {error}", report.tier, ours=True)
    return report


def memory_at_once(report: EngineReport) -> str | None:
    """Why an engine cannot have a snapshot's memory chunk by chunk; None where it can."""
    from freezeframe import _core

    return _core.faults_unavailable() if report.name == "kvm" else None

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
TRIAL_VARIABLE = "FREEZEFRAME_KVM_TRIAL"
TRIALS = ("remembered", "fresh")
ANSWER = "kvm"


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
        trial = _tried()
        warning = None if trial.runs else f"Linux is not expected to boot on the kvm engine of this host: {trial.found}"
        return EngineReport("kvm", f"asked for by {source}; {trial}", warning=warning)
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
    trial = _known_or_tried()
    return trial.fit, str(trial)


class Trial:
    """What a throw-away machine says of this host's KVM: that the device exists says nothing.

    `runs`: Linux can be expected to boot. `fit`: `auto` takes it. `found`: a sentence for people. `earlier`: it was
    another process that tried.
    """

    __slots__ = ("earlier", "fit", "found", "runs")

    def __init__(self, *, runs: bool, fit: bool, found: str, earlier: bool = False) -> None:
        self.runs = runs
        self.fit = fit
        self.found = found
        self.earlier = earlier

    def __str__(self) -> str:
        when = " earlier in this boot of the host" if self.earlier else ""
        return f"{KVM_DEVICE} was tried{when}: {self.found}"


@functools.cache
def _tried() -> Trial:
    """Tries KVM now, which takes some 10 ms, and keeps for others what does not depend on the moment."""
    from freezeframe import _core
    from freezeframe.machine import per_boot

    runs, found, fit, lasting = _core.kvm_probe()
    if lasting:
        per_boot.remember(ANSWER, f"{int(runs)}{int(fit)} {found}", *_identity())
    return Trial(runs=runs, fit=fit, found=found)


@functools.cache
def _known_or_tried() -> Trial:
    """What an earlier process of this user's found out since the host's boot, or what is found now."""
    from freezeframe.machine import per_boot

    how = os.environ.get(TRIAL_VARIABLE) or "remembered"
    if how not in TRIALS:
        raise Refused(f"no trial {how!r} (the variable {TRIAL_VARIABLE}): remembered or fresh")
    answer = per_boot.recall(ANSWER, *_identity()) if how == "remembered" else None
    if answer is None or answer[:3] not in ("00 ", "10 ", "11 ") or not answer[3:]:
        return _tried()
    return Trial(runs=answer[0] == "1", fit=answer[1] == "1", found=answer[3:], earlier=True)


def _identity() -> tuple[int, ...]:
    """Of the device: another one after KVM's module was loaded anew."""
    try:
        found = os.stat(KVM_DEVICE)
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_rdev)


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

"""The rate of the host's time stamp counter: measured once per boot of the host, because it takes a while."""

from __future__ import annotations

import os

from freezeframe import _core
from freezeframe.machine import per_boot

# Two rates this close are one (the kernel's own limit for TSC drift that NTP can correct).
TOLERANCE_PPM = 250
ANSWER = "tsc-khz"
# What a guest is told where the host has no counter that can be used.
FALLBACK_KHZ = 2_000_000

KVM_CREATE_VM = 0xAE01
KVM_CREATE_VCPU = 0xAE41
KVM_GET_TSC_KHZ = 0xAEA3


def host_khz() -> int:
    """The host's TSC rate in kHz, 0 when it has none that can be used."""
    known = per_boot.recall(ANSWER)
    if known is not None and known.isascii() and known.isdigit():
        return int(known)
    rate = _kvm_khz() or _core.host_tsc_khz()
    per_boot.remember(ANSWER, str(rate))
    return rate


def same(khz: int, other: int) -> bool:
    return abs(khz - other) * 1_000_000 <= TOLERANCE_PPM * khz


def _kvm_khz() -> int:
    """What KVM's own clock uses: exact where it can be had, 0 where not."""
    from fcntl import ioctl

    opened: list[int] = []
    try:
        opened.append(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        opened.append(ioctl(opened[0], KVM_CREATE_VM, 0))
        opened.append(ioctl(opened[1], KVM_CREATE_VCPU, 0))
        return max(0, ioctl(opened[2], KVM_GET_TSC_KHZ, 0))
    except OSError:
        return 0
    finally:
        for fd in reversed(opened):
            os.close(fd)

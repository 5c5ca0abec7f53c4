"""QEMU's TCG under measurement: microvm with PCI (the faster of its machines), driven over QMP."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

from freezeframe.testing.process import Vmm

DEADLINE_S = 600.0


def _tsc_khz() -> int:
    """The host's TSC rate, which TCG's guest sees: microvm has no timer that a kernel could calibrate it against reliably."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("cpu MHz"):
            return int(float(line.split(":")[1]) * 1000)
    raise RuntimeError("no cpu MHz in /proc/cpuinfo")


class Qemu:
    name = "QEMU TCG"

    def __init__(
        self, scratch: Path, cpus: int, memory: str, kernel: Path, initramfs: Path, cmdline: str, disk: Path
    ) -> None:
        self._scratch, self._cpus, self._memory = scratch, cpus, memory
        self._guest = (kernel, initramfs, cmdline, disk)
        self._number = 0
        self._qmp: Any = None

    def _argv(self, *more: str) -> list[str]:
        kernel, initramfs, cmdline, disk = self._guest
        self._number += 1
        self._socket = self._scratch / f"qmp-{self._number}.sock"
        return [
            "-M", "microvm,pcie=on,acpi=on,rtc=on", "-accel", "tcg,thread=multi", "-cpu", "qemu64,+x2apic,+ssse3,+sse4.1,+sse4.2,+popcnt",
            "-m", self._memory, "-smp", str(self._cpus), "-kernel", str(kernel), "-initrd", str(initramfs), "-append", f"{cmdline} console=hvc0 tsc_early_khz={_tsc_khz()}",
            "-drive", f"id=d,file={disk},format=raw,if=none", "-device", "virtio-blk-pci,drive=d", "-device", "virtio-rng-pci",
            "-device", "virtio-serial-pci", "-chardev", "stdio,id=c", "-device", "virtconsole,chardev=c", "-display", "none", "-no-reboot",
            "-nodefaults", "-no-user-config", "-qmp", f"unix:{self._socket},server=on,wait=off", *more,
        ]  # fmt: skip

    def boot(self) -> Vmm:
        self._qmp = None
        return Vmm(self._argv(), command="qemu-system-x86_64")

    def _connect(self) -> Any:
        if self._qmp is None:
            end = time.monotonic() + DEADLINE_S
            connection = socket.socket(socket.AF_UNIX)
            while True:
                try:
                    connection.connect(str(self._socket))
                    break
                except OSError:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.001)
            self._qmp = connection.makefile("rw")
            self._qmp.readline()
            self._say("qmp_capabilities")
        return self._qmp

    def _say(self, command: str, **arguments: object) -> Any:
        qmp = self._qmp or self._connect()
        qmp.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        qmp.flush()
        while True:
            answer = json.loads(qmp.readline())
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']}")

    def pause(self) -> float:
        self._connect()
        began = time.monotonic()
        self._say("stop")
        return time.monotonic() - began

    def snapshot(self, where: Path) -> float:
        """Saves to a file, synced; QEMU's own bandwidth limit is lifted."""
        self._say("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        began = time.monotonic()
        self._say("migrate", uri=f"exec:dd of={where} bs=1M iflag=fullblock conv=fsync 2>/dev/null")
        self._wait("completed")
        return time.monotonic() - began

    def _wait(self, status: str) -> None:
        end = time.monotonic() + DEADLINE_S
        while self._say("query-migrate").get("status") != status:
            if time.monotonic() > end:
                raise RuntimeError("QEMU's migration did not end")
            time.sleep(0.001)

    def restore(self, where: Path) -> tuple[Vmm, float]:
        self._qmp = None
        vmm = Vmm(self._argv("-S", "-incoming", f"exec:cat {where}"), command="qemu-system-x86_64")
        self._connect()
        end = time.monotonic() + DEADLINE_S
        while self._say("query-status")["status"] == "inmigrate":
            if time.monotonic() > end:
                raise RuntimeError("QEMU did not restore")
            time.sleep(0.001)
        return vmm, time.monotonic() - vmm.started

    def resume(self) -> None:
        self._say("cont")

"""freezeframe under measurement, by its command line and its socket."""

from __future__ import annotations

import http.client
import json
import socket
import time
from pathlib import Path
from typing import Any

from freezeframe.testing.process import Vmm

DEADLINE_S = 600.0


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(DEADLINE_S)
        self.sock.connect(str(self._path))


class Control:
    """A VMM's socket, one connection a request as `ch-remote` has."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = _Connection(self._path)
        connection.request(method, f"/api/v1/{path}", None if body is None else json.dumps(body))
        response = connection.getresponse()
        data = response.read()
        connection.close()
        if response.status >= 300:
            raise RuntimeError(f"{path}: {response.status} {data!r}")
        return json.loads(data) if data else None

    def pause(self) -> None:
        self.call("PUT", "vm.pause")

    def resume(self) -> None:
        self.call("PUT", "vm.resume")

    def snapshot(self, where: Path) -> None:
        """Into an empty directory."""
        self.call("PUT", "vm.snapshot", {"destination_url": f"file://{where}"})

    def wait_paused(self, vmm: Vmm) -> None:
        """Until the machine of a VMM that was just started exists and stands."""
        while True:
            try:
                if self.call("GET", "vm.info")["state"] == "Paused":
                    return
            except (OSError, RuntimeError):
                if vmm.process.poll() is not None or time.monotonic() - vmm.started > DEADLINE_S:
                    raise
            time.sleep(0.0005)


class Ours:
    name = "freezeframe"

    def __init__(
        self, scratch: Path, cpus: int, memory: str, kernel: Path, initramfs: Path, cmdline: str, disk: Path
    ) -> None:
        self._scratch, self._cpus, self._memory = scratch, cpus, memory
        self._guest = (kernel, initramfs, cmdline, disk)
        self._number = 0
        self._socket = scratch / "ours.sock"

    def boot(self) -> Vmm:
        kernel, initramfs, cmdline, disk = self._guest
        self._number += 1
        self._socket = self._scratch / f"ours-{self._number}.sock"
        return Vmm([
            "--cpus", f"boot={self._cpus}", "--memory", f"size={self._memory}",
            "--kernel", str(kernel), "--initramfs", str(initramfs), "--cmdline", f"{cmdline} console=hvc0", "--disk", f"path={disk}",
        ], socket=self._socket)  # fmt: skip

    def pause(self) -> float:
        began = time.monotonic()
        Control(self._socket).pause()
        return time.monotonic() - began

    def snapshot(self, where: Path) -> float:
        where.mkdir()
        began = time.monotonic()
        Control(self._socket).snapshot(where)
        return time.monotonic() - began

    def restore(self, where: Path) -> tuple[Vmm, float]:
        """A new process with the machine restored and paused, and how long that took from before its start."""
        self._number += 1
        self._socket = self._scratch / f"ours-{self._number}.sock"
        vmm = Vmm(["--restore", f"source_url=file://{where}"], socket=self._socket)
        Control(self._socket).wait_paused(vmm)
        return vmm, time.monotonic() - vmm.started

    def resume(self) -> None:
        Control(self._socket).resume()

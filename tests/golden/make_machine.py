"""Makes `machine-v1.tar.gz`: a whole machine, which every reader of format version 1 must restore and run.

    python tests/golden/make_machine.py tests/golden/machine-v1.tar.gz

As long as version 1 has not been released, a change of saved fields is followed by running this again; afterwards it
needs version 2, and this file stays.
"""

from __future__ import annotations

import gzip
import io
import os
import sys
import tarfile
import tempfile
from pathlib import Path

import freezeframe as ff
from freezeframe.testing.guests import smp


def make(work: Path) -> bytes:
    """Two CPUs with timers and IPIs on their way, at whatever instruction the pause finds."""
    kernel = work / "smp.elf"
    kernel.write_bytes(smp(2))
    with ff.boot(kernel=kernel, memory="16M", cpus=2) as vm:
        vm.serial.expect(r"T 3\n")
        vm.snapshot(work / "snapshot")
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for name in sorted(os.listdir(work / "snapshot")):
            data = (work / "snapshot" / name).read_bytes()
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o600
            tar.addfile(member, io.BytesIO(data))
    return packed.getvalue()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        Path(sys.argv[1]).write_bytes(make(Path(directory)))

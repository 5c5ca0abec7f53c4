"""A file system that is really full, and one that is really read-only: a small tmpfs in a mount namespace of its own."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unit

INSIDE = """
import os, subprocess, sys
from freezeframe.errors import IoFailed, chain_messages
from freezeframe.store import write_snapshot
from freezeframe import _core
from freezeframe.testing import small_snapshot as small

directory = sys.argv[1]
memory = _core.Memory([(0, 64 << 20)])
memory.write(0, os.urandom(32 << 20))
arguments = dict(config={"memory": {"size": 64 << 20}}, state={}, memory=memory, engine="software")

subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", directory], check=True)
try:
    write_snapshot(directory, **arguments)
except IoFailed as error:
    chain = chain_messages(error)
    assert chain[2:4] == [
        "Error writing dense memory snapshot region", "Guest memory error: No space left on device (os error 28)"
    ], chain
    assert "free some space" in chain[4], chain
else:
    raise SystemExit("fitted?")
assert os.listdir(directory) == []
found = os.statvfs(directory)
assert found.f_bfree > found.f_blocks * 9 // 10, "the space was not given back"

subprocess.run(["mount", "-o", "remount,size=64m", directory], check=True)
write_snapshot(directory, **arguments)
assert small.restore(directory, "copy").read(0, 32 << 20) == memory.read(0, 32 << 20)
for name in os.listdir(directory):
    os.unlink(os.path.join(directory, name))

subprocess.run(["mount", "-o", "remount,ro", directory], check=True)
try:
    write_snapshot(directory, **arguments)
except IoFailed as error:
    chain = chain_messages(error)
    assert chain[2:4] == [
        "Error creating VM config snapshot file", "Read-only file system (os error 30)"
    ], chain
else:
    raise SystemExit("written?")
print("ok")
"""


def test_no_space_and_read_only(tmp_path: Path) -> None:
    unshare = ["unshare", "--map-root-user", "--mount"]
    try:
        probe = subprocess.run(
            [*unshare, "mount", "-t", "tmpfs", "none", str(tmp_path)], check=False, capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if probe.returncode:
        pytest.skip(f"mount namespaces are not to be had: {probe.stderr.strip()}")
    done = subprocess.run(
        [*unshare, sys.executable, "-c", INSIDE, str(tmp_path)], check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr

"""SIGKILL at every step of a snapshot: the directory holds a whole one, or a restore says that it is torn.

A writer process counts its system calls on the directory and kills itself before or after the n-th one, so every
moment between two of them is tried, each time, without a timer.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from freezeframe.errors import Busy, Damaged, NotFound, Torn
from freezeframe.testing import small_snapshot as small

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unit

WRITER = """
import errno, os, signal, sys
from freezeframe.store import write_snapshot  # loaded before the counting starts
from freezeframe.testing import small_snapshot as small

directory, point, when, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
steps = 0

def counted(name):
    real = getattr(os, name)
    def call(*arguments, **keywords):
        global steps
        steps += 1
        if kind == "named" and name == "open" and arguments[1] & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        if steps == point and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if steps == point and when == "within" and name == "write":
            real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **keywords)
        if steps == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(os, name, call)

for name in ("open", "fchmod", "fsync", "link", "write"):
    counted(name)
small.snapshot(directory)
print(steps)
"""


def write(directory: Path, point: int, when: str, kind: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WRITER, str(directory), str(point), when, kind],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("when", ["before", "within", "after"])
@pytest.mark.parametrize("kind", ["unnamed", "named"])
def test_a_killed_writer_leaves_nothing_a_torn_one_or_a_whole_one(tmp_path: Path, kind: str, when: str) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    done = write(whole, 0, when, kind)
    assert done.returncode == 0, done.stderr
    steps = int(done.stdout)
    assert steps > 10
    seen: set[str] = set()
    for point in range(1, steps + 1):
        directory = tmp_path / str(point)
        directory.mkdir()
        ended = write(directory, point, when, kind)
        if ended.returncode == 0:  # a file without a name that this run refuses to make: the step does not exist
            continue
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        seen.add(judge(directory))
    assert "nothing" in seen
    assert "torn" in seen
    if when == "after":
        assert "whole" in seen


def judge(directory: Path) -> str:
    """What a restore says, after checking that it says the right thing."""
    names = set(os.listdir(directory))
    assert names <= {"memory-region-0", "memory-region-1", "vm.json"}
    try:
        memory = small.restore(directory, "copy")
    except NotFound:
        assert not names
        small.snapshot(directory)
        return "nothing"
    except Torn:
        assert "vm.json" not in names
    except Damaged as error:
        if error.file != str(directory / "vm.json"):  # else, where names come first, it was being written
            raise
    else:
        assert small.contents(memory) == small.contents(small.memory())
        return "whole"
    with pytest.raises(Busy, match="cannot be restored"):
        small.snapshot(directory)
    return "torn"

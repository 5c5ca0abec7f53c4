"""The kvm-unit-tests suite on the bare board of `rust/diff`: a second opinion on what ring 3 cannot try.

Runs where `FREEZEFRAME_KVM_UNIT_TESTS` names a built source tree of the suite (`./configure --arch=x86_64 && make`; its
repository is kvm-unit-tests/kvm-unit-tests on GitHub). The numbers of passing checks are those of commit 1da1819e49fc.
"""

from __future__ import annotations

import os
import subprocess

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SUITE = os.environ.get("FREEZEFRAME_KVM_UNIT_TESTS", "")

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(not SUITE, reason="FREEZEFRAME_KVM_UNIT_TESTS does not name a built kvm-unit-tests tree"),
]

# image, CPUs, checks that pass, checks that are known to fail and why
ROWS: list[tuple[str, int, int, tuple[str, ...]]] = [
    ("dummy", 1, 0, ()),
    ("setjmp", 1, 10, ()),
    ("tsc", 1, 3, ()),
    ("rdpru", 1, 1, ()),
    ("memory", 1, 4, ()),
    ("umip", 1, 11, ()),
    ("eventinj", 1, 13, ()),
    ("idt_test", 1, 4, ()),
    ("debug", 1, 25, ()),
    ("smptest", 2, 1, ()),
    ("smptest", 3, 1, ()),
    ("ioapic", 4, 30, ()),
    ("apic", 2, 55, ()),
    ("msr", 1, 1808, ()),
    ("xsave", 1, 4, ()),
    ("syscall", 1, 2, ()),
    ("la57", 1, 49, ()),
    ("pcid", 1, 2, ()),
    ("tsc_adjust", 1, 6, ()),
    ("rmap_chain", 1, 1, ()),
    ("tscdeadline_latency", 1, 1, ()),
    ("access_test", 1, 1, ()),
]


@pytest.fixture(scope="module")
def board():
    command = ["cargo", "build", "-q", "-p", "freezeframe-diff", "--bin", "freezeframe-board"]
    subprocess.run(command, cwd=ROOT, check=True)
    target = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
    return os.path.join(target, "debug", "freezeframe-board")


@pytest.mark.parametrize(("image", "cpus", "passing", "known"), ROWS, ids=str)
def test_row(board, image, cpus, passing, known):
    path = os.path.join(SUITE, "x86", f"{image}.flat")
    settings = [f"NR_CPUS={cpus}", "MEMSIZE=128", "TEST_DEVICE=0"]
    command = [board, path, "--cpus", str(cpus), "--limit", "300", *[a for s in settings for a in ("--env", s)]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=330)
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith("FAIL") and not any(k in line for k in known)]
    assert not failed
    assert "[Exit(0)]" in done.stdout, "\n".join(lines[-15:])
    assert sum(line.startswith("PASS") for line in lines) >= passing

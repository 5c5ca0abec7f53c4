"""The kvm-unit-tests suite on the bare board of `rust/diff`: a second opinion on what ring 3 cannot try.

Runs where `FREEZEFRAME_KVM_UNIT_TESTS` names a built source tree of the suite (`./configure --arch=x86_64 && make`; its
repository is kvm-unit-tests/kvm-unit-tests on GitHub), or `FREEZEFRAME_KVM_UNIT_TESTS_I386` one of `--arch=i386`. The numbers of
passing checks are those of commit 1da1819e49fc. Left out: `emulator` of 64 bits, whose far jump with a 64-bit offset no
AMD processor has (everything after it passes), `realmode`, which wants a PIT, and what the profile lacks.
"""

from __future__ import annotations

import os
import subprocess

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SUITE = os.environ.get("FREEZEFRAME_KVM_UNIT_TESTS", "")
SUITE_I386 = os.environ.get("FREEZEFRAME_KVM_UNIT_TESTS_I386", "")

pytestmark = pytest.mark.guest

# Image, CPUs, checks that pass.
ROWS = [
    ("dummy", 1, 0),
    ("setjmp", 1, 10),
    ("tsc", 1, 3),
    ("rdpru", 1, 1),
    ("memory", 1, 4),
    ("umip", 1, 11),
    ("eventinj", 1, 13),
    ("idt_test", 1, 4),
    ("debug", 1, 25),
    ("smptest", 2, 1),
    ("smptest", 3, 1),
    ("ioapic", 4, 30),
    ("apic", 2, 55),
    ("msr", 1, 1808),
    ("xsave", 1, 4),
    ("syscall", 1, 2),
    ("la57", 1, 49),
    ("pcid", 1, 2),
    ("tsc_adjust", 1, 6),
    ("rmap_chain", 1, 1),
    ("tscdeadline_latency", 1, 1),
    ("access_test", 1, 1),
]
ROWS_I386 = [
    ("cmpxchg8b", 1, 1),
    ("emulator", 1, 84),
    ("eventinj", 1, 15),
    ("taskswitch", 1, 0),
    ("taskswitch2", 1, 13),
    ("setjmp", 1, 10),
    ("msr", 1, 1808),
    ("smptest", 3, 1),
    ("tsc_adjust", 1, 6),
    ("umip", 1, 11),
]


@pytest.fixture(scope="module")
def board():
    command = ["cargo", "build", "-q", "-p", "freezeframe-diff", "--bin", "freezeframe-board"]
    subprocess.run(command, cwd=ROOT, check=True)
    target = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
    return os.path.join(target, "debug", "freezeframe-board")


def run(board, suite, image, cpus, passing):
    path = os.path.join(suite, "x86", f"{image}.flat")
    settings = [f"NR_CPUS={cpus}", "MEMSIZE=128", "TEST_DEVICE=0"]
    command = [board, path, "--cpus", str(cpus), "--limit", "300", *[a for s in settings for a in ("--env", s)]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=330)
    lines = done.stdout.splitlines()
    assert not [line for line in lines if line.startswith("FAIL")]
    assert "[Exit(0)]" in done.stdout, "\n".join(lines[-15:])
    assert sum(line.startswith("PASS") for line in lines) >= passing


@pytest.mark.skipif(not SUITE, reason="FREEZEFRAME_KVM_UNIT_TESTS does not name a built kvm-unit-tests tree")
@pytest.mark.parametrize(("image", "cpus", "passing"), ROWS)
def test_64_bits(board, image, cpus, passing):
    run(board, SUITE, image, cpus, passing)


@pytest.mark.skipif(not SUITE_I386, reason="FREEZEFRAME_KVM_UNIT_TESTS_I386 does not name a built kvm-unit-tests tree")
@pytest.mark.parametrize(("image", "cpus", "passing"), ROWS_I386)
def test_32_bits(board, image, cpus, passing):
    run(board, SUITE_I386, image, cpus, passing)

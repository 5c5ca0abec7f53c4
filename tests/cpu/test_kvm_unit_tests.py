"""The kvm-unit-tests suite through the `freezeframe` command: a second opinion on what ring 3 cannot try.

The suite is not ours and is not here: FREEZEFRAME_KVM_UNIT_TESTS names a tree of it in which `./configure --arch=x86_64
&& make` was done, FREEZEFRAME_KVM_UNIT_TESTS_I386 one for `--arch=i386`. The table of all rows, beside QEMU's TCG, is in
docs/kvm-unit-tests.md.
"""

from __future__ import annotations

import os
import subprocess

import pytest

from freezeframe.testing.process import installed

pytestmark = pytest.mark.guest

VARIABLE, VARIABLE_I386 = "FREEZEFRAME_KVM_UNIT_TESTS", "FREEZEFRAME_KVM_UNIT_TESTS_I386"
PASSED, SKIPPED = 1, 77  # of isa-debug-exit: 0 and 38
LIMIT_S = 900


class Row:
    """A test as unittests.cfg has it: image, CPUs, arguments, changes of the CPU; and how many checks pass."""

    def __init__(self, name: str, image: str, passing: int, *, cpus: int = 1, arguments: str = "", cpu: str = ""):
        self.name = name
        self.image = image
        self.passing = passing
        self.cpus = cpus
        self.arguments = arguments
        self.cpu = cpu
        # TEST_DEVICE=0 leaves out what only KVM has: interrupts between CPUs by hypercall.
        self.environment = f"NR_CPUS={cpus}\nMEMSIZE=128\n" + ("TEST_DEVICE=0\n" if image == "apic" else "")


# QEMU's `-cpu max`, as far as it goes here.
MAX = "+smap,+umip,+pku,+pks,+rdpid,+far64"
ROWS = [
    Row("dummy", "dummy", 0),
    Row("setjmp", "setjmp", 10),
    Row("idt_test", "idt_test", 4),
    Row("memory", "memory", 4),
    Row("rdpru", "rdpru", 1),
    Row("tsc", "tsc", 6, cpu=MAX),
    Row("sieve", "sieve", 0),
    Row("rmap_chain", "rmap_chain", 1),
    Row("umip", "umip", 21, cpu="+umip"),
    Row("umip-absent", "umip", 11),
    Row("debug", "debug", 25),
    Row("eventinj", "eventinj", 13),
    Row("emulator", "emulator", 149, cpu="+far64"),
    Row("access", "access_test", 1),
    Row("access-pku", "access_test", 1, cpu="+pku"),
    Row("smap", "smap", 18, cpu=MAX),
    Row("pku", "pku", 7, cpu=MAX),
    Row("pks", "pks", 7, cpu=MAX),
    Row("msr", "msr", 1808),
    Row("xsave", "xsave", 4),
    Row("syscall", "syscall", 2),
    Row("la57", "la57", 49),
    Row("pcid", "pcid", 2),
    Row("tsc_adjust", "tsc_adjust", 6),
    Row("x2apic", "apic", 55, cpus=2),
    Row("xapic", "apic", 43, cpus=2, cpu="-x2apic"),
    Row("ioapic", "ioapic", 30, cpus=4),
    Row("smptest", "smptest", 1, cpus=2),
    Row("smptest3", "smptest", 1, cpus=3),
    Row("realmode", "realmode", 127),
    Row("vmexit_cpuid", "vmexit", 0, arguments="cpuid"),
    Row("vmexit_mov_from_cr8", "vmexit", 0, arguments="mov_from_cr8"),
    Row("vmexit_mov_to_cr8", "vmexit", 0, arguments="mov_to_cr8"),
    Row("vmexit_inl_pmtimer", "vmexit", 0, arguments="inl_from_pmtimer"),
    Row("vmexit_ipi", "vmexit", 0, arguments="ipi", cpus=2),
    Row("vmexit_ipi_halt", "vmexit", 0, arguments="ipi_halt", cpus=2),
    Row("vmexit_ple_round_robin", "vmexit", 0, arguments="ple_round_robin"),
    Row("vmexit_cr0_wp", "vmexit", 0, arguments="toggle_cr0_wp", cpus=2),
    Row("vmexit_cr4_pge", "vmexit", 0, arguments="toggle_cr4_pge", cpus=2),
    Row("vmexit_tscdeadline", "vmexit", 0, arguments="tscdeadline"),
    Row("vmexit_tscdeadline_immed", "vmexit", 0, arguments="tscdeadline_immed"),
    Row("tscdeadline_latency", "tscdeadline_latency", 1),
]
ROWS_I386 = [
    Row("cmpxchg8b", "cmpxchg8b", 1),
    Row("emulator", "emulator", 84),
    Row("eventinj", "eventinj", 15),
    Row("smap", "smap", 18, cpu=MAX),
    Row("taskswitch", "taskswitch", 0),
    Row("taskswitch2", "taskswitch2", 13),
    Row("setjmp", "setjmp", 10),
    Row("msr", "msr", 1808),
    Row("la57", "la57", 1),
    Row("realmode", "realmode", 127),
    Row("smptest", "smptest", 1, cpus=2),
    Row("smptest3", "smptest", 1, cpus=3),
    Row("tsc", "tsc", 6, cpu=MAX),
    Row("tsc_adjust", "tsc_adjust", 6),
    Row("umip", "umip", 21, cpu="+umip"),
]


def tree(variable: str) -> str:
    """The built suite, or a skip that says how to have it."""
    found = os.environ.get(variable, "")
    if not found:
        arch = "i386" if variable == VARIABLE_I386 else "x86_64"
        pytest.skip(
            f"{variable} names no built suite: git clone https://gitlab.com/kvm-unit-tests/kvm-unit-tests, in there "
            f"./configure --arch={arch} && make, then set it to that directory"
        )
    return found


def run(suite: str, row: Row, tmp_path) -> None:
    environment = tmp_path / "environment"
    environment.write_text(row.environment)
    words = [installed("freezeframe"), "run", "--multiboot", "--test-devices", "--no-reboot", "--memory", "128M"]
    words += ["--kernel", os.path.join(suite, "x86", f"{row.image}.flat"), "--initramfs", str(environment)]
    words += ["--cpus", str(row.cpus), "--cmdline", row.arguments, "--timeout", str(LIMIT_S)]
    words += [f"--cpu={row.cpu}"] * bool(row.cpu)
    done = subprocess.run(words, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    lines = done.stdout.decode(errors="replace").splitlines()
    assert not [line for line in lines if line.startswith("FAIL")]
    assert done.returncode == PASSED, "\n".join([*lines[-15:], done.stderr.decode()])
    assert sum(line.startswith("PASS") for line in lines) >= row.passing


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_64_bits(row, tmp_path):
    run(tree(VARIABLE), row, tmp_path)


@pytest.mark.parametrize("row", ROWS_I386, ids=lambda row: row.name)
def test_32_bits(row, tmp_path):
    run(tree(VARIABLE_I386), row, tmp_path)

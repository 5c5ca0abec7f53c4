"""`freezeframe run` as a process: multiboot images and the test devices, exit statuses, snapshots of such machines."""

from __future__ import annotations

import re
import subprocess

import pytest

from freezeframe.testing.guests import board, tick
from freezeframe.testing.process import Vmm, installed

pytestmark = pytest.mark.guest

DEADLINE = 60.0


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    directory = tmp_path_factory.mktemp("images")
    for name, image in {"few": board(5), "many": board(60), "endless": board(0), "tick": tick(size=0x1000)}.items():
        (directory / name).write_bytes(image)
    return directory


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [installed("freezeframe"), "run", *map(str, arguments)]
    return subprocess.run(
        words, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=DEADLINE, check=False
    )


def machine(image: object) -> list[object]:
    return ["--kernel", image, "--multiboot", "--test-devices", "--memory", "64M"]


def test_a_multiboot_image_finds_what_it_was_given(images, tmp_path):
    (tmp_path / "environment").write_text("ONE=1\nTWO=2")
    done = run(
        *machine(images / "few"), "--cpus", 3, "--initramfs", tmp_path / "environment", "--cmdline", "what ever 7"
    )
    assert done.returncode == 7 << 1 | 1, done.stderr
    assert done.stdout.splitlines() == [
        "FLAGS 0000024d",
        f"UPPER {63 << 10}",
        f"CMDLINE {images}/few what ever 7",
        "MODULE ONE=1",
        "TWO=2",
        "CPUS 3",
        "RAM 04000000",
        "LATCH 11aa3344",
        "WINDOW 55669988",
        "LINE 11",
        *(f"TICK {n}" for n in range(1, 6)),
    ]
    assert done.stderr == ""


@pytest.mark.parametrize(("digit", "status"), [(0, 1), (1, 3)])
def test_the_exit_status_is_that_of_isa_debug_exit(images, digit, status):
    assert run(*machine(images / "few"), "--cmdline", digit).returncode == status


def test_without_its_devices_there_is_no_exit(images):
    done = run("--kernel", images / "few", "--multiboot", "--memory", "64M", "--timeout", 1)
    assert done.returncode == 124
    assert "CPUS 255" in done.stdout or "CPUS 65535" in done.stdout
    assert "did not end within 1 s" in done.stderr


def test_some_devices(images):
    done = run("--kernel", images / "few", "--multiboot", "--memory", "64M", "--timeout", 1, "--test-devices", "fw-cfg")
    assert "CPUS 1\n" in done.stdout
    assert "LATCH ffffffff" in done.stdout
    done = run("--kernel", images / "few", "--multiboot", "--test-devices", "fw-cfg,floppy")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no test device 'floppy'" in done.stderr


def test_an_image_without_a_header_is_refused(images):
    done = run(*machine(images / "tick"))
    assert done.returncode == 1
    assert "there is no multiboot 1 header" in done.stderr


def test_other_kernels_run_as_well(images):
    done = run("--kernel", images / "tick", "--memory", "64M", "--timeout", 2)
    assert done.returncode == 124
    assert "T 3\n" in done.stdout


def test_a_reset_ends_the_machine(tmp_path):
    """`lidt` of an empty table, then an exception: a triple fault."""
    (tmp_path / "image").write_bytes(_multiboot(bytes.fromhex("0f011d 20001000 0f0b") + bytes(64)))
    done = run(*machine(tmp_path / "image"), "--no-reboot", "--timeout", 30)
    assert (done.returncode, done.stdout) == (0, "")
    assert "reset" in done.stderr


def _multiboot(code: bytes) -> bytes:
    """A flat image at 1 MiB that begins with `code` after its header of 32 bytes."""
    flags, start = 0x10003, 0x10_0000
    words = (0x1BADB002, flags, -(0x1BADB002 + flags) & 0xFFFFFFFF, start, start, 0, 0, start + 32)
    return b"".join(word.to_bytes(4, "little") for word in words) + code


def test_a_snapshot_goes_on_with_its_timer_and_its_exit(images, tmp_path):
    (tmp_path / "snapshot").mkdir()
    words = ["run", *machine(images / "many"), "--cmdline", "4"]
    arguments = [*map(str, words), "--api-socket", str(tmp_path / "socket")]
    with Vmm(arguments, command=installed("freezeframe")) as vmm:
        vmm.socket = tmp_path / "socket"
        vmm.console.expect("^TICK 3$")
        vmm.remote("pause")
        vmm.remote("snapshot", f"file://{tmp_path}/snapshot")
        before = vmm.console.text
    arguments = ["--restore", f"source_url=file://{tmp_path}/snapshot,resume=on"]
    with Vmm(arguments) as vmm:
        assert vmm.wait(DEADLINE) == 4 << 1 | 1
        vmm.console.join()
        ticks = [int(n) for n in re.findall(r"TICK (\d+)\n", before + vmm.console.text)]
    assert ticks == list(range(1, 61))


def test_the_kvm_engine_says_what_it_lacks(images, tmp_path):
    done = run(*machine(images / "few"), "--engine", "kvm", "--timeout", 5)
    assert done.returncode == 1
    assert "8259" in done.stderr or "/dev/kvm" in done.stderr


def test_changes_of_the_cpu_must_be_known(images):
    done = run(*machine(images / "few"), "--cpu=+avx512")
    assert done.returncode == 1
    assert "no change of the CPU '+avx512'" in done.stderr
    assert run(*machine(images / "few"), "--cpu=-x2apic,+smap", "--cmdline", "0").returncode == 1


def test_by_qemus_options(images, tmp_path):
    (tmp_path / "environment").write_text("ONE=1")
    words = [
        installed("freezeframe-qemu"),
        "-nodefaults",
        "-device",
        "pc-testdev",
        "-display",
        "none",
        "-serial",
        "stdio",
    ]
    words += [
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=0x4",
        "-machine",
        "accel=tcg",
        "-kernel",
        str(images / "few"),
    ]
    words += ["-smp", "2", "-append", "1", "-initrd", str(tmp_path / "environment"), "-cpu", "max,+pcid"]
    done = subprocess.run(
        words, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=DEADLINE, check=False
    )
    assert done.returncode == 3
    assert done.stderr == "freezeframe-qemu: warning: this CPU does not have the requested feature pcid\n"
    assert "CPUS 2\nRAM 08000000\nLATCH 11aa3344\n" in done.stdout
    assert done.stdout.endswith("TICK 5\n")

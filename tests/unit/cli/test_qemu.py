from __future__ import annotations

import struct
import subprocess

import pytest

from freezeframe.cli import qemu
from freezeframe.errors import Refused
from freezeframe.testing.process import installed

pytestmark = pytest.mark.unit

HEADER = struct.pack("<III", 0x1BADB002, 0, -0x1BADB002 & 0xFFFFFFFF)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(HEADER)
    return str(path)


def call(*words):
    made = qemu.Call()
    for name, value in qemu._options(words):
        qemu._take(made, name, value)
    return made


def test_the_line_of_a_harness(image):
    words = [
        "--no-reboot",
        "-nodefaults",
        "-global",
        "kvm-pit.lost_tick_policy=discard",
        "-device",
        "pc-testdev",
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=0x4",
        "-display",
        "none",
        "-serial",
        "stdio",
        "-machine",
        "accel=tcg",
    ]
    made = call(*words, "-kernel", image, "-smp", "2", "-append", "a b", "-cpu", "qemu64,-x2apic,+umip,+tsc-deadline")
    config = qemu._config(made)
    assert made.no_reboot
    assert made.warnings == []
    assert config.payload.multiboot
    assert (config.payload.cmdline, config.cpus.boot_vcpus, config.memory.size) == ("a b", 2, 128 << 20)
    assert config.cpus.changes == ("-x2apic", "+umip")
    assert config.test_devices == ("Testdev", "DebugExit", "FwCfg", "PicPit")
    assert config.serial.mode == "Tty"


@pytest.mark.parametrize(
    ("cpu", "changes", "warnings"),
    [
        ("max", ("+smap", "+umip", "+pku", "+pks", "+rdpid", "+far64"), 0),
        ("max,-pku", ("+smap", "+umip", "+pku", "+pks", "+rdpid", "+far64", "-pku"), 0),
        ("qemu64", None, 0),
        ("qemu64,+pcid,+invpcid", None, 2),
        ("max,vendor=GenuineIntel,host-phys-bits", ("+smap", "+umip", "+pku", "+pks", "+rdpid", "+far64"), 1),
        ("Opteron_G1,vendor=AuthenticAMD", None, 0),
        ("qemu64,-pcid,-invpcid", None, 0),
    ],
)
def test_processors(image, cpu, changes, warnings):
    made = call("-kernel", image, "-cpu", cpu)
    assert qemu._config(made).cpus.changes == changes
    assert len(made.warnings) == warnings
    assert all("warning" in text for text in made.warnings)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["-drive", "file=x"], "-drive"),
        (["image"], "not an option"),
        (["-kernel"], "needs a value"),
        (["-device", "floppy"], "'floppy' is not a valid device model name"),
        (["-device", "isa-debug-exit"], "only at iobase"),
        (["-device", "isa-debug-exit,iobase=x"], "not a number"),
        (["-display", "gtk"], "no display"),
        (["-machine", "isapc"], "isapc"),
        (["-global", "a.b=c"], "a.b=c"),
    ],
)
def test_what_is_not_known_is_refused(words, why):
    with pytest.raises(Refused, match=why):
        call(*words)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["-smp", "2,cores=2"], "only a number"),
        (["-accel", "hvf"], "tcg or kvm"),
        (["-serial", "pty"], "stdio, null"),
        (["-kernel", "/no/such/file"], "could not load kernel"),
    ],
)
def test_values_that_cannot_be(image, words, why):
    with pytest.raises(Refused, match=why):
        qemu._config(call("-kernel", image, *words))


def test_what_harnesses_ask_first():
    def ask(*words):
        return subprocess.run(
            [installed("freezeframe-qemu"), *words], capture_output=True, text=True, check=True
        ).stdout

    assert ask("--help").startswith("QEMU emulator version 10.0.0")
    assert 'name "pc-testdev"' in ask("-device", "?")

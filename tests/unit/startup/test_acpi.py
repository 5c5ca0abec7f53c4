from __future__ import annotations

import shutil
import struct
import subprocess

import pytest

from freezeframe.startup import acpi, aml, layout

MAP = layout.address_map(4 << 30, 46)
PLATFORM = acpi.Platform(MAP, (0, 1, 254, 255, 300), serial=True)


def tables():
    blob = acpi.build(PLATFORM)
    base = layout.RSDP

    def at(address):
        start = address - base
        (length,) = struct.unpack_from("<I", blob, start + 4)
        return blob[start : start + length]

    (xsdt,) = struct.unpack_from("<Q", blob, 24)
    root = at(xsdt)
    found = {root[:4]: root}
    for (address,) in struct.iter_unpack("<Q", root[36:]):
        table = at(address)
        found[table[:4]] = table
    (dsdt,) = struct.unpack_from("<Q", found[b"FACP"], 140)
    found[b"DSDT"] = at(dsdt)
    return blob, found


def test_every_table_is_found_and_sums_to_zero():
    blob, found = tables()
    assert blob[:8] == b"RSD PTR "
    assert sum(blob[:20]) % 256 == 0
    assert sum(blob[:36]) % 256 == 0
    assert set(found) == {b"XSDT", b"FACP", b"APIC", b"MCFG", b"DSDT"}
    for table in found.values():
        assert sum(table) % 256 == 0


def test_processors_below_255_are_plain_local_apics():
    madt = tables()[1][b"APIC"]
    entries = []
    at = 44
    while at < len(madt):
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    assert [(e[0], e[3]) for e in entries[:3]] == [(0, 0), (0, 1), (0, 254)]
    assert [(e[0], struct.unpack_from("<I", e, 4)[0]) for e in entries[3:5]] == [(9, 255), (9, 300)]
    assert [e[0] for e in entries[5:]] == [1, 2]


def test_fadt_is_hardware_reduced_with_reset_and_sleep_port():
    fadt = tables()[1][b"FACP"]
    assert len(fadt) == 276
    assert struct.unpack_from("<I", fadt, 112) == (1 << 20 | 1 << 10 | 1 << 8,)
    for offset in (116, 244, 256):
        assert struct.unpack_from("<BBBBQ", fadt, offset) == (1, 8, 0, 1, 0x600)
    assert struct.unpack_from("<BBBBQ", fadt, 208) == (1, 32, 0, 3, 0x608)


def test_package_length_encodings():
    for size in (10, 62, 63, 64, 4000, 5000, 70000):
        made = aml.scope("AAAA", bytes(size))
        lead = made[1]
        extra = lead >> 6
        length = lead & 63 if extra == 0 else lead & 15 | int.from_bytes(made[2 : 2 + extra], "little") << 4
        assert length == len(made) - 1


def test_integers_take_the_shortest_form():
    assert [aml.integer(n)[0] for n in (0, 1, 2, 0x100, 0x10000, 1 << 32)] == [0, 1, 0x0A, 0x0B, 0x0C, 0x0E]


@pytest.mark.parametrize("serial", [True, False])
def test_a_disassembler_reads_it_back(tmp_path, serial):
    if shutil.which("iasl") is None:
        pytest.skip("iasl is not installed (Debian package acpica-tools)")
    platform = acpi.Platform(MAP, (0, 1), serial=serial)
    made = {"dsdt": acpi.dsdt(platform), "facp": acpi.fadt(1 << 20), "apic": acpi.madt((0, 300)), "mcfg": acpi.mcfg()}
    for name, table in made.items():
        (tmp_path / f"{name}.dat").write_bytes(table)
        done = subprocess.run(["iasl", "-d", f"{name}.dat"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0
        assert "Error" not in done.stdout + done.stderr
    text = (tmp_path / "dsdt.dsl").read_text()
    for words in ("PNP0A08", "_PRT", "PNP0C0C", "ACPI0013", "_S5", 'Name (_DDN, "COM1")' if serial else "PNP0C02"):
        assert words in text
    assert ("COM1" in text) == serial
    done = subprocess.run(["iasl", "dsdt.dsl"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "0 Errors" in done.stdout

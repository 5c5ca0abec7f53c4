from __future__ import annotations

import struct

from freezeframe.startup import smbios


def test_entry_point_finds_three_structures():
    blob = smbios.build(0xF0000)
    assert blob[:5] == b"_SM3_"
    assert sum(blob[:24]) % 256 == 0
    size, address = struct.unpack_from("<IQ", blob, 12)
    at = address - 0xF0000
    assert at + size == len(blob)
    kinds = []
    while at < len(blob):
        kind, length = blob[at], blob[at + 1]
        end = blob.index(b"\0\0", at + length) + 2
        kinds.append((kind, blob[at + length : end - 2].split(b"\0")))
        at = end
    assert kinds == [
        (0, [b"cloud-hypervisor", b"0"]),
        (1, [b"Cloud Hypervisor", b"cloud-hypervisor"]),
        (127, [b""]),
    ]

from __future__ import annotations

import struct

import pytest

from freezeframe.testing import guests

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("build", [guests.tick, guests.smp, lambda: guests.smp(1, x2apic=True, deadline=True)])
def test_image_is_an_elf_with_a_pvh_note(build):
    image = build()
    assert image[:5] == b"\x7fELF\x02"
    phoff, phentsize, phnum = struct.unpack_from("<Q14xHH", image, 32)
    headers = [struct.unpack_from("<IIQQQQQQ", image, phoff + i * phentsize) for i in range(phnum)]
    loads = [(h[4], h[6]) for h in headers if h[0] == 1]
    notes = [image[h[2] : h[2] + h[5]] for h in headers if h[0] == 4]
    assert len(notes) == 1
    name_size, size, kind, name, entry = struct.unpack_from("<III4sI", notes[0])
    assert (name_size, size, kind, name) == (4, 4, 18, b"Xen\0")
    assert any(base <= entry < base + length for base, length in loads)

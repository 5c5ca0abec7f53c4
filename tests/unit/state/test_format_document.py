"""`docs/formats/snapshot.md` against the program: its example is read, its tables are the records' fields."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from freezeframe import _core
from freezeframe.state import document as d
from freezeframe.store.reader import CHUNK_SIZES, PAGE_SIZE, REGION_LIMIT

pytestmark = pytest.mark.unit

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "formats" / "snapshot.md").read_text()


def _table(section: str) -> dict[str, str]:
    """Rows (member → type) of the first table after a heading."""
    text = PAGE.split(f"{section}\n", 1)[1]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", text.split("\n\n## ", 1)[0].split("\n### ", 1)[0], re.MULTILINE)
    return dict(rows)


KINDS = {"str": "string", "U64": "integer", "values": "object", "MemoryImage": "object", "SnapshotFormat": "object"}


@pytest.mark.parametrize(
    ("section", "record"),
    [("## `vm.json`", d.Document), ("### `format`", d.SnapshotFormat), ("### `memory.regions`", d.RegionImage)],
)
def test_tables_name_the_fields(section: str, record: type[d.Record]) -> None:
    assert _table(section) == {name: KINDS[field.kind] for name, field in record.fields.items()}


def _example() -> bytes:
    text = re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert text
    chunk = b"hello" + bytes(65531)
    filled = text[1].replace("EXAMPLE_DIGEST", d.to_base64(_core.blake3(chunk))).encode()
    sealed = filled.split(b' "seal"')[0]
    return filled.replace(b"EXAMPLE_SEAL", _core.blake3(sealed).hex().encode())


def test_the_example_is_what_is_written(tmp_path: Path) -> None:
    from freezeframe.store import SnapshotReader, write_snapshot

    memory = _core.Memory([(0, 131072)])
    memory.write(65536, b"hello")
    write_snapshot(
        tmp_path,
        config={"memory": {"size": 131072}},
        state={"clock": {"tsc_khz": 2445432}},
        memory=memory,
        engine="software",
    )
    assert (tmp_path / "vm.json").read_bytes() == _example()
    with SnapshotReader.open(tmp_path) as reader:
        assert reader.open_memory("copy").read(65536, 6) == b"hello\0"


def test_numbers_on_the_page() -> None:
    text = " ".join(PAGE.split())
    assert f"at most {d.DOCUMENT_LIMIT} bytes" in text
    assert f"`{d.FORMAT_NAME}`" in text
    assert f"a power of two from {CHUNK_SIZES[0]} to {CHUNK_SIZES[-1]}" in text
    assert f"1 to {REGION_LIMIT} regions" in text
    assert f"pages of {PAGE_SIZE} bytes" in text
    assert f"version {d.FORMAT_VERSION}" in PAGE.splitlines()[0]
    assert "below address 2^52" in text

"""The frozen snapshot of each format version still restores (`tests/golden/make_snapshot.py` made it)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from freezeframe.store import SnapshotReader
from freezeframe.testing import small_snapshot as small

pytestmark = pytest.mark.unit

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


@pytest.mark.parametrize("mode", ["ondemand", "copy"])
def test_version_1(mode: str) -> None:
    with SnapshotReader.open(GOLDEN / "snapshot-v1") as reader:
        assert reader.document.format.version == 1
        assert (reader.config, reader.state) == (small.CONFIG, small.STATE)
        assert small.contents(reader.open_memory(mode)) == small.contents(small.memory())


def test_version_1_is_still_what_is_written(tmp_path: Path) -> None:
    """Until there is a version 2, the same machine gives the same bytes, but for the producer's version."""
    small.snapshot(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory-region-0", "memory-region-1", "vm.json"]
    for path in tmp_path.iterdir():
        assert _anonymous(path) == _anonymous(GOLDEN / "snapshot-v1" / path.name)


def _anonymous(path: Path) -> bytes:
    return re.sub(rb'"(producer|seal)": ".*"', b"", path.read_bytes())

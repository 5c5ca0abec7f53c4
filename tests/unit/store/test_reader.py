"""Damage of every kind is refused before anything is built, and said with the file's name."""

from __future__ import annotations

import errno
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from freezeframe import _core
from freezeframe.errors import Damaged, FreezeframeError, Incompatible, IoFailed, NotFound, Torn, chain_messages
from freezeframe.store import SnapshotReader
from freezeframe.testing import small_snapshot as small

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unit

RECEIVING = ["Cannot restore VM", "Failed to receive migratable component snapshot"]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    directory = tmp_path / "snapshot"
    directory.mkdir()
    small.snapshot(directory)
    return directory


def edit(directory: Path, change: Any) -> None:
    """Changes `vm.json` as an honest editor would: sealed again."""
    path = directory / "vm.json"
    document = json.loads(path.read_text())
    change(document)
    del document["seal"]
    text = json.dumps(document, indent=1).removesuffix("\n}") + ",\n"
    path.write_text(f'{text} "seal": "{_core.blake3(text.encode()).hex()}"\n}}\n')


def test_editing_keeps_the_form(whole: Path) -> None:
    before = (whole / "vm.json").read_bytes()
    edit(whole, lambda document: None)
    assert (whole / "vm.json").read_bytes() == before


@pytest.mark.parametrize("path", ["nowhere", "snapshot/vm.json", ""])
def test_there_must_be_a_directory(whole: Path, path: str) -> None:
    name = str(whole.parent / path) if path else ""
    with pytest.raises(NotFound) as caught:
        SnapshotReader.open(name)
    assert chain_messages(caught.value)[:3] == [
        "Cannot restore VM",
        "Failed to send migratable component snapshot",
        f'Destination is not a directory: "{name}"',
    ]


def test_an_empty_directory_is_no_snapshot(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no snapshot") as caught:
        SnapshotReader.open(tmp_path)
    assert chain_messages(caught.value)[:4] == [
        *RECEIVING,
        f'Error opening VM state snapshot file "{tmp_path}/vm.json"',
        "No such file or directory (os error 2)",
    ]


def test_memory_without_a_document_is_torn(whole: Path) -> None:
    (whole / "vm.json").unlink()
    with pytest.raises(Torn, match="torn"):
        SnapshotReader.open(whole)


@pytest.mark.parametrize("name", ["memory-region-0", "memory-region-1"])
def test_a_missing_memory_file(whole: Path, name: str) -> None:
    (whole / name).unlink()
    with pytest.raises(Damaged, match=f"{name} is missing") as caught:
        SnapshotReader.open(whole)
    assert caught.value.file == str(whole / name)
    assert chain_messages(caught.value)[:3] == [
        "Memory manager error",
        "Error opening snapshot file",
        "No such file or directory (os error 2)",
    ]


@pytest.mark.parametrize("name", ["memory-region-0", "memory-region-1"])
@pytest.mark.parametrize("change", [-(10**9), -65536, -4096, -1, 1, 4096, 10**10])
def test_a_memory_file_of_another_size(whole: Path, name: str, change: int) -> None:
    size = max(0, (whole / name).stat().st_size + change)
    os.truncate(whole / name, size)
    with pytest.raises(Damaged, match="is empty" if size == 0 else f"has {size} bytes") as caught:
        SnapshotReader.open(whole)
    assert caught.value.file == str(whole / name)


@pytest.mark.parametrize("name", ["memory-region-0", "memory-region-1", "vm.json"])
@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "directory", "device"])
def test_something_else_than_a_file(whole: Path, name: str, kind: str) -> None:
    path = whole / name
    moved = whole.parent / "moved"
    path.rename(moved)
    if kind == "link":
        path.symlink_to(moved)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(Damaged, match="not a regular file") as caught:
        SnapshotReader.open(whole)
    assert caught.value.file == str(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["memory-region-0", "vm.json"])
def test_a_file_that_may_not_be_read(whole: Path, name: str) -> None:
    (whole / name).chmod(0)
    with pytest.raises(IoFailed, match="Permission denied"):
        SnapshotReader.open(whole)


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_file_whose_size_cannot_be_asked(whole: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    def descriptors() -> set[str]:
        return set(os.listdir("/proc/self/fd"))

    asked = 0
    fstat = os.fstat

    def stale(fd: int) -> os.stat_result:
        nonlocal asked
        asked += 1
        if asked == failing:
            raise OSError(errno.ESTALE, "Stale file handle")
        return fstat(fd)

    before = descriptors()
    monkeypatch.setattr(os, "fstat", stale)
    with pytest.raises(IoFailed, match="Stale file handle"):
        SnapshotReader.open(whole)
    monkeypatch.undo()
    assert asked == failing
    assert descriptors() == before


def test_one_memory_file_too_many(whole: Path) -> None:
    shutil.copy(whole / "memory-region-1", whole / "memory-region-2")
    with pytest.raises(Damaged, match="memory-region-2 does not belong"):
        SnapshotReader.open(whole)


def test_every_flipped_bit_of_the_document(whole: Path) -> None:
    path = whole / "vm.json"
    data = path.read_bytes()
    for at in range(len(data)):
        bit = at * 5 % 8  # all bits of all bytes: test_document
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        with pytest.raises((Damaged, Incompatible)):
            SnapshotReader.open(whole)
    path.write_bytes(data)
    SnapshotReader.open(whole).close()


def test_a_document_too_large_is_not_read(whole: Path) -> None:
    os.truncate(whole / "vm.json", 1 << 40)
    with pytest.raises(Damaged, match="more than the"):
        SnapshotReader.open(whole)


def region(field: str, value: Any, index: int = 0) -> Any:
    def change(document: Any) -> None:
        document["memory"]["regions"][index][field] = value

    return change


def remove_region(document: Any) -> None:
    document["memory"]["regions"].pop()


def no_regions(document: Any) -> None:
    document["memory"]["regions"] = []


def many_regions(document: Any) -> None:
    document["memory"]["regions"] *= 40


def memory_size(size: Any) -> Any:
    def change(document: Any) -> None:
        document["config"]["memory"]["size"] = size

    return change


def no_memory(document: Any) -> None:
    del document["config"]["memory"]


@pytest.mark.parametrize(
    "change",
    [
        region("file", "memory-region-1"),
        region("file", "../snapshot/memory-region-0"),
        region("file", "/etc/passwd"),
        region("file", ""),
        region("address", 1),
        region("address", 1 << 20),
        region("address", 1 << 52),
        region("address", 2**64 - 4096),
        region("address", 4096 * 63, 1),
        region("address", 0, 1),
        region("size", 0),
        region("size", 4096),
        region("size", 4097),
        region("size", 2**63),
        region("size", 2**64 - 4096),
        region("chunk_size", 0),
        region("chunk_size", 1),
        region("chunk_size", 4096),
        region("chunk_size", 12288),
        region("chunk_size", 1 << 22),
        region("chunk_size", 2**64 - 1),
        region("stored", ""),
        region("stored", "Hw=="),
        region("stored", "BQA="),
        region("stored", "AQ=="),
        region("stored", "Bw=="),
        region("stored", "BQ"),
        region("digests", ""),
        region("digests", "AAAA"),
        remove_region,
        no_regions,
        many_regions,
        memory_size(4096),
        memory_size(small.SIZE * 2),
        memory_size(None),
        memory_size(True),
        memory_size(str(small.SIZE)),
        no_memory,
    ],
)
def test_a_table_that_cannot_be(whole: Path, change: Any) -> None:
    edit(whole, change)
    with pytest.raises(Damaged) as caught:
        SnapshotReader.open(whole)
    assert caught.value.file
    assert len(chain_messages(caught.value)) >= 2


def test_every_bit_counts_in_memory_files(whole: Path) -> None:
    """A flipped bit in each stored page: found at once by `copy`, at first touch by `ondemand`, and by nothing before."""
    for index, chunk, at in [
        (0, 0, 0),
        (0, 0, 65535),
        (0, 2, 131072),
        (0, 2, 3 * 65536 - 1),
        (1, 1, 65536),
        (1, 1, 131071),
    ]:
        path = whole / f"memory-region-{index}"
        flip(path, at, 1 << at % 8)
        with pytest.raises(Damaged) as caught:
            small.restore(whole, "copy")
        assert (caught.value.file, caught.value.chunk) == (str(path), chunk)
        assert caught.value.hint
        assert chain_messages(caught.value)[0] == "Memory manager error"
        lazy = small.restore(whole)
        base = small.REGIONS[index][0]
        lazy.read(small.REGIONS[1 - index][0], 10)
        for _ in range(2):
            with pytest.raises(Damaged) as caught:
                lazy.read(base + chunk * small.CHUNK, 1)
            assert (caught.value.file, caught.value.chunk) == (str(path), chunk)
        flip(path, at, 1 << at % 8)
    assert small.contents(small.restore(whole, "copy")) == small.contents(small.memory())


def flip(path: Path, at: int, mask: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ mask]))


def test_what_lies_in_holes_is_never_read(whole: Path) -> None:
    for at in (65536, 100000, 131071, 3 * 65536):
        flip(whole / "memory-region-0", at, 0xFF)
    for mode in ("ondemand", "copy"):
        assert small.contents(small.restore(whole, mode)) == small.contents(small.memory())


def test_a_file_cut_while_it_is_used(whole: Path) -> None:
    memory = small.restore(whole)
    os.truncate(whole / "memory-region-0", 70000)
    memory.read(0, 10)
    with pytest.raises(Damaged, match="the file ends before it"):
        memory.read(2 * small.CHUNK, 10)


def test_the_directory_may_go(whole: Path) -> None:
    with SnapshotReader.open(whole) as reader:
        shutil.rmtree(whole)
        lazy = reader.open_memory("ondemand")
        copied = reader.open_memory("copy")
    assert small.contents(lazy) == small.contents(copied) == small.contents(small.memory())


def test_many_at_once(whole: Path) -> None:
    memories = [small.restore(whole) for _ in range(16)]
    for number, memory in enumerate(memories):
        memory.write(0, bytes([number]))
    assert [memory.read(0, 2) for memory in memories] == [bytes([number, 8]) for number in range(16)]


def test_nothing_is_read_before_it_is_needed(whole: Path) -> None:
    memory = small.restore(whole)
    assert memory.lazy == [(2, 0), (1, 0)]
    memory.read(small.CHUNK, small.CHUNK)
    assert memory.lazy == [(2, 0), (1, 0)]
    memory.read(2 * small.CHUNK, 1)
    assert memory.lazy == [(2, 1), (1, 0)]
    assert small.restore(whole, "copy").lazy is None


def test_no_descriptor_is_left_open(whole: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with SnapshotReader.open(whole):
        pass
    os.truncate(whole / "memory-region-1", 1)
    with pytest.raises(FreezeframeError):
        SnapshotReader.open(whole)
    assert len(os.listdir("/proc/self/fd")) == before

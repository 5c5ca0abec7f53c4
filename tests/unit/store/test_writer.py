from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from freezeframe.errors import Busy, Damaged, IoFailed, NotFound, Refused, chain_messages
from freezeframe.store import SnapshotReader, write_snapshot
from freezeframe.testing import small_snapshot as small

pytestmark = pytest.mark.unit

NAMES = ["memory-region-0", "memory-region-1", "vm.json"]
PREFIX = ["Cannot send VM snapshot", "Failed to send migratable component snapshot"]


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


@pytest.fixture(params=["unnamed", "named", "cannot-link"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How files come to their names: as the file system can do it, or as if it could not."""
    if request.param == "named":
        real = os.open

        def no_tmpfile(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "not supported")
            return real(path, flags, mode, dir_fd=dir_fd)

        monkeypatch.setattr(os, "open", no_tmpfile)
    if request.param == "cannot-link":

        def no_link(*_: Any, **__: Any) -> None:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", no_link)
    return request.param


def test_what_is_written(tmp_path: Path, kind: str) -> None:
    umask = os.umask(0o777)
    try:
        written = small.snapshot(tmp_path)
    finally:
        os.umask(umask)
    assert names(tmp_path) == NAMES
    assert written.stored_bytes == (16 + 1 + 1) * 4096
    for name, size in zip(NAMES, [4 * small.CHUNK, 2 * small.CHUNK, None], strict=True):
        found = (tmp_path / name).stat()
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert size is None or found.st_size == size
        assert size is None or found.st_blocks * 512 <= size // 2 + 8192
    for mode in ("ondemand", "copy"):
        assert small.contents(small.restore(tmp_path, mode)) == small.contents(small.memory())
    with SnapshotReader.open(tmp_path) as reader:
        assert (reader.config, reader.state, reader.engine) == (small.CONFIG, small.STATE, "software")


def test_a_taken_directory_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    small.snapshot(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in NAMES}
    with pytest.raises(Busy, match="holds a whole one") as caught:
        small.snapshot(tmp_path)
    assert chain_messages(caught.value)[:4] == [
        *PREFIX,
        "Error creating VM config snapshot file",
        "File exists (os error 17)",
    ]
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


@pytest.mark.parametrize("removed", NAMES)
def test_a_torn_snapshot_takes_the_directory_too(tmp_path: Path, removed: str) -> None:
    small.snapshot(tmp_path)
    (tmp_path / removed).unlink()
    with pytest.raises(Busy, match="cannot be restored") as caught:
        small.snapshot(tmp_path)
    assert "File exists (os error 17)" in chain_messages(caught.value)
    assert names(tmp_path) == sorted(set(NAMES) - {removed})


@pytest.mark.parametrize("name", ["vm.json", "memory-region-0", "memory-region-1", "memory-region-7"])
@pytest.mark.parametrize("what", ["empty", "link", "fifo", "directory"])
def test_any_of_our_names_takes_the_directory(tmp_path: Path, name: str, what: str) -> None:
    path = tmp_path / name
    {
        "empty": path.touch,
        "link": lambda: path.symlink_to("/dev/null"),
        "fifo": lambda: os.mkfifo(path),
        "directory": path.mkdir,
    }[what]()
    with pytest.raises(Busy):
        small.snapshot(tmp_path)
    assert names(tmp_path) == [name]


def test_other_files_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "vm.json.old").write_text("mine")
    (tmp_path / "memory-region-0.bak").write_text("mine")
    small.snapshot(tmp_path)
    assert small.contents(small.restore(tmp_path)) == small.contents(small.memory())


@pytest.mark.parametrize("missing", ["nowhere", "file", ""])
def test_there_must_be_a_directory(tmp_path: Path, missing: str) -> None:
    (tmp_path / "file").touch()
    path = str(tmp_path / missing) if missing else ""
    with pytest.raises(NotFound) as caught:
        small.snapshot(path)
    assert chain_messages(caught.value)[:3] == [*PREFIX, f'Destination is not a directory: "{path}"']


class Fails:
    """Makes the `at`-th call of a function of `os` fail as a full, read-only or broken file system does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, function: str, at: int, number: int) -> None:
        self.real = getattr(os, function)
        self.at, self.number, self.calls = at, number, 0
        monkeypatch.setattr(os, function, self)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise OSError(self.number, os.strerror(self.number))
        return self.real(*args, **keywords)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize(("function", "calls"), [("open", 4), ("fsync", 5), ("link", 3), ("write", 1), ("fchmod", 3)])
def test_a_failure_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, function: str, calls: int
) -> None:
    for at in range(1, calls + 1):
        directory = tmp_path / f"{function}-{at}"
        directory.mkdir()
        memory = small.memory()
        with monkeypatch.context() as patch:
            failing = Fails(patch, function, at, number)
            with pytest.raises(IoFailed) as caught:
                small.snapshot(directory, memory)
        assert failing.calls >= at
        assert names(directory) == []
        chain = chain_messages(caught.value)
        assert chain[:2] == PREFIX
        assert any(f"{os.strerror(number)} (os error {number})" in text for text in chain)
        # The machine is whole: it can be written elsewhere, or here.
        small.snapshot(directory, memory)
        assert small.contents(small.restore(directory)) == small.contents(small.memory())


def test_a_failure_in_the_core_is_explained(tmp_path: Path) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (small.CHUNK, limits[1]))
    try:
        with pytest.raises(IoFailed, match="could not be written") as caught:
            small.snapshot(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert chain_messages(caught.value)[:4] == [
        *PREFIX,
        "Error writing dense memory snapshot region",
        "Guest memory error: File too large (os error 27)",
    ]
    assert caught.value.hint
    assert names(tmp_path) == []


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_faster_writer_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Another process takes a name between our check and our link; its file stays, ours go."""
    real, calls = os.link, 0

    def link(source: str, name: str, **keywords: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            (tmp_path / name).write_text("theirs")
        real(source, name, **keywords)

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(Busy, match="faster"):
        small.snapshot(tmp_path)
    assert names(tmp_path) == [NAMES[at - 1]]
    assert (tmp_path / NAMES[at - 1]).read_text() == "theirs"


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def interrupted(fd: int) -> None:
        real(fd)
        if names(tmp_path):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small.snapshot(tmp_path)
    assert names(tmp_path) == []


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    small.snapshot(tmp_path)
    with pytest.raises(Busy):
        small.snapshot(tmp_path)
    memory = small.restore(tmp_path, "copy")
    assert len(os.listdir("/proc/self/fd")) == before
    del memory


def test_state_that_json_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused):
        write_snapshot(tmp_path, config=small.CONFIG, state={"x": 0.5}, memory=small.memory(), engine="software")
    assert names(tmp_path) == []


def test_generations(tmp_path: Path) -> None:
    """Snapshot → lazy restore → change → snapshot → restore, the first directory gone meanwhile."""
    first, second, third = (tmp_path / name for name in ("1", "2", "3"))
    for directory in (first, second, third):
        directory.mkdir()
    small.snapshot(first)
    memory = small.restore(first)
    for name in NAMES:
        (first / name).unlink()
    memory.write(3 * small.CHUNK, b"second")
    written = small.snapshot(second, memory)
    assert [region["carried_chunks"] for region in written.regions] == [2, 1]
    wanted = small.contents(memory)
    again = small.restore(second)
    small.snapshot(third, again)
    assert again.lazy == [(3, 0), (1, 0)]
    assert small.contents(small.restore(third, "copy")) == wanted
    tables = []
    for directory in (second, third):
        with SnapshotReader.open(directory) as reader:
            tables.append(reader.document.memory)
    assert tables[0] == tables[1]


def test_a_damaged_source_is_not_laundered(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    small.snapshot(first)
    memory = small.restore(first)
    with (first / "memory-region-0").open("r+b") as file:
        file.seek(2 * small.CHUNK)
        file.write(b"\x01")
    with pytest.raises(Damaged) as caught:
        small.snapshot(second, memory)
    assert (caught.value.file, caught.value.chunk) == (str(first / "memory-region-0"), 2)
    assert names(second) == []


def test_a_named_file_whose_mode_cannot_be_set_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def no_tmpfile(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", no_tmpfile)
    for at in (1, 2, 3):
        memory = small.memory()
        with monkeypatch.context() as patch:
            Fails(patch, "fchmod", at, errno.EPERM)
            with pytest.raises(IoFailed):
                small.snapshot(tmp_path, memory)
        assert names(tmp_path) == []
        opened = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        assert not any(tmp_path in path.parents for path in opened)

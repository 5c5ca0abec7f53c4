"""Writing a snapshot directory: at any moment it holds nothing of ours, a torn snapshot, or a whole one."""

from __future__ import annotations

import os

from freezeframe._core import write_region
from freezeframe.errors import Busy, Damaged, FreezeframeError, IoFailed, Refused, os_error_text
from freezeframe.state.document import DOCUMENT_NAME, MemoryImage, RegionImage, encode, to_base64
from freezeframe.store.names import SENDING, is_ours, open_directory, path_text, region_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from freezeframe._core import Memory

# Cloud Hypervisor's names of the steps; the last is followed by "Guest memory error: …".
_DOCUMENT_STEP = "Error creating VM config snapshot file"
_MEMORY_STEP = "Error writing dense memory snapshot region"


class WrittenSnapshot:
    """What was written: `stored_bytes` of guest memory, and each region's counts (see `_core.write_region`)."""

    def __init__(self, directory: str, regions: list[dict[str, Any]]) -> None:
        self.directory = directory
        self.regions = regions
        self.stored_bytes = sum(region["written_pages"] for region in regions) * 4096


def write_snapshot(
    directory: str | os.PathLike[str],
    *,
    config: dict[str, Any],
    state: dict[str, Any],
    memory: Memory,
    engine: str,
    threads: int = 2,
) -> WrittenSnapshot:
    """Writes a machine that stands still into an existing directory that holds none of our names.

    `config` is CH's fully defaulted JSON form, `state` plain values by component. When it returns, all is on disk; on
    any error the directory is as it was. Raises `NotFound` (no such directory), `Busy` (it already holds a snapshot),
    `IoFailed` (no space, read-only, …), `Damaged` (the machine was restored lazily and its source turns out damaged).
    """
    path = path_text(directory)
    dir_fd = open_directory(path, hint="create the directory first", chain=SENDING, step=(_DOCUMENT_STEP,))
    try:
        _refuse_taken(dir_fd, path)
        writing = _Writing(dir_fd, path, unnamed=True)
        try:
            return writing.run(config, state, memory, engine, threads)
        except _CannotName:
            return _Writing(dir_fd, path, unnamed=False).run(config, state, memory, engine, threads)
    finally:
        os.close(dir_fd)


class _CannotName(Exception):
    """The file system makes files without a name but does not give them one later."""


class _NewFile:
    """A file on its way into the directory. Without a name until `publish`, where the file system has such files."""

    def __init__(self, dir_fd: int, name: str, *, unnamed: bool) -> None:
        self.dir_fd = dir_fd
        self.name = name
        self.named = False
        self.fd = -1
        if unnamed:
            try:
                self.fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)
            except OSError as error:
                from errno import EINVAL, EISDIR, ENOENT, EOPNOTSUPP

                if error.errno not in (EINVAL, EISDIR, ENOENT, EOPNOTSUPP):
                    raise
        if self.fd < 0:
            flags = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_RDWR | os.O_CLOEXEC
            self.fd = os.open(name, flags, 0o600, dir_fd=dir_fd)
            self.named = True
        try:
            os.fchmod(self.fd, 0o600)
        except OSError:
            self.remove()
            self.close()
            raise

    def publish(self) -> None:
        """Gives the file its name; `FileExistsError` when somebody else was faster."""
        if self.named:
            return
        try:
            os.link(f"/proc/self/fd/{self.fd}", self.name, dst_dir_fd=self.dir_fd, follow_symlinks=True)
        except FileExistsError:
            raise
        except OSError as error:
            from errno import EMLINK, ENOENT, EOPNOTSUPP, EPERM, EXDEV

            if error.errno in (EMLINK, ENOENT, EOPNOTSUPP, EPERM, EXDEV):
                raise _CannotName from error
            raise
        self.named = True

    def remove(self) -> None:
        """Takes the name away again if it still is this file's."""
        if not self.named:
            return
        ours = os.fstat(self.fd)
        try:
            there = os.stat(self.name, dir_fd=self.dir_fd, follow_symlinks=False)
            if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                os.unlink(self.name, dir_fd=self.dir_fd)
        except FileNotFoundError:
            pass
        self.named = False

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self.fd, view) :]

    def close(self) -> None:
        os.close(self.fd)


class _Writing:
    """One attempt. Order: data, `fsync` of each file, names of the memory files, then that of `vm.json`."""

    def __init__(self, dir_fd: int, directory: str, *, unnamed: bool) -> None:
        self.dir_fd = dir_fd
        self.directory = directory
        self.unnamed = unnamed
        self.files: list[_NewFile] = []
        self.step: tuple[str, str] = (_DOCUMENT_STEP, "")

    def run(
        self, config: dict[str, Any], state: dict[str, Any], memory: Memory, engine: str, threads: int
    ) -> WrittenSnapshot:
        try:
            return self._write(config, state, memory, engine, threads)
        except BaseException as error:
            problem = self._undo()
            raised = self._explain(error, problem)
            if raised is error:
                raise
            raise raised from error
        finally:
            for file in self.files:
                file.close()

    def _new(self, name: str) -> _NewFile:
        self.step = (_DOCUMENT_STEP, "")  # what CH makes first, and so what it names when it can make nothing
        file = _NewFile(self.dir_fd, name, unnamed=self.unnamed)
        self.files.append(file)
        return file

    def _write(
        self, config: dict[str, Any], state: dict[str, Any], memory: Memory, engine: str, threads: int
    ) -> WrittenSnapshot:
        images: list[RegionImage] = []
        counts: list[dict[str, Any]] = []
        regions: list[_NewFile] = []
        for index, (address, size) in enumerate(memory.regions):
            file = self._new(region_name(index))
            regions.append(file)
            self.step = (_MEMORY_STEP, "Guest memory error: ")
            chunk, stored, digests, stats = write_region(memory, index, file.fd, threads)
            counts.append(stats)
            images.append(
                RegionImage(
                    file=file.name,
                    address=address,
                    size=size,
                    chunk_size=chunk,
                    stored=to_base64(stored),
                    digests=to_base64(digests),
                )
            )
        for file in regions:
            os.fsync(file.fd)

        self.step = (_DOCUMENT_STEP, "")
        data = encode(
            producer=_producer(),
            engine=engine,
            config=config,
            state=state,
            memory=MemoryImage(regions=tuple(images)),
        )
        document = self._new(DOCUMENT_NAME)
        document.write(data)
        os.fsync(document.fd)

        for file in regions:
            file.publish()
        os.fsync(self.dir_fd)
        document.publish()
        os.fsync(self.dir_fd)
        return WrittenSnapshot(self.directory, counts)

    def _undo(self) -> OSError | None:
        """Removes the names that we gave, the last one first. Goes on after a failure and gives it back."""
        problem: OSError | None = None
        for file in reversed(self.files):
            try:
                file.remove()
            except OSError as error:
                problem = error
        return problem

    def _explain(self, error: BaseException, problem: OSError | None) -> BaseException:
        """The error as callers see it; `problem` kept us from removing what we had written."""
        left = f"; part of it is still in {self.directory!r}: {problem.strerror}" if problem else ""
        if isinstance(error, IoFailed) and isinstance(error.__cause__, OSError):
            error = error.__cause__  # the core's: the step is said here
        if isinstance(error, FileExistsError):
            return _taken(self.directory, DOCUMENT_NAME, "another writer was faster")
        if isinstance(error, FreezeframeError):
            error.message += left
            return error.chained(*SENDING, self.step[0]) if isinstance(error, (Damaged, Refused)) else error
        if isinstance(error, OSError):
            text = error.strerror or str(error)
            return IoFailed(
                f"the snapshot could not be written to {self.directory!r}: {text}{left}", hint=_hint(error)
            ).chained(*SENDING, self.step[0], self.step[1] + os_error_text(error))
        return error


def _hint(error: OSError) -> str | None:
    from errno import EACCES, EDQUOT, EFBIG, ENOSPC, EPERM, EROFS

    return {
        ENOSPC: "free some space, or use a directory on another file system",
        EDQUOT: "free some space within the quota, or use a directory on another file system",
        EFBIG: "the file system or a limit (ulimit -f) does not allow files as large as guest memory",
        EROFS: "use a directory on a file system that can be written to",
        EACCES: "make the directory writable for this process, or use another one",
        EPERM: "make the directory writable for this process, or use another one",
    }.get(error.errno or 0)


def _producer() -> str:
    """Our name and version without `importlib.metadata`, which costs more than writing the document."""
    from freezeframe import __version__

    return f"freezeframe {__version__}"


def _taken(directory: str, name: str, what: str) -> Busy:
    step = _DOCUMENT_STEP
    if name != DOCUMENT_NAME:
        step = f'Error creating memory snapshot file "{os.path.join(directory, name)}"'
    return Busy(
        f"{directory!r} cannot take a snapshot: {what}", hint="use an empty directory, or remove the old snapshot first"
    ).chained(*SENDING, step, "File exists (os error 17)")


def _refuse_taken(dir_fd: int, directory: str) -> None:
    names = sorted(name for name in os.listdir(dir_fd) if is_ours(name))
    if not names:
        return
    from freezeframe.store.reader import SnapshotReader

    try:
        SnapshotReader.open(directory).close()
        what = "it already holds a whole one"
    except FreezeframeError as error:
        what = f"it already holds one that cannot be restored ({error})"
    raise _taken(directory, DOCUMENT_NAME if DOCUMENT_NAME in names else names[0], what)

"""Reading a snapshot directory. Everything in it is untrusted: it may be torn, cut, edited, or no snapshot at all."""

from __future__ import annotations

import os
from stat import S_ISREG

from freezeframe._core import restore_memory
from freezeframe.errors import Damaged, FreezeframeError, IoFailed, NotFound, Torn, os_error_text
from freezeframe.state.document import DOCUMENT_LIMIT, DOCUMENT_NAME, decode
from freezeframe.store.names import (
    MEMORY,
    RECEIVING,
    SOURCE_MISSING,
    is_region,
    open_directory,
    path_text,
    region_name,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal, Self

    from freezeframe._core import Memory
    from freezeframe.config.vm import VmConfig
    from freezeframe.state.document import Document, RegionImage

PAGE_SIZE = 4096
# Regions, and the largest guest address: more than any machine of ours has, few enough to cost nothing.
REGION_LIMIT = 64
ADDRESS_LIMIT = 1 << 52
CHUNK_SIZES = tuple(4096 << shift for shift in range(10))
# Never follow a link, never wait for a pipe's other end.
_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_LOST = "the snapshot cannot be used; restore from another one"


class SnapshotReader:
    """An open snapshot whose description, seal and file sizes were found right.

    Guarantees: all files are open, so the directory may go away; no byte of guest memory was read yet; whatever
    `open_memory` gives is verified before the guest can see it. Close it, or use it in `with`, when the memory is open.
    """

    def __init__(self, directory: str, document: Document) -> None:
        self.directory = directory
        self.document = document
        self._files: list[int] = []

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Self:
        """Opens and checks a snapshot.

        Raises `NotFound` (no such directory, or nothing of ours in it), `Torn` (its writer did not end), `Damaged`
        (cut, changed, contradicting itself), `Incompatible` (another version or architecture) or `IoFailed`.
        """
        path = path_text(directory)
        dir_fd = open_directory(path, hint="name the directory that a snapshot was written to", chain=SOURCE_MISSING)
        try:
            names = set(os.listdir(dir_fd))
            document = _read_document(dir_fd, path, names)
            reader = cls(path, document)
            try:
                reader._open_regions(dir_fd, names)
            except BaseException:
                reader.close()
                raise
            return reader
        finally:
            os.close(dir_fd)

    @property
    def config(self) -> dict[str, Any]:
        """The machine's configuration, in CH's fully defaulted JSON form. Sealed, not validated."""
        config: dict[str, Any] = self.document.config
        return config

    def read_config(self) -> VmConfig:
        """The configuration, validated: it was valid when it was written, so nothing in it may be ignored now.

        Raises `Damaged`.
        """
        from freezeframe.config.validate import validate
        from freezeframe.config.vm import VmConfig

        path = os.path.join(self.directory, DOCUMENT_NAME)
        try:
            config = VmConfig.from_plain(self.config)
            validate(config)
        except ValueError as error:
            raise Damaged(f"{path}: the configuration: {error}", file=path) from None
        return config

    @property
    def state(self) -> dict[str, Any]:
        """The machine's state by component. Sealed, not validated."""
        state: dict[str, Any] = self.document.state
        return state

    @property
    def engine(self) -> str:
        """Name of the engine that the snapshot was taken on; it restores on any."""
        return self.document.format.engine

    @property
    def regions(self) -> list[tuple[int, int]]:
        """(guest physical address, size) of each region, as `Memory.regions`."""
        return [(region.address, region.size) for region in self.document.memory.regions]

    def open_memory(self, mode: Literal["ondemand", "copy"], *, threads: int = 2) -> Memory:
        """Guest memory. `ondemand`: chunks are read and verified when they are first needed; `copy`: all of them now.

        May be called more than once; each call gives memory of its own. Raises `Damaged` (copy only) or `IoFailed`.
        """
        sources: list[tuple[int, int, int, str, int, bytes, bytes]] = []
        for region, fd in zip(self.document.memory.regions, self._files, strict=True):
            stored, digests = region.tables()
            name = os.path.join(self.directory, region.file)
            sources.append((region.address, region.size, fd, name, region.chunk_size, stored, digests))
        try:
            return restore_memory(sources, mode == "copy", threads)
        except (Damaged, IoFailed) as error:
            if isinstance(error, Damaged):
                error.hint = _LOST
            error.chained(*MEMORY)
            raise

    def close(self) -> None:
        """Closes the files; memory that was opened keeps its own."""
        while self._files:
            os.close(self._files.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_regions(self, dir_fd: int, names: set[str]) -> None:
        regions = self.document.memory.regions
        document_path = os.path.join(self.directory, DOCUMENT_NAME)
        try:
            _check_regions(regions, self.config)
        except ValueError as error:
            raise Damaged(f"{document_path}: {error}", file=document_path, hint=_LOST).chained(*MEMORY) from None
        expected = {region.file for region in regions}
        for name in sorted(filter(is_region, names - expected)):
            path = os.path.join(self.directory, name)
            raise Damaged(
                f"{path} does not belong to this snapshot, which has {len(regions)} memory regions",
                file=path,
                hint="the directory mixes files of two snapshots",
            ).chained(*MEMORY)
        for region in regions:
            self._files.append(_open_region(dir_fd, self.directory, region))


def _read_document(dir_fd: int, directory: str, names: set[str]) -> Document:
    path = os.path.join(directory, DOCUMENT_NAME)
    opening = (*RECEIVING, f'Error opening VM state snapshot file "{path}"')
    if DOCUMENT_NAME not in names:
        missing = "No such file or directory (os error 2)"
        if any(map(is_region, names)):
            raise Torn(
                f"{directory!r} holds a torn snapshot: memory files, but no {DOCUMENT_NAME}, which is written last",
                file=path,
                hint="its writer was stopped before the end; remove it and use another one",
            ).chained(*opening, missing)
        raise NotFound(f"there is no snapshot in {directory!r}: it has no {DOCUMENT_NAME}").chained(*opening, missing)
    fd, size = _open_regular(dir_fd, DOCUMENT_NAME, path, opening)
    try:
        if size > DOCUMENT_LIMIT:
            raise Damaged(
                f"{path} has {size} bytes, more than the {DOCUMENT_LIMIT} that any snapshot needs",
                file=path,
                hint=_LOST,
            ).chained(*opening)
        data = _read_all(fd, size)
    except OSError as error:
        raise IoFailed(f"{path} cannot be read: {error.strerror}").chained(*opening, os_error_text(error)) from error
    finally:
        os.close(fd)
    try:
        return decode(data, path)
    except FreezeframeError as error:
        error.chained(*RECEIVING, "Error deserialising VM state snapshot")
        raise


def _read_all(fd: int, size: int) -> bytes:
    """The file's bytes, at most `size`: one that grows meanwhile fails its seal."""
    parts: list[bytes] = []
    while size > 0 and (part := os.read(fd, size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _check_regions(regions: tuple[RegionImage, ...], config: dict[str, Any]) -> None:
    """That the table could be of a machine with this configuration. `ValueError` says why not."""
    if not 0 < len(regions) <= REGION_LIMIT:
        raise ValueError(f"{len(regions)} memory regions; a machine has 1 to {REGION_LIMIT}")
    end = 0
    for index, region in enumerate(regions):
        if region.file != region_name(index):
            raise ValueError(f"memory region {index} is in {region.file!r}, not {region_name(index)!r}")
        if region.size == 0 or region.size % PAGE_SIZE or region.address % PAGE_SIZE:
            raise ValueError(f"{region.file}: address {region.address:#x} and size {region.size:#x} are not pages")
        if region.address < end or region.address + region.size > ADDRESS_LIMIT:
            raise ValueError(
                f"{region.file}: {region.size:#x} bytes at {region.address:#x} overlap or leave guest memory"
            )
        end = region.address + region.size
        if region.chunk_size not in CHUNK_SIZES:
            raise ValueError(f"{region.file}: chunk size {region.chunk_size} is not one of {CHUNK_SIZES}")
        stored, digests = region.tables()
        if len(stored) != -(-region.chunks // 8) or (region.chunks % 8 and stored[-1] >> region.chunks % 8):
            raise ValueError(f"{region.file}: `stored` is not a map of {region.chunks} chunks")
        count = int.from_bytes(stored, "little").bit_count()
        if len(digests) != 32 * count:
            raise ValueError(f"{region.file}: {len(digests)} bytes of digests for {count} chunks")
    total = sum(region.size for region in regions)
    memory = config.get("memory")
    wanted = memory.get("size") if isinstance(memory, dict) else None  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    if wanted != total:
        raise ValueError(f"the memory regions have {total} bytes together, but the configuration says {wanted}")


def _open_region(dir_fd: int, directory: str, region: RegionImage) -> int:
    path = os.path.join(directory, region.file)
    fd, size = _open_regular(dir_fd, region.file, path, (*MEMORY, "Error opening snapshot file"))
    if size != region.size:
        os.close(fd)
        what = "is empty" if size == 0 else f"has {size} bytes"
        raise Damaged(f"{path} {what}; the snapshot wrote {region.size}", file=path, hint=_LOST).chained(*MEMORY)
    return fd


def _open_regular(dir_fd: int, name: str, path: str, opening: tuple[str, ...]) -> tuple[int, int]:
    """A descriptor, and the size in bytes. Raises `Damaged` or `IoFailed` with the chain `opening`."""
    try:
        fd = os.open(name, _OPEN, dir_fd=dir_fd)
    except OSError as error:
        raise _not_opened(path, error).chained(*opening, os_error_text(error)) from error
    try:
        found = os.fstat(fd)
        if not S_ISREG(found.st_mode):
            raise Damaged(f"{path} is not a regular file", file=path, hint=_LOST).chained(*opening)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            raise _not_opened(path, error).chained(*opening, os_error_text(error)) from error
        raise
    return fd, found.st_size


def _not_opened(path: str, error: OSError) -> Damaged | IoFailed:
    from errno import ELOOP, ENXIO

    if isinstance(error, FileNotFoundError):
        return Damaged(f"{path} is missing", file=path, hint=_LOST)
    if error.errno in (ELOOP, ENXIO):
        return Damaged(f"{path} is not a regular file", file=path, hint=_LOST)
    return IoFailed(f"{path} cannot be opened: {error.strerror}")

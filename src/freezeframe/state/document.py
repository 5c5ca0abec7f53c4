"""`vm.json`: one readable document that describes a whole snapshot, sealed against accident.

`encode` and `decode` are the only writer and reader. The contract is `docs/formats/snapshot.md`; a test compares them.
"""

from __future__ import annotations

from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64

from freezeframe._core import blake3
from freezeframe.config.record import U64, Record
from freezeframe.errors import Damaged, Incompatible, Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    values = Any
else:
    values = object  # the core's name for any JSON value without fractions and duplicate names

FORMAT_NAME = "freezeframe-snapshot"
FORMAT_VERSION = 1
ARCHITECTURE = "x86_64"
DOCUMENT_NAME = "vm.json"
# A guest of 256 GiB, all of it filled, needs 186 MB. Nothing larger is read into memory, or written.
DOCUMENT_LIMIT = 256 << 20

_HEAD = b'{\n "format": {\n'
_HEAD_END = b"\n },\n"
_HEAD_LIMIT = 4096
_SEAL = b' "seal": "'
_SEAL_END = b'"\n}\n'
_SEAL_DIGITS = 64


class SnapshotFormat(Record):
    """Who wrote the snapshot, and by which version of the contract."""

    name: str
    version: U64
    producer: str
    architecture: str
    engine: str


class AnyFormat(Record):
    """What must be readable of any version, to say which one it is."""

    STRICT = False
    name: str
    version: U64
    producer: str = "an unknown program"


class RegionImage(Record):
    """One run of guest RAM and its file. Sizes in bytes; `stored` and `digests` are base64.

    `stored` has a bit per chunk (bit `i % 8` of byte `i // 8`): set when the chunk is not all zero. `digests` are the
    BLAKE3 digests of those chunks in order, 32 bytes each.
    """

    file: str
    address: U64
    size: U64
    chunk_size: U64
    stored: str
    digests: str

    @property
    def chunks(self) -> int:
        return -(-self.size // self.chunk_size)

    def tables(self) -> tuple[bytes, bytes]:
        """`stored` and `digests` decoded. `ValueError` when they are not base64 as we write it."""
        return _from_base64("stored", self.stored), _from_base64("digests", self.digests)


class MemoryImage(Record):
    regions: tuple[RegionImage, ...]


class Document(Record):
    """The whole of `vm.json`."""

    format: SnapshotFormat
    config: values
    state: values
    memory: MemoryImage
    seal: str


def to_base64(data: bytes) -> str:
    return b2a_base64(data, newline=False).decode("ascii")


def _from_base64(name: str, text: str) -> bytes:
    try:
        data = a2b_base64(text, strict_mode=True) if text else b""
    except (Base64Error, ValueError) as error:
        raise ValueError(f"`{name}` is not base64: {error}") from None
    if to_base64(data) != text:
        raise ValueError(f"`{name}` is not base64 in its one canonical form")
    return data


def encode(*, producer: str, engine: str, config: dict[str, Any], state: dict[str, Any], memory: MemoryImage) -> bytes:
    """The bytes of `vm.json`. Raises `Refused` when `config` or `state` hold what could not be read back."""
    from json import dumps

    head = SnapshotFormat(
        name=FORMAT_NAME, version=FORMAT_VERSION, producer=producer, architecture=ARCHITECTURE, engine=engine
    )
    body = {"format": head.to_plain(), "config": config, "state": state, "memory": memory.to_plain()}
    try:
        text = dumps(body, indent=1, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise Refused(f"the machine's state cannot be written as JSON: {error}") from error
    sealed = text.removesuffix("\n}").encode("ascii") + b",\n"
    document = sealed + _SEAL + blake3(sealed).hex().encode("ascii") + _SEAL_END
    if len(document) > DOCUMENT_LIMIT:
        raise Refused(
            f"{DOCUMENT_NAME} would have {len(document)} bytes; {DOCUMENT_LIMIT} is the most that can be restored",
            hint="the machine has more memory in use than a snapshot of this version can describe",
        )
    try:
        again = decode(document, DOCUMENT_NAME)
    except Damaged as error:
        raise Refused(f"the machine's state cannot be written so that it can be read back: {error}") from error
    if again.config != config or again.state != state or again.memory != memory:
        raise Refused("the machine's state does not survive being written: it holds values that JSON does not have")
    return document


def decode(data: bytes, name: str) -> Document:
    """Reads `vm.json`; `name` is what errors call it.

    The format is looked at first, then the seal, and only then anything else. Raises `Damaged` or `Incompatible`.
    """
    if not data:
        raise Damaged(f"{name} is empty", file=name, hint=_HINT)
    _check_format(data, name)
    _check_seal(data, name)
    try:
        document = Document.from_json(data)
    except ValueError as error:
        raise Damaged(f"{name} is sealed but not a document of version {FORMAT_VERSION}: {error}", file=name) from None
    if document.format.architecture != ARCHITECTURE:
        raise Incompatible(
            f"{name} is of a machine for {document.format.architecture}; this program runs {ARCHITECTURE}"
        )
    if not isinstance(document.config, dict) or not isinstance(document.state, dict):
        raise Damaged(f"{name}: `config` and `state` must be objects", file=name)
    return document


_HINT = "the snapshot cannot be used; restore from another one"


def _check_format(data: bytes, name: str) -> None:
    end = data.find(_HEAD_END, 0, _HEAD_LIMIT)
    if not data.startswith(_HEAD) or end < 0:
        raise Damaged(f"{name} does not begin as a snapshot of freezeframe does", file=name, hint=_HINT)
    try:
        head = AnyFormat.from_json(data[len(_HEAD) - 2 : end + 3])
    except ValueError as error:
        raise Damaged(f"{name}: `format` cannot be read: {error}", file=name, hint=_HINT) from None
    if head.name != FORMAT_NAME:
        raise Incompatible(f"{name} is of the format {head.name!r}, not {FORMAT_NAME!r}")
    if head.version != FORMAT_VERSION:
        raise Incompatible(
            f"{name} is of version {head.version}, written by {head.producer}; "
            f"this program reads version {FORMAT_VERSION}",
            hint="restore it with a program of its own version",
        )


def _check_seal(data: bytes, name: str) -> None:
    length = len(_SEAL) + _SEAL_DIGITS + len(_SEAL_END)
    sealed, tail = data[:-length], data[-length:]
    if not tail.startswith(_SEAL) or not tail.endswith(_SEAL_END) or not sealed.endswith(b",\n"):
        raise Damaged(f"{name} is cut short: its seal is missing", file=name, hint=_HINT)
    if tail[len(_SEAL) : -len(_SEAL_END)] != blake3(sealed).hex().encode("ascii"):
        raise Damaged(f"{name} was changed after it was written: its seal does not match", file=name, hint=_HINT)

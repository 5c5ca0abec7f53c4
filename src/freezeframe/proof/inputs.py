"""What came from outside during a run, and after how many instructions: a text file of one JSON object a line."""

from __future__ import annotations

import json
import os

from freezeframe.errors import IoFailed, NotFound, Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    AnyPath = str | os.PathLike[str]

FORMAT = {"format": "freezeframe-inputs", "version": 1}
POWER_BUTTON = "power-button"
_KEYS = {"at", "device", "data"}
_COUNT_MAX = (1 << 64) - 1


class Input:
    """`data` for console `device` after `at` instructions; a press of the power button has `device` POWER_BUTTON."""

    __slots__ = ("at", "data", "device")

    def __init__(self, at: int, device: str, data: bytes = b"") -> None:
        self.at = at
        self.device = device
        self.data = data

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Input) and (self.at, self.device, self.data) == (other.at, other.device, other.data)

    def __hash__(self) -> int:
        return hash((self.at, self.device, self.data))

    def __repr__(self) -> str:
        return f"<Input {self.device} {self.data!r} at {self.at}>"


def write_inputs(path: AnyPath, inputs: Iterable[Input]) -> None:
    """A new file; raises `IoFailed` when it exists or cannot be written."""
    lines = [FORMAT, *({"at": i.at, "device": i.device, "data": i.data.hex()} for i in inputs)]
    try:
        with open(path, "x", encoding="ascii") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    except OSError as error:
        raise IoFailed(f"cannot write {os.fspath(path)}") from error


def read_inputs(path: AnyPath) -> list[Input]:
    """In their order. Raises `NotFound`, `IoFailed`, or `Refused` naming the line."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except FileNotFoundError as error:
        raise NotFound(f"there is no input log {os.fspath(path)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise IoFailed(f"cannot read {os.fspath(path)}") from error
    if not lines or _parsed(lines[0]) != FORMAT:
        raise Refused(f"{os.fspath(path)} is not an input log: its first line is not {json.dumps(FORMAT)}")
    found: list[Input] = []
    for number, line in enumerate(lines[1:], 2):
        try:
            made = _input(_parsed(line))
            if found and made.at < found[-1].at:
                raise ValueError("it is earlier than the one before")
        except ValueError as error:
            raise Refused(f"{os.fspath(path)}, line {number}: {error}") from None
        found.append(made)
    return found


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _input(fields: object) -> Input:
    if not isinstance(fields, dict) or set(fields) != _KEYS:  # pyright: ignore[reportUnknownArgumentType]
        raise ValueError(f"not an object with the keys {', '.join(sorted(_KEYS))}")
    at, device, data = fields["at"], fields["device"], fields["data"]  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(at, int) or isinstance(at, bool) or not 0 <= at <= _COUNT_MAX:
        raise ValueError(f"`at` is {at!r}, not a count of instructions")
    if not isinstance(device, str) or not isinstance(data, str):
        raise ValueError("`device` or `data` is not text")  # noqa: TRY004 - what is in a file is never a TypeError
    return Input(at, device, bytes.fromhex(data))

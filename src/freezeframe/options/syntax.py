"""Cloud Hypervisor's option syntax: `key=value,key=value`, quotes, brackets, sizes (option_parser/src/lib.rs).

Behaviour and texts are CH's, odd ones included: a later value of a key wins, an empty value counts as absent, `""`
within quotes is a quote, a bracket outside quotes keeps commas together.
"""

from __future__ import annotations

from freezeframe.errors import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, TypeVar

    _T = TypeVar("_T")

_SHIFTS = {"K": 10, "M": 20, "G": 30}
_TOGGLES = {"on": True, "true": True, "off": False, "false": False, "": False}


class OptionError(Refused):
    """CH's `OptionParserError`."""


def split_commas(text: str) -> list[str]:
    """The parts between commas that stand outside quotes and brackets."""
    parts: list[str] = []
    depth = 0
    quoted = False
    current = ""
    for char in text.strip():
        if char == '"':
            quoted = not quoted
        elif quoted:
            pass
        elif char == "[":
            depth += 1
        elif char == "]":
            if depth == 0:
                raise OptionError(f"invalid syntax: {text}")
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(current)
            current = ""
            continue
        current += char
    parts.append(current)
    if quoted or depth:
        raise OptionError(f"invalid syntax: {text}")
    return parts


def dequote(text: str) -> str:
    """The text without its quotes; a doubled quote stands for one."""
    result = ""
    previous = ""
    quoted = False
    for char in text:
        if char == '"':
            if previous == '"' and not quoted:
                result += '"'
            quoted = not quoted
        else:
            result += char
        previous = char
    return result


class Options:
    """The values of one option string. Unknown keys are refused unless `subset` says that others read them."""

    def __init__(self, text: str, keys: Iterable[str], flags: Iterable[str] = (), *, subset: bool = False) -> None:
        known = set(keys)
        valueless = set(flags)
        self._values: dict[str, str] = {}
        if not text.strip():
            return
        for option in split_commas(text):
            name, equals, value = option.partition("=")
            if name in valueless:
                self._values[name] = ""
            elif name in known:
                if not equals:
                    raise OptionError(f"invalid syntax: {option}")
                self._values[name] = value.strip()
            elif not subset:
                raise OptionError(f"unknown option: {name}")

    def is_set(self, name: str) -> bool:
        """Whether the key was there at all, even without a value."""
        return name in self._values

    def text(self, name: str) -> str | None:
        """The value without quotes; None when absent or empty."""
        value = self._values.get(name)
        return dequote(value) if value else None

    def convert(self, name: str, read: Callable[[str], _T], default: _T) -> _T:
        """The value read by one of the functions below, or the default when absent or empty."""
        value = self._values.get(name)
        if not value:
            return default
        try:
            return read(value)
        except ValueError:
            raise OptionError(f"unable to convert {value} for {name}") from None

    def maybe(self, name: str, read: Callable[[str], _T]) -> _T | None:
        """`convert` with None for an absent or empty value."""
        return self.convert(name, read, None) if self._values.get(name) else None

    def toggle(self, name: str, default: bool) -> bool:
        """`on|off|true|false`."""
        return self.convert(name, toggle, default)

    def integer(self, name: str, bits: int, default: int) -> int:
        """An unsigned integer of so many bits."""
        return self.convert(name, lambda text: integer(text, bits), default)

    def size(self, name: str) -> int | None:
        """A number of bytes with an optional K, M or G."""
        return self.maybe(name, byte_size)


def toggle(text: str) -> bool:
    value = _TOGGLES.get(text.lower())
    if value is None:
        raise ValueError(text)
    return value


def integer(text: str, bits: int) -> int:
    """Rust's `parse::<uN>`: digits with an optional plus, nothing else."""
    digits = dequote(text)
    number = digits.removeprefix("+")
    if not number.isascii() or not number.isdigit() or int(number) >= 1 << bits:
        raise ValueError(text)
    return int(number)


def byte_size(text: str) -> int:
    """Bytes of `512M`. CH takes upper-case K, M and G only, and so do we; a result above 64 bits is refused."""
    stripped = dequote(text).strip()
    shift = _SHIFTS.get(stripped[-1:], 0)
    return integer(str(integer(stripped.rstrip("KMG"), 64) << shift), 64)


def integer_list(text: str, bits: int = 64) -> tuple[int, ...]:
    """`[0,2-4]` as (0, 2, 3, 4)."""
    numbers: list[int] = []
    for part in text.strip().strip("[]").split(","):
        first, dash, last = part.partition("-")
        start = integer(first, bits)
        end = integer(last, bits) if dash else start
        if (dash and start >= end) or end - start > 1 << 16:
            raise ValueError(part)
        numbers.extend(range(start, end + 1))
    return tuple(numbers)


def string_list(text: str) -> tuple[str, ...]:
    """`[a,b]` as ("a", "b"); the brackets may be left out."""
    return tuple(split_commas(text.strip().strip("[]")))


def pairs(text: str) -> tuple[tuple[str, str], ...]:
    """`[key@value,key@[a,b]]` as pairs of text; the value keeps its brackets."""
    stripped = text.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        raise ValueError(text)
    found: list[tuple[str, str]] = []
    for part in split_commas(stripped[1:-1]):
        quoted = False
        positions: list[int] = []
        for index, char in enumerate(part):
            if char == '"':
                quoted = not quoted
            elif char == "@" and not quoted:
                positions.append(index)
        if len(positions) != 1:
            raise ValueError(part)
        found.append((dequote(part[: positions[0]]), dequote(part[positions[0] + 1 :])))
    return tuple(found)


def variant(*names: str) -> Callable[[str], Any]:
    """A reader of one of several words in any case; gives CH's JSON spelling: `virtio-mem` → `VirtioMem`."""

    def read(text: str) -> Any:
        wanted = dequote(text).lower()
        for name in names:
            if name.lower() == wanted:
                return "".join(part.capitalize() for part in name.split("-"))
        raise ValueError(text)

    return read

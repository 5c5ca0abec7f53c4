"""Reading saved device state: plain values from a file that may be damaged, edited or from another program."""

from __future__ import annotations

from freezeframe.errors import Incompatible

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


def fields(component: str, state: object, names: Mapping[str, int]) -> dict[str, int]:
    """Checks that `state` has exactly the fields `names`, each an integer from 0 to the number given there."""
    values = keys(component, state, names)
    for name, top in names.items():
        integer(component, name, values[name], top)
    return values


def keys(component: str, state: object, names: Mapping[str, Any]) -> dict[str, Any]:
    """Checks that `state` is a mapping with exactly these keys."""
    if not isinstance(state, dict):
        raise Incompatible(f"saved state of {component} is not a table of fields")
    values: dict[str, Any] = state  # pyright: ignore[reportUnknownVariableType]
    missing = [name for name in names if name not in values]
    unknown = [str(name) for name in values if name not in names]
    if missing or unknown:
        what = [f"missing {', '.join(missing)}"] * bool(missing) + [f"unknown {', '.join(unknown)}"] * bool(unknown)
        raise Incompatible(f"saved state of {component} has other fields: {'; '.join(what)}")
    return values


def integer(component: str, name: str, value: object, top: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= top:
        raise Incompatible(f"saved state of {component}: {name} is {value!r}, not a number from 0 to {top:#x}")
    return value


def data(component: str, name: str, value: object, size: int) -> bytes:
    """`size` bytes written as hexadecimal digits."""
    try:
        found = bytes.fromhex(value) if isinstance(value, str) else b""
    except ValueError:
        found = b""
    if len(found) != size:
        raise Incompatible(f"saved state of {component}: {name} is not {size} bytes in hexadecimal")
    return found

"""Saved state is read by JSON's rules, not by Python's: no truth value from a number, no number from a truth value."""

from __future__ import annotations

from typing import Any

import pytest

from freezeframe import _core
from freezeframe.config.vm import VmConfig
from freezeframe.errors import Incompatible

pytestmark = pytest.mark.unit

CLOCK = _core.Clock(1_000_000, 0).state()
ODD: list[Any] = [True, 1.0, "1", None, [], {}, 2**64, -1, b"1", object()]


def test_a_clock_comes_back() -> None:
    assert _core.Clock.from_state(CLOCK, 0, advance=False).state() == CLOCK


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("name", sorted(CLOCK))
def test_numbers_are_numbers(name: str, value: Any) -> None:
    with pytest.raises(Incompatible, match=r"state.*clock|clock.*state"):
        _core.Clock.from_state({**CLOCK, name: value}, 0, advance=False)


def test_names_are_the_ones_that_were_saved() -> None:
    for state in ({**CLOCK, "extra": 1}, {k: v for k, v in CLOCK.items() if k != "tsc"}, {**CLOCK, 1: 1}, [], None, 7):
        with pytest.raises(Incompatible):
            _core.Clock.from_state(state, 0, advance=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1, 0, "true", None, [], {}, [1], 1.5])
def test_truth_values_are_truth_values(value: Any) -> None:
    with pytest.raises(ValueError, match=r"boolean|fractions|float"):
        VmConfig.from_plain({"memory": {"size": 1 << 20, "shared": value}})


def test_nesting_has_an_end() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(Incompatible, match="nested"):
        _core.Clock.from_state({**CLOCK, "tsc": deep}, 0, advance=False)

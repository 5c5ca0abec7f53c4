"""The core's JSON writer: what Python's own would write, in ASCII, in the order given."""

from __future__ import annotations

import json

import pytest

from freezeframe._core import debug_text, json_line

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        [0, -1, 2**64 - 1, -(2**63), False],
        {"b": 1, "a": {"z": [], "y": {}}},
        ("tuples", ["are", "lists"]),
        'quotes " \\ / \b\f\n\r\t \x00\x1f',
        "nö \u2028 \U0001f600",
        0.5,
    ],
)
def test_like_pythons(value):
    assert json_line(value).decode("ascii") == json.dumps(value, separators=(",", ":"))


@pytest.mark.parametrize("value", [2**64, object(), "\ud800"])
def test_what_json_does_not_have(value):
    with pytest.raises((ValueError, TypeError)):
        json_line(value)


def test_debug_text_quotes_as_rust_does():
    assert debug_text('a"b\\c\n') == '"a\\"b\\\\c\\n"'

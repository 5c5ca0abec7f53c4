"""A whole machine of format version 1 still restores and runs (`tests/golden/make_machine.py` made it)."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path

import pytest

import freezeframe as ff

pytestmark = pytest.mark.guest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def golden(tmp_path):
    with tarfile.open(ROOT / "tests" / "golden" / "machine-v1.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.mark.parametrize("clock", ["advance", "freeze"])
def test_it_runs_on(golden, clock):
    """If saved fields changed: run make_machine.py again while version 1 is unreleased, else make a version 2."""
    with ff.restore(golden, clock=clock) as vm:
        first = int(vm.serial.expect(r"T (\d+)\n")[1])
        vm.serial.expect(rf"T {first + 20}\n")
        assert "BAD" not in vm.serial.read()


def test_it_holds_the_fields_that_are_saved_today(golden, tmp_path):
    """What a machine saves now has the shape that it had then: no field came or went without a new version."""
    with ff.restore(golden, resume=False) as vm:
        (tmp_path / "again").mkdir()
        vm.snapshot(tmp_path / "again")
    old, new = (json.loads((path / "vm.json").read_text()) for path in (golden, tmp_path / "again"))
    assert shape(old) == shape(new)


def shape(value):
    """Names and kinds without values; lists by their first element."""
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value[:1]]
    return type(value).__name__


def test_the_page_names_the_parts(golden):
    text = (ROOT / "docs" / "formats" / "snapshot.md").read_text().split("### `state`\n", 1)[1].split("\n### ", 1)[0]
    state = json.loads((golden / "vm.json").read_text())["state"]
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(state)

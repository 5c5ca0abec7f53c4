"""docs/compatibility.md names every action and every option, and nothing that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from freezeframe.cli.cloud_hypervisor_options import COMMAND
from freezeframe.control.actions import ACTIONS

pytestmark = pytest.mark.unit

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "compatibility.md").read_text()
FIRST_CELLS = "\n".join(
    line.split("|")[1] for line in PAGE.split("## Different")[0].splitlines() if line.startswith("| `")
)


def test_actions():
    assert set(re.findall(r"`(vmm?\.[a-z-]+)`", FIRST_CELLS)) == set(ACTIONS)


def test_options():
    known = {f"-{option.name}" if option.name == "v" else f"--{option.name}" for option in COMMAND.options}
    assert set(re.findall(r"`(--?[a-z-]+)`", FIRST_CELLS)) == known


def test_what_is_said_to_be_refused_is_refused():
    row = next(line for line in PAGE.splitlines() if line.startswith("| `--balloon`"))
    assert "known and refused" in row
    refused = set(re.findall(r"`--([a-z-]+)`", row))
    helped = {option.name for option in COMMAND.options if option.help.startswith("Not supported")}
    assert helped <= refused

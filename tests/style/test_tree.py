"""Rules about the tree itself: sizes that one can read in a sitting, and nothing of the machine it was made on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {".py": 600, ".rs": 1000}


def _tracked() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name.decode() for name in listed.split(b"\0") if name and (ROOT / name.decode()).is_file()]


def test_modules_can_be_read_in_one_sitting() -> None:
    too_long = {
        str(path.relative_to(ROOT)): lines
        for path in _tracked()
        if path.suffix in LIMITS and (lines := len(path.read_text().splitlines())) > LIMITS[path.suffix]
    }
    assert not too_long


def test_nothing_names_a_machine() -> None:
    words = ["/" + "work/", "/" + "root/.", "mirror" + "."]
    for path in _tracked():
        if path.suffix in {".bin", ".elf", ".png", ".gz"} or path.name == "Cargo.lock":
            continue
        text = path.read_text(errors="replace")
        found = [word for word in words if word in text]
        assert not found, f"{path.relative_to(ROOT)} names {found}"

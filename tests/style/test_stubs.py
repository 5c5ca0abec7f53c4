"""`_core.pyi` says what the compiled core has, name for name and parameter for parameter."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit


def test_stubs_match_the_core(tmp_path):
    pytest.importorskip("mypy", reason="mypy is installed by scripts/check")
    allowed = tmp_path / "allowed"
    allowed.write_text(r"freezeframe\._core\.__all__" + "\n")
    words = [sys.executable, "-m", "mypy.stubtest", "--ignore-disjoint-bases", "--allowlist", str(allowed)]
    done = subprocess.run([*words, "freezeframe._core"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

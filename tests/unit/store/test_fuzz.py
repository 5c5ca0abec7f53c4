from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

SOURCE = Path(__file__).resolve().parents[3] / "fuzz" / "snapshot_document.py"


def test_mutated_documents_are_refused_or_read() -> None:
    spec = importlib.util.spec_from_file_location("snapshot_document", SOURCE)
    assert spec
    assert spec.loader
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    accepted, refused = fuzz.run(0, 600)
    assert refused > 400
    assert accepted > 10  # mutations of config and state, which others judge

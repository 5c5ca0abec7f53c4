"""The translator as a host's choice."""

from __future__ import annotations

import resource

import pytest

from freezeframe.machine import build_for_boot
from freezeframe.testing.guests import tick
from freezeframe.testing.tiny import MIB, configured, serial

pytestmark = pytest.mark.guest


def test_a_host_without_memory_for_code_interprets_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("FREEZEFRAME_ENGINE", "software")
    config = configured(tmp_path, tick(size=0x4000), 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        machine = build_for_boot(config, capture=MIB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    warning = machine.engine.warning
    assert warning is not None
    assert "no translator on this host: File too large" in warning
    machine.resume()
    serial(machine).expect("T 2", 20)
    machine.close()


def test_a_translating_machine_has_nothing_to_say(tmp_path, monkeypatch):
    monkeypatch.setenv("FREEZEFRAME_ENGINE", "software")
    machine = build_for_boot(configured(tmp_path, tick(size=0x4000), 1), capture=MIB)
    assert machine.engine.warning is None
    machine.close()

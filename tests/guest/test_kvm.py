"""The KVM engine beside the software engine: one guest on both in turn, and what KVM cannot do."""

from __future__ import annotations

import copy
import os
import threading
import time

import pytest

from freezeframe import _core
from freezeframe.errors import Incompatible, NotSupported
from freezeframe.machine import build, build_for_boot, build_from_snapshot
from freezeframe.machine import engine as engines
from freezeframe.testing.guests import smp, tick
from freezeframe.testing.process import Vmm
from freezeframe.testing.tiny import MIB, again, configured, serial

from .test_machine import ports

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm cannot be opened here"),
]


def without_time(vcpus):
    """A restore moves the machine's clock on."""
    return [{**state, "msrs": {k: v for k, v in state["msrs"].items() if k != "0x10"}} for state in vcpus]


def test_both_engines_start_a_vcpu_alike(tmp_path):
    config = configured(tmp_path, tick(), cpus=3)
    with build_for_boot(config, engine="kvm") as kvm, build_for_boot(config, engine="software") as software:
        assert without_time(kvm.save()["vcpus"]) == without_time(software.save()["vcpus"])


def test_a_guest_moves_between_the_engines(tmp_path):
    machine = build_for_boot(configured(tmp_path, tick(size=0x4000)), capture=MIB, engine="software")
    try:
        last = 0
        for hop in range(24):
            console = serial(machine)
            machine.resume()
            number = int(console.expect(r"(?<=T )\d+(?=\r?\n)", 60).group(0))
            assert number > last
            last = number
            machine.pause()
            assert "BAD" not in console.text
            before = machine.save()
            assert machine.save()["vcpus"] == before["vcpus"]
            machine = again(machine, engine=("kvm", "software")[hop % 2], clock="Freeze" if hop % 3 else "Advance")
            assert machine.engine.name == ("kvm", "software")[hop % 2]
            assert without_time(machine.save()["vcpus"]) == without_time(before["vcpus"])
    finally:
        machine.close()


def test_the_guests_tsc_goes_on_from_engine_to_engine(tmp_path):
    # rdtsc; mov [0x6000], eax; mov [0x6004], edx; jmp to the start
    code = bytes.fromhex("0f31 a300600000 891504600000 ebf1")
    machine = build_for_boot(configured(tmp_path, ports(code)), engine="software")
    try:
        last = 0
        for hop in range(12):
            machine.memory.write(0x6000, bytes(8))
            machine.resume()
            deadline = time.monotonic() + 20
            while not any(machine.memory.read(0x6004, 4)) and time.monotonic() < deadline:
                time.sleep(0.001)
            machine.pause()
            seen = int.from_bytes(machine.memory.read(0x6000, 8), "little")
            clock = machine.save()["clock"]
            assert last < seen <= clock["tsc"] < seen + clock["tsc_khz"] * 2000
            last = clock["tsc"]
            machine = again(machine, engine=("kvm", "software")[hop % 2], clock="Freeze" if hop % 3 else "Advance")
    finally:
        machine.close()


def test_registers_of_every_kind_survive_kvm(tmp_path):
    with build_for_boot(configured(tmp_path, ports(bytes.fromhex("ebfe"))), engine="kvm") as machine:
        state = machine.save()
        vcpu = state["vcpus"][0]
        vcpu["fpu"]["fpr"] = [f"{0x3FFF + i:04x}{1 << 63 | i:016x}" for i in range(8)]
        vcpu["fpu"]["xmm"] = [f"{i + 1:032x}" for i in range(16)]
        # With an exception pending: without one AMD's processors do not keep the last instruction.
        vcpu["fpu"].update(mxcsr=0x1FA0, fsw=0xB881, last_opcode=0x123, fcw=0x27E)
        vcpu["debug_regs"]["db"] = [0x1000, 0x2000, 0x3000, 0x4000]
        vcpu["lapic"].update(lvt_timer=0x40031, svr=0x1FF, tpr=0x20, lvt_lint0=0x700)
        vcpu["sregs"]["cr8"] = 2
        deadline = state["clock"]["tsc"] + (1 << 50)
        vcpu["msrs"].update({"0x6e0": deadline, "0xc0000082": 0xFFFF_8000_0000_1234, "0x3b": 777, "0xc0000103": 9})
        vcpu["msrs"]["0x10"] = state["clock"]["tsc"] + 777
        memory = _core.Memory(machine.memory.regions)
        memory.write(0x10_0000, machine.memory.read(0x10_0000, MIB))
        with build_from_snapshot(machine.config, state, memory, engine="kvm", clock="Freeze") as second:
            assert without_time(second.save()["vcpus"]) == without_time(state["vcpus"])
            second.resume()
            second.pause()
            saved = second.save()
            after = saved["vcpus"][0]
            for part in ("fpu", "debug_regs", "lapic"):
                assert after[part] == vcpu[part]
            msrs = dict(after["msrs"])
            assert msrs.pop("0x10") == saved["clock"]["tsc"] + 777
            # As far away as before, less what the machine has lived through: a KVM that shows its own TSC moves both.
            lived = (deadline - state["clock"]["tsc"]) - (msrs.pop("0x6e0") - saved["clock"]["tsc"])
            assert 0 < lived < 10_000 * state["clock"]["tsc_khz"]
            expected = without_time([vcpu])[0]["msrs"]
            expected.pop("0x6e0")
            assert msrs == expected


@pytest.mark.parametrize("mode", [0, 1 << 17], ids=["one-shot", "periodic"])
def test_a_timer_that_runs_out_on_the_way_out_of_the_guest_is_not_lost(tmp_path, mode):
    with build_for_boot(configured(tmp_path, ports(bytes.fromhex("f4 ebfd"))), engine="kvm") as machine:
        parts = machine._parts
        state = machine.save()["vcpus"][0]
        state["lapic"].update(
            svr=0x1FF, lvt_timer=mode | 0x40, timer_divide=0xB, timer_initial=1 << 30, timer_current=1
        )
        parts.engine.set_state(0, state)
        parts.control.request_stop("paused")
        # It is loaded, its timer runs out, and it is read again, all before its first instruction.
        assert parts.engine.run()[0] == "paused"
        after = parts.engine.state(0)
        assert after["regs"] == state["regs"]
        assert after["lapic"]["irr"][2] == 1
        assert (after["lapic"]["timer_current"] == 0) == (mode == 0)


def test_a_message_to_a_paused_machine_is_saved_once(tmp_path):
    # Interrupts stay off, so the request stays pending.
    with build_for_boot(configured(tmp_path, ports(bytes.fromhex("ebfe"))), engine="kvm") as machine:
        state = machine.save()["vcpus"][0]
        state["lapic"]["svr"] = 0x1FF
        machine._parts.engine.set_state(0, state)
        io = machine._parts.ioapic
        io.write(0, 1, 0x10 + 8)
        io.write(0x10, 4, 0x41)
        io.pulse(4)
        assert machine.save()["vcpus"][0]["lapic"]["irr"][2] == 2
        machine.resume()
        machine.pause()
        assert machine.save()["vcpus"][0]["lapic"]["irr"][2] == 2


def test_a_halted_guest_pauses_and_closes_at_once(tmp_path):
    machine = build_for_boot(configured(tmp_path, ports(bytes.fromhex("f4 ebfd")), cpus=4), engine="kvm")
    for _ in range(20):
        machine.resume()
        machine.pause()
    machine.resume()
    started = time.monotonic()
    machine.close()
    assert time.monotonic() - started < 10
    assert machine.state == "shutdown"


def test_an_instruction_that_kvm_cannot_run_is_named(tmp_path):
    if _core.kvm_probe()[0]:
        pytest.skip("this host's KVM runs every instruction")
    # pushf; push cs; call to what follows; iret: KVM's interpreter knows it in real mode only.
    with build_for_boot(configured(tmp_path, ports(bytes.fromhex("9c 0e e800000000 cf"))), engine="kvm") as machine:
        told = threading.Event()
        machine.on_stop = lambda _: told.set()
        machine.resume()
        assert told.wait(20)
        assert machine.stopped.kind == "failed"
        error = machine.stopped.error
        assert error.detail == {"code": "unsupported-instruction"}
        assert "instruction cf" in str(error)
        assert "--engine software" in str(error)


def test_a_user_is_told_of_an_instruction_that_kvm_cannot_run(tmp_path):
    if _core.kvm_probe()[0]:
        pytest.skip("this host's KVM runs every instruction")
    kernel = tmp_path / "kernel"
    kernel.write_bytes(smp(2))
    argv = ["--engine", "kvm", "--cpus", "boot=2", "--memory", "size=64M", "--console", "off", "--serial", "tty"]
    with Vmm([*argv, "--kernel", str(kernel)], socket=tmp_path / "s.sock") as vmm:
        assert vmm.wait(60) == 1
        vmm.console.expect(r"^READY$")
        vmm.errors.expect(
            r"^Error: The VM was stopped because it cannot go on:\n"
            r"  0: vCPU 0 at 0x[0-9a-f]+: this host's KVM cannot run the instruction cf( [0-9a-f]{2})*; use --engine software\n"
        )
    assert not (tmp_path / "s.sock").exists()
    # What it suggests helps.
    argv[1] = "software"
    with Vmm([*argv, "--kernel", str(kernel)], socket=tmp_path / "s.sock") as vmm:
        vmm.console.expect(r"^T 3$")


def test_a_bad_state_is_refused_by_name_and_changes_nothing(tmp_path):
    with build_for_boot(configured(tmp_path, tick()), engine="kvm") as machine:
        good = machine.save()["vcpus"]
        for change, name in (
            (lambda s: s["fpu"]["fpr"].__setitem__(0, "x" * 20), "fpu.fpr"),
            (lambda s: s["msrs"].pop("0x277"), "msrs.0x277"),
            (lambda s: s["msrs"].update({"0x277": 2}), "msrs.0x277"),
            (lambda s: s["sregs"]["cs"].update(type_=16), "sregs.cs"),
            (lambda s: s.update(xcr0=7), "xcr0"),
        ):
            state = machine.save()["vcpus"][0]
            change(state)
            with pytest.raises(Incompatible, match=name):
                machine._parts.engine.set_state(0, state)
            assert without_time(machine.save()["vcpus"]) == without_time(good)


def test_what_kvm_cannot_take_is_refused_by_name_before_anything_is_built(tmp_path, monkeypatch):
    with build_for_boot(configured(tmp_path, tick()), engine="software") as machine:
        config, good, regions = machine.config, machine.save(), machine.memory.regions

    def built(*_args, **_options):
        raise AssertionError("something was built")

    monkeypatch.setattr(build, "Backends", built)
    for error, name, change in (
        (Incompatible, "sregs.cr4: bits 0x40000", lambda s: s["vcpus"][0]["sregs"].update(cr4=1 << 18)),
        (Incompatible, "sregs.efer: bits 0x1000", lambda s: s["vcpus"][0]["sregs"].update(efer=1 << 12)),
        (Incompatible, "xcr0: 0x7", lambda s: s["vcpus"][0].update(xcr0=7)),
        (NotSupported, "3000000 kHz", lambda s: s["clock"].update(tsc_khz=3_000_000)),
    ):
        state = copy.deepcopy(good)
        change(state)
        with pytest.raises(error, match=name):
            build_from_snapshot(config, state, _core.Memory(regions), engine="kvm")


def test_an_explicit_choice_is_obeyed_and_measured(monkeypatch):
    monkeypatch.delenv("FREEZEFRAME_ENGINE", raising=False)
    assert (engines.choose("auto").name == "kvm") == _core.kvm_probe()[2]
    report = engines.choose("kvm")
    assert report.name == "kvm"
    assert _core.kvm_probe()[1].split(", at ")[0] in report.reason


def test_kvm_that_cannot_be_opened_is_said(monkeypatch):
    monkeypatch.setattr(engines, "KVM_DEVICE", "/dev/there-is-no-such-device")
    with pytest.raises(NotSupported, match="there is no"):
        engines.choose("kvm")

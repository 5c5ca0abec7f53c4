"""Runs that are the same each time, and `freezeframe prove`: what it shows, and what it finds."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

import freezeframe as ff
from freezeframe import _core
from freezeframe.cli.freezeframe import main
from freezeframe.cli.prove_cmd import report
from freezeframe.errors import (
    Damaged,
    EngineError,
    Incompatible,
    InvalidState,
    IoFailed,
    NotFound,
    NotSupported,
    Refused,
)
from freezeframe.machine import build_for_boot, build_repeatable
from freezeframe.proof import Input, Side, compare, prove, read_inputs, replay, write_inputs
from freezeframe.store import write_snapshot
from freezeframe.testing import guests
from freezeframe.testing.tiny import MIB, configured, serial

pytestmark = pytest.mark.guest

BOTH = ("interpreter", "translator")


def frozen(tmp_path, image, cpus=1, *, until=None, disk=None, code=None):
    """A snapshot of a guest that has printed `until`, or that has not begun (with `code` in place of its own)."""
    directory = tmp_path / "snapshot"
    directory.mkdir()
    with build_for_boot(configured(tmp_path, image, cpus, disk=disk), capture=MIB, engine="software") as machine:
        if until is not None:
            machine.resume()
            serial(machine).expect(until, 60)
            machine.pause()
        state = machine.save()
        if code is not None:
            machine.memory.write(state["vcpus"][0]["regs"]["rip"], code)
        write_snapshot(
            str(directory),
            config=machine.config.to_plain(),
            state=state,
            memory=machine.memory,
            engine=machine.engine.name,
        )
    return directory


def contents(*paths):
    """Bytes and times of files."""
    return [(p.stat().st_mtime_ns, p.stat().st_ctime_ns, hashlib.sha256(p.read_bytes()).digest()) for p in paths]


GUESTS = {
    "tick": (lambda: guests.tick(size=0x4000), 1, None),
    "tick-running": (lambda: guests.tick(size=0x4000), 1, "T 3"),
    "smp-2": (lambda: guests.smp(2), 2, None),
    "smp-4-x2apic-deadline": (lambda: guests.smp(4, x2apic=True, deadline=True), 4, "T 3"),
    "smp-8": (lambda: guests.smp(8), 8, "T 2"),
    "entropy": (guests.entropy, 1, "E "),
}


@pytest.mark.parametrize("name", GUESTS)
def test_a_snapshot_runs_the_same_on_both_tiers(tmp_path, name):
    image, cpus, until = GUESTS[name]
    snapshot = frozen(tmp_path, image(), cpus, until=until)
    files = sorted(snapshot.iterdir())
    before = contents(*files)
    proof = prove(snapshot, 3_000_000, every=700_000)
    assert proof.same, report(proof)
    assert proof.instructions == 3_000_000
    assert [c.at for c in proof.checkpoints] == [0, 700_000, 1_400_000, 2_100_000, 2_800_000, 3_000_000]
    assert len({c.digests for c in proof.checkpoints}) == 6, "nothing happened"
    # Another day, other checkpoints: the very same machine.
    again = prove(snapshot, 3_000_000, every=1_111_111, sides=(Side("interpreter"), Side("interpreter")))
    assert again.checkpoints[-1].digests == proof.checkpoints[-1].digests
    assert again.slept_ns == proof.slept_ns
    assert contents(*files) == before
    assert sorted(snapshot.iterdir()) == files


def test_timers_fire_by_the_count_of_instructions(tmp_path):
    proof = prove(frozen(tmp_path, guests.timers()), 50_000_000)
    assert proof.same, report(proof)
    assert proof.ended == "poweroff"
    assert proof.instructions < 50_000_000


def play(run, typed):
    """The virtio guest to its end, as somebody at its console would."""
    run.advance(50_000_000)
    assert run.ended == "asleep"
    for at in range(0, len(typed), 1000):
        run.send(typed[at : at + 1000])
        run.advance(20_000)
    run.advance(50_000_000)
    assert run.ended == "poweroff"
    return run.digests()


def test_input_is_logged_and_repeated_and_the_disk_stays(tmp_path):
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(range(256)) * 1024)
    typed = bytes(range(33, 123)) * 34
    typed = typed[:3000]
    snapshot = frozen(tmp_path, guests.virtio(), disk=str(disk))
    before = contents(disk, *sorted(snapshot.iterdir()))
    with replay(snapshot, tier="interpreter") as run:
        digests = play(run, typed)
        printed, screen, log = run.output("__serial"), run.output(), run.inputs
        count, state = run.instructions, run.state()
    assert "WRITTEN" in printed
    assert "DONE" in printed
    assert "BAD" not in printed
    assert set(state["devices"]["disk writes"]["_disk0"]) != {"0"}
    assert [len(i.data) for i in log] == [1000, 1000, 1000]

    path = tmp_path / "inputs"
    write_inputs(path, log)
    assert read_inputs(path) == log
    with replay(snapshot, tier="translator", inputs=read_inputs(path)) as run:
        run.advance(200_000_000)
        assert (run.ended, run.instructions) == ("poweroff", count)
        assert (run.output("__serial"), run.output()) == (printed, screen)
        assert run.digests() == digests
    proof = prove(snapshot, 200_000_000, inputs=log, every=400_000)
    assert proof.same, report(proof)
    assert (proof.ended, proof.instructions) == ("poweroff", count)
    assert proof.checkpoints[-1].digests == digests
    # Without them it waits.
    assert prove(snapshot, 200_000_000).ended == "asleep"
    assert contents(disk, *sorted(snapshot.iterdir())) == before


def test_digests_that_follow_memory_are_those_of_all_of_it(tmp_path):
    snapshot = frozen(tmp_path, guests.smp(4), 4)
    with replay(snapshot) as run:
        for _ in range(20):
            run.advance(50_000)
            assert run.digests() == run.digests()
        followed = run.digests()
        assert run.digests(afresh=True) == followed


def test_looking_at_the_state_changes_nothing(tmp_path):
    snapshot = frozen(tmp_path, guests.smp(4, x2apic=True, deadline=True), 4, until="T 3")

    def end(every):
        with replay(snapshot) as run:
            for _ in range(2_000_000 // every):
                run.advance(every)
                run.state()
            return run.state()

    assert end(20_000) == end(2_000_000)


def test_an_interrupt_ends_it(tmp_path, monkeypatch):
    snapshot = frozen(tmp_path, guests.tick())
    made = []
    monkeypatch.setattr(compare, "replay", lambda *a, **kw: made.append(replay(*a, **kw)) or made[-1])
    main_thread = threading.main_thread().ident

    def press():
        deadline = time.monotonic() + 60
        while len(made) < 2 or not made[1].machine._parts.clock.counts()[0]:
            assert time.monotonic() < deadline
        signal.pthread_kill(main_thread, signal.SIGINT)

    pressing = threading.Thread(target=press)
    # A test before this one may have left another handler.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    pressing.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            prove(snapshot, 10**12, every=10**12)
    finally:
        signal.signal(signal.SIGINT, before)
    pressing.join()


def test_another_seed_is_found_where_it_is_first_used(tmp_path):
    snapshot = frozen(tmp_path, guests.entropy())
    proof = prove(snapshot, 2_000_000, sides=(Side("interpreter", 1), Side("translator", 2)))
    assert not proof.same
    parting = proof.parting
    # The store that notifies the device, which fills the buffer at once.
    assert parting.block[-1].number == parting.at - 1
    assert re.match(r"mov (word ptr )?\[rcx\],ax", parting.block[-1].text), parting.block
    assert {d.where.split()[0] for d in parting.differences} == {"memory"}
    assert all(0x80_0000 <= int(d.where.split()[1], 16) < 0x80_0040 for d in parting.differences)
    assert f"DIFFERENT after instruction {parting.at:,}" in report(proof)
    assert json.loads(json.dumps(proof.to_json()))["parting"]["at"] == parting.at


@pytest.mark.parametrize("at", [0, 1, 777_777, 1_999_999])
def test_one_wrong_bit_is_found_at_its_instruction(tmp_path, at):
    snapshot = frozen(tmp_path, guests.tick(size=0x4000), until="T 2")
    proof = prove(snapshot, 2_000_000, sides=(Side("interpreter"), Side("translator", disturb=(at, 0x300_0000))))
    assert not proof.same
    assert proof.parting.at == at + 1
    (found,) = proof.parting.differences
    assert (found.where, found.first, found.second) == ("memory 0x3000000", "00", "01")
    assert proof.parting.block[-1].number == at


LEAVES_RAM = bytes.fromhex(
    "803d00000003 00"  # waits: cmp byte [0x3000000], 0
    "74 f7"  # je waits
    "b8 000000d0"  # mov eax, 0xd0000000: where no RAM is
    "ff e0"  # jmp eax
)


def test_an_engine_that_cannot_go_on_differs_from_one_that_can(tmp_path):
    snapshot = frozen(tmp_path, guests.tick(size=0x1000), code=LEAVES_RAM)
    bad = ("translator", 0, (20_001, 0x300_0000))
    for sides in ((Side("interpreter"), Side(*bad)), (Side(*bad), Side("interpreter"))):
        proof = prove(snapshot, 1_000_000, sides=sides)
        assert not proof.same
        # The byte is what differs first, right where it was flipped.
        assert proof.parting.at == 20_002
        assert proof.parting.block[-1].number == 20_001

    # What the engine cannot do on either side is no difference.
    with pytest.raises(EngineError, match="no RAM") as caught:
        prove(snapshot, 1_000_000, sides=(Side("interpreter", 0, (20_001, 0x300_0000)), Side(*bad)))
    assert re.search(r"interpreter, after 2000\d instructions", caught.value.hint)


def test_the_end_of_an_engine_is_among_the_differences(tmp_path, monkeypatch):
    """A translator that would refuse what the interpreter does."""
    snapshot = frozen(tmp_path, guests.tick(size=0x4000))

    def make(*args, tier, **options):
        made = replay(*args, tier=tier, **options)
        run_to = made.run_to

        def refusing(count):
            run_to(min(count, 5000))
            if count > 5000:
                raise EngineError("this instruction is not supported")

        if tier == "translator":
            made.run_to = refusing
        return made

    monkeypatch.setattr(compare, "replay", make)
    proof = prove(snapshot, 100_000)
    assert proof.parting.at == 5001
    shown = {d.where: (d.first, d.second) for d in proof.parting.differences}
    assert shown["instructions"] == ("5001", "5000")
    assert shown["error"] == ("", "this instruction is not supported")
    assert proof.parting.block[-1].number == 5000


def test_where_the_wall_clock_stands_follows_from_the_seed(tmp_path):
    snapshot = frozen(tmp_path, guests.tick(size=0x1000))
    saved = json.loads((snapshot / "vm.json").read_bytes())["state"]["clock"]["wall_ns"]
    clocks = []
    for seed in (0, 1, 1, 2):
        with replay(snapshot, seed=seed) as run:
            run.advance(1000)
            clocks.append(run.machine._parts.clock.wall_ns() - 1000 - saved)
    assert clocks[0] == 0
    assert clocks[1] == clocks[2] != clocks[3]
    assert all(0 < ahead < 365 * 86_400 * 10**9 for ahead in clocks[1:])


def test_the_library_gives_it_too(tmp_path):
    snapshot = ff.Snapshot(frozen(tmp_path, guests.tick(size=0x1000)))
    assert repr(ff.prove(snapshot, 200_000)) == "<Proof same, 200000 instructions>"
    with ff.replay(snapshot) as run:
        run.advance(200_000)
        with pytest.raises(Refused):
            run.send("hello", "__nothing")
        assert run.inputs == []
    with pytest.raises(Refused):
        ff.prove(snapshot, 0)
    with pytest.raises(Refused):
        ff.replay(snapshot, seed=-1)


def test_a_replay_does_not_go_back_and_says_when_it_is_closed(tmp_path):
    with replay(frozen(tmp_path, guests.tick(size=0x4000))) as run:
        run.advance(0)
        with pytest.raises(Refused, match="does not go back"):
            run.advance(-1)
    run.close()
    for use in (lambda: run.advance(1), run.digests, run.output, lambda: run.instructions, lambda: run.ended):
        with pytest.raises(InvalidState, match="closed"):
            use()


def test_the_command(tmp_path, capsys, monkeypatch):
    snapshot = frozen(tmp_path, guests.smp(2), 2)
    assert main(["prove", str(snapshot), "--instructions", "1M"]) == 0
    shown = capsys.readouterr()
    assert "equal: 1,000,000 instructions" in shown.out
    assert shown.err == ""
    assert main(["prove", f"file://{snapshot}", "--instructions", "300k", "--seed", "5", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["same"]
    assert [run["tier"] for run in document["runs"]] == ["interpreter", "translator"]
    assert [run["seed"] for run in document["runs"]] == [5, 5]

    differing = prove(snapshot, 300_000, sides=(Side("interpreter"), Side("translator", disturb=(5000, 0x200_0000))))
    monkeypatch.setattr("freezeframe.proof.prove", lambda *_, **__: differing)
    assert main(["prove", str(snapshot)]) == 1
    assert "DIFFERENT after instruction 5,001" in capsys.readouterr().out
    assert main(["prove", str(snapshot), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["parting"]["at"] == 5001
    for wrong in (["--instructions", "0"], ["--instructions", "1X"], ["--disk", "x"], ["--every", "-1"]):
        with pytest.raises(SystemExit) as ended:
            main(["prove", str(snapshot), *wrong])
        assert ended.value.code == 2


def test_what_is_wrong_with_a_snapshot_is_said(tmp_path, capsys):
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 18))
    snapshot = frozen(tmp_path, guests.virtio(), disk=str(disk))
    copy = tmp_path / "copy.raw"
    copy.write_bytes(disk.read_bytes())
    with pytest.raises(NotFound):
        prove(tmp_path / "nothing")
    assert main(["prove", str(tmp_path / "nothing")]) == 10
    os.utime(disk)
    with pytest.raises(Incompatible):
        prove(snapshot, 1000)
    assert main(["prove", str(snapshot)]) == 13
    assert prove(snapshot, 1000, disks={"_disk0": copy}).same
    assert main(["prove", str(snapshot), "--instructions", "1k", "--disk", f"_disk0={copy}"]) == 0
    assert main(["prove", str(snapshot), "--instructions", "1k", "--disk-check", "off"]) == 0
    with open(snapshot / "memory-region-0", "r+b") as file:
        file.seek(0x10_0000)  # the guest's image
        byte = file.read(1)
        file.seek(0x10_0000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(Damaged, match="memory-region-0"):
        prove(snapshot, 1000, disks={"_disk0": copy})
    assert main(["prove", str(snapshot), "--disk", f"_disk0={copy}"]) == 12
    assert "memory-region-0" in capsys.readouterr().err


def test_a_guest_may_be_switched_off_by_its_button_at_a_count(tmp_path):
    snapshot = frozen(tmp_path, guests.tick(size=0x1000))
    with replay(snapshot) as run:
        run.advance(1000)
        run.press_power_button()
        run.advance(1000)
        log, digests = run.inputs, run.digests()
    assert log == [Input(1000, "power-button")]
    with replay(snapshot, inputs=log) as run:
        run.advance(2000)
        assert run.digests() == digests
    with pytest.raises(Refused, match="order"):
        replay(snapshot, inputs=[Input(7, "power-button"), *log, Input(8, "power-button")])
    with replay(snapshot) as run:
        run.advance(2000)
        assert run.digests() != digests


def test_a_timer_that_follows_the_host_is_refused(tmp_path):
    config = configured(tmp_path, guests.tick()).replace(test_devices=("PicPit",))
    with pytest.raises(NotSupported, match="PIT"):
        build_repeatable(config, {}, _core.Memory([(0, 64 * MIB)]))


def test_the_format_of_logs_is_what_its_page_shows(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "formats" / "inputs.md").read_text()
    example = re.search(r"```jsonl\n(.*?)```", page, re.DOTALL)[1]
    path, again = tmp_path / "inputs", tmp_path / "again"
    path.write_text(example)
    found = read_inputs(path)
    assert found[0] == Input(50_000_000, "__console", b"uname -a\n")
    assert [i.device for i in found] == ["__console", "__serial", "power-button"]
    write_inputs(again, found)
    assert again.read_text() == example
    with pytest.raises(IoFailed):
        write_inputs(again, found)


def test_a_log_of_inputs_that_is_none_is_refused(tmp_path):
    path = tmp_path / "inputs"
    with pytest.raises(NotFound):
        read_inputs(path)
    head = '{"format": "freezeframe-inputs", "version": 1}\n'
    good = '{"at": 5, "device": "__console", "data": "00"}\n'
    path.write_text(head + good)
    assert read_inputs(path) == [Input(5, "__console", b"\0")]
    for text in (
        "",
        good,
        head + "x",
        head + good + good.replace("5", "4"),
        head + good.replace("5", "-5"),
        head + good.replace("5", "true"),
        head + good.replace('"00"', '"0"'),
        head + good.replace('"00"', "0"),
        head + good.replace("at", "on"),
    ):
        path.write_text(text)
        with pytest.raises(Refused):
            read_inputs(path)

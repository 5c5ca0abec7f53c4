"""What is remembered about the host until it boots anew: whom it is told, and what makes it forgotten."""

from __future__ import annotations

import os
import threading

import pytest

from freezeframe import _core
from freezeframe.errors import Refused
from freezeframe.machine import engine, per_boot, tsc

FACTS = (7, "b")


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    """The user's runtime directory; there is nothing in it, and no other place to keep anything."""
    folder = tmp_path / "runtime"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nobody" / "makes" / "this"))
    return folder


def kept(runtime):
    return runtime / "freezeframe" / "answer"


def test_an_answer_is_kept_in_a_file_of_the_users_alone(runtime):
    assert per_boot.recall("answer", *FACTS) is None
    assert not (runtime / "freezeframe").exists(), "asking makes nothing"
    per_boot.remember("answer", "it hums: 0x10 – never", *FACTS)
    assert per_boot.recall("answer", *FACTS) == "it hums: 0x10 – never"
    assert kept(runtime).stat().st_mode & 0o777 == 0o600
    assert (runtime / "freezeframe").stat().st_mode & 0o777 == 0o700
    per_boot.remember("answer", "", *FACTS)
    assert per_boot.recall("answer", *FACTS) == ""
    assert os.listdir(runtime / "freezeframe") == ["answer"], "no temporary file stays"


def test_an_answer_holds_for_its_facts_boot_kernel_and_core_only(runtime, monkeypatch, tmp_path):
    per_boot.remember("answer", "yes", *FACTS)
    assert per_boot.recall("answer", 7, "c") is None
    assert per_boot.recall("answer", 7) is None
    assert per_boot.recall("other", *FACTS) is None
    with monkeypatch.context() as changed:
        changed.setattr(per_boot, "_VERSION", 2)
        assert per_boot.recall("answer", *FACTS) is None
    with monkeypatch.context() as changed:
        uname = list(os.uname())
        uname[2] += "-other"
        changed.setattr(os, "uname", lambda: os.uname_result(uname))
        assert per_boot.recall("answer", *FACTS) is None
    with monkeypatch.context() as changed:
        (tmp_path / "core.so").write_bytes(b"another build")
        changed.setattr(_core, "__file__", str(tmp_path / "core.so"))
        assert per_boot.recall("answer", *FACTS) is None
    with monkeypatch.context() as changed:
        (tmp_path / "boot_id").write_text("another boot\n")
        changed.setattr(per_boot, "BOOT_ID", str(tmp_path / "boot_id"))
        assert per_boot.recall("answer", *FACTS) is None
    assert per_boot.recall("answer", *FACTS) == "yes"


def test_a_host_that_does_not_name_its_boots_keeps_nothing(runtime, monkeypatch, tmp_path):
    monkeypatch.setattr(per_boot, "BOOT_ID", str(tmp_path / "none"))
    per_boot.remember("answer", "yes")
    assert per_boot.recall("answer") is None
    assert not (runtime / "freezeframe").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[: data.index(b"\n") + 1],
        lambda data: data + b"more\n",
        lambda data: data.replace(b"yes", b"y\xffs"),
        lambda data: data.replace(b"freezeframe", b"freezeframf"),
        lambda data: data + b"x" * 5000,
        lambda data: bytes(len(data)),
    ],
)
def test_a_damaged_file_is_as_good_as_none(runtime, damage):
    per_boot.remember("answer", "yes", *FACTS)
    kept(runtime).write_bytes(damage(kept(runtime).read_bytes()))
    assert per_boot.recall("answer", *FACTS) is None
    per_boot.remember("answer", "no", *FACTS)
    assert per_boot.recall("answer", *FACTS) == "no"


def test_a_file_that_is_not_a_plain_one_of_ours_is_not_read(runtime, tmp_path):
    per_boot.remember("answer", "yes", *FACTS)
    file = kept(runtime)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert per_boot.recall("answer", *FACTS) is None
    file.unlink()
    os.mkfifo(file)
    assert per_boot.recall("answer", *FACTS) is None
    file.unlink()
    file.mkdir()
    assert per_boot.recall("answer", *FACTS) is None
    per_boot.remember("answer", "no", *FACTS)
    assert os.listdir(runtime / "freezeframe") == ["answer"], "what could not be renamed is gone"
    file.rmdir()
    (tmp_path / "elsewhere").rename(file)
    assert per_boot.recall("answer", *FACTS) == "yes"
    file.chmod(0o620)
    assert per_boot.recall("answer", *FACTS) is None


def test_a_symbolic_link_is_replaced_not_written_through(runtime, tmp_path):
    (tmp_path / "precious").write_text("data")
    (runtime / "freezeframe").mkdir()
    kept(runtime).symlink_to(tmp_path / "precious")
    per_boot.remember("answer", "yes")
    assert (tmp_path / "precious").read_text() == "data"
    assert per_boot.recall("answer") == "yes"


@pytest.mark.parametrize("whose", ["folder", "file", "base"])
def test_what_belongs_to_another_user_is_not_used(runtime, monkeypatch, whose):
    if whose != "base":
        per_boot.remember("answer", "yes")
    target = {"base": runtime, "folder": runtime / "freezeframe", "file": kept(runtime)}[whose].stat()

    real = per_boot._ours
    monkeypatch.setattr(
        per_boot, "_ours", lambda found: (found.st_dev, found.st_ino) != (target.st_dev, target.st_ino) and real(found)
    )
    assert per_boot.recall("answer") is None
    if whose == "file":
        return
    per_boot.remember("answer", "no")
    if whose == "base":
        assert os.listdir(runtime) == [], "nothing is made in another user's directory"
    else:
        assert kept(runtime).read_text().endswith("\nyes\n")


def test_ownership_is_the_effective_users(tmp_path, monkeypatch):
    found = tmp_path.stat()
    assert per_boot._ours(found)
    monkeypatch.setattr(os, "geteuid", lambda: found.st_uid + 1)
    assert not per_boot._ours(found)


def test_a_folder_that_everybody_may_write_to_is_not_used(runtime):
    (runtime / "freezeframe").mkdir()
    (runtime / "freezeframe").chmod(0o1777)
    per_boot.remember("answer", "yes")
    assert os.listdir(runtime / "freezeframe") == []


def test_the_cache_directory_serves_where_there_is_no_runtime_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for runtime in (None, "relative/is/ignored", str(tmp_path / "none")):
        if runtime is None:
            monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        else:
            monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        per_boot.remember("answer", str(runtime))
        assert per_boot.recall("answer") == str(runtime)
    assert (tmp_path / ".cache" / "freezeframe" / "answer").is_file()
    assert not (tmp_path / "none").exists(), "nobody is logged in"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    per_boot.remember("answer", "there")
    assert (tmp_path / "mine" / "freezeframe" / "answer").is_file()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert per_boot.recall("answer") != "there"


def test_answers_that_are_no_line_or_too_long_are_not_kept(runtime):
    for answer in ("two\nlines", "x" * 5000):
        per_boot.remember("answer", answer)
        assert per_boot.recall("answer") is None
    per_boot.remember("answer", "yes", "a fact\nof two lines")
    assert per_boot.recall("answer", "a fact\nof two lines") is None


def test_readers_see_whole_files_only(runtime):
    answers = {"a" * 3000, "b"}
    per_boot.remember("answer", "b")
    done = threading.Event()

    def write():
        for _ in range(300):
            for answer in sorted(answers):
                per_boot.remember("answer", answer)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(per_boot.recall("answer"))
    writer.join()
    assert seen <= answers


class Probe:
    """Stands in for the trial of KVM; counts how often it was made."""

    def __init__(self, monkeypatch, answer):
        self.answer, self.times = answer, 0
        monkeypatch.setattr(_core, "kvm_probe", self)
        monkeypatch.setattr(engine, "KVM_DEVICE", os.devnull)
        monkeypatch.delenv(engine.VARIABLE, raising=False)
        monkeypatch.delenv(engine.TRIAL_VARIABLE, raising=False)
        self.new_process()

    def __call__(self):
        self.times += 1
        return self.answer

    def new_process(self):
        engine._tried.cache_clear()
        engine._known_or_tried.cache_clear()


@pytest.fixture(autouse=True)
def forget():
    yield
    engine._tried.cache_clear()
    engine._known_or_tried.cache_clear()


@pytest.mark.parametrize("fit", [False, True])
def test_kvm_is_tried_once_in_a_boot_of_the_host(runtime, monkeypatch, fit):
    probe = Probe(monkeypatch, (True, "it hums", fit, True))
    first = engine.choose("auto")
    assert first.reason == f"{os.devnull} was tried: it hums"
    assert engine.choose(None).reason == first.reason
    for _ in range(2):
        probe.new_process()
        later = engine.choose("auto")
        assert (later.name, later.ours, later.warning) == (first.name, first.ours, first.warning)
        assert later.reason == f"{os.devnull} was tried earlier in this boot of the host: it hums"
    assert probe.times == 1


def test_what_may_be_chance_is_not_remembered(runtime, monkeypatch):
    probe = Probe(monkeypatch, (False, "KVM_CREATE_VM fails: busy", False, False))
    assert engine.choose("auto").name == "software"
    probe.new_process()
    probe.answer = (True, "it hums", True, True)
    assert engine.choose("auto").name == "kvm"
    assert probe.times == 2


def test_another_device_is_tried_anew(runtime, monkeypatch):
    probe = Probe(monkeypatch, (True, "it hums", True, True))
    engine.choose("auto")
    probe.new_process()
    monkeypatch.setattr(engine, "KVM_DEVICE", "/dev/zero")
    engine.choose("auto")
    assert probe.times == 2


def test_who_asks_for_kvm_or_a_fresh_trial_gets_one_and_the_answer_replaces_the_old_one(runtime, monkeypatch):
    probe = Probe(monkeypatch, (True, "it hums", True, True))
    engine.choose("auto")
    probe.answer = (False, "it creaks", False, True)
    probe.new_process()
    assert engine.choose("kvm").reason == f"asked for by the engine option; {os.devnull} was tried: it creaks"
    probe.new_process()
    assert engine.choose("auto").name == "software"
    assert probe.times == 2
    monkeypatch.setenv(engine.TRIAL_VARIABLE, "fresh")
    probe.new_process()
    assert "earlier" not in engine.choose("auto").reason
    assert probe.times == 3
    monkeypatch.setenv(engine.TRIAL_VARIABLE, "perhaps")
    probe.new_process()
    with pytest.raises(Refused, match=engine.TRIAL_VARIABLE):
        engine.choose("auto")


@pytest.mark.parametrize("answer", ["", "1", "11", "01 it hums", "12 it hums", "11 ", "it hums"])
def test_a_remembered_trial_that_makes_no_sense_is_made_again(runtime, monkeypatch, answer):
    probe = Probe(monkeypatch, (False, "it creaks", False, True))
    per_boot.remember(engine.ANSWER, answer, *engine._identity())
    assert engine.choose("auto").reason == f"{os.devnull} was tried: it creaks"
    assert probe.times == 1


def test_the_tsc_rate_is_measured_once(runtime, monkeypatch):
    rates = iter((2_000_001, 2_000_002, 2_000_003))
    monkeypatch.setattr(tsc, "_kvm_khz", lambda: 0)
    monkeypatch.setattr(_core, "host_tsc_khz", lambda: next(rates))
    assert [tsc.host_khz(), tsc.host_khz()] == [2_000_001] * 2
    per_boot.remember(tsc.ANSWER, "fast")
    assert [tsc.host_khz(), tsc.host_khz()] == [2_000_002] * 2

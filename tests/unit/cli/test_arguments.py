"""Command lines: clap's messages and exit statuses, as the transcript of v53.0 shows them."""

from __future__ import annotations

import sys

import pytest

from freezeframe.cli import ch_remote, cloud_hypervisor
from freezeframe.cli.ch_remote import COMMANDS as REMOTE
from freezeframe.cli.cloud_hypervisor_options import COMMAND

pytestmark = pytest.mark.unit


def run(main, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    try:
        status = main()
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def remote(monkeypatch, capsys):
    return lambda *arguments: run(ch_remote.main, monkeypatch, capsys, *arguments)


@pytest.fixture
def vmm(monkeypatch, capsys):
    return lambda *arguments: run(cloud_hypervisor.main, monkeypatch, capsys, *arguments)


def test_missing_argument(remote):
    assert remote("--api-socket", "s.sock", "snapshot") == (
        2,
        "",
        (
            "error: the following required arguments were not provided:\n  <snapshot_config>\n\n"
            "Usage: ch-remote snapshot <snapshot_config>\n\nFor more information, try '--help'.\n"
        ),
    )


def test_unknown_subcommand(remote):
    assert remote("--api-socket", "s.sock", "bogus") == (
        2,
        "",
        (
            "error: unrecognized subcommand 'bogus'\n\nUsage: ch-remote [OPTIONS] <COMMAND>\n\n"
            "For more information, try '--help'.\n"
        ),
    )


def test_bad_restore_option(remote):
    assert remote("--api-socket", "s.sock", "restore", "foo=bar") == (
        1,
        "",
        (
            "Error: ch-remote exited with the following chain of errors:\n  0: Error parsing restore syntax\n"
            "  1: Error parsing --restore\n  2: unknown option: foo\n"
        ),
    )


def test_missing_socket(remote, tmp_path):
    status, out, err = remote("--api-socket", str(tmp_path / "no.sock"), "ping")
    assert (status, out) == (1, "")
    assert err.endswith(" ERROR ch_remote] Error opening HTTP socket: No such file or directory (os error 2)\n")


def test_usage(remote, vmm):
    assert remote()[0] == 2
    assert remote("--api-socket")[0] == 2
    assert remote("--api-socket", "x")[0] == 2
    assert remote("--api-socket", "x", "pause", "extra")[0] == 2
    assert remote("pause")[0] == 1
    assert remote("--help")[0] == 0
    assert remote("--version") == (0, "ch-remote v53.0 (freezeframe 0.1.0)\n", "")
    assert vmm()[0] == 2
    assert vmm("--help")[0] == 0
    assert vmm("--version")[1].startswith("cloud-hypervisor v53.0")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--bogus"], "error: unexpected argument '--bogus' found\n"),
        (["--disks", "x"], "  tip: a similar argument exists: '--disk'\n"),
        (["--kernel"], "error: a value is required for '--kernel <kernel>' but none was supplied\n"),
        (["--kernel", "a", "--kernel", "b"], "error: the argument '--kernel <kernel>' cannot be used multiple times\n"),
        (
            ["--engine", "x"],
            "error: invalid value 'x' for '--engine <engine>'\n  [possible values: auto, kvm, software]\n",
        ),
        (["--watchdog=1"], "error: unexpected value '1' for '--watchdog' found; no more were expected\n"),
        (["--kernel", "\udcff"], "error: invalid UTF-8 was detected in one or more arguments\n"),
        (["stray"], "error: unexpected argument 'stray' found\n"),
        (["--cpus", "boot=1"], "  <--firmware <firmware>|--kernel <kernel>>\n"),
        (["--restore", "source_url=x", "--cpus", "boot=1"], "cannot be used with '--restore <restore>'"),
    ],
)
def test_usage_errors_end_with_2(vmm, arguments, text):
    status, out, err = vmm(*arguments)
    assert (status, out) == (2, "")
    assert text in err
    assert err.endswith("For more information, try '--help'.\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--kernel", "k", "--restore", "source_url=file:///x"], "--restore and --kernel contradict each other"),
        (["--event-monitor", "path=x"], "there is nothing to run"),
        (
            ["--kernel", "k", "--disk", "path=a,bogus=1"],
            "  0: Error parsing config\n  1: Error parsing --disk\n  2: unknown option: bogus\n",
        ),
        (["--kernel", "k", "--disk", "path=a,direct=on"], "'disks[0].direct' is not supported"),
        (["--kernel", "k", "--net", "tap=x"], "--net is not supported by this VMM"),
        (["--kernel", "k", "--cpus", "boot=4,max=2"], "  2: Max CPUs (2) lower than boot CPUs (4)\n"),
        (["--firmware", "f"], "'payload.firmware' is not supported"),
        (["--kernel", "k", "--firmware", "f"], "Specifying a kernel is not supported when a firmware is provided"),
        (["--kernel", "k", "--log-format", "x"], "--log-format x is not supported"),
        (
            ["--restore", "file:///x"],
            "  0: Error parsing restore\n  1: Error parsing --restore\n  2: unknown option: file:///x\n",
        ),
        (
            ["--restore", "source_url=file:///nonexistent"],
            (
                "  0: Error restoring VM\n  1: The VM could not be restored\n  2: Cannot restore VM\n"
                '  3: Failed to send migratable component snapshot\n  4: Destination is not a directory: "/nonexistent"\n'
            ),
        ),
        (["--kernel", "/nonexistent"], "  0: Error booting VM\n  1: The VM could not boot\n"),
    ],
)
def test_what_cannot_start_ends_with_1(vmm, arguments, text):
    status, out, err = vmm(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith("Error: Cloud Hypervisor exited with the following ")
    assert text in err


def test_many_values_after_one_option():
    values = COMMAND.parse(["--disk", "path=a", "path=b", "--disk=path=c", "--kernel", "k", "-vv", "-v", "--rtc"])
    assert values == {"disk": ["path=a", "path=b", "path=c"], "kernel": "k", "v": 3, "rtc": ""}


def test_every_subcommand_of_ch_is_known():
    expected = (
        "add-device add-disk add-fs add-generic-vhost-user add-net add-pmem add-user-device add-vdpa add-vsock boot "
        "coredump counters create delete info nmi pause ping power-button reboot receive-migration remove-device "
        "resize resize-disk resize-zone restore resume send-migration shutdown shutdown-vmm snapshot"
    )
    assert sorted(REMOTE.commands) == expected.split()

"""The command line's option syntax: quotes, brackets, sizes, toggles, lists; CH's texts for what is wrong."""

from __future__ import annotations

import pytest

from freezeframe.errors import FreezeframeError, chain_messages
from freezeframe.options.restore import parse_restore, restore_request
from freezeframe.options.syntax import Options, byte_size, dequote, integer_list, pairs, split_commas, string_list
from freezeframe.options.vm import parse_console, parse_cpus, parse_disk, parse_memory, parse_platform, parse_vm

pytestmark = pytest.mark.unit


def texts(call, *arguments) -> list[str]:
    with pytest.raises(FreezeframeError) as caught:
        call(*arguments)
    return chain_messages(caught.value)


def test_commas_quotes_and_brackets():
    assert split_commas('a=1,b="x,y",c=[1,[2,3]]') == ["a=1", 'b="x,y"', "c=[1,[2,3]]"]
    assert dequote('"a""b"') == 'a"b'
    assert Options('path="a,b",x=foo=bar', ("path", "x")).text("path") == "a,b"
    assert Options("x=foo=bar", ("x",)).text("x") == "foo=bar"
    assert Options("x=1,x=2", ("x",)).text("x") == "2"
    assert Options("x=", ("x",)).text("x") is None
    assert not Options("  ", ("x",)).is_set("x")


@pytest.mark.parametrize("text", ["a=[", "a=]", 'a="', "a=[1]]", "a=[[1]"])
def test_unbalanced(text):
    assert texts(Options, text, ("a",)) == [f"invalid syntax: {text}"]


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("512M", 512 << 20), ("4G", 4 << 30), ("3K", 3072), (" 5 ", 5), ("+1K", 1024)]
)
def test_sizes(text, size):
    assert byte_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "5k", "5T", "M", "1.5G", "-1", "99999999999999999999", "20000000000G", "5M5", "\u0661"]
)
def test_no_sizes(text):
    with pytest.raises(ValueError):
        byte_size(text)


def test_lists():
    assert integer_list("[0,2-4]") == (0, 2, 3, 4)
    assert string_list("[a,b]") == ("a", "b")
    assert pairs('[a@1,b@[2,3],"c@d"@e]') == (("a", "1"), ("b", "[2,3]"), ("c@d", "e"))
    for bad in ("[4-2]", "[a]", "[1-2-3]", "[0-99999999999]"):
        with pytest.raises(ValueError):
            integer_list(bad)
    for bad in ("a@1", "[a]", "[a@b@c]"):
        with pytest.raises(ValueError):
            pairs(bad)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("foo=bar", ["Error parsing --restore", "unknown option: foo"]),
        ("file:///x/snap", ["Error parsing --restore", "unknown option: file:///x/snap"]),
        (
            "source_url=file:///x,memory_restore_mode=bogus",
            ["Error parsing --restore", "unable to convert bogus for memory_restore_mode"],
        ),
        ("source_url=file:///x,resume=maybe", ["Error parsing --restore", "unable to convert maybe for resume"]),
        ("source_url", ["Error parsing --restore", "invalid syntax: source_url"]),
        ("prefault=on", ["Error parsing --restore: source_url missing"]),
    ],
)
def test_refused_restores(text, expected):
    assert texts(parse_restore, text) == expected


def test_restores():
    config = parse_restore(
        'source_url=file:///a,resume=TRUE,memory_restore_mode=Copy,clock=freeze,disks=[_disk0@/x,"_disk1"@"/y,z"],disk_check=off'
    )
    assert (config.resume, config.eager, config.clock, config.disk_check) == (True, True, "Freeze", False)
    assert [(disk.id, disk.path) for disk in config.disks] == [("_disk0", "/x"), ("_disk1", "/y,z")]
    assert parse_restore("source_url=file:///a").memory_restore_mode is None
    # Cloud Hypervisor's own server gets nothing that it does not know.
    assert restore_request(parse_restore("source_url=file:///a,resume=on")) == {
        "source_url": "file:///a",
        "resume": True,
    }
    contradiction = parse_restore("source_url=file:///a,prefault=on,memory_restore_mode=ondemand")
    assert texts(contradiction.validate) == ["'prefault' cannot be combined with 'memory_restore_mode=ondemand'"]


def test_the_pages_command_line():
    config = parse_vm(
        {
            "cpus": "boot=4",
            "memory": "size=4G",
            "kernel": "bzImage",
            "cmdline": "root=/dev/vda1 console=hvc0 rw",
            "disk": ["path=focal-server-cloudimg-amd64.raw"],
        }
    )
    assert config.cpus.boot_vcpus == config.cpus.max_vcpus == 4
    assert config.memory.size == 4 << 30
    assert config.disks[0].path == "focal-server-cloudimg-amd64.raw"
    assert config.console.mode == "Tty"
    assert config.serial.mode == "Null"


@pytest.mark.parametrize(
    ("call", "text", "expected"),
    [
        (parse_cpus, "boot=-1", ["Error parsing --cpus", "unable to convert -1 for boot"]),
        (parse_cpus, "foo", ["Error parsing --cpus", "unknown option: foo"]),
        (parse_cpus, "features=[x]", ["Invalid feature in --cpus features list: x"]),
        (parse_cpus, "topology=1:2", ["Error parsing --cpus", "unable to convert 1:2 for topology"]),
        (parse_memory, "size=5X", ["Error parsing --memory", "unable to convert 5X for size"]),
        (parse_disk, "path=a,bogus=1", ["Error parsing --disk", "unknown option: bogus"]),
        (parse_disk, "path=a,readonly=2", ["Error parsing --disk", "unable to convert 2 for readonly"]),
        (parse_console, "bogus", ["Error parsing --console", "unknown option: bogus"]),
        (parse_console, "", ["Error parsing --console: invalid console mode given"]),
        (
            parse_console,
            "file=",
            ["Error validating configuration", "Path missing when using file console mode"],
        ),
    ],
)
def test_refused_options(call, text, expected):
    assert texts(call, text) == expected


def test_platform_and_disk_keys():
    platform = parse_platform("uuid=u,oem_strings=[a,b],num_pci_segments=2")
    assert (platform.system_uuid, platform.oem_strings, platform.num_pci_segments) == ("u", ("a", "b"), 2)
    disk = parse_disk(
        "path=a,readonly=on,id=d,serial=s,queue_size=256,image_type=raw,lock_granularity=full,_disable_aio=on"
    )
    assert (disk.readonly, disk.id, disk.serial, disk.queue_size) == (True, "d", "s", 256)
    assert (disk.image_type, disk.lock_granularity, disk.disable_aio) == ("Raw", "Full", True)


def test_devices_that_we_lack():
    assert texts(parse_vm, {"kernel": "k", "net": ["tap=x"]}) == ["--net is not supported by this VMM: leave it out"]

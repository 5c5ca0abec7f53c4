"""Disk images: what is refused, and who holds a lock."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from freezeframe.backends.disk import open_disk
from freezeframe.errors import Busy, IoFailed, NotFound, NotSupported, Refused, chain_messages

pytestmark = pytest.mark.unit


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    return str(path)


def test_not_a_disk(tmp_path) -> None:
    with pytest.raises(NotFound, match="does not exist"):
        open_disk(str(tmp_path / "none"), readonly=False)
    for readonly in (False, True):
        with pytest.raises(Refused, match="is a directory"):
            open_disk(str(tmp_path), readonly=readonly)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(Refused, match="neither a file nor a block device"):
        open_disk(str(tmp_path / "fifo"), readonly=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anything")
def test_a_disk_that_may_only_be_read(image) -> None:
    os.chmod(image, 0o400)
    with pytest.raises(IoFailed) as caught:
        open_disk(image, readonly=False)
    assert "readonly=on" in str(caught.value.hint)


def test_other_formats_are_named(tmp_path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"QFI\xfb" + bytes(4096))
    with pytest.raises(NotSupported, match="qcow2"):
        open_disk(str(path), readonly=False)
    open_disk(str(path), readonly=False, raw=True).close()


def test_many_readers_or_one_writer(image) -> None:
    readers = [open_disk(image, readonly=True) for _ in range(3)]
    with pytest.raises(Busy, match=f"another machine of this process .{os.getpid()}"):
        open_disk(image, readonly=False)
    for reader in readers:
        reader.close()
    writer = open_disk(image, readonly=False)
    for readonly in (False, True):
        with pytest.raises(Busy):
            open_disk(image, readonly=readonly)
    writer.close()
    open_disk(image, readonly=False, granularity="Full").close()


def test_the_holder_is_named_and_what_to_do(image, tmp_path) -> None:
    program = tmp_path / "some-vmm"
    program.write_text(
        "import sys\n"
        "from freezeframe.backends.disk import open_disk\n"
        f"disk = open_disk({image!r}, readonly=False)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, str(program), "--api-socket", "/run/first.sock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(Busy) as caught:
            open_disk(image, readonly=False)
        [message, *_] = chain_messages(caught.value)
        assert f"the disk {image} is in use by process {holder.pid} (some-vmm)" in message
        assert "ch-remote --api-socket=/run/first.sock shutdown-vmm" in message
        assert "disks=[" in message
        holder.communicate("")
    open_disk(image, readonly=False).close()


def test_the_lock_lives_as_long_as_a_duplicate(image) -> None:
    disk = open_disk(image, readonly=False)
    copy = os.dup(disk.fd)
    disk.close()
    with pytest.raises(Busy):
        open_disk(image, readonly=True)
    os.close(copy)
    open_disk(image, readonly=True).close()

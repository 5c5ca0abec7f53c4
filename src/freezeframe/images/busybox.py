"""A small Linux root disk: GPT, one ext4 partition, busybox. Made in seconds, without root."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from freezeframe.errors import Refused
from freezeframe.images.cache import Progress, cache_dir, locked, silent
from freezeframe.images.debian import package, run, unpack

_PARTITION_START = 1 << 20
_GPT_BACKUP = 1 << 20
MIN_SIZE = 16 << 20

# cttyhack: the shell gets the kernel's console as its controlling terminal, whatever it is called (hvc0, ttyS0).
_INITTAB = """\
::sysinit:/etc/init.d/rcS
::respawn:/bin/busybox cttyhack /bin/sh -l
::ctrlaltdel:/sbin/reboot
::shutdown:/bin/busybox sync
::shutdown:/bin/busybox umount -a -r
"""

_RCS = """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
[ -c /dev/null ] || mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
hostname freezeframe
[ -x /etc/rc.local ] && /etc/rc.local
echo "freezeframe guest is up: $(uname -sr), $(grep -c ^processor /proc/cpuinfo) CPUs"
"""

_POWER_BUTTON = """\
#!/bin/sh
exec /sbin/poweroff
"""

_FILES: dict[str, tuple[str, int]] = {
    "etc/inittab": (_INITTAB, 0o644),
    "etc/init.d/rcS": (_RCS, 0o755),
    "etc/acpi/PWRF/00000080": (_POWER_BUTTON, 0o755),
    "etc/passwd": ("root::0:0:root:/root:/bin/sh\n", 0o644),
    "etc/group": ("root:x:0:\n", 0o644),
    "etc/hostname": ("freezeframe\n", 0o644),
    "etc/profile": ("export PS1='guest:\\w# ' HOME=/root TERM=${TERM:-linux}\ncd /root\n", 0o644),
}
_DIRECTORIES = (
    "bin",
    "sbin",
    "etc",
    "dev",
    "proc",
    "sys",
    "tmp",
    "run",
    "root",
    "mnt",
    "usr/bin",
    "usr/sbin",
    "var/log",
)


def busybox(progress: Progress = silent) -> Path:
    """Debian's statically linked busybox, unpacked in the cache."""
    deb = package("busybox-static", progress)
    into = cache_dir("unpacked", deb.stem)
    with locked(into.with_suffix(".lock")):
        binary = into / "bin" / "busybox"
        if not binary.exists():
            binary = into / "usr" / "bin" / "busybox"
        if not binary.exists():
            progress("unpacking busybox")
            unpack(deb, into)
    for place in ("bin", "usr/bin"):
        if (into / place / "busybox").exists():
            return into / place / "busybox"
    raise Refused(f"{deb.name} has no busybox where it is expected")


def applets(binary: Path) -> list[str]:
    """Paths (``bin/ls``) of the commands that this busybox has."""
    import subprocess

    return subprocess.run([binary, "--list-full"], capture_output=True, text=True, check=True).stdout.split()


def build_busybox_disk(
    out: Path, *, size: int = 64 << 20, extra: dict[str, bytes] | None = None, progress: Progress = silent
) -> None:
    """Writes a raw disk of ``size`` bytes to ``out``: GPT, one ext4 partition (``/dev/vda1``) that boots to a shell.

    ``extra`` adds files (path without leading slash → contents, executable). ``out`` must not exist; nothing is left
    there on failure.
    """
    if size < MIN_SIZE:
        raise Refused(f"a busybox disk needs at least {MIN_SIZE >> 20} MiB, {size} bytes were asked for")
    if out.exists():
        raise Refused(f"{out} exists already: remove it or choose another name")
    binary = busybox(progress)
    with tempfile.TemporaryDirectory(prefix="freezeframe-root-") as scratch:
        root = Path(scratch, "root")
        _fill_root(root, binary, extra or {})
        disk = Path(scratch, "disk.raw")
        progress("writing the disk")
        _write_disk(disk, root, size)
        partial = out.with_name(f".{out.name}.{os.getpid()}")
        try:
            shutil.copyfile(disk, partial)  # copies holes as zeroes only where the file system cannot do better
            _punch(partial)
            partial.rename(out)
        finally:
            partial.unlink(missing_ok=True)


def _fill_root(root: Path, binary: Path, extra: dict[str, bytes]) -> None:
    for name in _DIRECTORIES:
        (root / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(binary, root / "bin" / "busybox")
    (root / "bin" / "busybox").chmod(0o755)
    for applet in applets(binary):
        link = root / applet
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to("/bin/busybox")
    for name, (text, mode) in _FILES.items():
        _put(root / name, text.encode(), mode)
    for name, data in extra.items():
        _put(root / name, data, 0o755)


def _put(path: Path, data: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        path.unlink()
    path.write_bytes(data)
    path.chmod(mode)


def _write_disk(disk: Path, root: Path, size: int) -> None:
    with disk.open("wb") as file:
        file.truncate(size)
    sectors = (size - _PARTITION_START - _GPT_BACKUP) // 512
    table = f"label: gpt\nstart={_PARTITION_START // 512}, size={sectors}, type=linux, name=root\n"
    run("sfdisk", "--quiet", str(disk), stdin=table)
    run(
        "mke2fs", "-q", "-F", "-t", "ext4", "-L", "root", "-b", "4096",
        "-O", "^has_journal" if size < (32 << 20) else "has_journal",
        "-E", f"offset={_PARTITION_START},root_owner=0:0,lazy_itable_init=0", "-d", str(root), str(disk),
        f"{sectors // 2}k",
    )  # fmt: skip


def _punch(path: Path) -> None:
    """Gives back the blocks of zeroes that a plain copy may have allocated."""
    fallocate = shutil.which("fallocate")
    if fallocate:
        import subprocess

        subprocess.run([fallocate, "--dig-holes", str(path)], check=False, capture_output=True)

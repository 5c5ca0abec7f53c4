"""Debian's stock cloud kernel, with an initramfs of ours that finds the root disk.

The stock kernel has virtio as modules, so it cannot mount a virtio disk by itself.
"""

from __future__ import annotations

import lzma
import os
from dataclasses import dataclass
from pathlib import Path

from freezeframe.errors import NotFound
from freezeframe.images import cpio
from freezeframe.images.busybox import busybox
from freezeframe.images.cache import Progress, cache_dir, locked, silent
from freezeframe.images.debian import dependency, package, unpack

_METAPACKAGE = "linux-image-cloud-amd64"
_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "virtio-rng", "ext4")

# Bump when the initramfs changes: it is part of the cached file's name.
_INITRAMFS_VERSION = 3

_INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
for module in $(/bin/busybox cat /modules/order); do
    /bin/busybox insmod /modules/$module || echo "initramfs: cannot load $module"
done
# hvc0 appears only with its module, after the kernel has tried to open /dev/console for us.
exec </dev/console >/dev/console 2>&1
root= flags=-r type=ext4 init=/sbin/init
for word in $(/bin/busybox cat /proc/cmdline); do
    case $word in
        root=*) root=${word#root=} ;;
        rootfstype=*) type=${word#rootfstype=} ;;
        init=*) init=${word#init=} ;;
        rw) flags=-w ;;
        ro) flags=-r ;;
    esac
done
if [ -z "$root" ]; then
    echo "initramfs: no root= on the kernel command line; here is a shell"
    exec /bin/busybox cttyhack /bin/busybox sh
fi
tries=0
while :; do
    device=$root
    case $root in LABEL=*|UUID=*|PARTUUID=*) device=$(/bin/busybox findfs "$root" 2>/dev/null) ;; esac
    [ -b "$device" ] && break
    tries=$((tries + 1))
    if [ $tries -gt 100 ]; then
        echo "initramfs: root device $root did not appear; block devices:"
        /bin/busybox cat /proc/partitions
        exec /bin/busybox cttyhack /bin/busybox sh
    fi
    /bin/busybox usleep 50000
done
if ! /bin/busybox mount $flags -t $type "$device" /root; then
    echo "initramfs: cannot mount $device; here is a shell"
    exec /bin/busybox cttyhack /bin/busybox sh
fi
/bin/busybox mount -o move /dev /root/dev
/bin/busybox umount /proc /sys
exec /bin/busybox switch_root /root "$init"
"""


@dataclass(frozen=True, slots=True)
class CloudKernel:
    """A kernel and its initramfs, as files in the cache."""

    version: str
    kernel: Path
    initramfs: Path


def cloud_kernel(progress: Progress = silent) -> CloudKernel:
    """Debian's newest cloud kernel for this machine's release: downloaded, unpacked and given an initramfs once."""
    name = dependency(_METAPACKAGE, "linux-image-", progress)
    deb = package(name, progress)
    tree = cache_dir("unpacked", deb.stem)
    version = name.removeprefix("linux-image-")
    kernel = tree / "boot" / f"vmlinuz-{version}"
    initramfs = cache_dir("initramfs") / f"{deb.stem}-{_INITRAMFS_VERSION}.cpio"
    with locked(tree.with_suffix(".lock")):
        if not kernel.exists():
            progress(f"unpacking {name}")
            unpack(deb, tree)
        if not initramfs.exists():
            progress("making the initramfs")
            data = _initramfs(tree, version, busybox(progress))
            partial = initramfs.with_suffix(f".{os.getpid()}")
            partial.write_bytes(data)
            partial.rename(initramfs)
    return CloudKernel(version, kernel, initramfs)


def _initramfs(tree: Path, version: str, busybox_path: Path) -> bytes:
    modules = _load_order(_modules_dir(tree, version))
    entries = {name: cpio.directory() for name in ("bin", "dev", "proc", "sys", "root", "modules")}
    entries["dev/console"] = cpio.char_device(5, 1)
    entries["bin/busybox"] = cpio.file(busybox_path.read_bytes(), 0o755)
    entries["bin/sh"] = cpio.symlink("busybox")
    entries["init"] = cpio.file(_INIT.encode(), 0o755)
    entries["modules/order"] = cpio.file("".join(f"{name}.ko\n" for name in modules).encode())
    for name, data in modules.items():
        entries[f"modules/{name}.ko"] = cpio.file(data)
    return cpio.archive(entries)


def _modules_dir(tree: Path, version: str) -> Path:
    for place in ("lib/modules", "usr/lib/modules"):
        if (tree / place / version).is_dir():
            return tree / place / version
    raise NotFound(f"the kernel package {version} holds no modules")


def _load_order(directory: Path) -> dict[str, bytes]:
    """Modules to load, dependencies first: name → contents. What the kernel has built in is left out."""
    builtin = {_canonical(Path(line).name) for line in (directory / "modules.builtin").read_text().split()}
    files = {_canonical(path.name): path for path in directory.rglob("*.ko*")}
    order: dict[str, bytes] = {}

    def add(name: str) -> None:
        key = _canonical(name)
        if key in builtin or key in order:
            return
        if key not in files:
            raise NotFound(f"the kernel package has no module {name}")
        path = files[key]
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        for needed in _depends(data):
            add(needed)
        order[key] = data

    for name in _MODULES:
        add(name)
    return order


def _canonical(name: str) -> str:
    return name.split(".ko", maxsplit=1)[0].replace("-", "_")


def _depends(module: bytes) -> list[str]:
    """The module's own list of what it needs (its ``.modinfo`` section: NUL-terminated ``key=value``)."""
    start = module.find(b"\0depends=")
    if start < 0:
        return []
    value = module[start + len(b"\0depends=") :].split(b"\0", 1)[0].decode("ascii", "replace")
    return [name for name in value.split(",") if name]

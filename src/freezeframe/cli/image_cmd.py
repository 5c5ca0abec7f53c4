"""`freezeframe image` and `freezeframe kernel`: guests to try and test with."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from freezeframe.errors import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

_UNITS = {"K": 10, "M": 20, "G": 30}


def add_image(parser: argparse.ArgumentParser) -> None:
    parser.description = "Makes guest disks from Debian packages, without root, in seconds."
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    busybox = kinds.add_parser(
        "busybox", help="a small Linux root disk: GPT, ext4 on /dev/vda1, busybox, a shell on the console"
    )
    busybox.add_argument("out", metavar="OUT", type=Path, help="the raw disk file to make; it must not exist")
    busybox.add_argument("--size", default="64M", help="size of the disk, with suffix K, M or G (default: %(default)s)")
    parser.set_defaults(run=run_image)


def add_kernel(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Provides Debian's stock cloud kernel with an initramfs that finds the root disk; prints where they are."
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of lines")
    parser.set_defaults(run=run_kernel)


def run_image(args: argparse.Namespace) -> int:
    from freezeframe.images import build_busybox_disk

    out = Path(args.out)
    if not out.parent.is_dir():
        raise Refused(f"{out.parent} is not a directory")
    build_busybox_disk(out, size=_size(args.size), progress=_progress)
    print(out)
    return 0


def run_kernel(args: argparse.Namespace) -> int:
    from freezeframe.images import cloud_kernel

    found = cloud_kernel(_progress)
    if args.json:
        print(json.dumps({"version": found.version, "kernel": str(found.kernel), "initramfs": str(found.initramfs)}))
    else:
        print(f"kernel={found.kernel}\ninitramfs={found.initramfs}")
    return 0


def _size(text: str) -> int:
    """Bytes of `64M` and the like."""
    digits, unit = (text[:-1], text[-1:]) if text[-1:] in _UNITS else (text, "")
    if not digits.isascii() or not digits.isdigit():
        raise Refused(f"not a size: {text!r} (a whole number with an optional suffix K, M or G)")
    return int(digits) << _UNITS.get(unit, 0)


def _progress(line: str) -> None:
    """Talk goes to stderr: one line that is overwritten on a terminal, lines elsewhere."""
    if os.isatty(2):
        sys.stderr.write(f"\r\033[K{line}… ")
    else:
        sys.stderr.write(f"{line}\n")
    sys.stderr.flush()

"""The parts of guest images that need no network."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from freezeframe.cli.image_cmd import _size
from freezeframe.errors import Refused
from freezeframe.images import cpio
from freezeframe.images.kernel import _depends

pytestmark = pytest.mark.unit


def test_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    if shutil.which("cpio") is None:
        pytest.skip("cpio is not installed")
    data = cpio.archive({
        "etc": cpio.directory(),
        "etc/name": cpio.file(b"one\n", 0o640),
        "odd": cpio.file(b"abc", 0o755),
        "link": cpio.symlink("etc/name"),
    })  # fmt: skip
    subprocess.run(["cpio", "-id", "--quiet"], input=data, cwd=tmp_path, check=True)
    assert (tmp_path / "etc" / "name").read_bytes() == b"one\n"
    assert (tmp_path / "odd").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "link").readlink() == Path("etc/name")


def test_archive_is_deterministic_and_aligned() -> None:
    entries = {"a": cpio.file(b"x" * 5)}
    assert cpio.archive(entries) == cpio.archive(dict(entries))
    assert len(cpio.archive(entries)) % 512 == 0


def test_module_dependencies_are_read_from_modinfo() -> None:
    assert _depends(b"junk\0license=GPL\0depends=virtio,virtio_ring\0name=x\0") == ["virtio", "virtio_ring"]
    assert _depends(b"junk\0depends=\0") == []
    assert _depends(b"no modinfo") == []


@pytest.mark.parametrize(("text", "size"), [("64M", 64 << 20), ("1G", 1 << 30), ("4096", 4096), ("3K", 3072)])
def test_sizes(text: str, size: int) -> None:
    assert _size(text) == size


@pytest.mark.parametrize("text", ["", "M", "64m", "-1M", "1.5G", "1T", "٣M"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(Refused):
        _size(text)

"""Guest images: kernels and disks made from Debian packages, without root, cached.

An *image* is a kernel and a root disk; it is never called a snapshot.
"""

from __future__ import annotations

from freezeframe.images.busybox import build_busybox_disk
from freezeframe.images.kernel import CloudKernel, cloud_kernel

__all__ = ["CloudKernel", "build_busybox_disk", "cloud_kernel"]

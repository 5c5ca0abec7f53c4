"""PCI: configuration space, the one bus, and virtio functions on it (PCI Local Bus 3.0)."""

from __future__ import annotations

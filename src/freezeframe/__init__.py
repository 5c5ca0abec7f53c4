"""freezeframe: a virtual machine monitor whose point is snapshot and restore."""

from __future__ import annotations

__version__ = "0.1.0"

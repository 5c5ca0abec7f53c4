"""Host ends of devices: disk images, consoles, entropy. Nothing here knows a register."""

from __future__ import annotations

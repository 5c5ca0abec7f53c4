"""Everything that a guest finds in its memory before its first instruction: kernel, boot parameters, ACPI tables."""

from __future__ import annotations

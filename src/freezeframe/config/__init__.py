"""What was asked for: frozen records with Cloud Hypervisor's names, defaults and JSON.

`VmConfig` is the root; `validate` refuses what contradicts itself (CH's rules and texts) and `refuse_unsupported` what
this VMM cannot do. The command line's syntax is in `freezeframe.options`.
"""

from __future__ import annotations

from freezeframe.config.restore import AnyBody, ResizeData, RestoreConfig, RestoredDisk, SnapshotConfig
from freezeframe.config.validate import refuse_unsupported, validate
from freezeframe.config.vm import (
    ConsoleConfig,
    CpusConfig,
    CpuTopology,
    DebugConsoleConfig,
    DiskConfig,
    MemoryConfig,
    PayloadConfig,
    RngConfig,
    SerialConfig,
    VmConfig,
)

__all__ = [
    "AnyBody",
    "ConsoleConfig",
    "CpuTopology",
    "CpusConfig",
    "DebugConsoleConfig",
    "DiskConfig",
    "MemoryConfig",
    "PayloadConfig",
    "ResizeData",
    "RestoreConfig",
    "RestoredDisk",
    "RngConfig",
    "SerialConfig",
    "SnapshotConfig",
    "VmConfig",
    "refuse_unsupported",
    "validate",
]

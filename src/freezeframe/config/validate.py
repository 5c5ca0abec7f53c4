"""What a configuration may not be: Cloud Hypervisor's rules in its order and words, then what we do not support."""

from __future__ import annotations

from freezeframe.config.record import Record
from freezeframe.errors import NotSupported, Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from freezeframe.config.vm import CpuTopology, DiskConfig, VmConfig

MAX_CPUS = 8192
VCPUS_MAX = 254  # xAPIC ids that are no broadcast, and one for the I/O APIC
MAX_SERIAL = 20  # VIRTIO_BLK_ID_BYTES, virtio 1.2 section 5.2.6
MIN_BLOCK_QUEUE = 2
PAGE = 4096
PCI_SLOTS = 32
SPECIAL_CIDS = (0, 1, 2, 0xFFFF_FFFF)


class ConfigRefused(Refused):
    """CH's `ValidationError`: the configuration contradicts itself."""


def validate(config: VmConfig) -> None:
    """`ConfigRefused` with CH's text for the first rule that is broken (config.rs, `VmConfig::validate`)."""
    payload = config.payload
    if payload is None or (payload.firmware is None and payload.kernel is None):
        raise ConfigRefused("Payload configuration is not bootable") from ConfigRefused(
            "No bootitem provided: neither firmware nor kernel"
        )
    if payload.firmware is not None and payload.kernel is not None:
        raise ConfigRefused("Payload configuration is not bootable") from ConfigRefused(
            "Specifying a kernel is not supported when a firmware is provided"
        )
    for console in (config.console, config.serial):
        if console.mode == "File" and console.file is None:
            raise ConfigRefused("Path missing when using file console mode")
    cpus = config.cpus
    if cpus.max_vcpus < cpus.boot_vcpus:
        raise ConfigRefused(f"Max CPUs ({cpus.max_vcpus}) lower than boot CPUs ({cpus.boot_vcpus})")
    if cpus.max_vcpus > MAX_CPUS:
        raise ConfigRefused(f"Too many CPUs: specified {cpus.max_vcpus} but {MAX_CPUS} is the limit")
    # Ours: CH finds it only while it builds the machine. Here, because other rules count on it.
    if not 1 <= cpus.boot_vcpus <= VCPUS_MAX:
        raise ConfigRefused(f"A machine has 1 to {VCPUS_MAX} vCPUs: cpus.boot_vcpus is {cpus.boot_vcpus}")
    ids: set[str] = set()
    for disk in config.disks or ():
        _validate_disk(disk, config)
        _claim(ids, disk.id)
    for net in config.net or ():
        _claim(ids, net.id)
    _pci(config.rng.pci_segment, config.rng.pci_device_id, config)
    _claim(ids, config.rng.id)
    _pci(config.console.pci_segment, config.console.pci_device_id, config)
    _claim(ids, config.console.id)
    if cpus.topology is not None:
        _validate_topology(cpus.topology, cpus.max_vcpus)
    memory = config.memory
    if memory.hugepage_size is not None:
        if not memory.hugepages:
            raise ConfigRefused("Huge page size specified but huge pages not enabled")
        if memory.hugepage_size == 0 or memory.hugepage_size & (memory.hugepage_size - 1):
            raise ConfigRefused(f"Huge page size is not power of 2: {memory.hugepage_size}")
    if (memory.shared and memory.mergeable) or any(zone.shared and zone.mergeable for zone in memory.zones or ()):
        raise ConfigRefused("Invalid to set both 'mergeable' and 'shared' for memory")
    if config.vsock is not None and config.vsock.cid in SPECIAL_CIDS:
        raise ConfigRefused(f"{config.vsock.cid} is a special VSOCK CID")
    if config.balloon is not None and config.balloon.size >= config.memory_actual_size:
        raise ConfigRefused(f"Balloon size ({config.balloon.size}) greater than RAM ({config.memory_actual_size})")
    platform = config.platform
    if platform is not None and not 1 <= platform.num_pci_segments <= 96:
        raise ConfigRefused(f"Number of PCI segments ({platform.num_pci_segments}) not in range of 1 to 96")
    # From here on ours: CH finds these only while it builds the machine.
    if memory.size == 0 or memory.size % PAGE:
        raise ConfigRefused(f"Memory size must be a multiple of {PAGE} above 0: {memory.size}")
    devices = config.test_devices or ()
    if len(set(devices)) != len(devices):
        raise ConfigRefused("A test device is there twice")
    for disk in config.disks or ():
        if disk.path is None and not disk.vhost_user:
            raise ConfigRefused(f"Disk {disk.id or ''} has no path".replace("  ", " "))


def _claim(ids: set[str], name: str | None) -> None:
    if name is None:
        return
    if name.startswith("__"):
        raise ConfigRefused(f"Identifier {name} is not invalid")  # CH's own words
    if name in ids:
        raise ConfigRefused(f"Identifier {name} is not unique")
    ids.add(name)


def _pci(segment: int, slot: int | None, config: VmConfig) -> None:
    segments = 1 if config.platform is None else config.platform.num_pci_segments
    if segment >= segments:
        raise ConfigRefused(f"Invalid PCI segment id: {segment}")
    if slot is not None and slot >= PCI_SLOTS:
        raise ConfigRefused(f"Given PCI device ID ({slot}) is out of the supported range of 0..{PCI_SLOTS}")
    if slot == 0:
        raise ConfigRefused(f"Given PCI device ID ({slot}) is reserved")


def _validate_disk(disk: DiskConfig, config: VmConfig) -> None:
    if disk.vhost_socket is not None and disk.path is not None:
        raise ConfigRefused("Disk path and vhost socket both provided")
    if disk.vhost_user and not (config.memory.shared or config.memory.hugepages):
        raise ConfigRefused("Using vhost-user requires using shared memory or huge pages")
    if disk.vhost_user and disk.vhost_socket is None:
        raise ConfigRefused("No socket provided when using vhost-user")
    groups = {group.id for group in config.rate_limit_groups or ()}
    if disk.rate_limit_group is not None and disk.rate_limit_group not in groups:
        raise ConfigRefused("Invalid rate-limiter group")
    _pci(disk.pci_segment, disk.pci_device_id, config)
    if disk.num_queues > config.cpus.boot_vcpus:
        raise ConfigRefused(f"Queue count ({disk.num_queues}) must not exceed boot vCPUs ({config.cpus.boot_vcpus})")
    size = disk.queue_size
    if size == 0 or size & (size - 1):
        raise ConfigRefused(f"Queue size must be a power of 2 no greater than 32768: {size}")
    if size <= MIN_BLOCK_QUEUE:
        raise ConfigRefused(f"Block queue size must be greater than {MIN_BLOCK_QUEUE}: {size}")
    if disk.serial is not None and len(disk.serial.encode()) > MAX_SERIAL:
        length = len(disk.serial.encode())
        raise ConfigRefused(f"Block device serial length ({length}) exceeds maximum allowed length ({MAX_SERIAL})")


def _validate_topology(topology: CpuTopology, max_vcpus: int) -> None:
    parts = (topology.threads_per_core, topology.cores_per_die, topology.dies_per_package, topology.packages)
    threads, cores, dies, packages = parts
    if 0 in parts:
        raise ConfigRefused("No part of the CPU topology can be zero")
    if threads > 2:
        raise ConfigRefused("CPU topology supports at most 2 threads per core")
    if threads * cores * dies * packages != max_vcpus:
        raise ConfigRefused("Product of CPU topology parts does not match maximum vCPU")


# What is supported at no value but these: a value or a test, by record and field. Fields that are not here work.
_ONLY: dict[str, dict[str, object | Callable[[object], bool]]] = {
    "CpusConfig": {
        "topology": None,
        "kvm_hyperv": False,
        "max_phys_bits": 46,
        "affinity": None,
        "core_scheduling": "Vm",
    },
    "CpuFeatures": {"amx": False},
    "MemoryConfig": {
        "mergeable": False,
        "hotplug_method": "Acpi",
        "hotplug_size": lambda size: not size,
        "hotplugged_size": lambda size: not size,
        "shared": False,
        "hugepages": False,
        "hugepage_size": None,
        "prefault": False,
        "reserve": False,
        "zones": lambda zones: not zones,
        "thp": True,
    },
    "DiskConfig": {
        "iommu": False,
        "pci_segment": 0,
        "pci_device_id": None,
        "direct": False,
        "vhost_user": False,
        "vhost_socket": None,
        "rate_limit_group": None,
        "rate_limiter_config": None,
        "queue_affinity": None,
        "backing_files": False,
        "image_type": lambda kind: kind in ("Raw", "Unknown"),
    },
    "RngConfig": {"iommu": False, "pci_segment": 0, "pci_device_id": None, "id": None},
    "SerialConfig": {"mode": lambda mode: mode != "Socket", "socket": None},
    "ConsoleConfig": {
        "mode": lambda mode: mode != "Socket",
        "socket": None,
        "iommu": False,
        "pci_segment": 0,
        "pci_device_id": None,
        "id": None,
    },
    "DebugConsoleConfig": {"mode": "Off"},
    "PayloadConfig": {"firmware": None, "igvm": None, "host_data": None},
    "PlatformConfig": {
        "num_pci_segments": 1,
        "iommu_segments": None,
        "iommu_address_width_bits": 64,
        "system_serial_number": None,
        "system_uuid": None,
        "oem_strings": None,
        "system_manufacturer": None,
        "system_product_name": None,
        "system_version": None,
        "system_family": None,
        "system_sku_number": None,
        "chassis_asset_tag": None,
        "iommufd": False,
        "iommufd_fd": None,
        "vfio_p2p_dma": True,
    },
    "VmConfig": {
        "balloon": None,
        "vsock": None,
        "pvpanic": False,
        "iommu": False,
        "watchdog": False,
        "rtc": None,
        "tpm": None,
        "landlock_enable": False,
        **dict.fromkeys(
            (
                "rate_limit_groups",
                "net",
                "generic_vhost_user",
                "fs",
                "pmem",
                "devices",
                "user_devices",
                "vdpa",
                "numa",
                "pci_segments",
                "landlock_rules",
            ),
            lambda items: not items,  # pyright: ignore[reportUnknownLambdaType]
        ),
    },
}


def refuse_unsupported(config: VmConfig) -> None:
    """`NotSupported` naming the first field with a value that this VMM does not implement."""
    if config.cpus.max_vcpus != config.cpus.boot_vcpus:
        raise NotSupported("'cpus.max_vcpus' above 'cpus.boot_vcpus' is not supported: CPUs cannot be added later yet")
    _refuse(config, "")


def _refuse(record: Record, path: str) -> None:
    only = _ONLY.get(type(record).__name__, {})
    for name in record.fields:
        value = getattr(record, name)
        where = f"{path}{name}"
        allowed = only.get(name, value)
        if not (allowed(value) if callable(allowed) else value == allowed):
            raise NotSupported(f"'{where}' is not supported" + _because(value, allowed))
        if isinstance(value, Record):
            _refuse(value, f"{where}.")
        elif isinstance(value, tuple):
            for index, item in enumerate(value):  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
                if isinstance(item, Record):
                    _refuse(item, f"{where}[{index}].")


def _because(value: object, allowed: object) -> str:
    if isinstance(value, Record | tuple):
        return ": leave it out"
    text = {True: "true", False: "false"}.get(value, value) if isinstance(value, bool) else value
    if callable(allowed):
        return f" at {text}"
    if allowed is None:
        return f" at {text}: leave it out"
    default = {True: "true", False: "false"}[allowed] if isinstance(allowed, bool) else allowed
    return f" at {text}, only at {default}"

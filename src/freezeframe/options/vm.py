"""`--cpus`, `--memory`, `--disk` and the rest as a `VmConfig`; keys, defaults and texts are CH's (vmm/src/config.rs).

All keys of CH are known. What we cannot do is refused by `config.refuse_unsupported` when it is not at its default;
options of whole devices that we lack are refused here, by name.
"""

from __future__ import annotations

from freezeframe.config.vm import (
    DEFAULT_MAX_PHYS_BITS,
    DEFAULT_MEMORY,
    DEFAULT_RNG_SOURCE,
    ConsoleConfig,
    CpuAffinity,
    CpuFeatures,
    CpusConfig,
    CpuTopology,
    DebugConsoleConfig,
    DiskConfig,
    MemoryConfig,
    MemoryZoneConfig,
    PayloadConfig,
    PlatformConfig,
    RateLimiterConfig,
    RngConfig,
    SerialConfig,
    TokenBucketConfig,
    VirtQueueAffinity,
    VmConfig,
)
from freezeframe.errors import NotSupported, Refused
from freezeframe.options.syntax import OptionError, Options, integer, integer_list, pairs, string_list, variant

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

_PCI = ("id", "iommu", "pci_segment", "pci_device_id")
_RATE = ("bw_size", "bw_one_time_burst", "bw_refill_time", "ops_size", "ops_one_time_burst", "ops_refill_time")
_CONSOLE_MODES = ("off", "pty", "tty", "null")
_IMAGE_TYPES = {"vhd": "FixedVhd", "qcow2": "Qcow2", "raw": "Raw", "vhdx": "Vhdx"}

# Options of devices that this VMM does not have.
UNSUPPORTED_DEVICES = (
    "balloon",
    "device",
    "fs",
    "generic-vhost-user",
    "landlock-rules",
    "net",
    "numa",
    "pci-segment",
    "pmem",
    "rate-limit-group",
    "rtc",
    "tpm",
    "user-device",
    "vdpa",
    "vsock",
)


def parse_vm(values: Mapping[str, Any]) -> VmConfig:
    """The machine that the options ask for, by option name (`{"cpus": "boot=4", "disk": ["path=a"], …}`).

    `Refused` or `NotSupported` with CH's texts; the result is not validated yet.
    """
    for name in UNSUPPORTED_DEVICES:
        if values.get(name) is not None:
            raise NotSupported(f"--{name} is not supported by this VMM: leave it out")
    payload = PayloadConfig(
        firmware=values.get("firmware"),
        kernel=values.get("kernel"),
        cmdline=values.get("cmdline"),
        initramfs=values.get("initramfs"),
    )
    disks = tuple(parse_disk(text) for text in values.get("disk") or ())
    platform = values.get("platform")
    return VmConfig(
        cpus=parse_cpus(values.get("cpus") or ""),
        memory=parse_memory(values.get("memory") or "", values.get("memory-zone") or ()),
        payload=payload,
        disks=disks or None,
        rng=parse_rng(values.get("rng") or ""),
        serial=parse_serial(values.get("serial") or "null"),
        console=parse_console(values.get("console") or "tty"),
        debug_console=parse_debug_console(values.get("debug-console") or "off,iobase=0xe9"),
        pvpanic=bool(values.get("pvpanic")),
        watchdog=bool(values.get("watchdog")),
        platform=None if platform is None else parse_platform(platform),
        landlock_enable=bool(values.get("landlock")),
    )


class _Parsing:
    """Puts CH's `Error parsing --name` above whatever its option string does wrong."""

    def __init__(self, option: str) -> None:
        self.option = option

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OptionError):
            raise Refused(f"Error parsing --{self.option}") from error


def parse_cpus(text: str) -> CpusConfig:
    with _Parsing("cpus"):
        keys = ("boot", "max", "topology", "kvm_hyperv", "max_phys_bits", "affinity", "features", "nested")
        options = Options(text, (*keys, "core_scheduling", "profile"))
        boot = options.integer("boot", 32, 1)
        features = options.maybe("features", string_list) or ()
        for feature in features:
            if feature != "amx":
                raise Refused(f"Invalid feature in --cpus features list: {feature}")
        affinity = options.maybe(
            "affinity",
            lambda value: tuple(
                CpuAffinity(vcpu=integer(vcpu, 32), host_cpus=integer_list(cpus)) for vcpu, cpus in pairs(value)
            ),
        )
        return CpusConfig(
            boot_vcpus=boot,
            max_vcpus=options.integer("max", 32, boot),
            topology=options.maybe("topology", _topology),
            kvm_hyperv=options.toggle("kvm_hyperv", default=False),
            max_phys_bits=options.integer("max_phys_bits", 8, DEFAULT_MAX_PHYS_BITS),
            affinity=affinity,
            features=CpuFeatures(amx="amx" in features),
            nested=options.toggle("nested", default=True),
            core_scheduling=options.convert("core_scheduling", variant("vm", "vcpu", "off"), "Vm"),
            profile=options.convert("profile", variant("host", "portable"), "Portable"),
        )


def _topology(text: str) -> CpuTopology | None:
    threads, cores, dies, packages = (integer(part, 16) for part in text.split(":"))
    return CpuTopology(threads_per_core=threads, cores_per_die=cores, dies_per_package=dies, packages=packages)


_MEMORY_COMMON = ("size", "file", "mergeable", "hotplug_size", "hotplugged_size", "shared", "hugepages")
_MEMORY_KEYS = (*_MEMORY_COMMON, "hugepage_size", "prefault", "reserve")


def parse_memory(text: str, zones: Sequence[str] = ()) -> MemoryConfig:
    with _Parsing("memory"):
        options = Options(text, (*_MEMORY_KEYS, "hotplug_method", "thp"))
        if options.is_set("file"):
            # CH takes this key and then forgets it.
            raise NotSupported("--memory file= is not supported: leave it out")
        mergeable = options.toggle("mergeable", default=False)
        config = MemoryConfig(
            size=options.size("size") or (0 if options.text("size") else DEFAULT_MEMORY),
            mergeable=mergeable,
            hotplug_method=options.convert("hotplug_method", variant("acpi", "virtio-mem"), "Acpi"),
            hotplug_size=options.size("hotplug_size"),
            hotplugged_size=options.size("hotplugged_size"),
            shared=options.toggle("shared", default=False),
            hugepages=options.toggle("hugepages", default=False),
            hugepage_size=options.size("hugepage_size"),
            prefault=options.toggle("prefault", default=False),
            reserve=options.toggle("reserve", default=False),
            thp=options.toggle("thp", default=True),
        )
    with _Parsing("memory-zone"):
        return config.replace(zones=tuple(_zone(zone, mergeable) for zone in zones) or None)


def _zone(text: str, mergeable: bool) -> MemoryZoneConfig:
    options = Options(text, (*_MEMORY_KEYS, "id", "host_numa_node"))
    name = options.text("id")
    if name is None:
        raise Refused("Error parsing --memory-zone: id missing")
    size = options.size("size")
    return MemoryZoneConfig(
        id=name,
        size=DEFAULT_MEMORY if size is None else size,
        file=options.text("file"),
        shared=options.toggle("shared", default=False),
        hugepages=options.toggle("hugepages", default=False),
        hugepage_size=options.size("hugepage_size"),
        host_numa_node=options.maybe("host_numa_node", lambda value: integer(value, 32)),
        hotplug_size=options.size("hotplug_size"),
        hotplugged_size=options.size("hotplugged_size"),
        prefault=options.toggle("prefault", default=False),
        reserve=options.toggle("reserve", default=False),
        mergeable=options.toggle("mergeable", default=mergeable),
    )


def _pci(text: str) -> dict[str, Any]:
    try:
        options = Options(text, _PCI, subset=True)
        return {
            "id": options.text("id"),
            "iommu": options.toggle("iommu", default=False),
            "pci_segment": options.integer("pci_segment", 16, 0),
            "pci_device_id": options.maybe("pci_device_id", lambda value: integer(value, 8)),
        }
    except OptionError as error:
        raise Refused("Error parsing common PCI device config") from error


def parse_disk(text: str) -> DiskConfig:
    with _Parsing("disk"):
        keys = ("path", "readonly", "direct", "queue_size", "num_queues", "vhost_user", "socket", "serial", "sparse")
        more = ("_disable_io_uring", "_disable_aio", "rate_limit_group", "queue_affinity", "backing_files")
        options = Options(text, (*keys, *more, "image_type", "lock_granularity", *_RATE, *_PCI))
        affinity = options.maybe(
            "queue_affinity",
            lambda value: tuple(
                VirtQueueAffinity(queue_index=integer(queue, 16), host_cpus=integer_list(cpus))
                for queue, cpus in pairs(value)
            ),
        )
        return DiskConfig(
            path=options.text("path"),
            readonly=options.toggle("readonly", default=False),
            direct=options.toggle("direct", default=False),
            num_queues=options.integer("num_queues", 64, 1),
            queue_size=options.integer("queue_size", 16, 128),
            vhost_user=options.toggle("vhost_user", default=False),
            vhost_socket=options.text("socket"),
            rate_limit_group=options.text("rate_limit_group"),
            rate_limiter_config=_rate_limiter(options),
            disable_io_uring=options.toggle("_disable_io_uring", default=False),
            disable_aio=options.toggle("_disable_aio", default=False),
            serial=options.text("serial"),
            queue_affinity=affinity,
            backing_files=options.toggle("backing_files", default=False),
            sparse=options.toggle("sparse", default=True),
            image_type=options.convert("image_type", _image_type, "Unknown"),
            lock_granularity=options.convert("lock_granularity", variant("byte-range", "full"), "ByteRange"),
            **_pci(text),
        )


def _image_type(text: str) -> Any:
    kind = _IMAGE_TYPES.get(text.lower())
    if kind is None:
        raise ValueError(text)
    return kind


def _rate_limiter(options: Options) -> RateLimiterConfig | None:
    buckets: list[TokenBucketConfig | None] = []
    for kind in ("bw", "ops"):
        size, burst, refill = (options.integer(f"{kind}_{part}", 64, 0) for part in _BUCKET)
        bucket = TokenBucketConfig(size=size, one_time_burst=burst, refill_time=refill)
        buckets.append(bucket if size and refill else None)
    bandwidth, ops = buckets
    return RateLimiterConfig(bandwidth=bandwidth, ops=ops) if bandwidth or ops else None


_BUCKET = ("size", "one_time_burst", "refill_time")


def parse_rng(text: str) -> RngConfig:
    with _Parsing("rng"):
        options = Options(text, ("src", *_PCI))
        return RngConfig(src=options.text("src") or DEFAULT_RNG_SOURCE, **_pci(text))


def _console_mode(options: Options, names: Iterable[str]) -> dict[str, Any]:
    for name in _CONSOLE_MODES:
        if options.is_set(name):
            return {"mode": name.capitalize()}
    for name in names:
        if options.is_set(name):
            path = options.text(name)
            if path is None:
                raise Refused("Error validating configuration") from Refused(
                    f"Path missing when using {name} console mode"
                )
            return {"mode": name.capitalize(), name: path}
    raise Refused("Error parsing --console: invalid console mode given")


def parse_serial(text: str) -> SerialConfig:
    with _Parsing("serial"):
        return SerialConfig(**_console_mode(Options(text, ("file", "socket"), _CONSOLE_MODES), ("file", "socket")))


def parse_console(text: str) -> ConsoleConfig:
    with _Parsing("console"):
        options = Options(text, ("file", "socket", *_PCI), _CONSOLE_MODES)
        return ConsoleConfig(**_console_mode(options, ("file", "socket")), **_pci(text))


def parse_debug_console(text: str) -> DebugConsoleConfig:
    with _Parsing("console"):
        options = Options(text, ("file", "iobase"), _CONSOLE_MODES)
        mode = _console_mode(options, ("file",))
        iobase = options.text("iobase")
        if iobase is not None:
            digits = iobase.removeprefix("0x")
            try:
                number = int(digits, 16) if iobase.startswith("0x") and digits.isalnum() else -1
            except ValueError:
                number = -1
            if not 0 <= number < 1 << 16:
                raise Refused("Error validating configuration") from Refused(
                    f"The IO port was not properly provided in hex or a `0x` prefix is missing: {iobase}"
                )
            return DebugConsoleConfig(**mode, iobase=number)
        return DebugConsoleConfig(**mode)


_SMBIOS = (
    "system_manufacturer",
    "system_product_name",
    "system_version",
    "system_serial_number",
    "system_uuid",
    "system_sku_number",
    "system_family",
    "chassis_asset_tag",
)


def parse_platform(text: str) -> PlatformConfig:
    with _Parsing("platform"):
        keys = ("num_pci_segments", "iommu_segments", "iommu_address_width", "serial_number", "uuid", "oem_strings")
        options = Options(text, (*keys, "iommufd", "iommufd_fd", "vfio_p2p_dma", *_SMBIOS))
        iommufd_fd = options.maybe("iommufd_fd", lambda value: integer(value, 31))
        strings = {name: options.text(name) for name in _SMBIOS}
        strings["system_serial_number"] = strings["system_serial_number"] or options.text("serial_number")
        strings["system_uuid"] = strings["system_uuid"] or options.text("uuid")
        return PlatformConfig(
            num_pci_segments=options.integer("num_pci_segments", 16, 1),
            iommu_segments=options.maybe("iommu_segments", lambda value: integer_list(value, 16)),
            iommu_address_width_bits=options.integer("iommu_address_width", 8, 64),
            oem_strings=options.maybe("oem_strings", string_list),
            iommufd=options.toggle("iommufd", default=iommufd_fd is not None),
            iommufd_fd=iommufd_fd,
            vfio_p2p_dma=options.toggle("vfio_p2p_dma", default=True),
            **strings,  # pyright: ignore[reportArgumentType]
        )

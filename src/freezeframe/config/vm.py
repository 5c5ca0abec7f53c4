"""What a machine is asked to be: Cloud Hypervisor v53's `VmConfig`, names, order and defaults (vmm/src/vm_config.rs).

Sizes are bytes. `iommu` and the other PCI fields stand in each device, as CH flattens them into its JSON.
"""

from __future__ import annotations

from freezeframe.config.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar, Literal

    from freezeframe.config.record import I32, U8, U16, U32, U64, Usize

    CoreScheduling = Literal["Vm", "Vcpu", "Off"]
    CpuProfile = Literal["Host", "Portable"]
    HotplugMethod = Literal["Acpi", "VirtioMem"]
    ImageType = Literal["FixedVhd", "Qcow2", "Raw", "Vhdx", "Unknown"]
    LockGranularity = Literal["ByteRange", "Full"]
    VhostMode = Literal["Client", "Server"]
    CpuChange = str
    TestDevice = Literal["Testdev", "DebugExit", "FwCfg", "PicPit"]
    ConsoleMode = Literal["Off", "Pty", "Tty", "File", "Socket", "Null"]

MIB = 1 << 20
DEFAULT_MEMORY = 512 * MIB
DEFAULT_MAX_PHYS_BITS = 46
DEFAULT_RNG_SOURCE = "/dev/urandom"

# Features that can be switched on or off (rust/vcpu/src/profile.rs).
CPU_FEATURES = ("x2apic", "smap", "umip", "pku", "pks", "rdpid", "far64")
# pc-testdev; isa-debug-exit; QEMU's firmware configuration; the 8259s and the 8254.
TEST_DEVICES = ("Testdev", "DebugExit", "FwCfg", "PicPit")

Record.VARIANTS = {
    "CoreScheduling": ("Vm", "Vcpu", "Off"),
    "CpuProfile": ("Host", "Portable"),
    "HotplugMethod": ("Acpi", "VirtioMem"),
    "ImageType": ("FixedVhd", "Qcow2", "Raw", "Vhdx", "Unknown"),
    "LockGranularity": ("ByteRange", "Full"),
    "VhostMode": ("Client", "Server"),
    "CpuChange": tuple(sign + name for name in CPU_FEATURES for sign in "+-"),
    "TestDevice": TEST_DEVICES,
    "ConsoleMode": ("Off", "Pty", "Tty", "File", "Socket", "Null"),
    "MemoryRestoreMode": ("Copy", "OnDemand"),
    "RestoreClock": ("Advance", "Freeze"),
}


class CpuAffinity(Record):
    vcpu: U32
    host_cpus: tuple[Usize, ...]


class CpuFeatures(Record):
    amx: bool = False


class CpuTopology(Record):
    threads_per_core: U16
    cores_per_die: U16
    dies_per_package: U16
    packages: U16


class CpusConfig(Record):
    """`profile` is ours to default: `Portable` is the same CPU on every host; `Host` all that the engine can offer.

    `changes` is ours: what the CPUs show more or less than the profile, for programs that test a CPU.
    """

    boot_vcpus: U32
    max_vcpus: U32
    topology: CpuTopology | None = None
    kvm_hyperv: bool = False
    max_phys_bits: U8 = DEFAULT_MAX_PHYS_BITS
    affinity: tuple[CpuAffinity, ...] | None = None
    features: CpuFeatures = CpuFeatures()
    nested: bool = True
    core_scheduling: CoreScheduling = "Vm"
    profile: CpuProfile = "Portable"
    changes: tuple[CpuChange, ...] | None = None


class PlatformConfig(Record):
    ALIASES: ClassVar = {"system_serial_number": ("serial_number",), "system_uuid": ("uuid",)}

    num_pci_segments: U16 = 1
    iommu_segments: tuple[U16, ...] | None = None
    iommu_address_width_bits: U8 = 64
    system_serial_number: str | None = None
    system_uuid: str | None = None
    oem_strings: tuple[str, ...] | None = None
    system_manufacturer: str | None = None
    system_product_name: str | None = None
    system_version: str | None = None
    system_family: str | None = None
    system_sku_number: str | None = None
    chassis_asset_tag: str | None = None
    iommufd: bool = False
    iommufd_fd: I32 | None = None
    vfio_p2p_dma: bool = True


class PciSegmentConfig(Record):
    pci_segment: U16 = 0
    mmio32_aperture_weight: U32 = 1
    mmio64_aperture_weight: U32 = 1


class MemoryZoneConfig(Record):
    id: str
    size: U64
    file: str | None = None
    shared: bool = False
    hugepages: bool = False
    hugepage_size: U64 | None = None
    host_numa_node: U32 | None = None
    hotplug_size: U64 | None = None
    hotplugged_size: U64 | None = None
    prefault: bool = False
    reserve: bool = False
    mergeable: bool = False


class MemoryConfig(Record):
    size: U64
    mergeable: bool = False
    hotplug_method: HotplugMethod = "Acpi"
    hotplug_size: U64 | None = None
    hotplugged_size: U64 | None = None
    shared: bool = False
    hugepages: bool = False
    hugepage_size: U64 | None = None
    prefault: bool = False
    reserve: bool = False
    zones: tuple[MemoryZoneConfig, ...] | None = None
    thp: bool = True


class TokenBucketConfig(Record):
    PRINT_NONE: ClassVar = True

    size: U64
    one_time_burst: U64 | None = None
    refill_time: U64


class RateLimiterConfig(Record):
    PRINT_NONE: ClassVar = True

    bandwidth: TokenBucketConfig | None = None
    ops: TokenBucketConfig | None = None


class RateLimiterGroupConfig(Record):
    id: str = ""
    rate_limiter_config: RateLimiterConfig = RateLimiterConfig()


class VirtQueueAffinity(Record):
    queue_index: U16
    host_cpus: tuple[Usize, ...]


class PciDevice(Record):
    """The fields that every PCI device has."""

    QUIET: ClassVar = frozenset({"iommu"})

    id: str | None = None
    iommu: bool = False
    pci_segment: U16 = 0
    pci_device_id: U8 | None = None


class DiskConfig(PciDevice):
    path: str | None = None
    readonly: bool = False
    direct: bool = False
    num_queues: Usize = 1
    queue_size: U16 = 128
    vhost_user: bool = False
    vhost_socket: str | None = None
    rate_limit_group: str | None = None
    rate_limiter_config: RateLimiterConfig | None = None
    disable_io_uring: bool = False
    disable_aio: bool = False
    serial: str | None = None
    queue_affinity: tuple[VirtQueueAffinity, ...] | None = None
    backing_files: bool = False
    sparse: bool = True
    image_type: ImageType = "Unknown"
    lock_granularity: LockGranularity = "ByteRange"


class NetConfig(PciDevice):
    tap: str | None = None
    ip: str | None = None
    mask: str | None = None
    mac: str | None = None
    host_mac: str | None = None
    mtu: U16 | None = None
    num_queues: Usize = 2
    queue_size: U16 = 256
    vhost_user: bool = False
    vhost_socket: str | None = None
    vhost_mode: VhostMode = "Client"
    fds: tuple[I32, ...] | None = None
    rate_limiter_config: RateLimiterConfig | None = None
    offload_tso: bool = True
    offload_ufo: bool = True
    offload_csum: bool = True


class RngConfig(PciDevice):
    src: str


class RtcConfig(PciDevice):
    pass


class BalloonConfig(PciDevice):
    size: U64
    deflate_on_oom: bool = False
    free_page_reporting: bool = False


class FsConfig(PciDevice):
    tag: str
    socket: str
    num_queues: Usize = 1
    queue_size: U16 = 1024


class GenericVhostUserConfig(PciDevice):
    socket: str
    queue_sizes: tuple[U16, ...]
    device_type: U32


class PmemConfig(PciDevice):
    file: str
    size: U64 | None = None
    discard_writes: bool = False


class SerialConfig(Record):
    file: str | None = None
    mode: ConsoleMode
    socket: str | None = None


class ConsoleConfig(Record):
    QUIET: ClassVar = frozenset({"iommu"})

    file: str | None = None
    mode: ConsoleMode
    socket: str | None = None
    id: str | None = None
    iommu: bool = False
    pci_segment: U16 = 0
    pci_device_id: U8 | None = None


class DebugConsoleConfig(Record):
    file: str | None = None
    mode: ConsoleMode
    iobase: U16 | None = None


class DeviceConfig(PciDevice):
    path: str | None = None
    fd: I32 | None = None
    x_nv_gpudirect_clique: U8 | None = None
    x_exclude_mmap_bars: tuple[U64, ...] = ()


class UserDeviceConfig(PciDevice):
    socket: str


class VdpaConfig(PciDevice):
    path: str
    num_queues: Usize = 1


class VsockConfig(PciDevice):
    cid: U32
    socket: str


class NumaDistance(Record):
    destination: U32 = 0
    distance: U8 = 0


class NumaConfig(Record):
    guest_numa_id: U32
    cpus: tuple[U32, ...] | None = None
    distances: tuple[NumaDistance, ...] | None = None
    memory_zones: tuple[str, ...] | None = None
    pci_segments: tuple[U16, ...] | None = None
    device_id: str | None = None


class PayloadConfig(Record):
    """`multiboot` is ours: the kernel is a multiboot 1 image, `initramfs` its module."""

    QUIET: ClassVar = frozenset({"multiboot"})

    firmware: str | None = None
    kernel: str | None = None
    cmdline: str | None = None
    initramfs: str | None = None
    igvm: str | None = None
    host_data: str | None = None
    multiboot: bool = False


class TpmConfig(Record):
    socket: str


class LandlockConfig(Record):
    path: str
    access: str


class VmConfig(Record):
    """The whole machine. Every default is CH's, but for `cpus.profile`."""

    cpus: CpusConfig = CpusConfig(boot_vcpus=1, max_vcpus=1)
    memory: MemoryConfig = MemoryConfig(size=DEFAULT_MEMORY)
    payload: PayloadConfig | None = None
    rate_limit_groups: tuple[RateLimiterGroupConfig, ...] | None = None
    disks: tuple[DiskConfig, ...] | None = None
    net: tuple[NetConfig, ...] | None = None
    rng: RngConfig = RngConfig(src=DEFAULT_RNG_SOURCE)
    balloon: BalloonConfig | None = None
    generic_vhost_user: tuple[GenericVhostUserConfig, ...] | None = None
    fs: tuple[FsConfig, ...] | None = None
    pmem: tuple[PmemConfig, ...] | None = None
    serial: SerialConfig = SerialConfig(mode="Null")
    console: ConsoleConfig = ConsoleConfig(mode="Tty")
    debug_console: DebugConsoleConfig = DebugConsoleConfig(mode="Off", iobase=0xE9)
    devices: tuple[DeviceConfig, ...] | None = None
    user_devices: tuple[UserDeviceConfig, ...] | None = None
    vdpa: tuple[VdpaConfig, ...] | None = None
    vsock: VsockConfig | None = None
    pvpanic: bool = False
    iommu: bool = False
    numa: tuple[NumaConfig, ...] | None = None
    watchdog: bool = False
    rtc: RtcConfig | None = None
    pci_segments: tuple[PciSegmentConfig, ...] | None = None
    platform: PlatformConfig | None = None
    tpm: TpmConfig | None = None
    landlock_enable: bool = False
    landlock_rules: tuple[LandlockConfig, ...] | None = None
    # Ours: what a PC has for programs that test it.
    test_devices: tuple[TestDevice, ...] | None = None

    @property
    def memory_actual_size(self) -> int:
        """Bytes of guest RAM, without what is or could be hot-plugged."""
        return self.memory.size + sum(zone.size for zone in self.memory.zones or ())

    def with_device_ids(self) -> VmConfig:
        """The configuration with a name for every disk: `_disk0`, `_disk1`, … where the user gave none."""
        taken = {disk.id for disk in self.disks or ()}
        disks: list[DiskConfig] = []
        count = 0
        for disk in self.disks or ():
            named = disk
            while named.id is None:
                name, count = f"_disk{count}", count + 1
                if name not in taken:
                    named = disk.replace(id=name)
            disks.append(named)
        return self.replace(disks=tuple(disks)) if disks else self

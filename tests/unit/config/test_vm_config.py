"""The configuration's JSON: Cloud Hypervisor's names, order, defaults and texts; and what is refused by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from freezeframe.config import DiskConfig, RestoreConfig, SnapshotConfig, VmConfig, refuse_unsupported, validate
from freezeframe.errors import FreezeframeError, NotSupported, chain_messages

if TYPE_CHECKING:
    from freezeframe.config.record import Record

pytestmark = pytest.mark.unit

KERNEL = '"payload":{"kernel":"k"}'


def config(extra: str = "") -> VmConfig:
    return VmConfig.from_json(f"{{{KERNEL}{',' if extra else ''}{extra}}}".encode())


def test_defaults_are_printed_in_full_and_in_order():
    # As v53.0's `vm.info`, but for our default CPU profile.
    assert config().to_json() == (
        '{"cpus":{"boot_vcpus":1,"max_vcpus":1,"kvm_hyperv":false,"max_phys_bits":46,"features":{"amx":false},'
        '"nested":true,"core_scheduling":"Vm","profile":"Portable"},"memory":{"size":536870912,"mergeable":false,'
        '"hotplug_method":"Acpi","shared":false,"hugepages":false,"prefault":false,"reserve":false,"thp":true},'
        '"payload":{"kernel":"k"},"rng":{"pci_segment":0,"src":"/dev/urandom"},"serial":{"mode":"Null"},'
        '"console":{"mode":"Tty","pci_segment":0},"debug_console":{"mode":"Off","iobase":233},"pvpanic":false,'
        '"iommu":false,"watchdog":false,"landlock_enable":false}'
    )


def test_a_disk_as_ch_prints_it():
    disk = DiskConfig(id="_disk0", path="a.raw")
    assert disk.to_json() == (
        '{"id":"_disk0","pci_segment":0,"path":"a.raw","readonly":false,"direct":false,"num_queues":1,'
        '"queue_size":128,"vhost_user":false,"disable_io_uring":false,"disable_aio":false,"backing_files":false,'
        '"sparse":true,"image_type":"Unknown","lock_granularity":"ByteRange"}'
    )


def test_what_is_printed_is_read_back():
    whole = config(
        '"disks":[{"path":"a","readonly":true,"serial":"x"},{"path":"b","id":"b"}],"cpus":{"boot_vcpus":4,"max_vcpus":4}'
    ).with_device_ids()
    assert [disk.id for disk in whole.disks] == ["_disk0", "b"]
    assert VmConfig.from_json(whole.to_json().encode()) == whole
    assert VmConfig.from_plain(whole.to_plain()) == whole
    assert VmConfig.from_plain(json.loads(whole.to_json())) == whole
    assert hash(VmConfig.from_plain(whole.to_plain())) == hash(whole)


def test_given_ids_are_not_given_again():
    named = config('"disks":[{"path":"a"},{"path":"b","id":"_disk0"}]').with_device_ids()
    assert [disk.id for disk in named.disks] == ["_disk1", "_disk0"]


def test_records_are_frozen():
    with pytest.raises(AttributeError):
        config().cpus.boot_vcpus = 2
    with pytest.raises(TypeError):
        config().replace(nope=1)


@pytest.mark.parametrize(
    ("record", "document", "text"),
    [
        (SnapshotConfig, "{bad json", "key must be a string at line 1 column 2"),
        (SnapshotConfig, "{}", "missing field `destination_url` at line 1 column 2"),
        (RestoreConfig, "{}", "missing field `source_url` at line 1 column 2"),
        (VmConfig, "", "EOF while parsing a value at line 1 column 0"),
        (VmConfig, "{} x", "trailing characters at line 1 column 4"),
        (VmConfig, '{"cpus":{"boot_vcpus":-1}}', "invalid value: integer `-1`, expected u32 at line 1 column 24"),
        (
            VmConfig,
            '{"cpus":{"boot_vcpus":1.5}}',
            "invalid type: floating point `1.5`, expected u32 at line 1 column 25",
        ),
        (VmConfig, '{"cpus":{"boot_vcpus":"1"}}', 'invalid type: string "1", expected u32 at line 1 column 25'),
        (VmConfig, '{"cpus":{"boot_vcpus":1}}', "missing field `max_vcpus` at line 1 column 24"),
        (VmConfig, '{"iommu":1}', "invalid type: integer `1`, expected a boolean at line 1 column 10"),
        (VmConfig, '{"disks":{}}', "invalid type: map, expected a sequence at line 1 column 9"),
        (VmConfig, '{"iommu":true,"iommu":true}', "duplicate field `iommu` at line 1 column 21"),
        (VmConfig, '{"serial":{"mode":"tty"}}', None),
        (RestoreConfig, '{"source_url":"a","sorce":1}', None),
    ],
)
def test_refused_documents_have_serdes_texts(record: type[Record], document: str, text: str | None):
    with pytest.raises(ValueError) as caught:
        record.from_json(document.encode())
    if text is not None:
        assert str(caught.value) == text


def test_unknown_names_are_refused_by_name():
    with pytest.raises(ValueError, match="unknown field `sorce`, expected one of `source_url`"):
        RestoreConfig.from_json(b'{"source_url":"a","sorce":1}')
    with pytest.raises(ValueError, match="unknown field `kernl`"):
        VmConfig.from_json(b'{"payload":{"kernl":"k"}}')
    # Cloud Hypervisor takes this one, and the transcript wins.
    assert SnapshotConfig.from_json(b'{"destination_url":"a","x":{"y":[1]}}').destination_url == "a"


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ('"cpus":{"boot_vcpus":4,"max_vcpus":2}', "Max CPUs (2) lower than boot CPUs (4)"),
        ('"cpus":{"boot_vcpus":9000,"max_vcpus":9000}', "Too many CPUs: specified 9000 but 8192 is the limit"),
        ('"cpus":{"boot_vcpus":0,"max_vcpus":0}', "A machine has 1 to 254 vCPUs: cpus.boot_vcpus is 0"),
        (
            '"cpus":{"boot_vcpus":0,"max_vcpus":0},"disks":[{"path":"a"}]',
            "A machine has 1 to 254 vCPUs: cpus.boot_vcpus is 0",
        ),
        ('"cpus":{"boot_vcpus":255,"max_vcpus":255}', "A machine has 1 to 254 vCPUs: cpus.boot_vcpus is 255"),
        ('"memory":{"size":0}', "Memory size must be a multiple of 4096 above 0: 0"),
        ('"memory":{"size":4097}', "Memory size must be a multiple of 4096 above 0: 4097"),
        ('"disks":[{"path":"a","id":"x"},{"path":"b","id":"x"}]', "Identifier x is not unique"),
        ('"disks":[{"path":"a","id":"__x"}]', "Identifier __x is not invalid"),
        (
            '"disks":[{"path":"a","queue_size":100}]',
            "Queue size must be a power of 2 no greater than 32768: 100",
        ),
        ('"disks":[{"path":"a","num_queues":2}]', "Queue count (2) must not exceed boot vCPUs (1)"),
        ('"disks":[{}]', "Disk has no path"),
        ('"serial":{"mode":"File"}', "Path missing when using file console mode"),
        (
            '"memory":{"size":4096,"shared":true,"mergeable":true}',
            "Invalid to set both 'mergeable' and 'shared' for memory",
        ),
    ],
)
def test_contradictions_have_chs_texts(extra, text):
    with pytest.raises(FreezeframeError) as caught:
        validate(config(extra))
    assert chain_messages(caught.value) == [text]


def test_no_payload():
    with pytest.raises(FreezeframeError) as caught:
        validate(VmConfig.from_json(b"{}"))
    assert chain_messages(caught.value) == [
        "Payload configuration is not bootable",
        "No bootitem provided: neither firmware nor kernel",
    ]


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        ('"cpus":{"boot_vcpus":1,"max_vcpus":2}', "cpus.max_vcpus"),
        ('"cpus":{"boot_vcpus":1,"max_vcpus":1,"kvm_hyperv":true}', "cpus.kvm_hyperv"),
        ('"cpus":{"boot_vcpus":1,"max_vcpus":1,"features":{"amx":true}}', "cpus.features.amx"),
        ('"memory":{"size":4096,"hugepages":true}', "memory.hugepages"),
        ('"memory":{"size":4096,"thp":false}', "memory.thp"),
        ('"disks":[{"path":"a"},{"path":"b","direct":true}]', "disks[1].direct"),
        ('"disks":[{"path":"a","image_type":"Qcow2"}]', "disks[0].image_type"),
        ('"net":[{}]', "net"),
        ('"balloon":{"size":1}', "balloon"),
        ('"watchdog":true', "watchdog"),
        ('"console":{"mode":"Socket","socket":"x"}', "console.mode"),
        ('"platform":{"system_uuid":"x"}', "platform.system_uuid"),
        ('"platform":{"uuid":"x"}', "platform.system_uuid"),
    ],
)
def test_what_we_lack_is_refused_by_name(extra, name):
    with pytest.raises(NotSupported, match=f"^'{name.replace('[', chr(92) + '[')}'"):
        refuse_unsupported(config(extra))


def test_defaults_written_out_are_accepted():
    refuse_unsupported(config())
    refuse_unsupported(VmConfig.from_json(config('"platform":{},"disks":[{"path":"a"}],"net":[]').to_json().encode()))

//! Making a virtual machine and its vCPUs.

use std::arch::x86_64::__cpuid_count;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_X2APIC_API_USE_32BIT_IDS,
    kvm_cpuid_entry2, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use memory::GuestMemory;
use vcpu::cpuid::Machine;
use vcpu::profile::{self, Word};
use vcpu::{EngineError, ioapic};

use crate::failed;

/// Claimed features that KVM itself provides whatever the processor, and those that say what is not there.
const EMULATED: &[&str] = &["tsc_deadline_timer", "x2apic", "hypervisor", "tsc_adjust", "mtrr"];

/// That the host has what every vCPU is promised (the profile is the same on every host).
fn check_features(kvm: &Kvm) -> Result<(), EngineError> {
    let supported =
        kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(|e| failed("KVM_GET_SUPPORTED_CPUID", e))?;
    let leaf = |function: u32, pick: fn(&kvm_cpuid_entry2) -> u32| {
        supported.as_slice().iter().find(|e| e.function == function && e.index == 0).map_or(0, pick)
    };
    // KVM may know less than the processor does by itself (on a host that interprets the kernel's code only).
    let own = |function: u32| __cpuid_count(function, 0);
    let has = |word: Word| match word {
        Word::Leaf1Edx => leaf(1, |e| e.edx) | own(1).edx,
        Word::Leaf1Ecx => leaf(1, |e| e.ecx) | own(1).ecx,
        Word::Leaf7Ebx => leaf(7, |e| e.ebx) | own(7).ebx,
        // Bits that repeat leaf 1 are AMD's only; the others are everybody's.
        Word::Ext1Edx => leaf(0x8000_0001, |e| e.edx) | own(0x8000_0001).edx | 0x0183_f3ff,
        _ => !0,
    };
    let missing: Vec<_> = profile::FEATURES
        .iter()
        .filter(|f| has(f.word) >> f.bit & 1 == 0 && !EMULATED.contains(&f.name) && f.name != "mmxext")
        .map(|f| f.name)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(failed("this host's processor lacks what every guest is shown", missing.join(", ") + " (use --engine software)"))
}

/// An empty virtual machine with the machine's RAM. All of a lazily restored machine's memory is read and verified here:
/// the processor does not ask before it reads.
pub(crate) fn create(memory: &GuestMemory) -> Result<(Kvm, Arc<VmFd>), EngineError> {
    let kvm = Kvm::new().map_err(|e| failed("/dev/kvm cannot be opened", e))?;
    for (cap, name) in [
        (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
        (Cap::Xsave, "KVM_CAP_XSAVE"),
        (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    ] {
        if !kvm.check_extension(cap) {
            return Err(failed("this kernel is too old", format!("it has no {name} (use --engine software)")));
        }
    }
    check_features(&kvm)?;
    let vm = kvm.create_vm().map_err(|e| failed("KVM_CREATE_VM", e))?;
    // Before the interrupt controller and the vCPUs: each slot is much dearer afterwards.
    for (slot, region) in (0..).zip(memory.regions()) {
        let layout = region.layout();
        let host = memory.host_range(layout.gpa, layout.size).map_err(|e| EngineError::new("damaged", e.to_string()))?;
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: layout.gpa,
            memory_size: layout.size,
            userspace_addr: host.as_ptr() as u64,
        };
        // SAFETY: the mapping is the guest's RAM and lives as long as `memory`, which the engine holds longer than the
        // vCPUs; without a vCPU nobody uses the slot.
        unsafe { vm.set_user_memory_region(region) }.map_err(|e| failed("KVM_SET_USER_MEMORY_REGION", e))?;
    }
    let mut cap = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    cap.args[0] = ioapic::PINS as u64;
    vm.enable_cap(&cap).map_err(|e| failed("KVM_CAP_SPLIT_IRQCHIP", e))?;
    let mut cap = kvm_enable_cap { cap: KVM_CAP_X2APIC_API, ..Default::default() };
    cap.args[0] = u64::from(KVM_X2APIC_API_USE_32BIT_IDS);
    vm.enable_cap(&cap).map_err(|e| failed("KVM_CAP_X2APIC_API", e))?;
    Ok((kvm, Arc::new(vm)))
}

/// Every leaf that exists, as the software engine answers it.
fn cpuid(machine: &Machine) -> Result<CpuId, EngineError> {
    let plain = [0, 1, 6, 0x4000_0000, 0x4000_0001, 0x4000_0010].into_iter().chain(0x8000_0000..=0x8000_0008);
    let plain = plain.chain([0x8000_001e, 0x8000_0021]).map(|leaf| (leaf, 0, 0));
    let indexed = [(7, 0..1), (0xb, 0..3), (0x8000_001d, 0..5)];
    let indexed = indexed.into_iter().flat_map(|(leaf, subs)| subs.map(move |s| (leaf, s, KVM_CPUID_FLAG_SIGNIFCANT_INDEX)));
    let entries: Vec<_> = plain
        .chain(indexed)
        .map(|(function, index, flags)| {
            let [eax, ebx, ecx, edx] = machine.cpuid(function, index);
            kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
        })
        .collect();
    CpuId::from_entries(&entries).map_err(|e| failed("CPUID", format!("{e:?}")))
}

pub(crate) fn create_vcpu(vm: &VmFd, machine: &Machine) -> Result<VcpuFd, EngineError> {
    let fd = vm.create_vcpu(machine.apic_id.into()).map_err(|e| failed("KVM_CREATE_VCPU", e))?;
    fd.set_cpuid2(&cpuid(machine)?).map_err(|e| failed("KVM_SET_CPUID2", e))?;
    Ok(fd)
}

//! Making a virtual machine and its vCPUs.

use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_X2APIC_API_USE_32BIT_IDS,
    kvm_cpuid_entry2, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use memory::GuestMemory;
use vcpu::cpuid::Machine;
use vcpu::profile::{Feature, Word};
use vcpu::{EngineError, ioapic};

use crate::failed;

/// An empty virtual machine with the machine's RAM, which is there or given when it is touched.
pub(crate) fn create(kvm: &Kvm, memory: &GuestMemory) -> Result<Arc<VmFd>, EngineError> {
    let vm = kvm.create_vm().map_err(|e| failed("KVM_CREATE_VM", e))?;
    // Before the interrupt controller and the vCPUs: each slot is much dearer afterwards.
    for (slot, region) in (0..).zip(memory.regions()) {
        let layout = region.layout();
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: layout.gpa,
            memory_size: layout.size,
            userspace_addr: region.host_address() as u64,
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
    Ok(Arc::new(vm))
}

/// Every leaf that exists, as the software engine answers it, but for what this host may not say (see [`Host::untrue`]).
fn cpuid(machine: &Machine, untrue: &[Feature]) -> Result<CpuId, EngineError> {
    let plain = [0, 1, 6, 0x4000_0000, 0x4000_0001, 0x4000_0010].into_iter().chain(0x8000_0000..=0x8000_0008);
    let plain = plain.chain([0x8000_001e, 0x8000_0021]).map(|leaf| (leaf, 0, 0));
    let indexed = [(7, 0..1), (0xb, 0..3), (0x8000_001d, 0..5)];
    let indexed = indexed.into_iter().flat_map(|(leaf, subs)| subs.map(move |s| (leaf, s, KVM_CPUID_FLAG_SIGNIFCANT_INDEX)));
    let entries: Vec<_> = plain
        .chain(indexed)
        .map(|(function, index, flags)| {
            let [eax, mut ebx, ecx, edx] = machine.cpuid(function, index);
            let clear = |word| !untrue.iter().filter(|f| f.word == word).fold(0, |bits, f| bits | 1 << f.bit);
            if function == 0x8000_0008 {
                ebx &= clear(Word::Ext8Ebx);
            }
            let eax = if function == 0x8000_0021 { eax & clear(Word::Ext21Eax) } else { eax };
            kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
        })
        .collect();
    CpuId::from_entries(&entries).map_err(|e| failed("CPUID", format!("{e:?}")))
}

pub(crate) fn create_vcpu(vm: &VmFd, machine: &Machine, untrue: &[Feature]) -> Result<VcpuFd, EngineError> {
    let fd = vm.create_vcpu(machine.apic_id.into()).map_err(|e| failed("KVM_CREATE_VCPU", e))?;
    fd.set_cpuid2(&cpuid(machine, untrue)?).map_err(|e| failed("KVM_SET_CPUID2", e))?;
    Ok(fd)
}

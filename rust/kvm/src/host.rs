//! What this host's KVM and processor have, and whether a machine fits them: everything that can be said before anything is built.

use std::arch::x86_64::__cpuid_count;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use memory::GuestMemory;
use vcpu::profile::{self, Feature, Word};
use vcpu::state::VcpuState;
use vcpu::{Clock, EngineError, msr};

use crate::convert::{check_features, msr_name};
use crate::failed;
use crate::tsc::{self, TscControl};

/// Interrupt controllers with ids of 8 bits, the broadcast excluded.
const MAX_VCPUS: usize = 254;

/// Claimed features that KVM itself provides whatever the processor.
const EMULATED: &[&str] = &["tsc_deadline_timer", "x2apic", "hypervisor", "tsc_adjust", "mtrr"];

/// Features that say of a processor that it does not have a certain flaw. True of the software engine; shown on KVM only
/// where they are true of the host.
const FLAWLESS: &[&str] = &["btc_no", "srso_no"];

pub(crate) struct Host {
    pub kvm: Kvm,
    supported: CpuId,
}

impl Host {
    pub fn open() -> Result<Self, EngineError> {
        let kvm = Kvm::new().map_err(|e| failed("/dev/kvm cannot be opened", e))?;
        for (cap, name) in [
            (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
            (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
            (Cap::Xsave, "KVM_CAP_XSAVE"),
            (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
            (Cap::X2ApicApi, "KVM_CAP_X2APIC_API"),
            (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
            (Cap::Irqfd, "KVM_CAP_IRQFD"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(failed("this kernel is too old", format!("it has no {name} (use --engine software)")));
            }
        }
        let supported =
            kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(|e| failed("KVM_GET_SUPPORTED_CPUID", e))?;
        Ok(Self { kvm, supported })
    }

    fn leaf(&self, function: u32, pick: fn(&kvm_cpuid_entry2) -> u32) -> u32 {
        self.supported.as_slice().iter().find(|e| e.function == function && e.index == 0).map_or(0, pick)
    }

    /// The bits that KVM offers to guests.
    fn offered(&self, word: Word) -> u32 {
        match word {
            Word::Leaf1Edx => self.leaf(1, |e| e.edx),
            Word::Leaf1Ecx => self.leaf(1, |e| e.ecx),
            Word::Leaf7Ebx => self.leaf(7, |e| e.ebx),
            // Bits that repeat leaf 1 are AMD's only; the others are everybody's.
            Word::Ext1Edx => self.leaf(0x8000_0001, |e| e.edx) | REPEATED,
            Word::Ext8Ebx => self.leaf(0x8000_0008, |e| e.ebx),
            Word::Ext21Eax => self.leaf(0x8000_0021, |e| e.eax),
            _ => !0,
        }
    }

    /// The bits that the processor shows us.
    fn own(word: Word) -> u32 {
        match word {
            Word::Leaf1Edx => __cpuid_count(1, 0).edx,
            Word::Leaf1Ecx => __cpuid_count(1, 0).ecx,
            Word::Leaf7Ebx => __cpuid_count(7, 0).ebx,
            Word::Ext1Edx => __cpuid_count(0x8000_0001, 0).edx | REPEATED,
            Word::Ext8Ebx => __cpuid_count(0x8000_0008, 0).ebx,
            Word::Ext21Eax => __cpuid_count(0x8000_0021, 0).eax,
            _ => !0,
        }
    }

    fn lacking(&self, has: impl Fn(Word) -> u32) -> Vec<&'static str> {
        let needed = profile::FEATURES.iter().filter(|f| !matches!(f.word, Word::Ext8Ebx | Word::Ext21Eax));
        let needed = needed.filter(|f| !EMULATED.contains(&f.name) && f.name != "mmxext");
        needed.filter(|f| has(f.word) >> f.bit & 1 == 0).map(|f| f.name).collect()
    }

    /// What every guest is shown and this host cannot do.
    pub fn missing(&self) -> Vec<&'static str> {
        // KVM may know less than the processor does by itself (on a host that interprets the kernel's code only).
        let mut missing = self.lacking(|word| self.offered(word) | Self::own(word));
        // Of other vendors' processors it is always true.
        let amd = __cpuid_count(0, 0).ebx == u32::from_le_bytes(*b"Auth");
        if amd && (self.offered(Word::Ext8Ebx) | Self::own(Word::Ext8Ebx)) >> 2 & 1 == 0 {
            missing.push("xsaveerptr");
        }
        missing
    }

    /// What the processor can do but KVM does not offer to guests.
    pub fn unoffered(&self) -> Vec<&'static str> {
        self.lacking(|word| self.offered(word))
    }

    /// What may not be said of this host's processor: [`FLAWLESS`] features that it does not have.
    pub fn untrue(&self) -> Vec<Feature> {
        let flawless = profile::FEATURES.iter().filter(|f| FLAWLESS.contains(&f.name));
        flawless.filter(|f| (self.offered(f.word) | Self::own(f.word)) >> f.bit & 1 == 0).copied().collect()
    }

    fn phys_bits(&self) -> u32 {
        match self.leaf(0x8000_0008, |e| e.eax) & 0xff {
            0 => 36,
            bits => bits,
        }
    }

    /// That machines of this shape can be made here.
    pub fn check(&self, clock: &Clock, vcpus: usize, phys_bits: u8) -> Result<(), EngineError> {
        if vcpus == 0 || vcpus > MAX_VCPUS {
            return Err(EngineError::new("host", format!("{vcpus} vCPUs: the KVM engine runs 1 to {MAX_VCPUS}")));
        }
        if !clock.native() {
            let khz = clock.tsc_khz();
            let why = format!("the guest's TSC runs at {khz} kHz, this host's at another rate");
            return Err(EngineError::new("host", why + ": use --engine software, which can scale it"));
        }
        let missing = self.missing();
        if !missing.is_empty() {
            let names = missing.join(", ");
            return Err(failed("this host lacks what every guest is shown", names + " (use --engine software)"));
        }
        let most = self.phys_bits();
        if u32::from(phys_bits) > most {
            let what = format!("guest physical addresses of {phys_bits} bits");
            let how = format!("this host's processor has {most} (use --cpus max_phys_bits={most} or --engine software)");
            return Err(failed(&what, how));
        }
        Ok(())
    }
}

/// Leaf 8000_0001h EDX: what repeats leaf 1.
const REPEATED: u32 = 0x0183_f3ff;

/// Says before anything is built whether a machine can be made, or a saved one can go on, on this host's KVM. `states`: none
/// for a machine that is new. Code `host`: not here, but the software engine can; `state`: nowhere.
pub fn check(clock: &Clock, memory: &GuestMemory, vcpus: usize, phys_bits: u8, states: &[VcpuState]) -> Result<(), EngineError> {
    let host = Host::open()?;
    host.check(clock, vcpus, phys_bits)?;
    let pages_1g = host.unoffered().contains(&"pdpe1gb");
    for (number, state) in states.iter().enumerate() {
        check_features(state).map_err(|e| EngineError::new(e.code, format!("vCPU {number}: {}", e.message)))?;
        if pages_1g && uses_1g_pages(memory, state)? {
            let what = format!("vCPU {number} uses pages of 1 GiB");
            return Err(failed(&what, "this host's KVM does not have them (use --engine software)"));
        }
    }
    if states.is_empty() {
        return Ok(());
    }
    let vm = host.kvm.create_vm().map_err(|e| failed("KVM_CREATE_VM", e))?;
    let vcpu = vm.create_vcpu(0).map_err(|e| failed("KVM_CREATE_VCPU", e))?;
    if tsc::control(&vcpu)? == TscControl::Offset {
        return Ok(());
    }
    let adjust = |state: &VcpuState| state.msrs.get(&msr_name(msr::TSC_ADJUST)).copied().unwrap_or(0);
    let first = adjust(&states[0]);
    if let Some(other) = states.iter().position(|s| adjust(s) != first) {
        return Err(tsc::apart(other));
    }
    let behind = clock.tsc().wrapping_add(first).wrapping_sub(tsc::host_ticks()) as i64;
    if behind > 0 && clock.ns(behind as u64) > tsc::PATIENCE.as_nanos() as u64 {
        return Err(tsc::behind(behind as u64, clock.tsc_khz()));
    }
    Ok(())
}

/// Whether the page tables in use map anything in pages of 1 GiB (Intel SDM vol. 3, 5.5): tables that are not RAM do not.
fn uses_1g_pages(memory: &GuestMemory, state: &VcpuState) -> Result<bool, EngineError> {
    const PRESENT: u64 = 1;
    const LARGE: u64 = 1 << 7;
    let s = &state.sregs;
    if s.efer & 1 << 10 == 0 || s.cr0 >> 31 & 1 == 0 {
        return Ok(false);
    }
    let table = |at: u64| -> Result<Vec<u64>, EngineError> {
        let mut bytes = [0; 4096];
        match memory.read(at & 0x000f_ffff_ffff_f000, &mut bytes) {
            Ok(()) => {}
            Err(memory::MemoryError::NotRam { .. }) => return Ok(Vec::new()),
            Err(e) => return Err(EngineError::new("damaged", e.to_string())),
        }
        Ok(bytes.chunks_exact(8).map(|b| u64::from_le_bytes(std::array::from_fn(|i| b[i]))).collect())
    };
    for entry in table(s.cr3)?.into_iter().filter(|e| e & PRESENT != 0) {
        if table(entry)?.iter().any(|e| e & (PRESENT | LARGE) == PRESENT | LARGE) {
            return Ok(true);
        }
    }
    Ok(false)
}

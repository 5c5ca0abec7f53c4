//! The CPU profile `portable`: what every guest is shown, whatever the host. It is baked into each snapshot, so a bit may be
//! claimed only when everything behind it is implemented.
//!
//! Vendor AMD (no page table isolation, no MDS buffers to clear, safe SYSRET), family 17h model 2Fh, x86-64-v2.

/// Family 17h, model 2Fh, stepping 0: no processor that exists. Programs made of several versions for processors that they know
/// (GCC's `target_clones("arch=znver2")`) look at family and model only, and a known model of this family means AVX2 to them.
pub const SIGNATURE: u32 = 0x0082_0ff0;
pub const VENDOR: &[u8; 12] = b"AuthenticAMD";
pub const BRAND: &str = "AMD EPYC (freezeframe portable x86-64-v2)";
pub const MICROCODE: u64 = 0x0830_1077;
pub const LINEAR_BITS: u8 = 48;
/// Physical address bits where nothing else is asked for (Cloud Hypervisor's `max_phys_bits`).
pub const DEFAULT_PHYS_BITS: u8 = 46;
/// The LAPIC timer's input, as KVM's.
pub const LAPIC_KHZ: u32 = 1_000_000;

/// A CPUID register that holds feature bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Word {
    /// 0000_0001 EDX
    Leaf1Edx,
    /// 0000_0001 ECX
    Leaf1Ecx,
    /// 0000_0007:0 EBX
    Leaf7Ebx,
    /// 0000_0007:0 ECX
    Leaf7Ecx,
    /// 8000_0001 EDX
    Ext1Edx,
    /// 8000_0001 ECX
    Ext1Ecx,
    /// 8000_0007 EDX
    Ext7Edx,
    /// 8000_0008 EBX
    Ext8Ebx,
    /// 8000_0021 EAX
    Ext21Eax,
    /// 4000_0001 EAX
    Kvm,
}

/// A claimed feature: its name as Linux writes it, and where CPUID shows it.
#[derive(Debug, Clone, Copy)]
pub struct Feature {
    pub name: &'static str,
    pub word: Word,
    pub bit: u8,
}

const fn f(name: &'static str, word: Word, bit: u8) -> Feature {
    Feature { name, word, bit }
}

/// Everything that is claimed. Bits that depend on the machine (APIC enabled, HTT) are set in `cpuid`.
pub const FEATURES: &[Feature] = &[
    f("fpu", Word::Leaf1Edx, 0),
    f("de", Word::Leaf1Edx, 2),
    f("pse", Word::Leaf1Edx, 3),
    f("tsc", Word::Leaf1Edx, 4),
    f("msr", Word::Leaf1Edx, 5),
    f("pae", Word::Leaf1Edx, 6),
    f("cx8", Word::Leaf1Edx, 8),
    f("sep", Word::Leaf1Edx, 11),
    f("mtrr", Word::Leaf1Edx, 12),
    f("pge", Word::Leaf1Edx, 13),
    f("cmov", Word::Leaf1Edx, 15),
    f("pat", Word::Leaf1Edx, 16),
    f("pse36", Word::Leaf1Edx, 17),
    f("clflush", Word::Leaf1Edx, 19),
    f("mmx", Word::Leaf1Edx, 23),
    f("fxsr", Word::Leaf1Edx, 24),
    f("sse", Word::Leaf1Edx, 25),
    f("sse2", Word::Leaf1Edx, 26),
    f("pni", Word::Leaf1Ecx, 0),
    f("ssse3", Word::Leaf1Ecx, 9),
    f("cx16", Word::Leaf1Ecx, 13),
    f("sse4_1", Word::Leaf1Ecx, 19),
    f("sse4_2", Word::Leaf1Ecx, 20),
    f("x2apic", Word::Leaf1Ecx, 21),
    f("popcnt", Word::Leaf1Ecx, 23),
    f("tsc_deadline_timer", Word::Leaf1Ecx, 24),
    f("hypervisor", Word::Leaf1Ecx, 31),
    f("fsgsbase", Word::Leaf7Ebx, 0),
    f("tsc_adjust", Word::Leaf7Ebx, 1),
    f("smep", Word::Leaf7Ebx, 7),
    f("fpu", Word::Ext1Edx, 0),
    f("de", Word::Ext1Edx, 2),
    f("pse", Word::Ext1Edx, 3),
    f("tsc", Word::Ext1Edx, 4),
    f("msr", Word::Ext1Edx, 5),
    f("pae", Word::Ext1Edx, 6),
    f("cx8", Word::Ext1Edx, 8),
    f("syscall", Word::Ext1Edx, 11),
    f("mtrr", Word::Ext1Edx, 12),
    f("pge", Word::Ext1Edx, 13),
    f("cmov", Word::Ext1Edx, 15),
    f("pat", Word::Ext1Edx, 16),
    f("pse36", Word::Ext1Edx, 17),
    f("nx", Word::Ext1Edx, 20),
    f("mmxext", Word::Ext1Edx, 22),
    f("mmx", Word::Ext1Edx, 23),
    f("fxsr", Word::Ext1Edx, 24),
    f("pdpe1gb", Word::Ext1Edx, 26),
    f("rdtscp", Word::Ext1Edx, 27),
    f("lm", Word::Ext1Edx, 29),
    f("lahf_lm", Word::Ext1Ecx, 0),
    f("3dnowprefetch", Word::Ext1Ecx, 8),
    f("topoext", Word::Ext1Ecx, 22),
    f("constant_tsc", Word::Ext7Edx, 8),
    // FXSAVE always stores the x87 error pointers: no FXSAVE leak, no work-around in the guest.
    f("xsaveerptr", Word::Ext8Ebx, 2),
    // An interpreter has neither branch type confusion nor a return predictor to overflow.
    f("btc_no", Word::Ext8Ebx, 29),
    f("lfence_rdtsc", Word::Ext21Eax, 2),
    f("null_sel_clr_base", Word::Ext21Eax, 6),
    f("srso_no", Word::Ext21Eax, 29),
    f("kvm_clocksource", Word::Kvm, 0),
    f("kvm_nop_io_delay", Word::Kvm, 1),
    f("kvm_clocksource2", Word::Kvm, 3),
    f("kvm_clocksource_stable", Word::Kvm, 24),
];

/// The claimed bits of one register.
pub fn word(word: Word) -> u32 {
    FEATURES.iter().filter(|f| f.word == word).fold(0, |bits, f| bits | 1 << f.bit)
}

/// What one machine's CPUs show more or less than the profile, for programs that test a CPU. Software engine only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Switches {
    pub x2apic: bool,
    /// Costs the guest a STAC and CLAC around each copy from user memory; kernel translations of user pages are then not kept.
    pub smap: bool,
    pub umip: bool,
    /// Protection keys of user pages, and of supervisor pages.
    pub pku: bool,
    pub pks: bool,
    pub rdpid: bool,
    /// Far jumps and calls through memory take REX.W as a 64-bit offset, as Intel's processors do.
    pub far64: bool,
}

impl Default for Switches {
    fn default() -> Self {
        Self { x2apic: true, smap: false, umip: false, pku: false, pks: false, rdpid: false, far64: false }
    }
}

impl Switches {
    /// `+name` and `-name`, the later ones last; `Err` names what there is no switch for.
    pub fn changed(changes: &[impl AsRef<str>]) -> Result<Self, String> {
        let mut switches = Self::default();
        for change in changes {
            let change = change.as_ref();
            let on = change.starts_with('+');
            let switch = match change.get(1..) {
                Some("x2apic") => &mut switches.x2apic,
                Some("smap") => &mut switches.smap,
                Some("umip") => &mut switches.umip,
                Some("pku") => &mut switches.pku,
                Some("pks") => &mut switches.pks,
                Some("rdpid") => &mut switches.rdpid,
                Some("far64") => &mut switches.far64,
                _ => return Err(format!("{change:?} is not a change of the CPU profile")),
            };
            if !on && !change.starts_with('-') {
                return Err(format!("{change:?} begins with neither + nor -"));
            }
            *switch = on;
        }
        Ok(switches)
    }

    /// As [`word`], with the switches.
    pub fn word(&self, which: Word) -> u32 {
        let bit = |on: bool, n: u32| u32::from(on) << n;
        match which {
            Word::Leaf1Ecx => word(which) & !(1 << 21) | bit(self.x2apic, 21),
            Word::Leaf7Ebx => word(which) | bit(self.smap, 20),
            Word::Leaf7Ecx => bit(self.umip, 2) | bit(self.pku, 3) | bit(self.rdpid, 22) | bit(self.pks, 31),
            _ => word(which),
        }
    }

    /// Bits that CR4 takes. Others are #GP.
    pub fn cr4_allowed(&self) -> u64 {
        let bit = |on: bool, n: u32| u64::from(on) << n;
        CR4_ALLOWED | bit(self.umip, 11) | bit(self.smap, 21) | bit(self.pku, 22) | bit(self.pks, 24)
    }
}

/// Bits that CR4 takes: what the profile claims.
const CR4_ALLOWED: u64 = 1 << 2 // TSD
    | 1 << 3 // DE
    | 1 << 4 // PSE
    | 1 << 5 // PAE
    | 1 << 7 // PGE
    | 1 << 8 // PCE
    | 1 << 9 // OSFXSR
    | 1 << 10 // OSXMMEXCPT
    | 1 << 16 // FSGSBASE
    | 1 << 20; // SMEP

/// Bits that EFER takes: SCE, LME, LMA, NXE.
pub const EFER_ALLOWED: u64 = 1 | 1 << 8 | 1 << 10 | 1 << 11;

#[cfg(test)]
mod tests {
    use super::*;

    /// GCC's rule for `__builtin_cpu_is` in family 17h: models up to 1Fh are "znver1", those from 30h on "znver2", and between them
    /// CLWB (leaf 7 EBX 24) or CLZERO (8000_0008 EBX 0) decide.
    #[test]
    fn the_processor_is_none_that_has_avx2_by_its_name() {
        let family = (SIGNATURE >> 8 & 0xf) + (SIGNATURE >> 20 & 0xff);
        let model = SIGNATURE >> 4 & 0xf | SIGNATURE >> 12 & 0xf0;
        assert_eq!(family, 0x17);
        assert!((0x20..=0x2f).contains(&model), "{model:#x}");
        assert_eq!((word(Word::Leaf7Ebx) >> 24 & 1, word(Word::Ext8Ebx) & 1), (0, 0));
    }

    #[test]
    fn switches() {
        let none: [&str; 0] = [];
        assert_eq!(Switches::changed(&none), Ok(Switches::default()));
        assert_eq!(Switches::default().word(Word::Leaf1Ecx), word(Word::Leaf1Ecx));
        assert_eq!(Switches::default().cr4_allowed(), CR4_ALLOWED);
        let some = Switches::changed(&["+smap", "-x2apic", "+pku", "-pku"]).unwrap();
        assert_eq!(some, Switches { smap: true, x2apic: false, ..Switches::default() });
        assert_eq!(some.word(Word::Leaf7Ebx) >> 20 & 1, 1);
        assert_eq!(some.word(Word::Leaf1Ecx) >> 21 & 1, 0);
        for wrong in ["smap", "+avx", "", "=pku", "é"] {
            assert!(Switches::changed(&[wrong]).is_err(), "{wrong}");
        }
    }
}

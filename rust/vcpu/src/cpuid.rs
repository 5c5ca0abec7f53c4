//! CPUID (AMD vol. 3, appendix E; leaf 0Bh as SDM vol. 2). One socket, one thread a core, APIC id = vCPU number.

use crate::profile::{self, Switches, Word};

/// What CPUID depends on besides the profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// Initial APIC id.
    pub apic_id: u32,
    pub vcpus: u32,
    pub phys_bits: u8,
    pub tsc_khz: u64,
    /// IA32_APIC_BASE.EN: leaf 1 shows it.
    pub apic_enabled: bool,
    pub switches: Switches,
    /// CR4.PKE: leaf 7 shows it.
    pub keys_enabled: bool,
}

const MAX_BASIC: u32 = 0x0d;
const MAX_EXTENDED: u32 = 0x8000_0021;
const MAX_KVM: u32 = 0x4000_0010;

fn text(bytes: &[u8]) -> u32 {
    let mut word = [0; 4];
    for (to, from) in word.iter_mut().zip(bytes) {
        *to = *from;
    }
    u32::from_le_bytes(word)
}

impl Machine {
    /// Width of the core number in an APIC id.
    fn id_bits(&self) -> u32 {
        self.vcpus.max(1).next_power_of_two().trailing_zeros()
    }

    /// EAX, EBX, ECX, EDX. Leaves that do not exist are zero, as AMD's are.
    pub fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let v = profile::VENDOR;
        let vendor = [text(&v[0..]), text(&v[8..]), text(&v[4..])];
        let word = |which| self.switches.word(which);
        match leaf {
            0 => [MAX_BASIC, vendor[0], vendor[1], vendor[2]],
            1 => {
                let logical = self.vcpus.min(255);
                let ebx = self.apic_id << 24 | logical << 16 | 8 << 8;
                let mut edx = word(Word::Leaf1Edx);
                edx |= u32::from(self.apic_enabled) << 9 | u32::from(self.vcpus > 1) << 28;
                [profile::SIGNATURE, ebx, word(Word::Leaf1Ecx), edx]
            }
            // ARAT: the LAPIC timer runs in every idle state.
            6 => [1 << 2, 0, 0, 0],
            7 if subleaf == 0 => [0, word(Word::Leaf7Ebx), word(Word::Leaf7Ecx) | u32::from(self.keys_enabled) << 4, 0],
            0x0b => match subleaf {
                0 => [0, 1, 1 << 8, self.apic_id],
                1 => [self.id_bits(), self.vcpus, 2 << 8 | 1, self.apic_id],
                n => [0, 0, n & 0xff, self.apic_id],
            },
            0x4000_0000 => [MAX_KVM, text(b"KVMK"), text(b"VMKV"), text(b"M")],
            0x4000_0001 => [word(Word::Kvm), 0, 0, 0],
            0x4000_0010 => [self.tsc_khz.min(u64::from(u32::MAX)) as u32, profile::LAPIC_KHZ, 0, 0],
            0x8000_0000 => [MAX_EXTENDED, vendor[0], vendor[1], vendor[2]],
            0x8000_0001 => {
                let many = u32::from(self.vcpus > 1) << 1;
                let edx = word(Word::Ext1Edx) | u32::from(self.apic_enabled) << 9;
                [profile::SIGNATURE, 0, word(Word::Ext1Ecx) | many, edx]
            }
            0x8000_0002..=0x8000_0004 => {
                let mut brand = [0u8; 48];
                brand[..profile::BRAND.len()].copy_from_slice(profile::BRAND.as_bytes());
                let at = (leaf - 0x8000_0002) as usize * 16;
                [text(&brand[at..]), text(&brand[at + 4..]), text(&brand[at + 8..]), text(&brand[at + 12..])]
            }
            // L1: 32 KiB, 8 ways, 64-byte lines; TLBs of 64 entries.
            0x8000_0005 => [0xff40_ff40, 0xff40_ff40, 0x2008_0140, 0x2008_0140],
            // L2: 512 KiB, 8 ways; L3: 16 MiB, 16 ways.
            0x8000_0006 => [0x4800_6400, 0x6800_6400, 0x0200_6140, 0x0080_9140],
            0x8000_0007 => [0, 0, 0, word(Word::Ext7Edx)],
            0x8000_0008 => {
                let eax = u32::from(self.phys_bits) | u32::from(profile::LINEAR_BITS) << 8;
                [eax, word(Word::Ext8Ebx), self.vcpus.clamp(1, 256) - 1 | self.id_bits() << 12, 0]
            }
            0x8000_001d => {
                let shared = self.vcpus.clamp(1, 4096) - 1;
                // Type and level, ways − 1 and line − 1, sets − 1.
                let cache = |kind: u32, level: u32, ways: u32, sets: u32, sharing: u32| {
                    [kind | level << 5 | 1 << 8 | sharing << 14, (ways - 1) << 22 | 63, sets - 1, 0]
                };
                match subleaf {
                    0 => cache(1, 1, 8, 64, 0),
                    1 => cache(2, 1, 8, 64, 0),
                    2 => cache(3, 2, 8, 1024, 0),
                    3 => cache(3, 3, 16, 16384, shared),
                    _ => [0; 4],
                }
            }
            // Extended APIC id; core number, one thread a core; node 0, one node.
            0x8000_001e => [self.apic_id, self.apic_id & 0xff, 0, 0],
            0x8000_0021 => [word(Word::Ext21Eax), 0, 0, 0],
            _ => [0; 4],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(apic_id: u32, vcpus: u32) -> Machine {
        let (switches, keys_enabled) = (Switches::default(), false);
        Machine { apic_id, vcpus, phys_bits: 46, tsc_khz: 2_500_000, apic_enabled: true, switches, keys_enabled }
    }

    #[test]
    fn names_and_bounds() {
        let m = machine(0, 1);
        let [max, b, c, d] = m.cpuid(0, 0);
        let name: Vec<u8> = [b, d, c].iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!((max, name.as_slice()), (0xd, b"AuthenticAMD".as_slice()));
        let [_, b, c, d] = m.cpuid(0x4000_0000, 0);
        let kvm: Vec<u8> = [b, c, d].iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(kvm, b"KVMKVMKVM\0\0\0");
        assert_eq!(m.cpuid(0x4000_0001, 0)[0], 1 | 2 | 8 | 1 << 24);
        for leaf in [2, 4, 5, 9, 0xa, 0xd, 0xe, 0x15, 0x8000_000a, 0x8000_001f, 0x8000_0022, u32::MAX] {
            assert_eq!(m.cpuid(leaf, 0), [0; 4], "{leaf:#x}");
        }
        assert!(profile::BRAND.len() < 48);
    }

    #[test]
    fn topology_leaves_agree() {
        for vcpus in [1, 2, 3, 4, 8, 12, 255] {
            for id in [0, vcpus - 1] {
                let m = machine(id, vcpus);
                assert_eq!(m.cpuid(1, 0)[1] >> 24, id & 0xff);
                assert_eq!(m.cpuid(1, 0)[1] >> 16 & 0xff, vcpus);
                assert_eq!(m.cpuid(0xb, 0)[3], id);
                let [shift, count, kind, x2] = m.cpuid(0xb, 1);
                assert_eq!((count, kind, x2), (vcpus, 0x201, id));
                assert!(1 << shift >= vcpus);
                assert_eq!(m.cpuid(0x8000_001e, 0)[0], id);
                let [_, _, nc, _] = m.cpuid(0x8000_0008, 0);
                assert_eq!((nc & 0xff, nc >> 12 & 15), (vcpus - 1, shift));
            }
        }
    }

    #[test]
    fn apic_bit_follows_apic_base() {
        let on = machine(0, 1);
        let off = Machine { apic_enabled: false, ..on };
        assert_eq!(on.cpuid(1, 0)[3] ^ off.cpuid(1, 0)[3], 1 << 9);
        assert_eq!(on.cpuid(0x8000_0001, 0)[3] ^ off.cpuid(0x8000_0001, 0)[3], 1 << 9);
    }

    #[test]
    fn no_feature_twice() {
        for (i, a) in profile::FEATURES.iter().enumerate() {
            assert!(profile::FEATURES[..i].iter().all(|b| (a.word, a.bit) != (b.word, b.bit)), "{}", a.name);
        }
    }
}

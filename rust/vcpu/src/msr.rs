//! Numbers of the model-specific registers of the CPU profile, and the list of those that are saved: the same on both engines.

pub const TSC: u32 = 0x10;
pub const APIC_BASE: u32 = 0x1b;
pub const TSC_ADJUST: u32 = 0x3b;
pub const MICROCODE: u32 = 0x8b;
pub const MTRR_CAP: u32 = 0xfe;
pub const SYSENTER_CS: u32 = 0x174;
pub const MCG_CAP: u32 = 0x179;
pub const MCG_STATUS: u32 = 0x17a;
pub const SYSENTER_ESP: u32 = 0x175;
pub const SYSENTER_EIP: u32 = 0x176;
pub const MISC_ENABLE: u32 = 0x1a0;
pub const DEBUGCTL: u32 = 0x1d9;
pub const MTRR_PHYS: u32 = 0x200;
pub const PAT: u32 = 0x277;
pub const MTRR_DEF_TYPE: u32 = 0x2ff;
pub const TSC_DEADLINE: u32 = 0x6e0;
/// Rights of the supervisor pages' protection keys; only where they are switched on, and saved only there.
pub const PKRS: u32 = 0x6e1;
pub const EFER: u32 = 0xc000_0080;
pub const STAR: u32 = 0xc000_0081;
pub const LSTAR: u32 = 0xc000_0082;
pub const CSTAR: u32 = 0xc000_0083;
pub const FMASK: u32 = 0xc000_0084;
pub const FS_BASE: u32 = 0xc000_0100;
pub const GS_BASE: u32 = 0xc000_0101;
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
pub const TSC_AUX: u32 = 0xc000_0103;
pub const KVM_WALL_CLOCK_OLD: u32 = 0x11;
pub const KVM_SYSTEM_TIME_OLD: u32 = 0x12;
pub const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
pub const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
pub const HWCR: u32 = 0xc001_0015;
pub const SYSCFG: u32 = 0xc001_0010;
pub const DE_CFG: u32 = 0xc001_1029;

/// The fixed-range MTRRs in the order of the fixed ranges' addresses.
pub const MTRR_FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];

/// Every MSR that is saved, in the order in which it is restored (EFER is in the special registers; APIC_BASE before the
/// x2APIC ones, TSC_ADJUST before TSC and the deadline).
pub const SAVED: &[u32] = &[
    APIC_BASE,
    TSC_ADJUST,
    TSC,
    TSC_DEADLINE,
    TSC_AUX,
    STAR,
    LSTAR,
    CSTAR,
    FMASK,
    KERNEL_GS_BASE,
    SYSENTER_CS,
    SYSENTER_ESP,
    SYSENTER_EIP,
    PAT,
    MISC_ENABLE,
    MTRR_DEF_TYPE,
    0x200,
    0x201,
    0x202,
    0x203,
    0x204,
    0x205,
    0x206,
    0x207,
    0x208,
    0x209,
    0x20a,
    0x20b,
    0x20c,
    0x20d,
    0x20e,
    0x20f,
    0x250,
    0x258,
    0x259,
    0x268,
    0x269,
    0x26a,
    0x26b,
    0x26c,
    0x26d,
    0x26e,
    0x26f,
    KVM_WALL_CLOCK,
    KVM_SYSTEM_TIME,
    HWCR,
];

/// Whether the upper bits repeat bit 47.
fn canonical(address: u64) -> bool {
    (address << 16) as i64 >> 16 == address as i64
}

fn memory_type(t: u64) -> bool {
    matches!(t & 0xff, 0 | 1 | 4 | 5 | 6)
}

/// Whether `value` may be put in MSR `index` of those that are plain storage; the same rules for WRMSR and for a snapshot.
pub fn storable(index: u32, value: u64, phys_bits: u8) -> bool {
    let bytes = || value.to_le_bytes();
    match index {
        LSTAR | CSTAR | KERNEL_GS_BASE | FS_BASE | GS_BASE | SYSENTER_ESP | SYSENTER_EIP => canonical(value),
        FMASK | TSC_AUX | PKRS => value >> 32 == 0,
        PAT => bytes().iter().all(|&t| matches!(t, 0 | 1 | 4..=7)),
        MTRR_DEF_TYPE => value & !0xcff == 0 && memory_type(value),
        MTRR_PHYS..0x210 => {
            let reserved = !0u64 << phys_bits;
            if index & 1 == 0 { value & (reserved | 0xf00) == 0 && memory_type(value) } else { value & (reserved | 0x7ff) == 0 }
        }
        _ if MTRR_FIXED.contains(&index) => bytes().iter().all(|&t| memory_type(u64::from(t))),
        _ => true,
    }
}

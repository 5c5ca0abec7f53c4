//! Architectural state of one vCPU, in the engine's live form. No pointers. What is saved is `vcpu::VcpuState`;
//! `convert` is the one place where the two meet.

/// Index in [`Cpu::gpr`] that always reads zero: "no base", "no index".
pub const GPR_ZERO: u8 = 16;
/// Index in [`Cpu::gpr`] that holds the address of the running block's first byte: the base of RIP-relative
/// operands and branch targets, so that a block does not depend on the virtual address it is mapped at.
pub const GPR_BLOCK: u8 = 17;

pub const RAX: usize = 0;
pub const RCX: usize = 1;
pub const RDX: usize = 2;
pub const RBX: usize = 3;
pub const RSP: usize = 4;
pub const RBP: usize = 5;
pub const RSI: usize = 6;
pub const RDI: usize = 7;
pub const R11: usize = 11;

/// Segment register numbers as the instruction set encodes them. `SEG_FLAT` (base 0, no limit) is what DS/ES/SS/CS
/// overrides mean in 64-bit mode.
pub const ES: usize = 0;
pub const CS: usize = 1;
pub const SS: usize = 2;
pub const DS: usize = 3;
pub const FS: usize = 4;
pub const GS: usize = 5;
pub const SEG_FLAT: usize = 6;

pub mod flags {
    //! RFLAGS bits.
    pub const CF: u64 = 1 << 0;
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The six that arithmetic writes.
    pub const ARITH: u64 = CF | PF | AF | ZF | SF | OF;
}

/// A segment register with its hidden part. `attr` is the descriptor's access rights as VMX has them: bits 0–3 type, 4 S,
/// 5–6 DPL, 7 P, 12 AVL, 13 L, 14 D/B, 15 G, 16 unusable.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Segment {
    pub base: u64,
    /// In bytes, granularity already applied.
    pub limit: u32,
    pub selector: u16,
    pub attr: u32,
}

impl Segment {
    pub const S: u32 = 1 << 4;
    pub const P: u32 = 1 << 7;
    pub const L: u32 = 1 << 13;
    pub const DB: u32 = 1 << 14;
    pub const G: u32 = 1 << 15;
    pub const UNUSABLE: u32 = 1 << 16;

    /// Whether `len` bytes at `offset` are inside the limit (expand-down data segments: above it).
    pub fn holds(&self, offset: u64, len: u64) -> bool {
        let last = offset + (len - 1);
        if self.attr & (Self::S | 0xc) == Self::S | 4 {
            let top = if self.attr & Self::DB != 0 { 0xffff_ffff } else { 0xffff };
            return offset > u64::from(self.limit) && last <= top;
        }
        last <= u64::from(self.limit)
    }

    pub fn type_(&self) -> u8 {
        (self.attr & 15) as u8
    }
    pub fn dpl(&self) -> u8 {
        (self.attr >> 5 & 3) as u8
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Table {
    pub base: u64,
    pub limit: u16,
}

/// How code is decoded: the operating mode together with CS.L/D. Part of a block's key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CodeSize {
    #[default]
    Bits16,
    Bits32,
    Bits64,
}

/// x87 registers by *physical* number (R0–R7), MMX aliases their mantissas. `st[i]`: 64-bit mantissa and sign+exponent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fpu {
    pub st: [F80; 8],
    pub fcw: u16,
    /// TOP (bits 11–13) included, always up to date.
    pub fsw: u16,
    /// Full tag word is derived on demand; here one bit a physical register: 1 = in use (FXSAVE's abridged form).
    pub ftw: u8,
    pub fop: u16,
    pub fip: u64,
    pub fdp: u64,
}

/// The first ten bytes are the x87 memory format.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct F80 {
    pub mantissa: u64,
    pub sign_exp: u16,
}

impl Default for Fpu {
    fn default() -> Self {
        Self { st: [F80::default(); 8], fcw: 0x37f, fsw: 0, ftw: 0, fop: 0, fip: 0, fdp: 0 }
    }
}

/// MSRs that are plain storage. TSC, APIC, kvm-clock MSRs live with what they control.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub fmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub tsc_aux: u64,
    pub misc_enable: u64,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    pub mtrr_phys: [u64; 16],
}

/// What a halted or starting vCPU waits for (`KVM_MP_STATE_*`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Activity {
    #[default]
    Running,
    Halted,
    WaitInit,
    WaitSipi,
}

#[derive(Debug, Clone, Default)]
pub struct Cpu {
    /// RAX RCX RDX RBX RSP RBP RSI RDI R8–R15, then [`GPR_ZERO`], [`GPR_BLOCK`]; a power of two, so that `& 31` needs no check.
    pub gpr: [u64; 32],
    pub rip: u64,
    /// Lazy arithmetic flags. `lf_res`: the last result, sign-extended to 64 bits from its width. `lf_aux`: bit 63 = carry out
    /// of the top bit (CF); bit 63 ^ bit 62 = OF; bit 3 = carry out of bit 3 (AF); bits 8–15 are XORed into the low byte of
    /// `lf_res` for PF, bit 16 is XORed into its sign for SF: so any combination of flags can be represented (see `flags.rs`).
    pub lf_res: u64,
    pub lf_aux: u64,
    /// RFLAGS without the arithmetic bits (those are in `lf_*`); bit 1 set.
    pub flags: u64,
    pub seg: [Segment; 6],
    /// Copies of `seg[i].base` for address generation; [6] (SEG_FLAT) is 0. In 64-bit code only FS and GS are used from here.
    pub seg_base: [u64; 8],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: Table,
    pub idtr: Table,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub dr: [u64; 8],
    /// Rights of the protection keys, user and supervisor: two bits each, access disabled and write disabled.
    pub pkru: u32,
    pub pkrs: u32,
    pub msr: Msrs,
    /// Low quadword first in memory order: `xmm[i] as u128` is little endian.
    pub xmm: [u128; 16],
    pub mxcsr: u32,
    pub fpu: Fpu,
    pub cpl: u8,
    pub code_size: CodeSize,
    pub activity: Activity,
    /// Interrupts are held off for one instruction: bit 0 MOV SS / POP SS, bit 1 STI.
    pub shadow: u8,
    pub nmi_masked: bool,
    pub nmi_pending: u8,
    /// Instructions retired (each REP iteration counts one).
    pub icount: u64,
}

impl Cpu {
    pub fn long_mode(&self) -> bool {
        self.efer & (1 << 10) != 0
    }
    pub fn protected(&self) -> bool {
        self.cr0 & 1 != 0
    }
    pub fn paging(&self) -> bool {
        self.cr0 >> 31 & 1 != 0
    }
    pub fn v8086(&self) -> bool {
        self.flags & flags::VM != 0
    }
}

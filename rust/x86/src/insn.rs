//! A decoded instruction and the contract of the functions that execute it.

use crate::core::Core;

/// What happened, seen from the block loop. On `Ok` all effects of the instruction are in [`Core::cpu`] except RIP, which the
/// loop keeps unless the variant says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Flow {
    /// Go on with the next instruction of the block.
    Next,
    /// A branch: the handler has set `cpu.rip` (taken or not). Last instruction of its block.
    Jump,
    /// As `Jump`, but this instruction and the branch after it were executed together.
    Jump2,
    /// Completed; `cpu.rip` is to become the next instruction, then leave the block: something that translations, interrupts or
    /// the next fetch depend on has changed (CR, MSR, segment, flags IF/TF, code page written, I/O done, HLT).
    Leave,
    /// As `Leave`, but the handler has set `cpu.rip` itself (iret, far jump, sysret, SIPI).
    LeaveJump,
    /// A REP instruction that did some iterations: registers are exact, RIP stays at it.
    Again,
    /// The block is dead: nothing was executed, look it up again. Only the block cache's own marker says this.
    Stale,
}

/// The instruction faulted and changed nothing (precise). Details are in [`Core::fault`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault;

/// Executes one instruction. Faults must come before any architectural effect.
pub type Handler = fn(&mut Core, &Insn) -> Result<Flow, Fault>;

/// Address size of the memory operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum AddrSize {
    A16,
    A32,
    A64,
}

pub const REP: u8 = 1;
pub const REPNE: u8 = 2;
pub const LOCK: u8 = 4;
/// The memory operand is a stack reference (segment SS): canonical and limit faults are #SS, not #GP.
pub const STACK: u8 = 8;
/// A direct branch of 64-bit code, last in its block. It has no memory operand; `disp`, `base` and `index` hold where the
/// blocks that follow it are: see [`Insn::link`].
pub const LINK: u8 = 16;

/// Register number of an 8-bit high register: `HIGH8 | 0..=3` for AH CH DH BH.
pub const HIGH8: u8 = 0x20;

/// One decoded instruction: 40 bytes. Filled by `decode` the same way for every handler from iced's operands, in operand order.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Insn {
    pub f: Handler,
    /// Immediate, sign-extended as the instruction wants it; for near branches the target *relative to the block's start*
    /// (target RIP = `gpr[GPR_BLOCK] + imm`); for a far pointer, `selector << 32 | offset`; ENTER: `imm8 << 16 | imm16`.
    pub imm: u64,
    /// Displacement, sign-extended. RIP-relative: base is `GPR_BLOCK` and this is relative to the block's start.
    pub disp: i64,
    /// GPR numbers, `GPR_ZERO` where there is none.
    pub base: u8,
    pub index: u8,
    /// Bits 0–1: log2 of the scale. Outside 64-bit code also what the memory operand is, for segment limits: bit 3 it is
    /// written, bits 4–7 1 + log2 of its bytes (0: not known).
    pub shift: u8,
    /// Segment whose base is added (`SEG_FLAT` where it is known to be 0).
    pub seg: u8,
    pub asize: AddrSize,
    /// Register numbers of operands 0–2 (GPR, XMM, MM, ST(i), segment, CR or DR, as the instruction has it); of a memory or
    /// immediate operand 0. GPR8: 0–15 low byte, `HIGH8 | n` high byte.
    pub r: [u8; 3],
    /// Length in bytes.
    pub len: u8,
    /// REP, REPNE, LOCK, STACK, LINK.
    pub prefix: u8,
    /// Operand size in bytes (2, 4, 8; 1 for byte forms).
    pub osize: u8,
    /// Start of this instruction relative to the block's start.
    pub off: u16,
    /// `iced_x86::Code` as u16, for error messages and rarely used handlers that serve several codes.
    pub code: u16,
    /// Of a block's first instruction: how often it was interpreted, or [`TRANSLATED`], [`UNTRANSLATABLE`].
    pub heat: u8,
}

/// The block has a translation.
pub const TRANSLATED: u8 = 254;
/// The block is not to be translated.
pub const UNTRANSLATABLE: u8 = 255;

impl Insn {
    /// Where the block after this [`LINK`] branch is in the block cache: first instruction and count, 0 when it is not known.
    #[inline(always)]
    pub fn link(&self, taken: bool) -> (u32, u8) {
        let both = self.disp as u64;
        if taken { (both as u32, self.base) } else { ((both >> 32) as u32, self.index) }
    }

    /// Only for a block on the same page: that it can be executed here follows from this instruction's being executed.
    pub fn set_link(&mut self, taken: bool, start: u32, count: u8) {
        let both = self.disp as u64;
        if taken {
            self.disp = (both & !0xffff_ffff | u64::from(start)) as i64;
            self.base = count;
        } else {
            self.disp = (both & 0xffff_ffff | u64::from(start) << 32) as i64;
            self.index = count;
        }
    }
}

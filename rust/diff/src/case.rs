//! What one run starts from and ends with, and the address space both sides see.

use iced_x86::Code;

/// Two pages of code (read, execute), full of INT3 but for the case's bytes. The page after is not mapped.
pub const CODE: u64 = 0x1000_0000;
pub const CODE_LEN: usize = 0x2000;
/// Two pages of data (read, write), one that is read-only, none executable. The pages before and after are not mapped.
pub const DATA: u64 = 0x2000_0000;
pub const DATA_LEN: usize = 0x3000;
pub const READ_ONLY: u64 = DATA + 0x2000;
pub const DATA_END: u64 = DATA + DATA_LEN as u64;

pub const INT3: u8 = 0xcc;

/// Selectors of Linux's GDT, which our side copies.
pub const USER_CS32: u16 = 0x23;
pub const USER_DS: u16 = 0x2b;
pub const USER_CS64: u16 = 0x33;

/// Registers as FXSAVE (64-bit form) and the general registers in encoding order.
#[repr(C, align(64))]
#[derive(Clone, PartialEq, Eq)]
pub struct State {
    pub fx: [u8; 512],
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    /// ES CS SS DS FS GS.
    pub selectors: [u16; 6],
}

impl Default for State {
    fn default() -> Self {
        Self { fx: [0; 512], gpr: [0; 16], rip: 0, rflags: 2, fs_base: 0, gs_base: 0, selectors: [0; 6] }
    }
}

/// Offsets in the FXSAVE image.
pub mod fx {
    pub const FCW: usize = 0;
    pub const FSW: usize = 2;
    pub const FTW: usize = 4;
    pub const MXCSR: usize = 24;
    /// ST(0)–ST(7), 16 bytes apart, 10 bytes each.
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
}

impl State {
    pub fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.fx[at], self.fx[at + 1]])
    }
    pub fn set_u16(&mut self, at: usize, v: u16) {
        self.fx[at..at + 2].copy_from_slice(&v.to_le_bytes());
    }
    pub fn mxcsr(&self) -> u32 {
        u32::from_le_bytes(self.fx[fx::MXCSR..fx::MXCSR + 4].try_into().expect("4 bytes"))
    }
    pub fn set_mxcsr(&mut self, v: u32) {
        self.fx[fx::MXCSR..fx::MXCSR + 4].copy_from_slice(&v.to_le_bytes());
    }
    pub fn xmm(&self, n: usize) -> u128 {
        let at = fx::XMM + 16 * n;
        u128::from_le_bytes(self.fx[at..at + 16].try_into().expect("16 bytes"))
    }
    pub fn set_xmm(&mut self, n: usize, v: u128) {
        let at = fx::XMM + 16 * n;
        self.fx[at..at + 16].copy_from_slice(&v.to_le_bytes());
    }
    /// ST(n): mantissa, sign and exponent.
    pub fn st(&self, n: usize) -> (u64, u16) {
        let at = fx::ST + 16 * n;
        (u64::from_le_bytes(self.fx[at..at + 8].try_into().expect("8 bytes")), self.u16(at + 8))
    }
    pub fn set_st(&mut self, n: usize, mantissa: u64, sign_exp: u16) {
        let at = fx::ST + 16 * n;
        self.fx[at..at + 8].copy_from_slice(&mantissa.to_le_bytes());
        self.set_u16(at + 8, sign_exp);
    }
}

/// One experiment.
#[derive(Clone)]
pub struct Case {
    pub number: u64,
    pub code: Code,
    /// Machine code at `state.rip`; what does not fit into the code pages is not there.
    pub bytes: Vec<u8>,
    /// How many of the bytes are other instructions before the one that the case is about.
    pub prelude: usize,
    pub bits: u32,
    pub state: State,
    pub data: Box<[u8; DATA_LEN]>,
}

/// How it ended: always with an exception, INT3 where the instruction went through.
#[derive(Clone, PartialEq, Eq)]
pub struct Outcome {
    pub state: State,
    pub vector: u8,
    pub error: u32,
    pub cr2: u64,
    pub data: Box<[u8; DATA_LEN]>,
}

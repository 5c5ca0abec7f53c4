//! Operands: guest registers to host registers, and the addresses of memory operands.

use iced_x86::{Instruction, Mnemonic as N, OpKind, Register};

use super::asm::{Mem, R11, RAX};
use super::block::{Result, Translator, Unsupported};
use super::frame::{MAP, segment_base, word};
use crate::state::{FS, GS};

/// A memory operand that is accessed.
#[derive(Debug, Clone, Copy)]
pub struct Access {
    /// Written, or read and written.
    pub write: bool,
    pub size: u32,
}

/// Instructions that look like an access and make none.
pub fn is_nop(mnemonic: N) -> bool {
    matches!(
        mnemonic,
        N::Nop
            | N::Endbr64
            | N::Endbr32
            | N::Prefetchnta
            | N::Prefetcht0
            | N::Prefetcht1
            | N::Prefetcht2
            | N::Prefetchw
            | N::Prefetchwt1
            | N::Lfence
            | N::Mfence
            | N::Sfence
    )
}

/// The explicit memory operand, if the instruction accesses one.
pub fn memory(ins: &Instruction) -> Option<Access> {
    let mnemonic = ins.mnemonic();
    if mnemonic == N::Lea || is_nop(mnemonic) {
        return None;
    }
    let place = (0..ins.op_count()).find(|&n| ins.op_kind(n) == OpKind::Memory)?;
    let reads_only = matches!(
        mnemonic,
        N::Cmp
            | N::Test
            | N::Bt
            | N::Mul
            | N::Imul
            | N::Div
            | N::Idiv
            | N::Push
            | N::Call
            | N::Jmp
            | N::Comiss
            | N::Ucomiss
            | N::Comisd
            | N::Ucomisd
    );
    let write = place == 0 && !reads_only || matches!(mnemonic, N::Xchg);
    Some(Access { write, size: ins.memory_size().size() as u32 })
}

/// Guest number of a general register that is not AH, CH, DH or BH.
pub fn guest(register: Register) -> Result<usize> {
    if !register.is_gpr() || matches!(register, Register::AH | Register::CH | Register::DH | Register::BH) {
        return Err(Unsupported);
    }
    Ok(register.full_register().number())
}

/// Host register `n` in the size of `like`.
pub fn sized(n: u8, like: Register) -> Register {
    let n = u32::from(n);
    match like.size() {
        1 if n < 4 => Register::AL + n,
        1 => Register::SPL + (n - 4),
        2 => Register::AX + n,
        4 => Register::EAX + n,
        _ => Register::RAX + n,
    }
}

impl Translator<'_> {
    /// A register that holds guest register `n`: its own, or `temporary`, loaded.
    pub fn fetch(&mut self, n: usize, temporary: u8) -> u8 {
        match MAP[n] {
            Some(host) => host,
            None => {
                self.asm.load(temporary, word(n));
                temporary
            }
        }
    }

    /// Writes `from` to guest register `n`.
    pub fn put(&mut self, n: usize, from: u8) {
        match MAP[n] {
            Some(host) => self.asm.mov(host, from),
            None => self.asm.store(word(n), from),
        }
    }

    /// RAX = address of the memory operand; `segment`: with FS or GS base, which changes RFLAGS. Uses R11.
    pub fn address(&mut self, ins: &Instruction, segment: bool) -> Result {
        let (base, index) = (ins.memory_base(), ins.memory_index());
        let prefix = ins.memory_segment().number();
        let disp = i32::try_from(ins.memory_displacement64() as i64).map_err(|_| Unsupported)?;
        let narrow = base.is_gpr32() || index.is_gpr32();
        if base == Register::RIP {
            let offset = i32::from(self.unit.offset).checked_add(disp).ok_or(Unsupported)?;
            self.linear(offset);
        } else if base == Register::None && index == Register::None {
            if ins.memory_displ_size() != 8 {
                return Err(Unsupported);
            }
            // mov rax, simm32
            self.asm.bytes(&[0x48, 0xc7, 0xc0]);
            self.asm.imm32(disp as u32);
        } else if (base == Register::None || base.is_gpr64() || base.is_gpr32())
            && (index == Register::None || index.is_gpr64() || index.is_gpr32())
        {
            let base = if base == Register::None { None } else { Some(self.fetch(guest(base)?, R11)) };
            let shift = ins.memory_index_scale().trailing_zeros() as u8;
            let index = if index == Register::None { None } else { Some((self.fetch(guest(index)?, RAX), shift)) };
            match (base, index, disp) {
                (Some(base), None, 0) if !narrow => self.asm.mov(RAX, base),
                _ => self.asm.rm(!narrow, &[0x8d], RAX, Mem { base, index, disp }),
            }
        } else {
            return Err(Unsupported);
        }
        if segment && (prefix == FS || prefix == GS) {
            self.asm.rm(true, &[0x03], RAX, segment_base(prefix));
        }
        Ok(())
    }
}

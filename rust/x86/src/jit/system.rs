//! Kernel entry and exit, critical sections: CLI, STI, PUSHFQ, POPFQ, CLD, STD, SWAPGS, CMPXCHG16B.
//!
//! An interrupt that waits, ring 1 or 2, a trap flag that would be set: all these are for the functions.

use std::mem::offset_of;

use iced_x86::{Instruction, Mnemonic as N};

use super::asm::{Mem, R11, RAX, RBP};
use super::block::{Flags, Result, Translator, Unsupported};
use super::frame::{FLAGS, MAP, SCRATCH, field, segment_base, word};
use super::integer::place;
use super::operand::Access;
use super::transfer::{self, SP};
use crate::core::Core;
use crate::lapic::Lapic;
use crate::state::{Cpu, GS, Msrs, Segment, flags};

fn cpu(offset: usize) -> Mem {
    Mem::at(RBP, field(offset_of!(Core, cpu) + offset))
}

/// RFLAGS without the arithmetic bits.
fn system_flags() -> Mem {
    cpu(offset_of!(Cpu, flags))
}

pub fn template(t: &mut Translator<'_>, ins: &Instruction) -> Result {
    match ins.mnemonic() {
        N::Cli => {
            only_in_ring_0(t)?;
            change_flags(t, 4, !flags::IF);
        }
        N::Sti => sti(t)?,
        N::Cld => {
            t.spoil_flags();
            change_flags(t, 4, !flags::DF);
        }
        N::Std => {
            t.spoil_flags();
            change_flags(t, 1, flags::DF);
        }
        N::Pushfq => pushf(t),
        N::Popfq => popf(t)?,
        N::Swapgs => swapgs(t)?,
        N::Cmpxchg16b => compare_exchange(t, ins)?,
        _ => return Err(Unsupported),
    }
    Ok(())
}

/// `cmp byte [m], 0`; the jump whose distance stands at the result is taken when it is not.
fn unless_zero(t: &mut Translator<'_>, m: Mem) -> usize {
    t.asm.rm(false, &[0x80], 7, m);
    t.asm.bytes(&[0]);
    t.asm.jcc_forward(5)
}

fn only_in_ring_0(t: &mut Translator<'_>) -> Result {
    if t.unit.half != 0 {
        return Err(Unsupported);
    }
    t.spoil_flags();
    let other = unless_zero(t, cpu(offset_of!(Cpu, cpl)));
    t.slow(other);
    Ok(())
}

/// `and dword [flags], with` (operation 4), `or` (1).
fn change_flags(t: &mut Translator<'_>, operation: u8, with: u64) {
    t.asm.rm(false, &[0x81], operation, system_flags());
    t.asm.imm32(with as u32);
}

/// An interrupt that waits for IF goes to the function.
fn unless_interrupted(t: &mut Translator<'_>) {
    let waits = unless_zero(t, Mem::at(RBP, field(offset_of!(Core, lapic) + offset_of!(Lapic, waits))));
    t.slow(waits);
}

/// Interrupts stay off for one instruction more. That is the next of this block, which no turn's end can come before, and nothing waits
/// to interrupt after it; so the shadow need not be noted.
fn sti(t: &mut Translator<'_>) -> Result {
    if t.is_last() {
        return Err(Unsupported);
    }
    only_in_ring_0(t)?;
    unless_interrupted(t);
    change_flags(t, 1, flags::IF);
    Ok(())
}

fn pushf(t: &mut Translator<'_>) {
    t.spoil_flags();
    t.asm.rm(false, &[0x8b], RAX, word(FLAGS));
    // mov r11d, eax; shr r11d, 8; and r11d, 0xd5; and eax, 1; shl eax, 11; or eax, r11d
    t.asm.bytes(&[0x41, 0x89, 0xc3, 0x41, 0xc1, 0xeb, 8, 0x41, 0x81, 0xe3, 0xd5, 0, 0, 0]);
    t.asm.bytes(&[0x83, 0xe0, 1, 0xc1, 0xe0, 11, 0x44, 9, 0xd8]);
    t.asm.rm(false, &[0x0b], RAX, system_flags());
    // and eax, without RF and VM
    t.asm.bytes(&[0x25]);
    t.asm.imm32(!(flags::RF | flags::VM) as u32);
    t.asm.store(word(SCRATCH), RAX);
    transfer::below_top(t);
    t.asm.lea(R11, Mem::indexed(R11, RAX, 0));
    t.asm.load(RAX, word(SCRATCH));
    t.asm.store(Mem::at(R11, 0), RAX);
    transfer::move_top(t, -8);
}

fn popf(t: &mut Translator<'_>) -> Result {
    /// What ring 0 may change besides arithmetic flags and TF.
    const FREE: u64 = flags::DF | flags::NT | flags::AC | flags::ID | flags::IOPL | flags::IF;
    only_in_ring_0(t)?;
    t.asm.mov(RAX, SP);
    t.translate(8, false);
    t.asm.load(RAX, Mem::indexed(R11, RAX, 0));
    // test eax, TF; jnz
    t.asm.bytes(&[0xa9]);
    t.asm.imm32(flags::TF as u32);
    let trap = t.asm.jcc_forward(5);
    t.slow(trap);
    // bt eax, 9; jnc: interrupts will be off
    t.asm.bytes(&[0x0f, 0xba, 0xe0, 9]);
    let off = t.asm.jcc_forward(3);
    unless_interrupted(t);
    t.asm.land(off);
    // movzx r11d, al; shl r11d, 8; bt eax, 11; adc r11d, 0: as LAHF and SETO leave them
    t.asm.bytes(&[0x44, 0x0f, 0xb6, 0xd8, 0x41, 0xc1, 0xe3, 8, 0x0f, 0xba, 0xe0, 11, 0x41, 0x83, 0xd3, 0]);
    t.asm.store(word(FLAGS), R11);
    // and eax, FREE
    t.asm.bytes(&[0x25]);
    t.asm.imm32(FREE as u32);
    change_flags(t, 4, !(FREE | flags::RF | flags::TF));
    t.asm.rm(false, &[0x09], RAX, system_flags());
    transfer::move_top(t, 8);
    Ok(())
}

fn swapgs(t: &mut Translator<'_>) -> Result {
    only_in_ring_0(t)?;
    let other = cpu(offset_of!(Cpu, msr) + offset_of!(Msrs, kernel_gs_base));
    let base = cpu(offset_of!(Cpu, seg) + GS * size_of::<Segment>() + offset_of!(Segment, base));
    t.asm.load(RAX, other);
    t.asm.load(R11, base);
    t.asm.store(other, R11);
    t.asm.store(base, RAX);
    t.asm.store(segment_base(GS), RAX);
    Ok(())
}

/// RBX, RCX and RDX are where the host's instruction wants them; no other access can come between, so it needs no LOCK.
fn compare_exchange(t: &mut Translator<'_>, ins: &Instruction) -> Result {
    debug_assert_eq!([MAP[0], MAP[1], MAP[2], MAP[3]], [Some(8), Some(1), Some(2), Some(3)]);
    let m = place(t, ins, Access { write: true, size: 16 }, true)?;
    // test r11b, 15; jnz: #GP
    t.asm.bytes(&[0x41, 0xf6, 0xc3, 15]);
    let unaligned = t.asm.jcc_forward(5);
    t.slow(unaligned);
    // It changes ZF and keeps the others.
    t.host_flags();
    t.asm.mov(RAX, 8);
    t.asm.rm(true, &[0x0f, 0xc7], 1, m);
    t.asm.mov(8, RAX);
    t.flags = Flags::Host;
    Ok(())
}

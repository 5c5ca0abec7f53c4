//! Stack and branches: PUSH, POP, LEAVE, and the ways from block to block.
//!
//! Direct jumps inside a page are patched to go straight to their target: that it may be executed there follows from the page's being
//! executed. All others look their target up among this vCPU's [code entries](super::codes), which are dropped with the translations.

use iced_x86::{Instruction, Mnemonic as N, OpKind, Register};

use super::asm::{Mem, R11, RAX, RBP};
use super::block::{Result, Translator, Unsupported, is_direct};
use super::codes::{self, ENTRIES};
use super::frame::{self, PAGE, SCRATCH, word};
use super::integer::place;
use super::operand::{self, guest};
use crate::state::{RBP as GUEST_RBP, RSP};

pub const SP: u8 = 9;
const BP: u8 = 10;

/// `Some(Ok(()))` or an error for instructions of this family that end a block; pushes and pops are among the `None`s with a template.
pub fn template(t: &mut Translator<'_>, ins: &Instruction) -> Option<Result> {
    match ins.mnemonic() {
        N::Jmp if is_direct(ins) => Some(jump(t, ins)),
        N::Call if is_direct(ins) => Some(call(t, ins)),
        N::Jmp | N::Call if ins.op0_kind() == OpKind::Register || ins.op0_kind() == OpKind::Memory => Some(indirect(t, ins)),
        N::Ret => Some(ret(t, ins)),
        _ if is_direct(ins) && ins.condition_code() != iced_x86::ConditionCode::None && ins.rflags_read() != 0 => {
            // LOOPE and LOOPNE have conditions too.
            if matches!(ins.mnemonic(), N::Loop | N::Loope | N::Loopne) {
                Some(Err(Unsupported))
            } else {
                Some(conditional(t, ins))
            }
        }
        _ => None,
    }
}

/// PUSH, POP, LEAVE.
pub fn stack(t: &mut Translator<'_>, ins: &Instruction) -> Result {
    match ins.mnemonic() {
        N::Push => push(t, ins),
        N::Pop => pop(t, ins),
        N::Leave => leave(t, ins),
        _ => Err(Unsupported),
    }
}

/// R11 + RAX = host address of the eight bytes below the stack's top.
pub fn below_top(t: &mut Translator<'_>) {
    t.asm.lea(RAX, Mem::at(SP, -8));
    t.translate(8, true);
}

pub fn move_top(t: &mut Translator<'_>, by: i32) {
    t.asm.lea(SP, Mem::at(SP, by));
}

fn push(t: &mut Translator<'_>, ins: &Instruction) -> Result {
    if ins.stack_pointer_increment() != -8 {
        return Err(Unsupported);
    }
    t.spoil_flags();
    match ins.op0_kind() {
        OpKind::Register => {
            let number = guest(ins.op0_register())?;
            below_top(t);
            match frame::MAP[number] {
                Some(host) => t.asm.store(Mem::indexed(R11, RAX, 0), host),
                None => {
                    t.asm.lea(R11, Mem::indexed(R11, RAX, 0));
                    t.asm.load(RAX, word(number));
                    t.asm.store(Mem::at(R11, 0), RAX);
                }
            }
        }
        OpKind::Immediate8to64 | OpKind::Immediate32to64 => {
            below_top(t);
            // mov qword [r11 + rax], simm32
            t.asm.rm(true, &[0xc7], 0, Mem::indexed(R11, RAX, 0));
            t.asm.imm32(ins.immediate(0) as u32);
        }
        _ => {
            let access = operand::memory(ins).ok_or(Unsupported)?;
            let m = place(t, ins, access, false)?;
            t.asm.load(RAX, m);
            t.asm.store(word(SCRATCH), RAX);
            below_top(t);
            t.asm.lea(R11, Mem::indexed(R11, RAX, 0));
            t.asm.load(RAX, word(SCRATCH));
            t.asm.store(Mem::at(R11, 0), RAX);
        }
    }
    move_top(t, -8);
    Ok(())
}

fn pop(t: &mut Translator<'_>, ins: &Instruction) -> Result {
    if ins.stack_pointer_increment() != 8 || ins.op0_kind() != OpKind::Register {
        return Err(Unsupported);
    }
    let number = guest(ins.op0_register())?;
    t.spoil_flags();
    t.asm.mov(RAX, SP);
    t.translate(8, false);
    if number == RSP {
        // What was popped is the new top.
        t.asm.load(SP, Mem::indexed(R11, RAX, 0));
        return Ok(());
    }
    match frame::MAP[number] {
        Some(host) => t.asm.load(host, Mem::indexed(R11, RAX, 0)),
        None => {
            t.asm.load(RAX, Mem::indexed(R11, RAX, 0));
            t.asm.store(word(number), RAX);
        }
    }
    move_top(t, 8);
    Ok(())
}

fn leave(t: &mut Translator<'_>, ins: &Instruction) -> Result {
    if ins.code() != iced_x86::Code::Leaveq {
        return Err(Unsupported);
    }
    debug_assert_eq!((frame::MAP[RSP], frame::MAP[GUEST_RBP]), (Some(SP), Some(BP)));
    t.spoil_flags();
    t.asm.mov(RAX, BP);
    t.translate(8, false);
    t.asm.load(RAX, Mem::indexed(R11, RAX, 0));
    t.asm.lea(SP, Mem::at(BP, 8));
    t.asm.mov(BP, RAX);
    Ok(())
}

/// Goes to the address `offset` bytes from the start of the page that is running.
pub fn goto(t: &mut Translator<'_>, offset: i64) {
    if (0..4096).contains(&offset) {
        let at = t.asm.jmp_forward();
        t.exit(at, offset as u16);
        return;
    }
    match i32::try_from(offset) {
        Ok(offset) => {
            t.linear(offset);
            let miss = probe(t);
            go(t);
            t.asm.land(miss);
        }
        Err(_) => unreachable!("direct branches reach 2 GiB"),
    }
    t.asm.jmp(t.unit.thunks.jump);
}

/// R11 = the entry of the address in RAX.
fn select(t: &mut Translator<'_>) {
    t.asm.rr(false, &[0x8b], R11, RAX);
    // shr r11d, 12; xor r11d, eax; and r11d, ENTRIES - 1; shl r11d, 4
    t.asm.bytes(&[0x41, 0xc1, 0xeb, 12, 0x41, 0x31, 0xc3, 0x41, 0x81, 0xe3]);
    t.asm.imm32(ENTRIES as u32 - 1);
    t.asm.bytes(&[0x41, 0xc1, 0xe3, 4]);
    t.asm.rm(true, &[0x03], R11, Mem::at(RBP, frame::codes()));
}

/// As `select`; the jump whose distance stands at the result is taken when the entry is another address's.
fn probe(t: &mut Translator<'_>) -> usize {
    select(t);
    t.asm.rm(true, &[0x3b], RAX, entry(t, 0));
    t.asm.jcc_forward(5)
}

/// A field of the entry that R11 points at; the running code's half follows from the block.
fn entry(t: &Translator<'_>, field: i32) -> Mem {
    Mem::at(R11, codes::half(t.unit.half) as i32 + field)
}

/// Goes to the entry at R11, whose address RAX holds.
fn go(t: &mut Translator<'_>) {
    // and rax, -4096
    t.asm.bytes(&[0x48, 0x25]);
    t.asm.imm32(0xffff_f000);
    t.asm.store(word(PAGE), RAX);
    t.asm.rm(false, &[0xff], 4, entry(t, 8));
}

/// Where a direct branch goes, from the start of the page.
fn target(t: &Translator<'_>, ins: &Instruction) -> Result<i64> {
    let offset = i64::from(t.unit.offset).wrapping_add(ins.near_branch64() as i64);
    if i32::try_from(offset).is_ok() { Ok(offset) } else { Err(Unsupported) }
}

fn jump(t: &mut Translator<'_>, ins: &Instruction) -> Result {
    let target = target(t, ins)?;
    t.save_flags();
    goto(t, target);
    Ok(())
}

fn conditional(t: &mut Translator<'_>, ins: &Instruction) -> Result {
    let target = target(t, ins)?;
    t.host_flags();
    t.save_flags();
    let condition = (ins.condition_code() as u8).wrapping_sub(1);
    let taken = t.asm.jcc_forward(condition & 15);
    let next = i64::from(t.unit.offset) + ins.next_ip() as i64;
    if (0..4096).contains(&target) {
        t.exit(taken, target as u16);
        goto(t, next);
    } else {
        goto(t, next);
        t.asm.land(taken);
        goto(t, target);
    }
    Ok(())
}

/// Stores the address after `ins` below the stack's top, and moves the top.
fn push_return(t: &mut Translator<'_>, ins: &Instruction) {
    below_top(t);
    t.asm.lea(R11, Mem::indexed(R11, RAX, 0));
    t.linear(i32::from(t.unit.offset) + ins.next_ip() as i32);
    t.asm.store(Mem::at(R11, 0), RAX);
    move_top(t, -8);
}

fn call(t: &mut Translator<'_>, ins: &Instruction) -> Result {
    let target = target(t, ins)?;
    t.spoil_flags();
    push_return(t, ins);
    goto(t, target);
    Ok(())
}

/// A target that is no entry, perhaps because nothing can be executed there, is the function's business: nothing has changed by then.
fn ret(t: &mut Translator<'_>, ins: &Instruction) -> Result {
    let extra = match ins.code() {
        iced_x86::Code::Retnq => 0,
        iced_x86::Code::Retnq_imm16 => i32::from(ins.immediate16()),
        _ => return Err(Unsupported),
    };
    t.spoil_flags();
    t.asm.mov(RAX, SP);
    t.translate(8, false);
    t.asm.load(RAX, Mem::indexed(R11, RAX, 0));
    let miss = probe(t);
    t.slow(miss);
    move_top(t, 8 + extra);
    go(t);
    Ok(())
}

fn indirect(t: &mut Translator<'_>, ins: &Instruction) -> Result {
    t.spoil_flags();
    if ins.op0_kind() == OpKind::Register {
        let register = ins.op0_register();
        if register.size() != 8 {
            return Err(Unsupported);
        }
        let from = t.fetch(guest(register)?, RAX);
        if from != RAX {
            t.asm.mov(RAX, from);
        }
    } else {
        let access = operand::memory(ins).ok_or(Unsupported)?;
        if access.size != 8 || ins.memory_base() == Register::None && ins.memory_displ_size() == 2 {
            return Err(Unsupported);
        }
        let m = place(t, ins, access, false)?;
        t.asm.load(RAX, m);
    }
    let miss = probe(t);
    t.slow(miss);
    if ins.mnemonic() == N::Call {
        t.asm.store(word(SCRATCH), RAX);
        push_return(t, ins);
        t.asm.load(RAX, word(SCRATCH));
        // The entry cannot have changed since.
        select(t);
    }
    go(t);
    Ok(())
}

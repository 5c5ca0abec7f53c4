//! One-operand MUL, IMUL, DIV and IDIV: the host's own, with the guest's accumulator moved to where it wants it.

use iced_x86::{Instruction, Mnemonic as N};

use super::asm::{R11, RAX};
use super::block::{Flags, Result, Translator, Unsupported};
use super::frame::{self, MAP};
use super::integer::{encode, place, redirect};
use super::operand::{Access, guest, sized};

const ACCUMULATOR: u8 = 8;
const RDX: u8 = 2;

pub fn template(t: &mut Translator<'_>, ins: &Instruction, access: Option<Access>) -> Result {
    let size = if access.is_some() { ins.memory_size().size() } else { ins.op0_register().size() };
    if size < 4 {
        return Err(Unsupported);
    }
    let wide = size == 8;
    let divides = matches!(ins.mnemonic(), N::Div | N::Idiv);
    let mut host = *ins;
    if let Some(access) = access {
        let m = place(t, ins, access, true)?;
        if divides {
            // The divisor is looked at before.
            t.asm.rm(wide, &[0x8b], R11, m);
            divide(t, ins, wide, R11);
            return Ok(());
        }
        redirect(&mut host, m);
    } else {
        let register = ins.op0_register();
        let from = t.fetch(guest(register)?, R11);
        if divides {
            t.spoil_flags();
            if from == RDX {
                return Err(Unsupported);
            }
            divide(t, ins, wide, from);
            return Ok(());
        }
        host.set_op0_register(sized(from, register));
    }
    // Some flags stay as they are.
    if t.needed_after() {
        t.host_flags();
    }
    t.asm.mov(RAX, ACCUMULATOR);
    encode(t, &mut host)?;
    t.asm.mov(ACCUMULATOR, RAX);
    debug_assert_eq!(MAP[2], Some(RDX), "the upper half goes to the guest's RDX");
    t.flags = Flags::Host;
    Ok(())
}

/// Divides when the quotient certainly fits; everything else, the faults above all, is for the function.
fn divide(t: &mut Translator<'_>, ins: &Instruction, wide: bool, divisor: u8) {
    if ins.mnemonic() == N::Div {
        // cmp edx, divisor; jae slow
        t.asm.rr(wide, &[0x3b], RDX, divisor);
        let slow = t.asm.jcc_forward(3);
        t.slow(slow);
    } else {
        // The dividend is a sign extension, and the divisor neither 0 nor -1.
        t.asm.mov(RAX, ACCUMULATOR);
        // sar rax, 63 (31); cmp rax, rdx; jne slow
        if wide {
            t.asm.bytes(&[0x48, 0xc1, 0xf8, 63]);
        } else {
            t.asm.bytes(&[0xc1, 0xf8, 31]);
        }
        t.asm.rr(wide, &[0x3b], RAX, RDX);
        let slow = t.asm.jcc_forward(5);
        t.slow(slow);
        // lea rax, [divisor + 1]; cmp rax, 1; jbe slow
        t.asm.rm(wide, &[0x8d], RAX, super::asm::Mem::at(divisor, 1));
        t.asm.rr(wide, &[0x83], 7, RAX);
        t.asm.bytes(&[1]);
        let slow = t.asm.jcc_forward(6);
        t.slow(slow);
    }
    if t.needed_after() {
        frame::restore_flags(&mut t.asm);
    }
    t.asm.mov(RAX, ACCUMULATOR);
    let operation = if ins.mnemonic() == N::Div { 6 } else { 7 };
    t.asm.rr(wide, &[0xf7], operation, divisor);
    t.asm.mov(ACCUMULATOR, RAX);
    t.flags = Flags::Host;
}

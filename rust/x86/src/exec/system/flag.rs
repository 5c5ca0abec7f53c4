//! IF and software interrupts.

use crate::core::{Core, GP, OF};
use crate::insn::{Fault, Flow, Insn};
use crate::state::flags;

fn iopl(core: &Core) -> u8 {
    (core.cpu.flags >> 12 & 3) as u8
}

/// CLI and STI are allowed at CPL ≤ IOPL; in virtual-8086 mode IOPL must be 3.
fn may_change_if(core: &mut Core) -> Result<(), Fault> {
    let allowed = !core.cpu.protected() || iopl(core) >= if core.cpu.v8086() { 3 } else { core.cpu.cpl };
    if allowed { Ok(()) } else { Err(core.raise(GP, Some(0))) }
}

pub fn cli(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    may_change_if(core)?;
    core.cpu.flags &= !flags::IF;
    Ok(Flow::Next)
}

/// Interrupts stay off for one more instruction when they were off.
pub fn sti(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    may_change_if(core)?;
    if core.cpu.flags & flags::IF == 0 {
        core.cpu.flags |= flags::IF;
        core.cpu.shadow |= 2;
    }
    Ok(Flow::Leave)
}

/// RIP is what the handler's frame will show; the loop puts it back when the interrupt faults.
fn soft(core: &mut Core, i: &Insn, vector: u8) -> Result<Flow, Fault> {
    core.cpu.rip = core.next_rip(i);
    core.soft_interrupt(vector)?;
    Ok(Flow::LeaveJump)
}

pub fn int(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    soft(core, i, i.imm as u8)
}

pub fn int3(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    soft(core, i, 3)
}

pub fn into(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    if core.cpu.of() { soft(core, i, OF) } else { Ok(Flow::Next) }
}

/// ICEBP.
pub fn int1(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    core.cpu.rip = core.next_rip(i);
    core.icebp()?;
    Ok(Flow::LeaveJump)
}

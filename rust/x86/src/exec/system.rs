//! Not written yet: selects nothing.

use iced_x86::Instruction;

use crate::insn::Handler;

pub fn select(_instr: &Instruction) -> Option<Handler> {
    None
}

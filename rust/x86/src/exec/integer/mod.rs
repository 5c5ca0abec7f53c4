//! General-purpose instructions. One module a family; handlers are generic over width and operand kinds and
//! every combination that the instruction set has is an own function.

mod alu;
mod arith;
mod bcd;
mod bit;
mod branch;
mod fused;
mod mov;
mod muldiv;
mod operand;
mod shift;
mod stack;
mod string;

use iced_x86::Instruction;

pub use branch::count_size;
pub use fused::pair;

use crate::insn::Handler;

pub fn select(instr: &Instruction) -> Option<Handler> {
    mov::select(instr)
        .or_else(|| alu::select(instr))
        .or_else(|| branch::select(instr))
        .or_else(|| stack::select(instr))
        .or_else(|| arith::select(instr))
        .or_else(|| shift::select(instr))
        .or_else(|| bit::select(instr))
        .or_else(|| muldiv::select(instr))
        .or_else(|| string::select(instr))
        .or_else(|| bcd::select(instr))
}

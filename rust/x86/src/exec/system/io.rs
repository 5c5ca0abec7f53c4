//! Port I/O.

use iced_x86::{Instruction, Mnemonic as M, OpKind};
use vcpu::Space;

use crate::core::{Core, GP};
use crate::insn::{AddrSize, Fault, Flow, Handler, Insn, REP, REPNE};
use crate::state::{ES, RAX, RCX, RDI, RDX, RSI, flags};

/// #GP(0) unless IOPL or the TSS's bitmap allows `width` bytes at `port`.
fn allowed(core: &mut Core, port: u16, width: u8) -> Result<(), Fault> {
    if !core.cpu.protected() {
        core.watch_port(port, width);
        return Ok(());
    }
    let iopl = (core.cpu.flags >> 12 & 3) as u8;
    if !core.cpu.v8086() && core.cpu.cpl <= iopl || core.io_bitmap_allows(port, width)? {
        core.watch_port(port, width);
        return Ok(());
    }
    Err(core.raise(GP, Some(0)))
}

fn input(core: &mut Core, port: u16, width: u8) -> u32 {
    let mut data = [0; 4];
    core.shared.bus.read(Space::Pio, u64::from(port), &mut data[..usize::from(width)]);
    u32::from_le_bytes(data)
}

fn output(core: &mut Core, port: u16, width: u8, value: u32) {
    core.shared.bus.write(Space::Pio, u64::from(port), &value.to_le_bytes()[..usize::from(width)]);
}

pub fn select(instr: &Instruction) -> Option<Handler> {
    let n = if instr.mnemonic() == M::In { 1 } else { 0 };
    let immediate = instr.op_kind(n) == OpKind::Immediate8;
    let width = instr.op_register(1 - n).size();
    Some(match (instr.mnemonic() == M::In, immediate, width) {
        (true, false, 1) => in_::<1, false>,
        (true, false, 2) => in_::<2, false>,
        (true, false, _) => in_::<4, false>,
        (true, true, 1) => in_::<1, true>,
        (true, true, 2) => in_::<2, true>,
        (true, true, _) => in_::<4, true>,
        (false, false, 1) => out::<1, false>,
        (false, false, 2) => out::<2, false>,
        (false, false, _) => out::<4, false>,
        (false, true, 1) => out::<1, true>,
        (false, true, 2) => out::<2, true>,
        (false, true, _) => out::<4, true>,
    })
}

fn port<const IMM: bool>(core: &Core, i: &Insn) -> u16 {
    if IMM { i.imm as u16 & 0xff } else { core.cpu.r16(RDX as u8) }
}

fn in_<const WIDTH: u8, const IMM: bool>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    core.at_known_count()?;
    let port = port::<IMM>(core, i);
    allowed(core, port, WIDTH)?;
    let value = input(core, port, WIDTH);
    match WIDTH {
        1 => core.cpu.set_r8(RAX as u8, value as u8),
        2 => core.cpu.set_r16(RAX as u8, value as u16),
        _ => core.cpu.set_r32(RAX as u8, value),
    }
    Ok(Flow::Leave)
}

fn out<const WIDTH: u8, const IMM: bool>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    core.at_known_count()?;
    let port = port::<IMM>(core, i);
    allowed(core, port, WIDTH)?;
    let value = core.cpu.r32(RAX as u8);
    output(core, port, WIDTH, value);
    Ok(Flow::Leave)
}

pub fn select_string(instr: &Instruction) -> Option<Handler> {
    Some(match instr.mnemonic() {
        M::Insb => ins::<1>,
        M::Insw => ins::<2>,
        M::Insd => ins::<4>,
        M::Outsb => outs::<1>,
        M::Outsw => outs::<2>,
        _ => outs::<4>,
    })
}

fn address_mask(i: &Insn) -> u64 {
    match i.asize {
        AddrSize::A16 => 0xffff,
        AddrSize::A32 => 0xffff_ffff,
        AddrSize::A64 => u64::MAX,
    }
}

/// A register used as counter or pointer: 16-bit writes keep the rest, 32-bit ones zero-extend.
fn put(core: &mut Core, r: usize, i: &Insn, value: u64) {
    match i.asize {
        AddrSize::A16 => core.cpu.set_r16(r as u8, value as u16),
        AddrSize::A32 => core.cpu.set_r32(r as u8, value as u32),
        AddrSize::A64 => core.cpu.set_r64(r as u8, value),
    }
}

/// One iteration a call: devices decide how fast this goes, not the loop.
fn repeated(
    core: &mut Core,
    i: &Insn,
    pointer: usize,
    width: u8,
    one: impl FnOnce(&mut Core) -> Result<(), Fault>,
) -> Result<Flow, Fault> {
    core.at_known_count()?;
    // Before the count: a forbidden REP INS of no elements faults too.
    let port = core.cpu.r16(RDX as u8);
    allowed(core, port, width)?;
    let mask = address_mask(i);
    let repeat = i.prefix & (REP | REPNE) != 0;
    let count = core.cpu.gpr[RCX] & mask;
    if repeat && count == 0 {
        return Ok(Flow::Leave);
    }
    one(core)?;
    let step = if core.cpu.flags & flags::DF != 0 { (width as u64).wrapping_neg() } else { u64::from(width) };
    let next = core.cpu.gpr[pointer].wrapping_add(step);
    put(core, pointer, i, next);
    if repeat {
        put(core, RCX, i, count - 1);
        if count > 1 {
            // An unfinished REP is not counted by the loop.
            core.budget = core.budget.saturating_sub(1);
            core.cpu.icount += 1;
            return Ok(Flow::Again);
        }
    }
    Ok(Flow::Leave)
}

fn ins<const WIDTH: u8>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    repeated(core, i, RDI, WIDTH, |core| {
        let port = core.cpu.r16(RDX as u8);
        let at = core.linear(core.flat_base(ES), core.cpu.gpr[RDI] & address_mask(i));
        core.probe_write(at, u64::from(WIDTH))?;
        let value = input(core, port, WIDTH);
        match WIDTH {
            1 => core.store8(at, value as u8),
            2 => core.store16(at, value as u16),
            _ => core.store32(at, value),
        }
    })
}

fn outs<const WIDTH: u8>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    repeated(core, i, RSI, WIDTH, |core| {
        let port = core.cpu.r16(RDX as u8);
        let at = core.linear(core.cpu.seg_base[usize::from(i.seg & 7)], core.cpu.gpr[RSI] & address_mask(i));
        let value = match WIDTH {
            1 => u32::from(core.load8(at)?),
            2 => u32::from(core.load16(at)?),
            _ => core.load32(at)?,
        };
        output(core, port, WIDTH, value);
        Ok(())
    })
}

impl Core {
    /// Base of a segment that 64-bit code takes as flat.
    fn flat_base(&self, seg: usize) -> u64 {
        if self.cpu.code_size == crate::state::CodeSize::Bits64 { 0 } else { self.cpu.seg[seg].base }
    }
}

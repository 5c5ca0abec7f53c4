//! Loads and stores of segment registers and descriptor tables, and the instructions that look at descriptors.

use iced_x86::{Code, Instruction, OpKind};

use super::in_memory;
use crate::core::{Core, GP, UD};
use crate::insn::{Fault, Flow, Handler, Insn};
use crate::segments::{CALL16, CALL32, Descriptor, LDT, TASK_GATE, TSS16, TSS16_BUSY, TSS32, TSS32_BUSY, canonical};
use crate::state::{CS, CodeSize, RSP, SS, flags};

/// MOV, PUSH and POP with a segment register.
pub fn select_mov(instr: &Instruction) -> Option<Handler> {
    let is_segment =
        |n: u32| instr.op_count() > n && instr.op_kind(n) == OpKind::Register && instr.op_register(n).is_segment_register();
    use iced_x86::Mnemonic as M;
    Some(match instr.mnemonic() {
        M::Mov if is_segment(0) => {
            if in_memory(instr, 1) {
                mov_from_memory
            } else {
                mov_from_register
            }
        }
        M::Mov if is_segment(1) => {
            if in_memory(instr, 0) {
                mov_to_memory
            } else {
                match instr.op0_register().size() {
                    2 => mov_to_register::<2>,
                    4 => mov_to_register::<4>,
                    _ => mov_to_register::<8>,
                }
            }
        }
        M::Push if is_segment(0) => match instr.code() {
            Code::Pushw_ES | Code::Pushw_CS | Code::Pushw_SS | Code::Pushw_DS | Code::Pushw_FS | Code::Pushw_GS => push::<2>,
            Code::Pushq_FS | Code::Pushq_GS => push::<8>,
            _ => push::<4>,
        },
        M::Pop if is_segment(0) => match instr.code() {
            Code::Popw_ES | Code::Popw_SS | Code::Popw_DS | Code::Popw_FS | Code::Popw_GS => pop::<2>,
            Code::Popq_FS | Code::Popq_GS => pop::<8>,
            _ => pop::<4>,
        },
        _ => return None,
    })
}

fn load(core: &mut Core, i: &Insn, selector: u16) -> Result<Flow, Fault> {
    let seg = usize::from(i.r[0]);
    if seg == CS || seg > 5 {
        return Err(core.raise(UD, None));
    }
    core.load_segment(seg, selector)?;
    if seg == SS {
        core.cpu.shadow |= 1;
        return Ok(Flow::Leave);
    }
    Ok(Flow::Next)
}

fn mov_from_register(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    load(core, i, core.cpu.r16(i.r[1]))
}
fn mov_from_memory(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let selector = core.load16(core.ea(i))?;
    load(core, i, selector)
}
fn mov_to_register<const SIZE: u8>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let value = core.cpu.seg[usize::from(i.r[1] % 6)].selector;
    core.put_register(i.r[0], SIZE, u64::from(value));
    Ok(Flow::Next)
}
fn mov_to_memory(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let value = core.cpu.seg[usize::from(i.r[1] % 6)].selector;
    core.store16(core.ea(i), value)?;
    Ok(Flow::Next)
}

fn push<const SIZE: u8>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let sp = core.cpu.gpr[RSP].wrapping_sub(u64::from(SIZE));
    // Zero-extended (AMD; Intel's 32-bit form stores 16 bits only).
    let value = u64::from(core.cpu.seg[usize::from(i.r[0] % 6)].selector);
    core.poke_stack(sp, SIZE, value)?;
    core.set_stack_pointer(sp);
    Ok(Flow::Next)
}
fn pop<const SIZE: u8>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let sp = core.cpu.gpr[RSP];
    let selector = core.peek_stack(sp, SIZE)? as u16;
    // The new stack segment's width applies to later accesses, not to this pop.
    let mask = core.stack_mask();
    let flow = load(core, i, selector)?;
    let next = sp.wrapping_add(u64::from(SIZE));
    core.cpu.gpr[RSP] = if mask == 0xffff { sp & !mask | next & mask } else { next & mask };
    Ok(flow)
}

/// LDS, LES, LSS, LFS, LGS.
pub fn load_far_pointer(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let code = Code::try_from(usize::from(i.code)).unwrap_or(Code::INVALID);
    let seg = match code {
        Code::Les_r16_m1616 | Code::Les_r32_m1632 => crate::state::ES,
        Code::Lds_r16_m1616 | Code::Lds_r32_m1632 => crate::state::DS,
        Code::Lss_r16_m1616 | Code::Lss_r32_m1632 | Code::Lss_r64_m1664 => SS,
        Code::Lfs_r16_m1616 | Code::Lfs_r32_m1632 | Code::Lfs_r64_m1664 => crate::state::FS,
        _ => crate::state::GS,
    };
    let at = core.ea(i);
    let offset = match i.osize {
        2 => u64::from(core.load16(at)?),
        4 => u64::from(core.load32(at)?),
        _ => core.load64(at)?,
    };
    let selector = core.load16(core.linear(at, u64::from(i.osize)))?;
    core.load_segment(seg, selector)?;
    core.put_register(i.r[0], i.osize, offset);
    // No interrupt shadow after LSS: it loads SS and SP at once.
    Ok(Flow::Leave)
}

// ---- descriptor tables ----

fn table_wide(core: &Core) -> bool {
    core.cpu.code_size == CodeSize::Bits64
}

/// LGDT, LIDT.
pub fn load_table<const GDT: bool>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    core.privileged()?;
    let at = core.ea(i);
    let limit = core.load16(at)?;
    let from = core.linear(at, 2);
    let base = if table_wide(core) {
        core.load64(from)?
    } else {
        let base = core.load32(from)?;
        let narrow = matches!(Code::try_from(usize::from(i.code)), Ok(Code::Lgdt_m1632_16 | Code::Lidt_m1632_16));
        u64::from(if narrow { base & 0xff_ffff } else { base })
    };
    if !canonical(base) {
        return Err(core.raise(GP, Some(0)));
    }
    let table = crate::state::Table { base, limit };
    if GDT {
        core.cpu.gdtr = table;
    } else {
        core.cpu.idtr = table;
    }
    Ok(Flow::Leave)
}

/// SGDT, SIDT.
pub fn store_table<const GDT: bool>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    core.not_prevented()?;
    let table = if GDT { core.cpu.gdtr } else { core.cpu.idtr };
    let mut bytes = [0u8; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let len = if table_wide(core) { 10 } else { 6 };
    core.store_bytes(core.ea(i), &bytes[..len])?;
    Ok(Flow::Next)
}

// ---- LLDT, LTR, SLDT, STR ----

fn protected_only(core: &mut Core) -> Result<(), Fault> {
    if core.cpu.protected() && !core.cpu.v8086() { Ok(()) } else { Err(core.raise(UD, None)) }
}

fn selector_operand<const MEM: bool>(core: &mut Core, i: &Insn, register: u8) -> Result<u16, Fault> {
    if MEM { core.load16(core.ea(i)) } else { Ok(core.cpu.r16(register)) }
}

macro_rules! by_place {
    ($name:ident, $handler:ident, $operand:expr) => {
        pub fn $name(instr: &Instruction) -> Handler {
            if in_memory(instr, $operand) { $handler::<true> } else { $handler::<false> }
        }
    };
}
by_place!(select_lldt, lldt, 0);
by_place!(select_ltr, ltr, 0);
by_place!(select_sldt, sldt, 0);
by_place!(select_str, str_, 0);
by_place!(select_lar, lar, 1);
by_place!(select_lsl, lsl, 1);
by_place!(select_arpl, arpl, 0);

fn lldt<const MEM: bool>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    protected_only(core)?;
    core.privileged()?;
    let selector = selector_operand::<MEM>(core, i, i.r[0])?;
    core.load_ldtr(selector)?;
    Ok(Flow::Leave)
}
fn ltr<const MEM: bool>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    protected_only(core)?;
    core.privileged()?;
    let selector = selector_operand::<MEM>(core, i, i.r[0])?;
    core.load_tr(selector)?;
    Ok(Flow::Leave)
}

/// A 16-bit value into memory, or zero-extended into a register.
pub(super) fn store_word<const MEM: bool>(core: &mut Core, i: &Insn, value: u64) -> Result<Flow, Fault> {
    if MEM {
        core.store16(core.ea(i), value as u16)?;
    } else {
        core.put_register(i.r[0], i.osize, value);
    }
    Ok(Flow::Next)
}
fn sldt<const MEM: bool>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    protected_only(core)?;
    core.not_prevented()?;
    store_word::<MEM>(core, i, u64::from(core.cpu.ldtr.selector))
}
fn str_<const MEM: bool>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    protected_only(core)?;
    core.not_prevented()?;
    store_word::<MEM>(core, i, u64::from(core.cpu.tr.selector))
}

// ---- LAR, LSL, VERR, VERW, ARPL ----

/// The descriptor when this privilege may see it.
fn visible(core: &mut Core, selector: u16, system: impl Fn(u8, bool) -> bool) -> Result<Option<Descriptor>, Fault> {
    if selector & !3 == 0 {
        return Ok(None);
    }
    let Some(d) = core.descriptor(selector)? else { return Ok(None) };
    if d.is_system() && !system(d.type_(), core.cpu.long_mode()) {
        return Ok(None);
    }
    let rpl = (selector & 3) as u8;
    Ok((d.conforming() || d.dpl() >= rpl.max(core.cpu.cpl)).then_some(d))
}

fn lar<const MEM: bool>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    protected_only(core)?;
    let selector = selector_operand::<MEM>(core, i, i.r[1])?;
    let known = |t: u8, long: bool| match t {
        LDT | TSS32 | TSS32_BUSY | CALL32 => true,
        TSS16 | TSS16_BUSY | CALL16 | TASK_GATE => !long,
        _ => false,
    };
    match visible(core, selector, known)? {
        Some(d) => {
            core.put_register(i.r[0], i.osize, d.0 >> 32 & 0x00ff_ff00);
            core.cpu.merge_rflags(flags::ZF, flags::ZF);
        }
        None => core.cpu.merge_rflags(0, flags::ZF),
    }
    Ok(Flow::Next)
}

fn lsl<const MEM: bool>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    protected_only(core)?;
    let selector = selector_operand::<MEM>(core, i, i.r[1])?;
    let known = |t: u8, long: bool| match t {
        LDT | TSS32 | TSS32_BUSY => true,
        TSS16 | TSS16_BUSY => !long,
        _ => false,
    };
    match visible(core, selector, known)? {
        Some(d) => {
            core.put_register(i.r[0], i.osize, u64::from(d.limit()));
            core.cpu.merge_rflags(flags::ZF, flags::ZF);
        }
        None => core.cpu.merge_rflags(0, flags::ZF),
    }
    Ok(Flow::Next)
}

pub fn select_verify<const WRITE: bool>(instr: &Instruction) -> Handler {
    if in_memory(instr, 0) { verify::<WRITE, true> } else { verify::<WRITE, false> }
}

fn verify<const WRITE: bool, const MEM: bool>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    protected_only(core)?;
    let selector = selector_operand::<MEM>(core, i, i.r[0])?;
    let d = visible(core, selector, |_, _| false)?;
    let good = d.is_some_and(|d| if WRITE { d.writable_data() } else { d.readable() });
    core.cpu.merge_rflags(if good { flags::ZF } else { 0 }, flags::ZF);
    Ok(Flow::Next)
}

fn arpl<const MEM: bool>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    protected_only(core)?;
    let rpl = core.cpu.r16(i.r[1]) & 3;
    let adjust = |old: u16| if old & 3 < rpl { (old & !3 | rpl, true) } else { (old, false) };
    let changed = if MEM {
        let at = core.ea(i);
        let (new, changed) = adjust(core.load16(at)?);
        if changed {
            core.store16(at, new)?;
        }
        changed
    } else {
        let (new, changed) = adjust(core.cpu.r16(i.r[0]));
        core.cpu.set_r16(i.r[0], new);
        changed
    };
    core.cpu.merge_rflags(if changed { flags::ZF } else { 0 }, flags::ZF);
    Ok(Flow::Next)
}

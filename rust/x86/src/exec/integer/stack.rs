//! PUSH, POP, ENTER, LEAVE, PUSHF, POPF, and the flag instructions beside them.

use iced_x86::{Code, Instruction, Mnemonic as N};

use super::operand::{I, Int, Kind, M, R, Source, code64, kind, place, wide};
use crate::core::{Core, Exception, GP, Pending, SS as STACK_FAULT};
use crate::insn::{Fault, Flow, Handler, Insn};
use crate::state::flags as fl;
use crate::state::{RBP, RSP, SS, Segment};

/// How the stack is addressed: [`Long`] in 64-bit code, [`Legacy`] through SS with 16 or 32 bits.
pub trait Stack {
    /// Stores below the top, then moves the top.
    fn push<T: Int>(core: &mut Core, v: T) -> Result<(), Fault>;
    /// Reads at `skip` bytes above the top.
    fn top<T: Int>(core: &mut Core, skip: u64) -> Result<T, Fault>;
    /// Faults where a push of `len` bytes would.
    fn probe(core: &mut Core, len: u64) -> Result<(), Fault>;
    /// Moves the top up.
    fn release(core: &mut Core, bytes: u64);
}

pub struct Long;
pub struct Legacy;

#[cold]
fn stack_fault(core: &mut Core, fault: Fault) -> Fault {
    if core.noncanonical {
        core.noncanonical = false;
        if let Some(Pending::Exception(Exception { vector: vector @ GP, .. })) = &mut core.fault {
            *vector = STACK_FAULT;
        }
    }
    fault
}

impl Stack for Long {
    #[inline(always)]
    fn push<T: Int>(core: &mut Core, v: T) -> Result<(), Fault> {
        let top = core.cpu.gpr[RSP].wrapping_sub(T::SIZE);
        core.store(top, v).map_err(|f| stack_fault(core, f))?;
        core.cpu.gpr[RSP] = top;
        Ok(())
    }
    #[inline(always)]
    fn top<T: Int>(core: &mut Core, skip: u64) -> Result<T, Fault> {
        core.load(core.cpu.gpr[RSP].wrapping_add(skip)).map_err(|f| stack_fault(core, f))
    }
    fn probe(core: &mut Core, len: u64) -> Result<(), Fault> {
        core.probe_write(core.cpu.gpr[RSP].wrapping_sub(len), len).map_err(|f| stack_fault(core, f))
    }
    #[inline(always)]
    fn release(core: &mut Core, bytes: u64) {
        core.cpu.gpr[RSP] = core.cpu.gpr[RSP].wrapping_add(bytes);
    }
}

/// Bits of SP that count outside 64-bit code.
fn mask(core: &Core) -> u64 {
    if core.cpu.seg[SS].attr & Segment::DB != 0 { 0xffff_ffff } else { 0xffff }
}

fn set_sp(core: &mut Core, sp: u64) {
    let mask = mask(core);
    let old = core.cpu.gpr[RSP];
    core.cpu.gpr[RSP] = if mask == 0xffff { old & !mask | sp & mask } else { sp & mask };
}

impl Legacy {
    fn linear(core: &mut Core, offset: u64, len: u64) -> Result<u64, Fault> {
        if !core.cpu.seg[SS].holds(offset, len) {
            return Err(core.raise(STACK_FAULT, Some(0)));
        }
        Ok(core.cpu.seg[SS].base.wrapping_add(offset) & 0xffff_ffff)
    }
}

impl Stack for Legacy {
    fn push<T: Int>(core: &mut Core, v: T) -> Result<(), Fault> {
        let top = core.cpu.gpr[RSP].wrapping_sub(T::SIZE) & mask(core);
        let at = Self::linear(core, top, T::SIZE)?;
        core.store(at, v)?;
        set_sp(core, top);
        Ok(())
    }
    fn top<T: Int>(core: &mut Core, skip: u64) -> Result<T, Fault> {
        let top = core.cpu.gpr[RSP].wrapping_add(skip) & mask(core);
        let at = Self::linear(core, top, T::SIZE)?;
        core.load(at)
    }
    fn probe(core: &mut Core, len: u64) -> Result<(), Fault> {
        let top = core.cpu.gpr[RSP].wrapping_sub(len) & mask(core);
        let at = Self::linear(core, top, len)?;
        core.probe_write(at, len)
    }
    fn release(core: &mut Core, bytes: u64) {
        let sp = core.cpu.gpr[RSP].wrapping_add(bytes);
        set_sp(core, sp);
    }
}

fn push<T: Int, K: Stack, S: Source>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let v: T = S::get(core, i)?;
    K::push(core, v)?;
    Ok(Flow::Next)
}

/// A segment register: the selector, zero-extended as AMD does it.
fn push_segment<T: Int, K: Stack>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let v = core.cpu.seg[usize::from(i.r[0]) % 6].selector;
    K::push(core, T::of(u64::from(v)))?;
    Ok(Flow::Next)
}

fn pop<T: Int, K: Stack>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let v: T = K::top(core, 0)?;
    K::release(core, T::SIZE);
    T::set(&mut core.cpu, i.r[0], v);
    Ok(Flow::Next)
}

/// `POP m`: an address that uses RSP is computed with the value after the pop.
fn pop_memory<T: Int, K: Stack>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let v: T = K::top(core, 0)?;
    let sp = core.cpu.gpr[RSP];
    K::release(core, T::SIZE);
    let at = core.ea(i);
    if let Err(fault) = core.store(at, v) {
        core.cpu.gpr[RSP] = sp;
        return Err(fault);
    }
    Ok(Flow::Next)
}

fn pusha<T: Int>(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    let sp = core.cpu.gpr[RSP];
    for r in 0..8 {
        let v = if r == RSP { sp } else { core.cpu.gpr[r] };
        if let Err(fault) = Legacy::push(core, T::of(v)) {
            core.cpu.gpr[RSP] = sp;
            return Err(fault);
        }
    }
    Ok(Flow::Next)
}

fn popa<T: Int>(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    let mut values = [T::of(0); 8];
    for (n, v) in values.iter_mut().enumerate() {
        *v = Legacy::top(core, n as u64 * T::SIZE)?;
    }
    for (n, v) in values.into_iter().enumerate() {
        let r = 7 - n;
        if r != RSP {
            T::set(&mut core.cpu, r as u8, v);
        }
    }
    Legacy::release(core, 8 * T::SIZE);
    Ok(Flow::Next)
}

fn leave<T: Int, K: Stack>(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    let sp = core.cpu.gpr[RSP];
    let bp = core.cpu.gpr[RBP];
    K::release(core, bp.wrapping_sub(sp));
    let v: T = match K::top(core, 0) {
        Ok(v) => v,
        Err(fault) => {
            core.cpu.gpr[RSP] = sp;
            return Err(fault);
        }
    };
    K::release(core, T::SIZE);
    T::set(&mut core.cpu, RBP as u8, v);
    Ok(Flow::Next)
}

fn enter<T: Int, K: Stack>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let (size, level) = (i.imm & 0xffff, i.imm >> 16 & 31);
    let (sp, bp) = (core.cpu.gpr[RSP], core.cpu.gpr[RBP]);
    let result = enter_steps::<T, K>(core, size, level);
    if result.is_err() {
        core.cpu.gpr[RSP] = sp;
        core.cpu.gpr[RBP] = bp;
    }
    result.map(|()| Flow::Next)
}

fn enter_steps<T: Int, K: Stack>(core: &mut Core, size: u64, level: u64) -> Result<(), Fault> {
    let bp = core.cpu.gpr[RBP];
    K::push(core, T::of(bp))?;
    let frame = core.cpu.gpr[RSP];
    for n in 1..level {
        let skip = bp.wrapping_sub(n * T::SIZE).wrapping_sub(core.cpu.gpr[RSP]);
        let v: T = K::top(core, skip)?;
        K::push(core, v)?;
    }
    if level > 0 {
        K::push(core, T::of(frame))?;
    }
    K::release(core, 0u64.wrapping_sub(size));
    // The processor checks that the new top could be written.
    let sp = core.cpu.gpr[RSP];
    K::release(core, T::SIZE);
    K::probe(core, T::SIZE)?;
    core.cpu.gpr[RSP] = sp;
    T::set(&mut core.cpu, RBP as u8, T::of(frame));
    Ok(())
}

fn iopl(core: &Core) -> u8 {
    (core.cpu.flags >> 12 & 3) as u8
}

fn pushf<T: Int, K: Stack>(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    if core.cpu.v8086() && iopl(core) < 3 {
        return Err(core.raise(GP, Some(0)));
    }
    let v = core.cpu.rflags() & !(fl::RF | fl::VM);
    K::push(core, T::of(v))?;
    Ok(Flow::Next)
}

fn popf<T: Int, K: Stack>(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    if core.cpu.v8086() && iopl(core) < 3 {
        return Err(core.raise(GP, Some(0)));
    }
    let v: T = K::top(core, 0)?;
    K::release(core, T::SIZE);
    let mut may = fl::ARITH | fl::TF | fl::DF | fl::NT | fl::AC | fl::ID;
    if core.cpu.cpl == 0 {
        may |= fl::IOPL;
    }
    if core.cpu.cpl <= iopl(core) {
        may |= fl::IF;
    }
    if T::SIZE == 2 {
        may &= 0xffff;
    }
    let old = core.cpu.rflags();
    core.cpu.set_rflags((old & !may | v.zext() & may) & !fl::RF);
    // Interrupts that were held off, single stepping and alignment checks begin at the next boundary.
    let now = core.cpu.flags;
    let aligned = core.cpu.cpl == 3 && (now ^ old) & fl::AC != 0;
    Ok(if now & fl::TF != 0 || now & !old & fl::IF != 0 || aligned { Flow::Leave } else { Flow::Next })
}

fn may_mask(core: &mut Core) -> Result<(), Fault> {
    if core.cpu.protected() && core.cpu.cpl > iopl(core) || core.cpu.v8086() && iopl(core) < 3 {
        return Err(core.raise(GP, Some(0)));
    }
    Ok(())
}

fn cli(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    may_mask(core)?;
    core.cpu.flags &= !fl::IF;
    Ok(Flow::Next)
}

fn sti(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    may_mask(core)?;
    if core.cpu.flags & fl::IF == 0 {
        core.cpu.flags |= fl::IF;
        core.cpu.shadow |= 2;
    }
    Ok(Flow::Leave)
}

fn cld(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    core.cpu.flags &= !fl::DF;
    Ok(Flow::Next)
}
fn std(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    core.cpu.flags |= fl::DF;
    Ok(Flow::Next)
}
fn clc(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    core.cpu.set_cf(false);
    Ok(Flow::Next)
}
fn stc(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    core.cpu.set_cf(true);
    Ok(Flow::Next)
}
fn cmc(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    let carry = core.cpu.cf();
    core.cpu.set_cf(!carry);
    Ok(Flow::Next)
}
fn lahf(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    let v = core.cpu.arith() as u8 | 2;
    core.cpu.set_r8(crate::insn::HIGH8, v);
    Ok(Flow::Next)
}
fn sahf(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    let of = core.cpu.arith() & fl::OF;
    let v = u64::from(core.cpu.r8(crate::insn::HIGH8));
    core.cpu.set_arith(v & fl::ARITH & !fl::OF | of);
    Ok(Flow::Next)
}

/// Bytes that PUSH and POP move.
fn pushed(instr: &Instruction) -> usize {
    instr.stack_pointer_increment().unsigned_abs() as usize
}

macro_rules! stacked {
    ($instr:expr, $size:expr, $f:ident $(, $g:ty)*) => {
        if code64($instr) { wide!($size, $f, Long $(, $g)*) } else { wide!($size, $f, Legacy $(, $g)*) }
    };
}

fn push_handler(instr: &Instruction) -> Option<Handler> {
    let n = pushed(instr);
    Some(match kind(instr, 0) {
        Kind::Imm => stacked!(instr, n, push, I),
        Kind::Other if instr.op0_register().is_segment_register() => stacked!(instr, n, push_segment),
        k if code64(instr) => place!(k, 0, wide, (n, push, Long)),
        k => place!(k, 0, wide, (n, push, Legacy)),
    })
}

pub fn select(instr: &Instruction) -> Option<Handler> {
    let n = pushed(instr);
    Some(match instr.mnemonic() {
        N::Push => return push_handler(instr),
        N::Pop => match kind(instr, 0) {
            Kind::Reg => stacked!(instr, n, pop),
            Kind::Flat | Kind::Mem => stacked!(instr, n, pop_memory),
            // Segment registers load descriptors: the system family.
            _ => return None,
        },
        N::Pusha => pusha::<u16>,
        N::Pushad => pusha::<u32>,
        N::Popa => popa::<u16>,
        N::Popad => popa::<u32>,
        N::Leave => match instr.code() {
            Code::Leaveq => leave::<u64, Long>,
            Code::Leaved => leave::<u32, Legacy>,
            _ if code64(instr) => leave::<u16, Long>,
            _ => leave::<u16, Legacy>,
        },
        N::Enter => match instr.code() {
            Code::Enterq_imm16_imm8 => enter::<u64, Long>,
            Code::Enterd_imm16_imm8 => enter::<u32, Legacy>,
            _ if code64(instr) => enter::<u16, Long>,
            _ => enter::<u16, Legacy>,
        },
        N::Pushf | N::Pushfd | N::Pushfq => stacked!(instr, n, pushf),
        N::Popf | N::Popfd | N::Popfq => stacked!(instr, n, popf),
        N::Cli => cli,
        N::Sti => sti,
        N::Cld => cld,
        N::Std => std,
        N::Clc => clc,
        N::Stc => stc,
        N::Cmc => cmc,
        N::Lahf => lahf,
        N::Sahf => sahf,
        _ => return None,
    })
}

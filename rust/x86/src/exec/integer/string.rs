//! MOVS STOS LODS CMPS SCAS with and without REP. (INS and OUTS are in the system family.)

use iced_x86::{Instruction, Mnemonic as N};
use memory::PAGE_SIZE;

use super::alu::sub;
use super::operand::Int;
use crate::core::Core;
use crate::insn::{AddrSize, Fault, Flow, Handler, Insn, REP, REPNE};
use crate::state::flags::DF;
use crate::state::{CodeSize, ES, RAX, RCX, RDI, RSI, Segment};

/// Bits of index and count registers that count.
#[inline(always)]
fn mask(i: &Insn) -> u64 {
    match i.asize {
        AddrSize::A64 => u64::MAX,
        AddrSize::A32 => 0xffff_ffff,
        AddrSize::A16 => 0xffff,
    }
}

#[inline(always)]
fn set(core: &mut Core, i: &Insn, r: usize, v: u64) {
    match i.asize {
        AddrSize::A64 => core.cpu.gpr[r] = v,
        AddrSize::A32 => core.cpu.gpr[r] = v & 0xffff_ffff,
        AddrSize::A16 => core.cpu.set_r16(r as u8, v as u16),
    }
}

#[inline(always)]
fn source<T: Int>(core: &Core, i: &Insn) -> u64 {
    let offset = core.cpu.gpr[RSI] & mask(i);
    core.address(usize::from(i.seg), offset, T::SIZE, false)
}

#[inline(always)]
fn target<T: Int>(core: &Core, i: &Insn, write: bool) -> u64 {
    let offset = core.cpu.gpr[RDI] & mask(i);
    if core.cpu.code_size == CodeSize::Bits64 { offset } else { core.segmented(ES, offset, T::SIZE, write) }
}

/// Moves an index register by `n` elements.
#[inline(always)]
fn advance<T: Int>(core: &mut Core, i: &Insn, r: usize, n: u64) {
    let bytes = n.wrapping_mul(T::SIZE);
    let v = core.cpu.gpr[r];
    let v = if core.cpu.flags & DF == 0 { v.wrapping_add(bytes) } else { v.wrapping_sub(bytes) };
    set(core, i, r, v);
}

/// How many elements up from `offset` (an index register) lie in one page and do not wrap the address size; 0 with DF.
#[inline(always)]
fn run<T: Int>(core: &Core, i: &Insn, seg: usize, linear: u64, offset: u64) -> u64 {
    if core.cpu.flags & DF != 0 {
        return 0;
    }
    let mut bytes = PAGE_SIZE - (linear & (PAGE_SIZE - 1));
    if i.asize != AddrSize::A64 {
        bytes = bytes.min((mask(i) - (offset & mask(i))).wrapping_add(1));
    }
    if core.cpu.code_size != CodeSize::Bits64 {
        let s = &core.cpu.seg[seg % 6];
        let expands_down = s.attr & (Segment::UNUSABLE | 0xc) == 4;
        bytes = if expands_down { 0 } else { bytes.min((u64::from(s.limit) + 1).saturating_sub(offset & mask(i))) };
    }
    bytes / T::SIZE
}

trait Str {
    /// Stops early on ZF (REPE, REPNE).
    const COMPARES: bool = false;
    /// One element.
    fn one<T: Int>(core: &mut Core, i: &Insn) -> Result<(), Fault>;
    /// Up to `most` elements at once; how many were done, 0 when it must go one by one.
    #[inline(always)]
    fn many<T: Int>(_: &mut Core, _: &Insn, _most: u64) -> u64 {
        0
    }
}

struct Movs;
struct Stos;
struct Lods;
struct Cmps;
struct Scas;

impl Str for Movs {
    #[inline(always)]
    fn one<T: Int>(core: &mut Core, i: &Insn) -> Result<(), Fault> {
        let v: T = core.load(source::<T>(core, i))?;
        core.store(target::<T>(core, i, true), v)?;
        advance::<T>(core, i, RSI, 1);
        advance::<T>(core, i, RDI, 1);
        Ok(())
    }
    fn many<T: Int>(core: &mut Core, i: &Insn, most: u64) -> u64 {
        let (from, to) = (source::<T>(core, i), target::<T>(core, i, true));
        let n = most.min(run::<T>(core, i, usize::from(i.seg), from, core.cpu.gpr[RSI])).min(run::<T>(
            core,
            i,
            ES,
            to,
            core.cpu.gpr[RDI],
        ));
        if n < 2 {
            return 0;
        }
        let bytes = (n * T::SIZE) as usize;
        let Some(src) = core.plain_read(from) else { return 0 };
        let Some(dst) = core.plain_write(to).or_else(|| core.code_write(i, to, bytes as u64)) else { return 0 };
        let distance = (dst as usize).wrapping_sub(src as usize);
        if distance < bytes && distance != 0 {
            // An overlapping copy upwards repeats what it wrote (the classic fill): element by element, but on the host.
            if distance < T::SIZE as usize {
                return 0;
            }
            for k in 0..n as usize {
                let at = k * T::SIZE as usize;
                // SAFETY: both ranges of `bytes` lie inside pages that the TLB says are plain, readable and writable.
                unsafe {
                    let v = src.add(at).cast::<T>().read_unaligned();
                    dst.add(at).cast::<T>().write_unaligned(v);
                }
            }
        } else {
            // SAFETY: as above.
            unsafe { std::ptr::copy(src, dst, bytes) };
        }
        advance::<T>(core, i, RSI, n);
        advance::<T>(core, i, RDI, n);
        n
    }
}

impl Str for Stos {
    #[inline(always)]
    fn one<T: Int>(core: &mut Core, i: &Insn) -> Result<(), Fault> {
        core.store(target::<T>(core, i, true), T::of(core.cpu.gpr[RAX]))?;
        advance::<T>(core, i, RDI, 1);
        Ok(())
    }
    fn many<T: Int>(core: &mut Core, i: &Insn, most: u64) -> u64 {
        let to = target::<T>(core, i, true);
        let n = most.min(run::<T>(core, i, ES, to, core.cpu.gpr[RDI]));
        if n < 2 {
            return 0;
        }
        let Some(dst) = core.plain_write(to).or_else(|| core.code_write(i, to, n * T::SIZE)) else { return 0 };
        let v = T::of(core.cpu.gpr[RAX]);
        let byte = v.zext() as u8;
        let even = v == T::of(u64::from(byte) * 0x0101_0101_0101_0101);
        if even {
            // SAFETY: the range lies inside a page that the TLB says is plain and writable.
            unsafe { dst.write_bytes(byte, (n * T::SIZE) as usize) };
        } else {
            for k in 0..n as usize {
                // SAFETY: as above.
                unsafe { dst.add(k * T::SIZE as usize).cast::<T>().write_unaligned(v) };
            }
        }
        advance::<T>(core, i, RDI, n);
        n
    }
}

impl Str for Lods {
    #[inline(always)]
    fn one<T: Int>(core: &mut Core, i: &Insn) -> Result<(), Fault> {
        let v: T = core.load(source::<T>(core, i))?;
        T::set(&mut core.cpu, RAX as u8, v);
        advance::<T>(core, i, RSI, 1);
        Ok(())
    }
}

fn compare<T: Int>(core: &mut Core, a: T, b: T) {
    let (r, aux) = sub(a, b, 0);
    core.cpu.lf_res = r.sext();
    core.cpu.lf_aux = aux;
}

impl Str for Cmps {
    const COMPARES: bool = true;
    #[inline(always)]
    fn one<T: Int>(core: &mut Core, i: &Insn) -> Result<(), Fault> {
        // Silicon looks at ES:rDI first.
        let b: T = core.load(target::<T>(core, i, false))?;
        let a: T = core.load(source::<T>(core, i))?;
        compare(core, a, b);
        advance::<T>(core, i, RSI, 1);
        advance::<T>(core, i, RDI, 1);
        Ok(())
    }
}

impl Str for Scas {
    const COMPARES: bool = true;
    #[inline(always)]
    fn one<T: Int>(core: &mut Core, i: &Insn) -> Result<(), Fault> {
        let b: T = core.load(target::<T>(core, i, false))?;
        compare(core, T::get(&core.cpu, RAX as u8), b);
        advance::<T>(core, i, RDI, 1);
        Ok(())
    }
}

fn string<T: Int, O: Str>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    if i.prefix & (REP | REPNE) == 0 {
        O::one::<T>(core, i)?;
        return Ok(Flow::Next);
    }
    repeat::<T, O>(core, i)
}

/// Every iteration counts as one instruction; a fault leaves the registers after the iterations before it.
fn repeat<T: Int, O: Str>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let total = core.cpu.gpr[RCX] & mask(i);
    if total == 0 {
        // The address size decides how much of RCX a 32-bit count clears: nothing is written for no iterations.
        return Ok(Flow::Next);
    }
    let most = total.min(core.iterations_left(i));
    let mut done = 0;
    while done < most {
        let n = O::many::<T>(core, i, most - done);
        if n > 0 {
            done += n;
            set(core, i, RCX, total - done);
            if core.leaving() && done < total {
                break;
            }
            continue;
        }
        if let Err(fault) = O::one::<T>(core, i) {
            core.count_iterations(i, done);
            return Err(fault);
        }
        done += 1;
        set(core, i, RCX, total - done);
        if O::COMPARES && core.cpu.zf() != (i.prefix & REP != 0) {
            core.count_iterations(i, done - 1);
            return Ok(Flow::Next);
        }
        if core.leaving() && done < total {
            // A device or code page was touched: the loop must look before the next iteration.
            break;
        }
    }
    if done < total {
        core.count_iterations(i, done);
        return Ok(Flow::Again);
    }
    core.count_iterations(i, done - 1);
    Ok(Flow::Next)
}

pub fn select(instr: &Instruction) -> Option<Handler> {
    Some(match instr.mnemonic() {
        N::Movsb => string::<u8, Movs>,
        N::Movsw => string::<u16, Movs>,
        N::Movsd if instr.is_string_instruction() => string::<u32, Movs>,
        N::Movsq => string::<u64, Movs>,
        N::Stosb => string::<u8, Stos>,
        N::Stosw => string::<u16, Stos>,
        N::Stosd => string::<u32, Stos>,
        N::Stosq => string::<u64, Stos>,
        N::Lodsb => string::<u8, Lods>,
        N::Lodsw => string::<u16, Lods>,
        N::Lodsd => string::<u32, Lods>,
        N::Lodsq => string::<u64, Lods>,
        N::Cmpsb => string::<u8, Cmps>,
        N::Cmpsw => string::<u16, Cmps>,
        N::Cmpsd if instr.is_string_instruction() => string::<u32, Cmps>,
        N::Cmpsq => string::<u64, Cmps>,
        N::Scasb => string::<u8, Scas>,
        N::Scasw => string::<u16, Scas>,
        N::Scasd => string::<u32, Scas>,
        N::Scasq => string::<u64, Scas>,
        _ => return None,
    })
}

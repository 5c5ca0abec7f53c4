//! Operand kinds and widths that handlers are generic over.

use iced_x86::{CodeSize as IcedSize, Instruction, OpKind, Register};

use crate::core::Core;
use crate::flags::AUX_KEEP;
use crate::insn::{Fault, Insn};
use crate::mmu::Data;
use crate::state::Cpu;

/// A general-purpose register width.
pub trait Int: Data + PartialEq + std::fmt::Debug {
    const BITS: u32;
    fn of(v: u64) -> Self;
    fn zext(self) -> u64;
    fn sext(self) -> u64;
    fn get(cpu: &Cpu, r: u8) -> Self;
    fn set(cpu: &mut Cpu, r: u8, v: Self);
}

macro_rules! int {
    ($t:ty, $s:ty, $get:ident, $set:ident) => {
        impl Int for $t {
            const BITS: u32 = <$t>::BITS;
            #[inline(always)]
            fn of(v: u64) -> Self {
                v as $t
            }
            #[inline(always)]
            fn zext(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn sext(self) -> u64 {
                self as $s as i64 as u64
            }
            #[inline(always)]
            fn get(cpu: &Cpu, r: u8) -> Self {
                cpu.$get(r)
            }
            #[inline(always)]
            fn set(cpu: &mut Cpu, r: u8, v: Self) {
                cpu.$set(r, v);
            }
        }
    };
}
int!(u8, i8, r8, set_r8);
int!(u16, i16, r16, set_r16);
int!(u32, i32, r32, set_r32);
int!(u64, i64, r64, set_r64);

/// Register operand number `N`.
pub struct R<const N: usize>;
/// Memory operand; `FLAT`: 64-bit address, base and displacement only, segment base 0.
pub struct M<const FLAT: bool>;
/// Immediate operand.
pub struct I;

pub trait Source {
    fn get<T: Int>(core: &mut Core, i: &Insn) -> Result<T, Fault>;
}

pub trait Place: Source {
    fn set<T: Int>(core: &mut Core, i: &Insn, v: T) -> Result<(), Fault>;
    /// Faults before `f` is called or not at all.
    fn modify<T: Int, X>(core: &mut Core, i: &Insn, f: impl FnOnce(T) -> (T, X)) -> Result<X, Fault>;
}

impl<const N: usize> Source for R<N> {
    #[inline(always)]
    fn get<T: Int>(core: &mut Core, i: &Insn) -> Result<T, Fault> {
        Ok(T::get(&core.cpu, i.r[N]))
    }
}

impl<const N: usize> Place for R<N> {
    #[inline(always)]
    fn set<T: Int>(core: &mut Core, i: &Insn, v: T) -> Result<(), Fault> {
        T::set(&mut core.cpu, i.r[N], v);
        Ok(())
    }
    #[inline(always)]
    fn modify<T: Int, X>(core: &mut Core, i: &Insn, f: impl FnOnce(T) -> (T, X)) -> Result<X, Fault> {
        let (v, x) = f(T::get(&core.cpu, i.r[N]));
        T::set(&mut core.cpu, i.r[N], v);
        Ok(x)
    }
}

#[inline(always)]
pub fn address<const FLAT: bool>(core: &Core, i: &Insn) -> u64 {
    if FLAT { core.cpu.gpr[usize::from(i.base & 31)].wrapping_add(i.disp as u64) } else { core.ea(i) }
}

impl<const FLAT: bool> Source for M<FLAT> {
    #[inline(always)]
    fn get<T: Int>(core: &mut Core, i: &Insn) -> Result<T, Fault> {
        core.load(address::<FLAT>(core, i))
    }
}

impl<const FLAT: bool> Place for M<FLAT> {
    #[inline(always)]
    fn set<T: Int>(core: &mut Core, i: &Insn, v: T) -> Result<(), Fault> {
        core.store(address::<FLAT>(core, i), v)
    }
    #[inline(always)]
    fn modify<T: Int, X>(core: &mut Core, i: &Insn, f: impl FnOnce(T) -> (T, X)) -> Result<X, Fault> {
        core.modify(address::<FLAT>(core, i), f)
    }
}

impl Source for I {
    #[inline(always)]
    fn get<T: Int>(_: &mut Core, i: &Insn) -> Result<T, Fault> {
        Ok(T::of(i.imm))
    }
}

/// A carry vector (bit n: carry out of bit n of a `T`) as `lf_aux`.
#[inline(always)]
pub fn aux<T: Int>(carries: u64) -> u64 {
    if T::BITS == 64 { carries & AUX_KEEP } else { carries << (64 - T::BITS) | carries & 8 }
}

/// `lf_aux` for a given CF and OF, AF clear.
#[inline(always)]
pub fn aux_cf_of(cf: bool, of: bool) -> u64 {
    u64::from(cf) << 63 | u64::from(cf ^ of) << 62
}

/// Operand kinds as the selectors match on them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Reg,
    /// See [`M`].
    Flat,
    Mem,
    Imm,
    /// Segment, control, vector registers, branch targets, string operands: not for these families.
    Other,
}

pub fn kind(instr: &Instruction, n: u32) -> Kind {
    if n >= instr.op_count() {
        return Kind::Other;
    }
    match instr.op_kind(n) {
        OpKind::Register if instr.op_register(n).is_gpr() => Kind::Reg,
        OpKind::Memory => {
            let base = instr.memory_base();
            let plain = (base.is_gpr64() || base == Register::RIP) && instr.memory_index() == Register::None;
            let segment = instr.memory_segment();
            if plain && code64(instr) && segment != Register::FS && segment != Register::GS { Kind::Flat } else { Kind::Mem }
        }
        OpKind::Immediate8
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => Kind::Imm,
        _ => Kind::Other,
    }
}

pub fn code64(instr: &Instruction) -> bool {
    instr.code_size() == IcedSize::Code64
}

/// Bytes of operand `n`, a general register or memory.
pub fn size(instr: &Instruction, n: u32) -> usize {
    match instr.op_kind(n) {
        OpKind::Register => instr.op_register(n).size(),
        _ => instr.memory_size().size(),
    }
}

/// `sized!(bytes, f::<_, A, B>)`: the handler of that width. The width is the first type parameter.
macro_rules! sized {
    ($size:expr, $f:ident $(, $g:ty)*) => {
        match $size {
            1 => $f::<u8 $(, $g)*> as crate::insn::Handler,
            2 => $f::<u16 $(, $g)*>,
            4 => $f::<u32 $(, $g)*>,
            8 => $f::<u64 $(, $g)*>,
            _ => return None,
        }
    };
}
/// As `sized!` without the 8-bit form.
macro_rules! wide {
    ($size:expr, $f:ident $(, $g:ty)*) => {
        match $size {
            2 => $f::<u16 $(, $g)*> as crate::insn::Handler,
            4 => $f::<u32 $(, $g)*>,
            8 => $f::<u64 $(, $g)*>,
            _ => return None,
        }
    };
}
/// The place operand 0 or 1 as a type: `place!(kind, N, sized, (size, f, Other, types))` appends it to the type list.
macro_rules! place {
    ($kind:expr, $n:literal, $m:ident, ($size:expr, $f:ident $(, $g:ty)*)) => {
        match $kind {
            crate::exec::integer::operand::Kind::Reg => $m!($size, $f $(, $g)*, R<$n>),
            crate::exec::integer::operand::Kind::Flat => $m!($size, $f $(, $g)*, M<true>),
            crate::exec::integer::operand::Kind::Mem => $m!($size, $f $(, $g)*, M<false>),
            _ => return None,
        }
    };
}
pub(super) use {place, sized, wide};

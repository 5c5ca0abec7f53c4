//! SSE4.2 string compares (SDM volume 2B, section 4.1).

use iced_x86::{Code, Instruction, OpKind};

use super::sse::{h, ld128u, x};
use crate::core::Core;
use crate::insn::{Fault, Handler, Insn};
use crate::state::{RAX, RCX, RDX, flags};

/// Elements of one operand, widened to i32 as the immediate says, and how many of them are valid.
struct Elements {
    v: [i32; 16],
    valid: usize,
}

fn elements(v: u128, imm: u64, length: Option<i64>) -> Elements {
    let words = imm & 1 != 0;
    let signed = imm & 2 != 0;
    let count = if words { 8 } else { 16 };
    let mut e = [0; 16];
    for (n, e) in e[..count].iter_mut().enumerate() {
        *e = match (words, signed) {
            (false, false) => (v >> (8 * n)) as u8 as i32,
            (false, true) => (v >> (8 * n)) as i8 as i32,
            (true, false) => (v >> (16 * n)) as u16 as i32,
            (true, true) => (v >> (16 * n)) as i16 as i32,
        };
    }
    let valid = match length {
        Some(n) => n.unsigned_abs().min(count as u64) as usize,
        None => e[..count].iter().position(|&e| e == 0).unwrap_or(count),
    };
    Elements { v: e, valid }
}

/// IntRes2 and the flags.
struct Compared {
    mask: u32,
    count: u32,
    flags: u64,
}

/// `a` is the first operand (the set, the ranges, the needle), `b` the second (the text).
fn compare(a: u128, b: u128, imm: u64, lengths: Option<(i64, i64)>) -> Compared {
    let count: usize = if imm & 1 != 0 { 8 } else { 16 };
    let all = (1u32 << count) - 1;
    let (p, q) = (elements(a, imm, lengths.map(|l| l.0)), elements(b, imm, lengths.map(|l| l.1)));
    let (set, text) = (&p.v[..p.valid], &q.v[..q.valid]);
    let bits = |f: &dyn Fn(usize) -> bool| (0..count).fold(0u32, |m, j| m | u32::from(f(j)) << j);
    let raw = match imm >> 2 & 3 {
        // equal any
        0 => bits(&|j| text.get(j).is_some_and(|t| set.contains(t))),
        // ranges: pairs of lower and upper bound, an odd last one does not count
        1 => bits(&|j| text.get(j).is_some_and(|t| set.chunks_exact(2).any(|r| r[0] <= *t && *t <= r[1]))),
        // equal each: both ended counts as equal, one ended as different
        2 => bits(&|j| match (set.get(j), text.get(j)) {
            (Some(a), Some(b)) => a == b,
            (None, None) => true,
            _ => false,
        }),
        // equal ordered: the needle starts here; beyond the register's end it is taken as going on
        _ => bits(&|j| (0..count - j).all(|k| set.get(k).is_none_or(|n| text.get(j + k) == Some(n)))),
    };
    let valid = ((1u64 << q.valid) - 1) as u32;
    let mask = match imm >> 4 & 3 {
        1 => !raw & all,
        3 => raw ^ valid,
        _ => raw,
    };
    let on = |b: bool, f: u64| if b { f } else { 0 };
    let flags =
        on(mask != 0, flags::CF) | on(q.valid < count, flags::ZF) | on(p.valid < count, flags::SF) | on(mask & 1 != 0, flags::OF);
    Compared { mask, count: count as u32, flags }
}

fn index(c: &mut Core, r: Compared, imm: u64) {
    let n = match r.mask {
        0 => r.count,
        m if imm & 0x40 != 0 => 31 - m.leading_zeros(),
        m => m.trailing_zeros(),
    };
    c.cpu.gpr[RCX] = n.into();
    c.cpu.set_arith(r.flags);
}

fn mask(c: &mut Core, r: Compared, imm: u64) {
    c.cpu.xmm[0] = if imm & 0x40 == 0 {
        r.mask.into()
    } else {
        let width = 128 / r.count;
        let one = (1u128 << width) - 1;
        (0..r.count).filter(|n| r.mask >> n & 1 != 0).fold(0, |m, n| m | one << (n * width))
    };
    c.cpu.set_arith(r.flags);
}

/// Operands: no alignment is asked of the memory one.
fn operands(c: &mut Core, i: &Insn, mem: bool) -> Result<(u128, u128), Fault> {
    let b = if mem { ld128u(c, i)? } else { c.cpu.xmm[x(i, 1)] };
    Ok((c.cpu.xmm[x(i, 0)], b))
}

fn lengths32(c: &Core) -> Option<(i64, i64)> {
    Some((c.cpu.gpr[RAX] as i32 as i64, c.cpu.gpr[RDX] as i32 as i64))
}

fn lengths64(c: &Core) -> Option<(i64, i64)> {
    Some((c.cpu.gpr[RAX] as i64, c.cpu.gpr[RDX] as i64))
}

fn implicit(_: &Core) -> Option<(i64, i64)> {
    None
}

macro_rules! form {
    ($mem:expr, $lengths:path, $end:path) => {
        if $mem {
            h!(|c, i| {
                let (a, b) = operands(c, i, true)?;
                let r = compare(a, b, i.imm, $lengths(c));
                $end(c, r, i.imm);
            })
        } else {
            h!(|c, i| {
                let (a, b) = operands(c, i, false)?;
                let r = compare(a, b, i.imm, $lengths(c));
                $end(c, r, i.imm);
            })
        }
    };
}

pub fn select(i: &Instruction) -> Option<Handler> {
    use Code::*;
    let mem = i.op1_kind() == OpKind::Memory;
    Some(match i.code() {
        Pcmpistri_xmm_xmmm128_imm8 => form!(mem, implicit, index),
        Pcmpistrm_xmm_xmmm128_imm8 => form!(mem, implicit, mask),
        Pcmpestri_xmm_xmmm128_imm8 => form!(mem, lengths32, index),
        Pcmpestrm_xmm_xmmm128_imm8 => form!(mem, lengths32, mask),
        Pcmpestri64_xmm_xmmm128_imm8 => form!(mem, lengths64, index),
        Pcmpestrm64_xmm_xmmm128_imm8 => form!(mem, lengths64, mask),
        _ => return None,
    })
}

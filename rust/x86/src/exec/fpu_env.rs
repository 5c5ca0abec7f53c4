//! x87 control, environment and whole state; WAIT.

use iced_x86::{Code, Instruction};

use super::fpu::{self, B, ES, EXCEPTIONS, SF, available, control, error, gate, phys, pointer, update_error};
use super::sse::{CR0_MP, CR0_TS};
use crate::core::{Core, MF, NM};
use crate::insn::{Fault, Flow, Handler, Insn};
use crate::state::{F80, Fpu, RAX};

/// The full tag of a register in use: 0 valid, 1 zero, 2 special.
fn tag(v: &F80) -> u16 {
    match (v.sign_exp & 0x7fff, v.mantissa) {
        (0, 0) => 1,
        (0 | 0x7fff, _) => 2,
        (_, m) if m >> 63 == 0 => 2,
        _ => 0,
    }
}

/// The tag word, two bits a physical register.
fn tags(f: &Fpu) -> u16 {
    (0..8).fold(0, |w, n| w | if f.ftw >> n & 1 != 0 { tag(&f.st[n]) } else { 3 } << (2 * n))
}

fn abridged(tags: u16) -> u8 {
    (0..8).fold(0, |w, n| w | u8::from(tags >> (2 * n) & 3 != 3) << n)
}

/// The four layouts: 14 or 28 bytes, protected or real (virtual-8086) mode.
fn real(c: &Core) -> bool {
    !c.cpu.protected() || c.cpu.v8086()
}

fn environment(c: &Core, wide: bool) -> Vec<u8> {
    let f = &c.cpu.fpu;
    let (ip, dp, op) = (f.fip as u32, f.fdp as u32, u32::from(f.fop & 0x7ff));
    let first = [u32::from(f.fcw), u32::from(f.fsw), u32::from(tags(f))];
    let rest = match (wide, real(c)) {
        (false, false) => [ip & 0xffff, 0, dp & 0xffff, 0],
        (false, true) => [ip & 0xffff, ip >> 4 & 0xf000 | op, dp & 0xffff, dp >> 4 & 0xf000],
        (true, false) => [ip, op << 16, dp, 0xffff_0000],
        (true, true) => [ip & 0xffff | 0xffff_0000, ip >> 16 << 12 | op, dp & 0xffff | 0xffff_0000, dp >> 16 << 12],
    };
    if wide {
        first.iter().map(|v| v | 0xffff_0000).chain(rest).flat_map(u32::to_le_bytes).collect()
    } else {
        first.into_iter().chain(rest).flat_map(|v| (v as u16).to_le_bytes()).collect()
    }
}

fn load_environment(c: &mut Core, b: &[u8]) {
    let real = real(c);
    let wide = b.len() == 28;
    let word = |n: usize| {
        if wide {
            u32::from_le_bytes([b[4 * n], b[4 * n + 1], b[4 * n + 2], b[4 * n + 3]])
        } else {
            u32::from(u16::from_le_bytes([b[2 * n], b[2 * n + 1]]))
        }
    };
    let f = &mut c.cpu.fpu;
    f.fcw = control(word(0) as u16);
    f.fsw = word(1) as u16;
    f.ftw = abridged(word(2) as u16);
    update_error(f);
    let (ip, op, dp) = match (wide, real) {
        (false, false) => (word(3), 0, word(5)),
        (false, true) => (word(3) | (word(4) & 0xf000) << 4, word(4), word(5) | (word(6) & 0xf000) << 4),
        (true, false) => (word(3), word(4) >> 16, word(5)),
        (true, true) => (word(3) & 0xffff | word(4) >> 12 << 16, word(4), word(5) & 0xffff | word(6) >> 12 << 16),
    };
    f.fip = pointer(ip.into());
    f.fdp = pointer(dp.into());
    f.fop = op as u16 & 0x7ff;
}

/// The order in which AMD looks at an operand: its first word or doubleword, then its last byte.
fn probe(c: &mut Core, a: u64, len: usize, wide: bool, write: bool) -> Result<(), Fault> {
    let first = if wide { 4 } else { 2 };
    let last = c.linear(a, len as u64 - 1);
    if write {
        c.probe_write(a, first)?;
        c.probe_write(last, 1)
    } else {
        c.probe_read(a, first)?;
        c.probe_read(last, 1)
    }
}

fn fnstenv(c: &mut Core, i: &Insn, wide: bool) -> Result<Flow, Fault> {
    available(c)?;
    let (a, b) = (c.ea(i), environment(c, wide));
    probe(c, a, b.len(), wide, true)?;
    c.store_bytes(a, &b)?;
    let f = &mut c.cpu.fpu;
    f.fcw |= EXCEPTIONS;
    update_error(f);
    Ok(Flow::Next)
}

fn fldenv(c: &mut Core, i: &Insn, wide: bool) -> Result<Flow, Fault> {
    gate(c)?;
    let mut b = [0; 28];
    let b = &mut b[..if wide { 28 } else { 14 }];
    probe(c, c.ea(i), b.len(), wide, false)?;
    c.load_bytes(c.ea(i), b)?;
    load_environment(c, b);
    Ok(Flow::Next)
}

fn fnsave(c: &mut Core, i: &Insn, wide: bool) -> Result<Flow, Fault> {
    available(c)?;
    let (a, mut b) = (c.ea(i), environment(c, wide));
    let f = &c.cpu.fpu;
    for n in 0..8 {
        let v = fpu::get(f, n);
        b.extend_from_slice(&v.mantissa.to_le_bytes());
        b.extend_from_slice(&v.sign_exp.to_le_bytes());
    }
    probe(c, a, b.len(), wide, true)?;
    c.store_bytes(a, &b)?;
    init(&mut c.cpu.fpu);
    Ok(Flow::Next)
}

fn frstor(c: &mut Core, i: &Insn, wide: bool) -> Result<Flow, Fault> {
    gate(c)?;
    let mut b = [0; 108];
    let env = if wide { 28 } else { 14 };
    let b = &mut b[..env + 80];
    probe(c, c.ea(i), b.len(), wide, false)?;
    c.load_bytes(c.ea(i), b)?;
    load_environment(c, &b[..env]);
    let f = &mut c.cpu.fpu;
    for (n, r) in b[env..].chunks_exact(10).enumerate() {
        let mut m = [0; 8];
        m.copy_from_slice(&r[..8]);
        f.st[phys(f, n)] = F80 { mantissa: u64::from_le_bytes(m), sign_exp: u16::from_le_bytes([r[8], r[9]]) };
    }
    Ok(Flow::Next)
}

/// FNINIT: everything but the registers' contents.
fn init(f: &mut Fpu) {
    *f = Fpu { st: f.st, ..Fpu::default() };
}

fn fldcw(c: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    gate(c)?;
    let v = c.load16(c.ea(i))?;
    let f = &mut c.cpu.fpu;
    f.fcw = control(v);
    update_error(f);
    Ok(Flow::Next)
}

fn fnstcw(c: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    available(c)?;
    c.store16(c.ea(i), c.cpu.fpu.fcw)?;
    Ok(Flow::Next)
}

fn fnstsw(c: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    available(c)?;
    c.store16(c.ea(i), c.cpu.fpu.fsw)?;
    Ok(Flow::Next)
}

fn fnstsw_ax(c: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    available(c)?;
    c.cpu.gpr[RAX] = c.cpu.gpr[RAX] & !0xffff | u64::from(c.cpu.fpu.fsw);
    Ok(Flow::Next)
}

fn fninit(c: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    available(c)?;
    init(&mut c.cpu.fpu);
    Ok(Flow::Next)
}

fn fnclex(c: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    available(c)?;
    c.cpu.fpu.fsw &= !(EXCEPTIONS | SF | ES | B);
    Ok(Flow::Next)
}

/// FENI, FDISI, FSETPM: meant something on the 8087 and 80287 only.
fn nothing(c: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    available(c)?;
    Ok(Flow::Next)
}

fn wait(c: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    if c.cpu.cr0 & (CR0_MP | CR0_TS) == CR0_MP | CR0_TS {
        return Err(c.raise(NM, None));
    }
    if error(&c.cpu.fpu) { Err(c.raise(MF, None)) } else { Ok(Flow::Next) }
}

pub fn select(i: &Instruction) -> Option<Handler> {
    use Code::*;
    Some(match i.code() {
        Fldcw_m2byte => fldcw,
        Fnstcw_m2byte => fnstcw,
        Fnstsw_m2byte => fnstsw,
        Fnstsw_AX => fnstsw_ax,
        Fninit => fninit,
        Fnclex => fnclex,
        Fneni | Fndisi | Fnsetpm => nothing,
        Fnstenv_m14byte => |c, i| fnstenv(c, i, false),
        Fnstenv_m28byte => |c, i| fnstenv(c, i, true),
        Fldenv_m14byte => |c, i| fldenv(c, i, false),
        Fldenv_m28byte => |c, i| fldenv(c, i, true),
        Fnsave_m94byte => |c, i| fnsave(c, i, false),
        Fnsave_m108byte => |c, i| fnsave(c, i, true),
        Frstor_m94byte => |c, i| frstor(c, i, false),
        Frstor_m108byte => |c, i| frstor(c, i, true),
        Wait => wait,
        _ => return None,
    })
}

//! FXSAVE, FXRSTOR, LDMXCSR, STMXCSR and the fences.

use iced_x86::{Code, Instruction};

use super::fpu;
use super::sse::{self, CR0_EM, CR0_TS, CR4_OSFXSR, MXCSR_MASK, h, ld32, st32};
use crate::core::{Core, GP, NM, UD};
use crate::insn::{Fault, Flow, Handler, Insn};
use crate::state::{CodeSize, F80};

/// What FXSAVE writes: bytes 0–415; 416–511 are left alone.
const IMAGE: usize = 416;

fn fx_gate(c: &mut Core) -> Result<(), Fault> {
    if c.cpu.cr0 & CR0_EM != 0 {
        return Err(c.raise(UD, None));
    }
    if c.cpu.cr0 & CR0_TS != 0 {
        return Err(c.raise(NM, None));
    }
    Ok(())
}

/// Checks of the image's address; whether it lies in one page.
fn fx_address(c: &mut Core, i: &Insn) -> Result<(u64, bool), Fault> {
    let a = c.ea(i);
    if a & 15 != 0 { Err(c.raise(GP, Some(0))) } else { Ok((a, a & 0xfff <= 0xe00)) }
}

/// A fault names the image's last byte on AMD: makes it so for one that hit elsewhere.
#[cold]
fn fx_fault(c: &mut Core, a: u64, write: bool) -> Result<(), Fault> {
    c.fault = None;
    let last = c.linear(a, 511);
    if write { c.probe_write(last, 1) } else { c.probe_read(last, 1) }
}

fn store_image(c: &mut Core, a: u64, one_page: bool, b: &[u8]) -> Result<(), Fault> {
    if !one_page {
        fx_fault(c, a, true)?;
        return c.store_bytes(a, b);
    }
    // Within a page the first store faults or none.
    for (n, part) in b.chunks_exact(16).enumerate() {
        let v = part.iter().rev().fold(0, |v, &b| v << 8 | u128::from(b));
        if c.store128(a + 16 * n as u64, v).is_err() {
            fx_fault(c, a, true)?;
            c.store128(a + 16 * n as u64, v)?;
        }
    }
    Ok(())
}

fn load_image(c: &mut Core, a: u64, one_page: bool, b: &mut [u8]) -> Result<(), Fault> {
    if !one_page {
        fx_fault(c, a, false)?;
        return c.load_bytes(a, b);
    }
    for (n, part) in b.chunks_exact_mut(16).enumerate() {
        let v = match c.load128(a + 16 * n as u64) {
            Ok(v) => v,
            Err(Fault) => {
                fx_fault(c, a, false)?;
                c.load128(a + 16 * n as u64)?
            }
        };
        part.copy_from_slice(&v.to_le_bytes());
    }
    Ok(())
}

/// XMM registers in the image: none without CR4.OSFXSR, 8 outside 64-bit code. EFER.FFXSR is not in the profile.
fn xmm_count(c: &Core) -> usize {
    match c.cpu.code_size {
        _ if c.cpu.cr4 & CR4_OSFXSR == 0 => 0,
        CodeSize::Bits64 => 16,
        _ => 8,
    }
}

/// The FXSAVE image. As on AMD with XSaveErPtr the pointers are stored always, as zeros when no exception is pending.
fn image(c: &Core, wide: bool) -> [u8; IMAGE] {
    let mut b = [0; IMAGE];
    let f = &c.cpu.fpu;
    b[0..2].copy_from_slice(&f.fcw.to_le_bytes());
    b[2..4].copy_from_slice(&f.fsw.to_le_bytes());
    b[4] = f.ftw;
    let (fop, fip, fdp) = if fpu::error(f) { (f.fop, f.fip, f.fdp) } else { (0, 0, 0) };
    b[6..8].copy_from_slice(&fop.to_le_bytes());
    if wide {
        b[8..16].copy_from_slice(&fip.to_le_bytes());
        b[16..24].copy_from_slice(&fdp.to_le_bytes());
    } else {
        b[8..12].copy_from_slice(&(fip as u32).to_le_bytes());
        b[16..20].copy_from_slice(&(fdp as u32).to_le_bytes());
    }
    b[24..28].copy_from_slice(&c.cpu.mxcsr.to_le_bytes());
    b[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    for n in 0..8 {
        let r = &f.st[fpu::phys(f, n)];
        b[32 + 16 * n..][..8].copy_from_slice(&r.mantissa.to_le_bytes());
        b[40 + 16 * n..][..2].copy_from_slice(&r.sign_exp.to_le_bytes());
    }
    for n in 0..xmm_count(c) {
        b[160 + 16 * n..][..16].copy_from_slice(&c.cpu.xmm[n].to_le_bytes());
    }
    b
}

fn fxsave(c: &mut Core, i: &Insn, wide: bool) -> Result<Flow, Fault> {
    fx_gate(c)?;
    let (a, one_page) = fx_address(c, i)?;
    let b = image(c, wide);
    // Without XMM registers in the image their part of memory keeps what it had.
    let used = 160 + 16 * xmm_count(c);
    store_image(c, a, one_page, &b[..used])?;
    Ok(Flow::Next)
}

fn fxrstor(c: &mut Core, i: &Insn, wide: bool) -> Result<Flow, Fault> {
    fx_gate(c)?;
    let (a, one_page) = fx_address(c, i)?;
    let count = xmm_count(c);
    let mut b = [0; IMAGE];
    load_image(c, a, one_page, &mut b[..160 + 16 * count])?;
    let u16_at = |n: usize| u16::from_le_bytes([b[n], b[n + 1]]);
    let u32_at = |n: usize| u32::from(u16_at(n)) | u32::from(u16_at(n + 2)) << 16;
    let u64_at = |n: usize| u64::from(u32_at(n)) | u64::from(u32_at(n + 4)) << 32;
    let mxcsr = u32_at(24);
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(c.raise(GP, Some(0)));
    }
    if c.cpu.cr4 & CR4_OSFXSR != 0 {
        c.cpu.mxcsr = mxcsr;
    }
    let f = &mut c.cpu.fpu;
    f.fcw = fpu::control(u16_at(0));
    f.fsw = u16_at(2);
    fpu::update_error(f);
    f.ftw = b[4];
    f.fop = u16_at(6) & 0x7ff;
    let at = |n: usize| if wide { fpu::pointer(u64_at(n)) } else { u32_at(n).into() };
    (f.fip, f.fdp) = (at(8), at(16));
    for n in 0..8 {
        let p = fpu::phys(f, n);
        f.st[p] = F80 { mantissa: u64_at(32 + 16 * n), sign_exp: u16_at(40 + 16 * n) };
    }
    for n in 0..count {
        c.cpu.xmm[n] = u128::from(u64_at(160 + 16 * n)) | u128::from(u64_at(168 + 16 * n)) << 64;
    }
    Ok(Flow::Next)
}

fn fence(_: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    sse::NEXT
}

pub fn select(i: &Instruction) -> Option<Handler> {
    use Code::*;
    Some(match i.code() {
        Fxsave_m512byte => |c, i| fxsave(c, i, false),
        Fxsave64_m512byte => |c, i| fxsave(c, i, true),
        Fxrstor_m512byte => |c, i| fxrstor(c, i, false),
        Fxrstor64_m512byte => |c, i| fxrstor(c, i, true),
        Ldmxcsr_m32 => h!(|c, i| {
            let v = ld32(c, i)?;
            if v & !MXCSR_MASK != 0 {
                return Err(c.raise(GP, Some(0)));
            }
            c.cpu.mxcsr = v;
        }),
        Stmxcsr_m32 => h!(|c, i| st32(c, i, c.cpu.mxcsr)?),
        Lfence | Lfence_E9 | Lfence_EA | Lfence_EB | Lfence_EC | Lfence_ED | Lfence_EE | Lfence_EF | Mfence | Mfence_F1
        | Mfence_F2 | Mfence_F3 | Mfence_F4 | Mfence_F5 | Mfence_F6 | Mfence_F7 | Sfence | Sfence_F9 | Sfence_FA | Sfence_FB
        | Sfence_FC | Sfence_FD | Sfence_FE | Sfence_FF => fence,
        _ => return None,
    })
}

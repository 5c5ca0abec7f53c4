//! SYSCALL, SYSRET, SYSENTER, SYSEXIT as AMD has them (vol. 3), SWAPGS.

use iced_x86::{Code, Instruction};

use crate::core::{Core, GP, UD};
use crate::insn::{Fault, Flow, Handler, Insn};
use crate::state::{CS, CodeSize, R11, RCX, RDX, RSP, SS, Segment, flags};

const EFER_SCE: u64 = 1;
/// Access rights of flat segments: 64-bit code, 32-bit code, data; DPL goes to bits 5–6.
const CODE64: u32 = 0xa09b;
const CODE32: u32 = 0xc09b;
const DATA: u32 = 0xc093;
/// What SYSRET takes from R11: everything but RF, VM and reserved bits.
const SYSRET_FLAGS: u64 = 0x003c_7fd7;

fn flat(selector: u16, attr: u32, dpl: u32) -> Segment {
    Segment { base: 0, limit: u32::MAX, selector, attr: attr | dpl << 5 }
}

fn enter(core: &mut Core, cpl: u8, cs: Segment, ss: Segment) {
    core.cpu.cpl = cpl;
    core.set_segment(CS, cs);
    core.set_segment(SS, ss);
}

pub fn swapgs(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    if core.cpu.code_size != CodeSize::Bits64 {
        return Err(core.raise(UD, None));
    }
    core.privileged()?;
    let gs = crate::state::GS;
    std::mem::swap(&mut core.cpu.seg[gs].base, &mut core.cpu.msr.kernel_gs_base);
    core.cpu.seg_base[gs] = core.cpu.seg[gs].base;
    Ok(Flow::Next)
}

pub fn syscall(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    if core.cpu.efer & EFER_SCE == 0 || !core.cpu.protected() {
        return Err(core.raise(UD, None));
    }
    let next = core.next_rip(i);
    let star = core.cpu.msr.star;
    let selector = (star >> 32) as u16 & !3;
    if core.cpu.long_mode() {
        let rflags = core.cpu.rflags() & !flags::RF;
        core.cpu.gpr[RCX] = next;
        core.cpu.gpr[R11] = rflags;
        let wide = core.cpu.code_size == CodeSize::Bits64;
        core.cpu.rip = if wide { core.cpu.msr.lstar } else { core.cpu.msr.cstar };
        core.cpu.set_rflags(rflags & !core.cpu.msr.fmask);
        enter(core, 0, flat(selector, CODE64, 0), flat(selector.wrapping_add(8), DATA, 0));
    } else {
        core.cpu.gpr[RCX] = next;
        core.cpu.rip = star & 0xffff_ffff;
        core.cpu.flags &= !(flags::VM | flags::IF | flags::RF);
        enter(core, 0, flat(selector, CODE32, 0), flat(selector.wrapping_add(8), DATA, 0));
    }
    Ok(Flow::LeaveJump)
}

pub fn select_sysret(instr: &Instruction) -> Handler {
    if instr.code() == Code::Sysretq { sysret::<true> } else { sysret::<false> }
}

fn sysret<const WIDE: bool>(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    if core.cpu.efer & EFER_SCE == 0 {
        return Err(core.raise(UD, None));
    }
    if !core.cpu.protected() {
        return Err(core.raise(GP, Some(0)));
    }
    core.privileged()?;
    let selector = (core.cpu.msr.star >> 48) as u16;
    let user = |s: u16| s | 3;
    let ss = flat(user(selector.wrapping_add(8)), DATA, 3);
    if core.cpu.long_mode() {
        let rflags = core.cpu.gpr[R11] & SYSRET_FLAGS;
        core.cpu.set_rflags(rflags);
        if WIDE {
            // A non-canonical RCX faults at the fetch, in user mode (AMD).
            core.cpu.rip = core.cpu.gpr[RCX];
            enter(core, 3, flat(user(selector.wrapping_add(16)), CODE64, 3), ss);
        } else {
            core.cpu.rip = core.cpu.gpr[RCX] & 0xffff_ffff;
            enter(core, 3, flat(user(selector), CODE32, 3), ss);
        }
        if core.cpu.flags & flags::TF != 0 {
            // Unlike IRET and POPF, SYSRET traps already after itself.
            core.refresh();
            core.single_step_trap()?;
        }
    } else {
        core.cpu.rip = core.cpu.gpr[RCX] & 0xffff_ffff;
        core.cpu.flags |= flags::IF;
        enter(core, 3, flat(user(selector), CODE32, 3), ss);
    }
    Ok(Flow::LeaveJump)
}

/// AMD has SYSENTER and SYSEXIT in legacy mode only.
pub fn sysenter(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    if core.cpu.long_mode() {
        return Err(core.raise(UD, None));
    }
    let selector = core.cpu.msr.sysenter_cs as u16 & !3;
    if !core.cpu.protected() || selector == 0 {
        return Err(core.raise(GP, Some(0)));
    }
    core.cpu.flags &= !(flags::VM | flags::IF | flags::RF);
    core.cpu.rip = core.cpu.msr.sysenter_eip & 0xffff_ffff;
    core.cpu.gpr[RSP] = core.cpu.msr.sysenter_esp & 0xffff_ffff;
    enter(core, 0, flat(selector, CODE32, 0), flat(selector.wrapping_add(8), DATA, 0));
    Ok(Flow::LeaveJump)
}

pub fn sysexit(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    if core.cpu.long_mode() {
        return Err(core.raise(UD, None));
    }
    let selector = core.cpu.msr.sysenter_cs as u16 & !3;
    if !core.cpu.protected() || selector == 0 {
        return Err(core.raise(GP, Some(0)));
    }
    core.privileged()?;
    core.cpu.rip = core.cpu.gpr[RDX] & 0xffff_ffff;
    core.cpu.gpr[RSP] = core.cpu.gpr[RCX] & 0xffff_ffff;
    let code = selector.wrapping_add(16) | 3;
    enter(core, 3, flat(code, CODE32, 3), flat(selector.wrapping_add(24) | 3, DATA, 3));
    Ok(Flow::LeaveJump)
}

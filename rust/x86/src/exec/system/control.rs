//! Control and debug registers, MSRs, time, CPUID.

use iced_x86::{Instruction, Mnemonic as M, OpKind};

use super::in_memory;
use super::segment::store_word;
use crate::apics::{FIXED, Message, NMI};
use crate::core::{Core, DB, GP, UD};
use crate::insn::{Fault, Flow, Handler, Insn};
use crate::segments::canonical;
use crate::state::{Activity, CS, CodeSize, RAX, RBX, RCX, RDX, RSI, Segment, flags};

pub const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_WP: u64 = 1 << 16;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
const CR0_DEFINED: u64 = 0xe005_003f;
const CR4_TSD: u64 = 1 << 2;
const CR4_DE: u64 = 1 << 3;
const CR4_PAE: u64 = 1 << 5;
const CR4_PCE: u64 = 1 << 8;
const CR4_FSGSBASE: u64 = 1 << 16;
const CR4_PKE: u64 = 1 << 22;
/// PSE, PAE, PGE, SMEP, SMAP, PKE, PKS: what translations depend on.
const CR4_PAGING: u64 = 1 << 4 | CR4_PAE | 1 << 7 | 1 << 20 | 1 << 21 | CR4_PKE | 1 << 24;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const DR6_FIXED: u64 = 0xffff_0ff0;
const DR7_FIXED: u64 = 0x400;
const DR7_GD: u64 = 1 << 13;

/// MOV to and from CR and DR.
pub fn select_mov(instr: &Instruction) -> Option<Handler> {
    if instr.mnemonic() != M::Mov || instr.op_kind(0) != OpKind::Register || instr.op_kind(1) != OpKind::Register {
        return None;
    }
    let (to, from) = (instr.op0_register(), instr.op1_register());
    Some(if to.is_cr() {
        write_cr
    } else if from.is_cr() {
        read_cr
    } else if to.is_dr() {
        write_dr
    } else if from.is_dr() {
        read_dr
    } else {
        return None;
    })
}

fn operand(core: &Core, r: u8) -> u64 {
    if core.cpu.code_size == CodeSize::Bits64 { core.cpu.r64(r) } else { u64::from(core.cpu.r32(r)) }
}

fn result(core: &mut Core, r: u8, value: u64) {
    let size = if core.cpu.code_size == CodeSize::Bits64 { 8 } else { 4 };
    core.put_register(r, size, value);
}

fn read_cr(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let value = match i.r[1] {
        0 => core.cpu.cr0,
        2 => core.cpu.cr2,
        3 => core.cpu.cr3,
        4 => core.cpu.cr4,
        8 => core.lapic.cr8(),
        _ => return Err(core.raise(UD, None)),
    };
    core.privileged()?;
    result(core, i.r[0], value);
    Ok(Flow::Next)
}

fn write_cr(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    if !matches!(i.r[0], 0 | 2 | 3 | 4 | 8) {
        return Err(core.raise(UD, None));
    }
    core.privileged()?;
    let value = operand(core, i.r[1]);
    match i.r[0] {
        0 => core.write_cr0(value)?,
        2 => core.cpu.cr2 = value,
        3 => core.write_cr3(value)?,
        4 => core.write_cr4(value)?,
        _ => {
            if value > 15 {
                return Err(core.raise(GP, Some(0)));
            }
            core.lapic.set_cr8(value);
        }
    }
    Ok(Flow::Leave)
}

impl Core {
    fn write_cr0(&mut self, value: u64) -> Result<(), Fault> {
        let refuse = |core: &mut Core| Err(core.raise(GP, Some(0)));
        if value >> 32 != 0 || value & (CR0_PG | CR0_PE) == CR0_PG || value & (CR0_NW | CR0_CD) == CR0_NW {
            return refuse(self);
        }
        let old = self.cpu.cr0;
        let new = value & CR0_DEFINED | CR0_ET;
        let mut efer = self.cpu.efer;
        if new & CR0_PG != 0 && old & CR0_PG == 0 && efer & EFER_LME != 0 {
            if self.cpu.cr4 & CR4_PAE == 0 || self.cpu.seg[CS].attr & Segment::L != 0 {
                return refuse(self);
            }
            efer |= EFER_LMA;
        }
        if new & CR0_PG == 0 && old & CR0_PG != 0 {
            if self.cpu.code_size == CodeSize::Bits64 {
                return refuse(self);
            }
            efer &= !EFER_LMA;
        }
        self.cpu.cr0 = new;
        self.cpu.efer = efer;
        if (old ^ new) & (CR0_PG | CR0_WP | CR0_PE) != 0 {
            self.flush_tlb_all();
        }
        if (old ^ new) & CR0_PE != 0 {
            // CPL is 0 on both sides; CS keeps what it had cached.
            self.cpu.cpl = 0;
        }
        self.cpu.code_size = self.cpu.code_size_of(&self.cpu.seg[CS]);
        Ok(())
    }

    fn write_cr3(&mut self, value: u64) -> Result<(), Fault> {
        // Without PCID bit 63 is reserved like the bits above the physical address.
        let reserved = if self.cpu.long_mode() { !0u64 << self.shared.phys_bits } else { 0 };
        if value & reserved != 0 {
            return Err(self.raise(GP, Some(0)));
        }
        self.cpu.cr3 = value;
        self.flush_tlb();
        Ok(())
    }

    fn write_cr4(&mut self, value: u64) -> Result<(), Fault> {
        if value & !self.shared.switches.cr4_allowed() != 0 || self.cpu.long_mode() && value & CR4_PAE == 0 {
            return Err(self.raise(GP, Some(0)));
        }
        let old = self.cpu.cr4;
        self.cpu.cr4 = value;
        if (old ^ value) & CR4_PAGING != 0 {
            self.flush_tlb_all();
        }
        if (old ^ value) & CR4_DE != 0 {
            self.refresh_breakpoints();
        }
        Ok(())
    }
}

/// DR4 and DR5 are DR6 and DR7 unless CR4.DE; DR7.GD traps every access.
fn debug_register(core: &mut Core, n: u8) -> Result<usize, Fault> {
    let n = usize::from(n);
    if n > 7 || matches!(n, 4 | 5) && core.cpu.cr4 & CR4_DE != 0 {
        return Err(core.raise(UD, None));
    }
    core.privileged()?;
    if core.cpu.dr[7] & DR7_GD != 0 {
        core.cpu.dr[7] &= !DR7_GD;
        core.cpu.dr[6] |= 1 << 13;
        return Err(core.raise(DB, None));
    }
    Ok(if n == 4 || n == 5 { n + 2 } else { n })
}

fn read_dr(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let n = debug_register(core, i.r[1])?;
    let value = core.cpu.dr[n];
    result(core, i.r[0], value);
    Ok(Flow::Next)
}

fn write_dr(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let n = debug_register(core, i.r[0])?;
    let value = operand(core, i.r[1]);
    if n >= 6 && value >> 32 != 0 {
        return Err(core.raise(GP, Some(0)));
    }
    core.cpu.dr[n] = match n {
        6 => value & 0xe00f | DR6_FIXED,
        7 => value & 0xffff_23ff | DR7_FIXED,
        _ => value,
    };
    core.refresh_breakpoints();
    Ok(Flow::Leave)
}

pub fn select_smsw(instr: &Instruction) -> Handler {
    if in_memory(instr, 0) { smsw::<true> } else { smsw::<false> }
}
fn smsw<const MEM: bool>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    core.not_prevented()?;
    store_word::<MEM>(core, i, core.cpu.cr0)
}

pub fn select_lmsw(instr: &Instruction) -> Handler {
    if in_memory(instr, 0) { lmsw::<true> } else { lmsw::<false> }
}
/// Sets PE, MP, EM, TS; cannot clear PE.
fn lmsw<const MEM: bool>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    core.privileged()?;
    let value = u64::from(if MEM { core.load16(core.ea(i))? } else { core.cpu.r16(i.r[0]) });
    let old = core.cpu.cr0;
    core.write_cr0(old & !0xe | value & 0xf)?;
    Ok(Flow::Leave)
}

pub fn clts(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    core.privileged()?;
    core.cpu.cr0 &= !8;
    Ok(Flow::Leave)
}

pub fn invlpg(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    core.privileged()?;
    let at = core.ea(i);
    if canonical(at) {
        core.flush_page(at);
    }
    Ok(Flow::Leave)
}

/// WBINVD, INVD: caches are coherent.
pub fn wbinvd(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    core.privileged()?;
    Ok(Flow::Next)
}

/// CLFLUSH: no caches here; faults as a load of the byte would.
pub fn clflush(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let at = core.ea(i);
    core.probe_read(at, 1)?;
    Ok(Flow::Next)
}

pub fn hlt(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    core.privileged()?;
    core.cpu.activity = Activity::Halted;
    Ok(Flow::Leave)
}

fn put_edx_eax(core: &mut Core, value: u64) {
    core.cpu.gpr[RAX] = value & 0xffff_ffff;
    core.cpu.gpr[RDX] = value >> 32;
}

fn may_read_tsc(core: &mut Core) -> Result<(), Fault> {
    if core.cpu.cr4 & CR4_TSD != 0 && core.cpu.cpl != 0 { Err(core.raise(GP, Some(0))) } else { Ok(()) }
}

pub fn rdtsc(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    may_read_tsc(core)?;
    core.at_known_count()?;
    let tsc = core.tsc();
    put_edx_eax(core, tsc);
    Ok(Flow::Next)
}

pub fn rdtscp(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    may_read_tsc(core)?;
    core.at_known_count()?;
    let tsc = core.tsc();
    put_edx_eax(core, tsc);
    core.cpu.gpr[RCX] = core.cpu.msr.tsc_aux & 0xffff_ffff;
    Ok(Flow::Next)
}

/// Four counters, none of which counts.
pub fn rdpmc(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    if core.cpu.cr4 & CR4_PCE == 0 && core.cpu.cpl != 0 || core.cpu.r32(RCX as u8) > 3 {
        return Err(core.raise(GP, Some(0)));
    }
    put_edx_eax(core, 0);
    Ok(Flow::Next)
}

pub fn rdmsr(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    core.privileged()?;
    core.at_known_count()?;
    let index = core.cpu.r32(RCX as u8);
    match core.read_msr(index) {
        Some(value) => put_edx_eax(core, value),
        None => return Err(core.raise(GP, Some(0))),
    }
    Ok(Flow::Next)
}

pub fn wrmsr(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    core.privileged()?;
    core.at_known_count()?;
    let index = core.cpu.r32(RCX as u8);
    let value = u64::from(core.cpu.r32(RDX as u8)) << 32 | u64::from(core.cpu.r32(RAX as u8));
    core.write_msr(index, value)?;
    Ok(Flow::Leave)
}

pub fn cpuid(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    let [a, b, c, d] = core.cpuid(core.cpu.r32(RAX as u8), core.cpu.r32(RCX as u8));
    for (r, v) in [(RAX, a), (RBX, b), (RCX, c), (RDX, d)] {
        core.cpu.gpr[r] = u64::from(v);
    }
    Ok(Flow::Next)
}

fn may_use_bases(core: &mut Core) -> Result<(), Fault> {
    if core.cpu.cr4 & CR4_FSGSBASE == 0 || core.cpu.code_size != CodeSize::Bits64 { Err(core.raise(UD, None)) } else { Ok(()) }
}

pub fn read_base<const SEG: usize>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    may_use_bases(core)?;
    let base = core.cpu.seg[SEG].base;
    core.put_register(i.r[0], i.osize, base);
    Ok(Flow::Next)
}

pub fn write_base<const SEG: usize>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    may_use_bases(core)?;
    let base = if i.osize == 8 { core.cpu.r64(i.r[0]) } else { u64::from(core.cpu.r32(i.r[0])) };
    if !canonical(base) {
        return Err(core.raise(GP, Some(0)));
    }
    core.cpu.seg[SEG].base = base;
    core.cpu.seg_base[SEG] = base;
    Ok(Flow::Next)
}

/// STAC, CLAC.
pub fn set_ac<const SET: bool>(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    if core.cpu.cpl != 0 || !core.shared.switches.smap {
        return Err(core.raise(UD, None));
    }
    if SET {
        core.cpu.flags |= flags::AC;
    } else {
        core.cpu.flags &= !flags::AC;
    }
    Ok(Flow::Next)
}

/// RDPKRU and WRPKRU want CR4.PKE, and ECX = 0.
fn may_use_keys(core: &mut Core) -> Result<(), Fault> {
    if core.cpu.cr4 & CR4_PKE == 0 {
        return Err(core.raise(UD, None));
    }
    if core.cpu.r32(RCX as u8) != 0 { Err(core.raise(GP, Some(0))) } else { Ok(()) }
}

pub fn rdpkru(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    may_use_keys(core)?;
    put_edx_eax(core, u64::from(core.cpu.pkru));
    Ok(Flow::Next)
}

pub fn wrpkru(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    may_use_keys(core)?;
    if core.cpu.r32(RDX as u8) != 0 {
        return Err(core.raise(GP, Some(0)));
    }
    core.cpu.pkru = core.cpu.r32(RAX as u8);
    core.flush_tlb_all();
    Ok(Flow::Leave)
}

pub fn rdpid(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    if !core.shared.switches.rdpid {
        return Err(core.raise(UD, None));
    }
    let value = core.cpu.msr.tsc_aux & 0xffff_ffff;
    result(core, i.r[0], value);
    Ok(Flow::Next)
}

/// VMCALL, VMMCALL: −KVM_ENOSYS but for interrupts to several vCPUs, which KVM sends whether its CPUID bit is shown or not;
/// from user mode −KVM_EPERM.
pub fn hypercall(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    const SEND_IPI: u64 = 10;
    let mask = if core.cpu.code_size == CodeSize::Bits64 { u64::MAX } else { u64::from(u32::MAX) };
    let answer: i64 = match core.cpu.gpr[RAX] & mask {
        _ if core.cpu.cpl != 0 => -1,
        SEND_IPI => send_ipis(core, mask),
        _ => -1000,
    };
    result(core, RAX as u8, answer as u64);
    Ok(Flow::Leave)
}

/// KVM_HC_SEND_IPI (Linux, Documentation/virt/kvm/x86/hypercalls.rst): RBX and RCX are a bitmap of APIC ids from RDX on, RSI is the
/// low word of ICR. Gives how many vCPUs there were, or −KVM_EINVAL.
fn send_ipis(core: &mut Core, mask: u64) -> i64 {
    const DESTINATION_AND_SHORTHAND: u64 = 1 << 11 | 3 << 18;
    let [low, high, first, icr] = [RBX, RCX, RDX, RSI].map(|r| core.cpu.gpr[r] & mask);
    let message = Message { vector: icr as u8, mode: (icr >> 8 & 7) as u8, level: false };
    if icr & DESTINATION_AND_SHORTHAND != 0 || !matches!(message.mode, FIXED | NMI) {
        return -22;
    }
    let width = if mask == u64::MAX { 64 } else { 32 };
    let bitmap = u128::from(low) | u128::from(high) << width;
    let apics = core.shared.apics.clone();
    let ids = (0..2 * width).filter(|n| bitmap >> n & 1 != 0).filter_map(|n| usize::try_from(first).ok()?.checked_add(n));
    let there = ids.filter(|&id| id < apics.count());
    there.map(|id| apics.send_self(id, message)).count() as i64
}

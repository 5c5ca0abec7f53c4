//! System instructions: control registers, descriptors, far transfers, ports.

mod control;
mod far;
mod flag;
mod io;
mod segment;
mod syscall;

use iced_x86::{Instruction, Mnemonic as M, OpKind};

use crate::core::{Core, GP};
use crate::insn::{Fault, Handler, Insn};
use crate::state::{CodeSize, GPR_BLOCK};

const CR4_UMIP: u64 = 1 << 11;

pub fn select(instr: &Instruction) -> Option<Handler> {
    Some(match instr.mnemonic() {
        M::Mov | M::Push | M::Pop => return segment::select_mov(instr).or_else(|| control::select_mov(instr)),
        M::Lds | M::Les | M::Lss | M::Lfs | M::Lgs => segment::load_far_pointer,
        M::Jmp | M::Call | M::Retf | M::Iret | M::Iretd | M::Iretq => return far::select(instr),
        M::Lar => segment::select_lar(instr),
        M::Lsl => segment::select_lsl(instr),
        M::Verr => segment::select_verify::<false>(instr),
        M::Verw => segment::select_verify::<true>(instr),
        M::Arpl => segment::select_arpl(instr),
        M::Lgdt => segment::load_table::<true>,
        M::Lidt => segment::load_table::<false>,
        M::Sgdt => segment::store_table::<true>,
        M::Sidt => segment::store_table::<false>,
        M::Lldt => segment::select_lldt(instr),
        M::Ltr => segment::select_ltr(instr),
        M::Sldt => segment::select_sldt(instr),
        M::Str => segment::select_str(instr),
        M::Smsw => control::select_smsw(instr),
        M::Lmsw => control::select_lmsw(instr),
        M::Clts => control::clts,
        M::Invlpg => control::invlpg,
        // WBNOINVD is WBINVD with a prefix that means nothing.
        M::Wbinvd | M::Invd | M::Wbnoinvd => control::wbinvd,
        M::Clflush => control::clflush,
        M::Hlt => control::hlt,
        M::Rdtsc => control::rdtsc,
        M::Rdtscp => control::rdtscp,
        M::Rdpmc => control::rdpmc,
        M::Rdmsr => control::rdmsr,
        M::Wrmsr => control::wrmsr,
        M::Cpuid => control::cpuid,
        M::Rdfsbase => control::read_base::<{ crate::state::FS }>,
        M::Rdgsbase => control::read_base::<{ crate::state::GS }>,
        M::Wrfsbase => control::write_base::<{ crate::state::FS }>,
        M::Wrgsbase => control::write_base::<{ crate::state::GS }>,
        M::Stac => control::set_ac::<true>,
        M::Clac => control::set_ac::<false>,
        M::Rdpkru => control::rdpkru,
        M::Wrpkru => control::wrpkru,
        M::Rdpid => control::rdpid,
        M::Vmcall | M::Vmmcall => control::hypercall,
        M::Swapgs => syscall::swapgs,
        M::Syscall => syscall::syscall,
        M::Sysret | M::Sysretq => syscall::select_sysret(instr),
        M::Sysenter => syscall::sysenter,
        M::Sysexit | M::Sysexitq => syscall::sysexit,
        M::In | M::Out => return io::select(instr),
        M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd => return io::select_string(instr),
        M::Cli => flag::cli,
        M::Sti => flag::sti,
        M::Int => flag::int,
        M::Int3 => flag::int3,
        M::Into => flag::into,
        M::Int1 => flag::int1,
        // RSM outside SMM, and the three that mean it.
        M::Rsm | M::Ud0 | M::Ud1 | M::Ud2 => crate::decode::invalid,
        _ => return None,
    })
}

/// Whether operand `n` is in memory.
fn in_memory(instr: &Instruction, n: u32) -> bool {
    instr.op_kind(n) == OpKind::Memory
}

impl Core {
    /// RIP of the instruction after `i`.
    fn next_rip(&self, i: &Insn) -> u64 {
        let next = self.cpu.gpr[usize::from(GPR_BLOCK)].wrapping_add(u64::from(i.off) + u64::from(i.len));
        if self.cpu.code_size == CodeSize::Bits64 { next } else { next & 0xffff_ffff }
    }

    /// #GP(0) for what CR4.UMIP forbids outside ring 0: SGDT, SIDT, SLDT, SMSW, STR.
    #[inline(always)]
    fn not_prevented(&mut self) -> Result<(), Fault> {
        if self.cpu.cr4 & CR4_UMIP != 0 && self.cpu.cpl != 0 { Err(self.raise(GP, Some(0))) } else { Ok(()) }
    }

    /// #GP(0) unless CPL is 0.
    #[inline(always)]
    fn privileged(&mut self) -> Result<(), Fault> {
        if self.cpu.cpl == 0 { Ok(()) } else { Err(self.raise(GP, Some(0))) }
    }

    /// Writes general register `r` as an operand of `size` bytes.
    fn put_register(&mut self, r: u8, size: u8, value: u64) {
        match size {
            2 => self.cpu.set_r16(r, value as u16),
            4 => self.cpu.set_r32(r, value as u32),
            _ => self.cpu.set_r64(r, value),
        }
    }
}

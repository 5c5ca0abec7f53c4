//! Between Rust and translated code: the register map, the way in, the ways out, and the call of an instruction's function from
//! inside a block.
//!
//! While translated code runs, RBP points into [`Cpu::gpr`](crate::state::Cpu::gpr) (so that all of it is within a byte's
//! displacement), twelve guest registers are in host registers, R8–R11 stay in memory, and RAX and R11 are free for templates.

use std::mem::offset_of;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::asm::{Asm, Mem, RAX, RBP, RDI};
use crate::core::Core;
use crate::insn::{Fault, Flow, Handler, Insn};
use crate::run::End;
use crate::state::{Cpu, Fpu, GPR_BLOCK};
use crate::tlb::Tlb;

/// Words of `Cpu::gpr` that only translated code uses.
pub const PAGE: usize = 18;
/// As LAHF and SETO leave them in RAX: AH flags, AL overflow.
pub const FLAGS: usize = 19;
pub const BUDGET: usize = 20;
/// Where a jump wants to go that nobody knows yet.
pub const TARGET: usize = 21;
pub const SCRATCH: usize = 22;
/// Not 0: SSE instructions may be executed.
pub const SSE: usize = 23;
/// Not 0: MXCSR is the guest's.
pub const FLOATING: usize = 24;
/// Not 0: the host's x87 registers are, or on the way in and out will be, the guest's.
pub const X87: usize = 25;

/// Host register of each guest register; `None`: it stays in memory.
pub const MAP: [Option<u8>; 16] = [
    Some(8),
    Some(1),
    Some(2),
    Some(3),
    Some(9),
    Some(10),
    Some(6),
    Some(7),
    None,
    None,
    None,
    None,
    Some(12),
    Some(13),
    Some(14),
    Some(15),
];

/// Word 16 of the registers is what RBP points at.
const GPR: usize = offset_of!(Core, cpu) + offset_of!(Cpu, gpr) + 128;

/// A field of [`Core`] as an operand; `offset` is from the core's start.
pub fn field(offset: usize) -> i32 {
    offset as i32 - GPR as i32
}
/// A word of [`Cpu::gpr`].
pub fn word(n: usize) -> Mem {
    Mem::at(RBP, (n as i32 - 16) * 8)
}
pub fn tlb() -> i32 {
    field(offset_of!(Core, tlb) + Tlb::ENTRIES_AT)
}
pub fn codes() -> i32 {
    field(offset_of!(Core, codes))
}
pub fn segment_base(segment: usize) -> Mem {
    Mem::at(RBP, field(offset_of!(Core, cpu) + offset_of!(Cpu, seg_base) + 8 * segment))
}

fn fpu(offset: usize) -> i32 {
    field(offset_of!(Core, cpu) + offset_of!(Cpu, fpu) + offset)
}
pub fn fip() -> i32 {
    fpu(offset_of!(Fpu, fip))
}
pub fn fdp() -> i32 {
    fpu(offset_of!(Fpu, fdp))
}
pub fn fop() -> i32 {
    fpu(offset_of!(Fpu, fop))
}

/// Displacement of a guest XMM register.
pub fn xmm(n: usize) -> i32 {
    field(offset_of!(Core, cpu) + offset_of!(Cpu, xmm) + 16 * n)
}

/// Why translated code came back, in the low byte of its result.
pub const STEP: u64 = 1;
pub const LINK: u64 = 2;
pub const JUMP: u64 = 3;
pub const HEAD: u64 = 4;

/// An instruction that its function executes: always, or when a template's fast path does not apply.
pub struct Site {
    pub f: Handler,
    pub insn: *const Insn,
    /// First instruction of the block, how many it has, and where in its page it begins.
    pub start: *const Insn,
    pub count: u8,
    pub offset: u16,
    /// It reads or writes flags, or may look at anything.
    pub flags: bool,
    /// It computes under MXCSR and has a template.
    pub floats: bool,
    /// It has a template that wants the guest's x87 registers loaded.
    pub x87: bool,
}

// SAFETY: the pointers are looked at only while the block cache that they point into runs.
unsafe impl Send for Site {}

/// Addresses of the common code at the region's start.
#[derive(Debug, Clone, Copy, Default)]
pub struct Thunks {
    pub enter: u64,
    pub step: u64,
    pub leave: u64,
    /// RAX: where to go, unknown.
    pub jump: u64,
}

fn spill(asm: &mut Asm) {
    for (guest, host) in MAP.iter().enumerate() {
        if let Some(host) = host {
            asm.store(word(guest), *host);
        }
    }
}
fn reload(asm: &mut Asm) {
    for (guest, host) in MAP.iter().enumerate() {
        if let Some(host) = host {
            asm.load(*host, word(guest));
        }
    }
}

/// If the guest's x87 registers are to be loaded, loads them from their image. RFLAGS are lost.
fn load_x87(asm: &mut Asm) {
    if_x87(asm, 4);
}
/// If they are loaded, saves them; the host's are then as Rust wants them.
fn save_x87(asm: &mut Asm) {
    if_x87(asm, 6);
}
/// FRSTOR or FNSAVE, no-wait: nothing is pending.
fn if_x87(asm: &mut Asm, operation: u8) {
    asm.rm(false, &[0x80], 7, word(X87));
    asm.bytes(&[0]);
    let not = asm.jcc_forward(4);
    asm.rm(false, &[0xdd], operation, Mem::at(RBP, field(offset_of!(Core, x87))));
    asm.land(not);
}

/// Emits the thunks; they stand at the region's start.
pub fn thunks(asm: &mut Asm, base: u64) -> Thunks {
    let at = |asm: &Asm| base + asm.here() as u64;
    let enter = at(asm);
    // push rbx, rbp, r12–r15; sub rsp, 8
    asm.bytes(&[0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57, 0x48, 0x83, 0xec, 8]);
    asm.lea(RBP, Mem::at(RDI, GPR as i32));
    load_x87(asm);
    asm.mov(RAX, 6);
    reload(asm);
    asm.bytes(&[0xff, 0xe0]);

    let leave = at(asm);
    spill(asm);
    save_x87(asm);
    let out = asm.here();
    // add rsp, 8; pop r15–r12, rbp, rbx; ret
    asm.bytes(&[0x48, 0x83, 0xc4, 8, 0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]);

    let step_at = at(asm);
    spill(asm);
    save_x87(asm);
    asm.lea(RDI, Mem::at(RBP, -(GPR as i32)));
    // mov esi, eax; sub rsp, 8; mov rax, step; call rax; add rsp, 8; test rax, rax
    asm.bytes(&[0x89, 0xc6, 0x48, 0x83, 0xec, 8, 0x48, 0xb8]);
    asm.bytes(&(step as *const () as u64).to_le_bytes());
    asm.bytes(&[0xff, 0xd0, 0x48, 0x83, 0xc4, 8, 0x48, 0x85, 0xc0]);
    let leaving = asm.jcc_forward(5);
    load_x87(asm);
    reload(asm);
    asm.bytes(&[0xc3]);
    asm.land(leaving);
    // The return address; cmp rax, 255; jbe out; else it is code to go on with.
    asm.bytes(&[0x48, 0x83, 0xc4, 8, 0x48, 0x3d]);
    asm.imm32(0xff);
    let above = asm.jcc_forward(7);
    asm.jmp_back(out);
    asm.land(above);
    let onward = asm.here();
    load_x87(asm);
    reload(asm);
    asm.bytes(&[0xff, 0xe0]);

    let jump_at = at(asm);
    asm.store(word(TARGET), RAX);
    spill(asm);
    save_x87(asm);
    asm.lea(RDI, Mem::at(RBP, -(GPR as i32)));
    // mov rax, jump; call rax; test rax, rax; jz: nobody knows
    asm.bytes(&[0x48, 0xb8]);
    asm.bytes(&(jump as *const () as u64).to_le_bytes());
    asm.bytes(&[0xff, 0xd0, 0x48, 0x85, 0xc0]);
    let unknown = asm.jcc_forward(4);
    asm.jmp_back(onward);
    asm.land(unknown);
    asm.mov_eax(JUMP as u32);
    asm.jmp_back(out);
    Thunks { enter, step: step_at, leave, jump: jump_at }
}

/// `mov [FLAGS], eax` after LAHF and SETO: no flag changes.
pub fn save_flags(asm: &mut Asm) {
    asm.bytes(&[0x9f, 0x0f, 0x90, 0xc0]);
    asm.rm(false, &[0x89], RAX, word(FLAGS));
}
/// The reverse: `add al, 127` makes OF, SAHF the others.
pub fn restore_flags(asm: &mut Asm) {
    asm.rm(false, &[0x8b], RAX, word(FLAGS));
    asm.bytes(&[0x04, 0x7f, 0x9e]);
}

/// RFLAGS bits of a saved word.
pub fn arithmetic(image: u64) -> u64 {
    image >> 8 & 0xd5 | (image & 1) << 11
}
pub fn image(arithmetic: u64) -> u64 {
    (arithmetic & 0xd5) << 8 | arithmetic >> 11 & 1
}

/// Carries out the instruction at `site`. 0: go on after it; [`STEP`]: translated code is left and `core.ended` says how; else the block is
/// left and this is the code to go on with.
///
/// # Safety
/// Only translated code calls this, with its own core, of which nobody else holds a reference meanwhile, and a site of its own.
unsafe extern "C" fn step(core: *mut Core, site: u32) -> u64 {
    // SAFETY: as the function demands.
    let core = unsafe { &mut *core };
    // SAFETY: `enter` has set the table, which does not change while translated code runs.
    let site = unsafe { &*core.sites.add(site as usize) };
    match catch_unwind(AssertUnwindSafe(|| core.execute(site))) {
        Ok(next) => next,
        Err(panic) => {
            // Frames of translated code cannot be unwound: the panic goes on after them.
            core.panic = Some(panic);
            STEP
        }
    }
}

/// Translated code jumps to the address in word [`TARGET`]: the code there, or 0.
///
/// # Safety
/// As for [`step`].
unsafe extern "C" fn jump(core: *mut Core) -> u64 {
    // SAFETY: as the function demands.
    let core = unsafe { &mut *core };
    catch_unwind(AssertUnwindSafe(|| core.jump())).unwrap_or_else(|panic| {
        core.panic = Some(panic);
        0
    })
}

impl Core {
    /// As [`step`]. Budget and count are as the interpreter has them meanwhile.
    fn execute(&mut self, site: &Site) -> u64 {
        if site.floats {
            self.note_floating();
        }
        let floating = self.suspend_floating() || site.floats;
        self.suspend_x87();
        self.budget = self.cpu.gpr[BUDGET] + u64::from(site.count);
        self.cpu.icount += self.entered.wrapping_sub(self.budget);
        self.cpu.gpr[usize::from(GPR_BLOCK)] = self.cpu.gpr[PAGE] + u64::from(site.offset);
        self.block_at = site.start;
        self.stop_at = site.insn.wrapping_add(1);
        if site.flags {
            self.cpu.set_arith(arithmetic(self.cpu.gpr[FLAGS]));
        }
        // SAFETY: the block cache's arena holds it until the translation is dropped with it.
        let insn = unsafe { &*site.insn };
        let flow = (site.f)(self, insn);
        if site.flags {
            self.cpu.gpr[FLAGS] = image(self.cpu.arith());
        }
        let goes_on = flow == Ok(Flow::Next) && !self.stop_at.is_null() && self.budget >= u64::from(site.count);
        if goes_on {
            self.entered = self.budget;
            self.cpu.gpr[BUDGET] = self.budget - u64::from(site.count);
            if floating {
                self.resume_floating();
            }
            if site.x87 {
                self.note_x87();
            }
            return 0;
        }
        self.ended = self.end_of_step(flow, insn, site.start);
        self.entered = self.budget;
        self.cpu.gpr[BUDGET] = self.budget;
        self.onward()
    }

    /// RIP and the counts after an instruction that a block is left with; `None`: another block may follow.
    fn end_of_step(&mut self, flow: Result<Flow, Fault>, insn: &Insn, start: *const Insn) -> Option<End> {
        let block = self.cpu.gpr[usize::from(GPR_BLOCK)];
        let at = std::ptr::from_ref(insn);
        match flow {
            Ok(Flow::Next) => {
                self.retire(at.wrapping_add(1), start);
                self.cpu.rip = block.wrapping_add(u64::from(insn.off) + u64::from(insn.len));
                if self.stop_at.is_null() { Some(End::Boundary) } else { None }
            }
            Ok(Flow::Jump) => {
                self.retire(at.wrapping_add(1), start);
                if self.stop_at.is_null() { Some(End::Boundary) } else { None }
            }
            Ok(flow) => Some(self.left(flow, insn, start, block)),
            Err(Fault) => {
                self.retire(at, start);
                self.cpu.rip = block.wrapping_add(u64::from(insn.off));
                if self.noncanonical {
                    self.blame_stack(insn);
                }
                Some(End::Fault)
            }
        }
    }

    /// What a block that begins at RIP finds, besides the flags.
    pub(super) fn begin_translated(&mut self, eager: bool) {
        self.cpu.gpr[PAGE] = self.cpu.rip & !0xfff;
        self.cpu.gpr[BUDGET] = self.budget;
        self.entered = self.budget;
        self.allow_sse();
        self.allow_x87(eager);
    }

    /// Runs translated code at `code`, whose block begins at RIP.
    pub(super) fn enter_translated(&mut self, enter: u64, sites: *const Site, code: u64, eager: bool) -> u64 {
        self.sites = sites;
        self.cpu.gpr[FLAGS] = image(self.cpu.arith());
        self.begin_translated(eager);
        // SAFETY: `enter` is the address of the code emitted by `thunks`, which has this signature and calling convention.
        let enter: extern "C" fn(*mut Core, u64) -> u64 = unsafe { std::mem::transmute(enter) };
        let why = enter(std::ptr::from_mut(self), code);
        self.suspend_floating();
        self.suspend_x87();
        if let Some(panic) = self.panic.take() {
            std::panic::resume_unwind(panic);
        }
        self.budget = self.cpu.gpr[BUDGET];
        self.cpu.icount += self.entered - self.budget;
        self.cpu.set_arith(arithmetic(self.cpu.gpr[FLAGS]));
        why
    }
}

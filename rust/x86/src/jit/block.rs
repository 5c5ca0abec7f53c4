//! One block: from its instructions to host code.
//!
//! Guarantees: guest registers in host registers and memory words are exact at the start of every instruction, so whatever a template
//! cannot do (a TLB miss, a fault, a rare operand) is done by the instruction's own function, from the beginning. Arithmetic flags are
//! in RFLAGS or in the saved word, known while translating, and exact wherever a block can be left.

use iced_x86::{Encoder, FlowControl, Instruction, Mnemonic as N, OpKind};

use super::asm::{Asm, Mem, R11, RAX, RBP};
use super::frame::{self, PAGE, Site, Thunks, word};
use super::{integer, operand, transfer, vector, x87};
use crate::insn::Insn;

/// Where the arithmetic flags are. `Host`: only in RFLAGS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flags {
    Saved,
    Host,
    Both,
}

/// What an instruction does to the arithmetic flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writes {
    None,
    /// All six.
    All,
    /// Some keep their value (sometimes).
    Some,
}

/// A way off the fast path: the instruction's function does it.
struct Cold {
    jumps: Vec<usize>,
    site: u32,
    /// Where to go on; `None`: the function ends the block in any case.
    resume: Option<usize>,
    restore_flags: bool,
}

/// A direct jump within the page whose target may be translated now or later.
pub struct Exit {
    /// Of the distance to patch, and of the code for as long as the target is unknown; relative to the block's code.
    pub at: usize,
    pub unknown: usize,
    /// Offset of the target in its page.
    pub target: u16,
}

/// What a translation consists of.
pub struct Code {
    pub bytes: Vec<u8>,
    pub exits: Vec<Exit>,
    /// Where the block is left before its first instruction.
    pub head_exit: usize,
}

/// What is translated, and for where.
pub struct Unit<'a> {
    /// Where the code will be.
    pub base: u64,
    pub thunks: Thunks,
    /// The host leaves undefined flags as the interpreter does.
    pub same_flags: bool,
    /// TLB half of the privilege level that the block runs at: 0 or `tlb::USER`.
    pub half: usize,
    /// Where in its page the block begins.
    pub offset: u16,
    pub insns: &'a [Insn],
    /// Of all blocks: what the translator adds to for this one.
    pub sites: &'a mut Vec<Site>,
    /// The number of the block's first link.
    pub first_link: u32,
}

pub struct Translator<'a> {
    pub unit: Unit<'a>,
    pub asm: Asm,
    pub encoder: Encoder,
    pub flags: Flags,
    /// Whether anybody may want the flags as they are before instruction n.
    pub need: Vec<bool>,
    /// It is known that SSE instructions may be executed.
    pub sse_checked: bool,
    /// The instruction after this one, if it is in the block.
    pub following: Option<Instruction>,
    index: usize,
    cold: Vec<Cold>,
    exits: Vec<(usize, u16)>,
    /// Jumps off the fast path of the instruction at `index`.
    waiting: Vec<usize>,
}

/// The instruction has no template (for these operands).
pub struct Unsupported;
pub type Result<T = ()> = std::result::Result<T, Unsupported>;

impl<'a> Translator<'a> {
    pub fn new(unit: Unit<'a>) -> Self {
        Self {
            asm: Asm::new(unit.base),
            unit,
            encoder: Encoder::new(64),
            flags: Flags::Saved,
            need: Vec::new(),
            sse_checked: false,
            following: None,
            index: 0,
            cold: Vec::new(),
            exits: Vec::new(),
            waiting: Vec::new(),
        }
    }

    /// Translates the block; `id` is what its head exit reports.
    pub fn block(mut self, decoded: &[Instruction], id: u32) -> Code {
        self.need = needs(decoded, self.unit.same_flags);
        let count = decoded.len();
        // sub qword [BUDGET], count; jb short
        self.asm.rm(true, &[0x83], 5, word(frame::BUDGET));
        self.asm.bytes(&[count as u8]);
        let short = self.asm.jcc_forward(2);
        let mut ended = false;
        for (n, ins) in decoded.iter().enumerate() {
            self.index = n;
            self.following = decoded.get(n + 1).copied();
            ended = self.instruction(ins);
        }
        if !ended {
            let next = i64::from(self.unit.offset) + decoded.last().map_or(0, |i| i.next_ip()) as i64;
            self.save_flags();
            transfer::goto(&mut self, next);
        }
        self.cold_code();
        self.asm.land(short);
        self.asm.rm(true, &[0x83], 0, word(frame::BUDGET));
        self.asm.bytes(&[count as u8]);
        let head_exit = self.asm.here();
        self.asm.mov_eax(id << 8 | frame::HEAD as u32);
        self.asm.jmp(self.unit.thunks.leave);
        let exits = self.exit_code();
        Code { bytes: self.asm.buf, exits, head_exit }
    }

    /// Whether the block ends with it.
    fn instruction(&mut self, ins: &Instruction) -> bool {
        let (here, flags, sites, cold) = (self.asm.here(), self.flags, self.unit.sites.len(), self.cold.len());
        let (exits, sse_checked) = (self.exits.len(), self.sse_checked);
        let ended = match transfer::template(self, ins) {
            Some(done) => done.map(|()| true),
            None => integer::template(self, ins).map(|()| false),
        };
        if let Ok(ended) = ended {
            let resume = self.asm.here();
            let restore = self.flags != Flags::Saved && self.need.get(self.index + 1).copied().unwrap_or(true);
            self.settle(ins, (!ended).then_some(resume), restore);
            return ended;
        }
        // What was emitted of it is forgotten.
        self.asm.buf.truncate(here);
        (self.flags, self.sse_checked) = (flags, sse_checked);
        self.unit.sites.truncate(sites);
        self.cold.truncate(cold);
        self.exits.truncate(exits);
        self.waiting.clear();
        self.call(ins);
        false
    }

    /// The jumps off the fast path that this instruction made go to its function.
    fn settle(&mut self, ins: &Instruction, resume: Option<usize>, restore_flags: bool) {
        let jumps = std::mem::take(&mut self.waiting);
        if !jumps.is_empty() {
            let site = self.site(ins);
            self.cold.push(Cold { jumps, site, resume, restore_flags });
        }
    }

    /// Executes the instruction by its function.
    fn call(&mut self, ins: &Instruction) {
        self.save_flags();
        let site = self.site(ins);
        self.asm.mov_eax(site);
        self.asm.call(self.unit.thunks.step);
        self.flags = Flags::Saved;
    }

    fn site(&mut self, ins: &Instruction) -> u32 {
        let insn = &self.unit.insns[self.index];
        self.unit.sites.push(Site {
            f: insn.f,
            insn,
            start: self.unit.insns.as_ptr(),
            count: self.unit.insns.len() as u8,
            offset: self.unit.offset,
            flags: !ignores_flags(ins),
            floats: vector::floats(ins),
            x87: x87::computes(ins, self.unit.same_flags),
        });
        self.unit.sites.len() as u32 - 1
    }

    fn cold_code(&mut self) {
        for cold in std::mem::take(&mut self.cold) {
            for jump in cold.jumps {
                self.asm.land(jump);
            }
            self.asm.mov_eax(cold.site);
            self.asm.call(self.unit.thunks.step);
            match cold.resume {
                Some(resume) => {
                    if cold.restore_flags {
                        frame::restore_flags(&mut self.asm);
                    }
                    self.asm.jmp_back(resume);
                }
                // ud2: the function of a branch never goes on.
                None => self.asm.bytes(&[0x0f, 0x0b]),
            }
        }
    }

    fn exit_code(&mut self) -> Vec<Exit> {
        let mut exits = Vec::with_capacity(self.exits.len());
        for (at, target) in std::mem::take(&mut self.exits) {
            let unknown = self.asm.here();
            self.asm.aim(at, unknown);
            self.asm.mov_eax((self.unit.first_link + exits.len() as u32) << 8 | frame::LINK as u32);
            self.asm.jmp(self.unit.thunks.leave);
            exits.push(Exit { at, unknown, target });
        }
        exits
    }

    /// A jump whose distance stands at `at` goes to `target` of the same page.
    pub fn exit(&mut self, at: usize, target: u16) {
        self.exits.push((at, target));
    }

    /// The jump whose distance stands at `at` leaves the fast path of this instruction.
    pub fn slow(&mut self, at: usize) {
        self.waiting.push(at);
    }

    /// Off the fast path if this word is 0. RFLAGS are lost.
    pub fn refuse_unless(&mut self, n: usize) {
        // cmp byte [word], 0
        self.asm.rm(false, &[0x80], 7, word(n));
        self.asm.bytes(&[0]);
        let slow = self.asm.jcc_forward(4);
        self.slow(slow);
    }

    /// The instruction as the interpreter knows it.
    pub fn insn(&self) -> &Insn {
        &self.unit.insns[self.index]
    }

    /// The instruction is the block's last.
    pub fn is_last(&self) -> bool {
        self.index + 1 == self.unit.insns.len()
    }

    pub fn needed_after(&self) -> bool {
        self.need[self.index + 1]
    }

    /// What follows changes RFLAGS and may leave the block before it has set new ones.
    pub fn save_flags(&mut self) {
        if self.flags == Flags::Host {
            if self.need[self.index.min(self.need.len() - 1)] || self.index + 1 == self.need.len() - 1 {
                frame::save_flags(&mut self.asm);
            }
            self.flags = Flags::Both;
        }
    }

    /// RFLAGS are about to be lost.
    pub fn spoil_flags(&mut self) {
        self.save_flags();
        self.flags = Flags::Saved;
    }

    /// What follows looks at RFLAGS or keeps some of them.
    pub fn host_flags(&mut self) {
        if self.flags == Flags::Saved {
            frame::restore_flags(&mut self.asm);
            self.flags = Flags::Both;
        }
    }

    /// Finds the page of the access of `size` bytes at RAX in the TLB. After it RAX is the offset in the page, R11 the page's host address.
    pub fn translate(&mut self, size: u32, write: bool) {
        let entries = frame::tlb() + (self.unit.half * 32) as i32;
        self.asm.mov(R11, RAX);
        // shr r11d, 7; and r11d, 2047 << 5
        self.asm.bytes(&[0x41, 0xc1, 0xeb, 7, 0x41, 0x81, 0xe3]);
        self.asm.imm32(((crate::tlb::ENTRIES - 1) << 5) as u32);
        self.asm.rm(true, &[0x33], RAX, Mem::indexed(RBP, R11, entries + if write { 8 } else { 0 }));
        // cmp rax, 4096 - size; ja slow
        self.asm.bytes(&[0x48, 0x3d]);
        self.asm.imm32(4096 - size);
        let miss = self.asm.jcc_forward(7);
        self.slow(miss);
        self.asm.load(R11, Mem::indexed(RBP, R11, entries + 16));
    }

    /// RAX = the linear address that is `offset` from the start of the running code's page.
    pub fn linear(&mut self, offset: i32) {
        self.asm.load(RAX, word(PAGE));
        if offset != 0 {
            self.asm.lea(RAX, Mem::at(RAX, offset));
        }
    }
}

/// Whether the function of this instruction neither looks at the arithmetic flags nor changes them nor ends a block.
fn ignores_flags(ins: &Instruction) -> bool {
    ins.rflags_read() == 0
        && ins.rflags_modified() == 0
        && ins.flow_control() == FlowControl::Next
        && !ins.is_privileged()
        // The decoder's crate believes that a rotation by a full turn changes nothing.
        && !matches!(ins.mnemonic(), N::Pushf | N::Pushfd | N::Pushfq | N::Rcl | N::Rcr | N::Rol | N::Ror)
}

/// Which flags are wanted before each instruction, and after the last: not when the next one that touches them writes all of them and
/// nothing before it can leave the block.
fn needs(decoded: &[Instruction], same_flags: bool) -> Vec<bool> {
    let mut need = vec![true; decoded.len() + 1];
    for (n, ins) in decoded.iter().enumerate().rev() {
        let stays = operand::memory(ins).is_none() && integer::shape(ins).is_some();
        need[n] = match integer::shape(ins) {
            Some(shape) if stays => match shape.writes {
                Writes::All => shape.reads || !same_flags && ins.rflags_undefined() != 0 && need[n + 1],
                Writes::Some => true,
                Writes::None => shape.reads || need[n + 1],
            },
            _ => true,
        };
    }
    need
}

/// Whether an operand is a direct target in 64-bit code.
pub fn is_direct(ins: &Instruction) -> bool {
    ins.op_count() == 1 && ins.op0_kind() == OpKind::NearBranch64
}

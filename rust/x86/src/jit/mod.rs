//! The template translator: blocks that were executed often become host code (x86-64 hosts only).
//!
//! Nothing about it is visible to the guest: registers, flags, faults, instruction counts and stops are those of the interpreter,
//! whose functions do everything that has no template. See docs/design/translator.md.

mod asm;
mod block;
pub(crate) mod codes;
mod float;
mod frame;
mod integer;
mod muldiv;
mod onward;
mod operand;
mod region;
mod system;
mod transfer;
mod vector;
mod x87;

use iced_x86::{Decoder, DecoderOptions, Instruction};
use memory::PAGE_SIZE;

use crate::cache::ARENA;
use crate::core::Core;
use crate::insn::{Insn, TRANSLATED, UNTRANSLATABLE};
use crate::run::End;

pub(crate) use codes::{Codes, Places};
pub(crate) use float::X87Image;
pub(crate) use frame::Site;

/// Room for translated code. A Linux boot takes about 10 MiB; what is not used costs nothing.
const REGION: usize = 64 << 20;
/// More than any block needs.
const BLOCK: usize = 32 << 10;

/// A translated block.
struct Translated {
    count: u8,
    half: usize,
    /// Where in its page it begins, and where that page is.
    offset: u16,
    page: u64,
    /// Offsets in the region: its code, and where it is left before its first instruction.
    code: usize,
    head_exit: usize,
    /// Links that lead here.
    incoming: Vec<u32>,
}

/// A direct jump inside a page, patched once its target is translated.
struct Link {
    /// Offsets in the region: of the jump's distance, and of the code for an unknown target.
    at: usize,
    unknown: usize,
    /// Offset of the target in its page.
    target: u16,
}

/// All translations of a machine; all its vCPUs use them, in turn.
pub struct Jit {
    region: region::Region,
    thunks: frame::Thunks,
    first: usize,
    next: usize,
    sites: Vec<Site>,
    blocks: Vec<Translated>,
    links: Vec<Link>,
    /// By a block's index in the block cache: 1 + the number of its translation, or 0. Mostly never touched.
    by_start: Vec<u32>,
    places: Places,
    same_flags: bool,
    /// The guest's x87 registers are loaded on the way in, whether they will be used or not: for tests.
    pub eager: bool,
    decoded: Vec<Instruction>,
}

/// Why translated code came back.
pub(crate) enum Left {
    /// The loop has to look at something, as at the end of an interpreted block.
    End(End),
    /// RIP is where to go on.
    Next,
    /// As `Next`; the link may be told where that is.
    Link(u32),
    /// Nothing was executed: the block at RIP is dead, or longer than the budget.
    Head,
}

/// What [`Jit::translate`] needs to know of a block.
pub(crate) struct Block<'a> {
    pub start: u32,
    pub insns: &'a mut [Insn],
    /// Its bytes, as they are in memory now.
    pub bytes: &'a [u8],
    /// Guest physical address of the first.
    pub phys: u64,
    pub half: usize,
}

impl Jit {
    /// Why there can be none is an error of the host: no second mapping, no LAHF in 64-bit code.
    pub fn new() -> std::io::Result<Self> {
        let extended = std::arch::x86_64::__cpuid(0x8000_0001);
        if extended.ecx & 1 == 0 {
            return Err(std::io::Error::other("this processor has no LAHF in 64-bit code"));
        }
        let mut region = region::Region::new(REGION)?;
        let base = region.address(0);
        let mut asm = asm::Asm::new(base);
        let thunks = frame::thunks(&mut asm, base);
        region.put(0, &asm.buf);
        let first = asm.buf.len().next_multiple_of(64);
        Ok(Self {
            region,
            thunks,
            first,
            next: first,
            sites: Vec::new(),
            blocks: Vec::new(),
            links: Vec::new(),
            by_start: vec![0; ARENA],
            places: Places::default(),
            same_flags: is_amd(),
            eager: false,
            decoded: Vec::new(),
        })
    }

    /// Blocks translated since everything was dropped last.
    pub fn translations(&self) -> usize {
        self.blocks.len()
    }

    /// Whether there is room for one more block.
    pub fn has_room(&self) -> bool {
        self.region.len() - self.next >= BLOCK && self.links.len() < 1 << 23 && self.blocks.len() < 1 << 23
    }

    /// Translates a block and marks its first instruction accordingly.
    pub(crate) fn translate(&mut self, block: Block<'_>) {
        block.insns[0].heat = UNTRANSLATABLE;
        if !self.decode(&block) {
            return;
        }
        let decoded = std::mem::take(&mut self.decoded);
        let base = self.region.address(self.next);
        let id = self.blocks.len() as u32;
        let (offset, page) = ((block.phys % PAGE_SIZE) as u16, block.phys & !(PAGE_SIZE - 1));
        let translator = block::Translator::new(block::Unit {
            base,
            thunks: self.thunks,
            same_flags: self.same_flags,
            half: block.half,
            offset,
            insns: block.insns,
            sites: &mut self.sites,
            first_link: self.links.len() as u32,
        });
        let code = translator.block(&decoded, id);
        self.decoded = decoded;
        debug_assert!(code.bytes.len() <= BLOCK, "{} bytes for a block", code.bytes.len());
        if code.bytes.len() > BLOCK {
            return;
        }
        self.region.put(self.next, &code.bytes);
        let at = |offset: usize| self.next + offset;
        self.links.extend(code.exits.iter().map(|e| Link { at: at(e.at), unknown: at(e.unknown), target: e.target }));
        self.blocks.push(Translated {
            count: block.insns.len() as u8,
            half: block.half,
            offset,
            page,
            code: self.next,
            head_exit: at(code.head_exit),
            incoming: Vec::new(),
        });
        self.next = (self.next + code.bytes.len()).next_multiple_of(16);
        self.remember(id);
        self.by_start[block.start as usize] = id + 1;
        block.insns[0].heat = TRANSLATED;
    }

    /// Decodes the bytes again; false when they are not what the block was made of (a device is writing them just now).
    fn decode(&mut self, block: &Block<'_>) -> bool {
        self.decoded.clear();
        let mut decoder = Decoder::new(64, block.bytes, DecoderOptions::AMD);
        for insn in block.insns.iter() {
            if !decoder.can_decode() {
                return false;
            }
            let ins = decoder.decode();
            // The interpreter's decoder makes XCHG R8, RAX of what this one calls PAUSE.
            if ins.code() as u16 != insn.code || ins.len() != usize::from(insn.len) {
                return false;
            }
            self.decoded.push(ins);
        }
        true
    }

    /// The translation of the block that starts at `start`, if it is for this privilege level and fits the budget.
    pub fn find(&self, start: u32, half: usize, budget: u64) -> Option<u32> {
        let id = self.by_start.get(start as usize)?.checked_sub(1)?;
        let block = &self.blocks[id as usize];
        (block.half == half && budget >= u64::from(block.count)).then_some(id)
    }

    /// Lets jumps that look for the block find it.
    pub fn remember(&mut self, id: u32) {
        let block = &self.blocks[id as usize];
        self.places.put(block.page + u64::from(block.offset), block.half, self.region.address(block.code));
    }

    /// Lets a link lead straight to a block, which must be the one at its target.
    pub fn link(&mut self, link: u32, to: u32) {
        let distance = {
            let (link, block) = (&self.links[link as usize], &self.blocks[to as usize]);
            (block.code as i64 - (link.at as i64 + 4)) as i32
        };
        self.region.put(self.links[link as usize].at, &distance.to_le_bytes());
        self.blocks[to as usize].incoming.push(link);
    }

    /// The block that started at `start` is dead: nobody may enter it again.
    pub fn kill(&mut self, start: u32) {
        let Some(id) = self.by_start.get_mut(start as usize).map(std::mem::take).and_then(|n| n.checked_sub(1)) else { return };
        let block = &mut self.blocks[id as usize];
        for link in std::mem::take(&mut block.incoming) {
            let link = &self.links[link as usize];
            let distance = (link.unknown as i64 - (link.at as i64 + 4)) as i32;
            self.region.put(link.at, &distance.to_le_bytes());
        }
        let block = &self.blocks[id as usize];
        self.places.forget(block.page + u64::from(block.offset), block.half);
        let mut jump = vec![0xe9];
        jump.extend(((block.head_exit as i64 - (block.code as i64 + 5)) as i32).to_le_bytes());
        self.region.put(block.code, &jump);
    }

    /// Drops everything; `end`: where the last block that there may be a translation of ended.
    pub fn clear(&mut self, end: usize) {
        self.next = self.first;
        self.sites.clear();
        for block in self.blocks.drain(..) {
            self.places.forget(block.page + u64::from(block.offset), block.half);
        }
        self.links.clear();
        self.by_start[..end].fill(0);
    }

    /// Executes from block `id`, which is the one at RIP; `global`: see [`Codes::put`], `None`: its address is not to be remembered.
    pub(crate) fn run(&self, core: &mut Core, id: u32, global: Option<bool>) -> Left {
        let block = &self.blocks[id as usize];
        let code = self.region.address(block.code);
        if let Some(global) = global {
            core.codes.put(core.cpu.rip, block.half, code, global);
        }
        core.places = &raw const self.places;
        let why = core.enter_translated(self.thunks.enter, self.sites.as_ptr(), code, self.eager);
        let page = core.cpu.gpr[frame::PAGE];
        match why & 0xff {
            frame::STEP => match core.ended.take() {
                Some(end) => Left::End(end),
                None => Left::Next,
            },
            frame::LINK => {
                let link = (why >> 8) as u32;
                core.cpu.rip = page + u64::from(self.links[link as usize].target);
                Left::Link(link)
            }
            frame::JUMP => {
                core.cpu.rip = core.cpu.gpr[frame::TARGET];
                Left::Next
            }
            _ => {
                let block = &self.blocks[(why >> 8) as usize];
                core.cpu.rip = page + u64::from(block.offset);
                core.codes.forget(core.cpu.rip, block.half);
                Left::Head
            }
        }
    }
}

/// Whether this processor leaves undefined flags as the CPU profile's maker does.
fn is_amd() -> bool {
    let v = std::arch::x86_64::__cpuid(0);
    (v.ebx, v.edx, v.ecx) == (0x6874_7541, 0x6974_6e65, 0x444d_4163)
}

//! Decoded blocks, shared by all vCPUs of a machine, and each vCPU's fast way to them.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use memory::{GuestMemory, PAGE_SIZE};

use crate::insn::{Insn, TRANSLATED, UNTRANSLATABLE};
use crate::jit::Jit;
use crate::run;
use crate::state::CodeSize;

/// Decoded instructions kept at most (40 bytes each); then everything is dropped. A Linux boot decodes 250 000.
pub(crate) const ARENA: usize = 1 << 20;

/// Pages remembered for vCPUs that do not run; one that missed more gives up all its write access.
const MARKS: usize = 4096;

/// Where a block's instructions are in the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub start: u32,
    pub count: u32,
}

/// Physical address of the first byte, and the mode it was decoded for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key(u64);

impl Key {
    pub fn new(phys: u64, size: CodeSize) -> Self {
        Self(phys << 2 | size as u64)
    }
    fn phys(self) -> u64 {
        self.0 >> 2
    }
}

/// Keys are addresses: one multiplication spreads them well enough.
#[derive(Default)]
pub struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(u64::from(b));
        }
    }
    fn write_u64(&mut self, v: u64) {
        let mixed = (self.0.rotate_left(5) ^ v).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ mixed >> 32;
    }
}

type Map<K, V> = HashMap<K, V, BuildHasherDefault<AddressHasher>>;

#[derive(Debug, Clone, Copy)]
struct Block {
    span: Span,
    len: u32,
    /// Physical address of the second page of an instruction that crosses a page end; `u64::MAX` for all others.
    second: u64,
}

/// All decoded blocks of a machine. A page with blocks is marked as code in [`GuestMemory`], which is what makes stores to it
/// take the slow path and devices report their writes.
pub struct Cache {
    insns: Vec<Insn>,
    blocks: Map<Key, Block>,
    pages: Map<u64, Vec<Key>>,
    /// Changes when the arena starts anew: every vCPU's jump cache is then stale. A block that dies alone leaves [`run::stale`] in
    /// its place instead.
    generation: u64,
    /// The last pages that became code, for TLBs of vCPUs that did not run meanwhile.
    marks: Vec<u64>,
    marks_base: usize,
    /// Interpreted executions after which a block is translated; [`NEVER`]: none is, because there is no translator.
    threshold: u8,
    pub(crate) jit: Option<Jit>,
}

/// Counts of executions stay below this.
const NEVER: u8 = TRANSLATED;

/// How a block is to be executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Heat {
    Interpret,
    /// It has just become worth a translation.
    Translate,
    Translated,
}

impl Default for Cache {
    fn default() -> Self {
        Self {
            // Never grows, so that nothing moves; the host gives memory when it is first used.
            insns: Vec::with_capacity(ARENA),
            blocks: Map::default(),
            pages: Map::default(),
            generation: 0,
            marks: Vec::new(),
            marks_base: 0,
            threshold: NEVER,
            jit: None,
        }
    }
}

impl Cache {
    pub fn new() -> Self {
        Self::default()
    }

    /// Blocks are translated after `executions` (at most 250) by the interpreter, if this host allows it: an error says why it does
    /// not, and the interpreter goes on alone.
    pub fn translate_after(&mut self, executions: u8) -> std::io::Result<()> {
        let jit = match &mut self.jit {
            Some(jit) => jit,
            none => none.insert(Jit::new()?),
        };
        jit.eager = executions == 0;
        self.threshold = executions.min(250);
        Ok(())
    }

    /// Blocks translated since everything was dropped last.
    pub fn translations(&self) -> usize {
        self.jit.as_ref().map_or(0, Jit::translations)
    }

    /// Counts one execution of a block.
    #[inline(always)]
    pub(crate) fn heat(&mut self, span: Span) -> Heat {
        let heat = &mut self.insns[span.start as usize].heat;
        if *heat >= TRANSLATED {
            return if *heat == TRANSLATED { Heat::Translated } else { Heat::Interpret };
        }
        if *heat >= self.threshold {
            return Heat::Translate;
        }
        *heat += u8::from(*heat < NEVER - 1);
        Heat::Interpret
    }

    #[inline(always)]
    pub(crate) fn insns_mut(&mut self, span: Span) -> (&mut [Insn], &mut Option<Jit>) {
        (&mut self.insns[span.start as usize..][..span.count as usize], &mut self.jit)
    }

    pub fn generation(&self) -> u64 {
        self.generation
    }

    #[inline(always)]
    pub fn insns(&self, span: Span) -> &[Insn] {
        &self.insns[span.start as usize..][..span.count as usize]
    }

    /// Looks a block up. `second` is asked for the current translation of the page after the block's when it needs that.
    pub fn find(&self, key: Key) -> Option<(Span, u64)> {
        self.blocks.get(&key).map(|b| (b.span, b.second))
    }

    /// Takes over a freshly decoded block of `len` bytes. `second` as in [`Cache::find`].
    pub fn insert(&mut self, memory: &GuestMemory, key: Key, insns: &[Insn], len: u32, second: u64) -> Span {
        if self.insns.len() + insns.len() > ARENA {
            self.clear(memory);
        }
        if self.blocks.contains_key(&key) {
            self.kill(key);
        }
        let span = Span { start: self.insns.len() as u32, count: insns.len() as u32 };
        self.insns.extend_from_slice(insns);
        self.blocks.insert(key, Block { span, len, second });
        let first = key.phys() & !(PAGE_SIZE - 1);
        self.enlist(memory, first, key);
        if second != u64::MAX {
            self.enlist(memory, second, key);
        }
        span
    }

    /// Tells the branch `from`, an instruction of this cache, which block follows it.
    pub(crate) fn link(&mut self, from: *const Insn, taken: bool, span: Span) {
        let index = (from as usize).wrapping_sub(self.insns.as_ptr() as usize) / size_of::<Insn>();
        if let Some(insn) = self.insns.get_mut(index) {
            insn.set_link(taken, span.start, span.count as u8);
        }
    }

    fn enlist(&mut self, memory: &GuestMemory, page: u64, key: Key) {
        let keys = self.pages.entry(page).or_default();
        if keys.is_empty() {
            memory.set_code(page, true);
            if self.marks.len() == MARKS {
                self.marks_base += MARKS;
                self.marks.clear();
            }
            self.marks.push(page);
        }
        keys.push(key);
    }

    /// Number of pages that ever became code; with [`Cache::marks_since`] a vCPU learns of those it has not seen.
    pub fn marks(&self) -> usize {
        self.marks_base + self.marks.len()
    }

    /// Pages that became code since `seen`; `None` when that is too long ago to tell.
    pub fn marks_since(&self, seen: usize) -> Option<&[u64]> {
        self.marks.get(seen.checked_sub(self.marks_base)?..)
    }

    fn kill(&mut self, key: Key) {
        if let Some(block) = self.blocks.remove(&key) {
            let first = &mut self.insns[block.span.start as usize];
            first.f = run::stale;
            if first.heat == TRANSLATED {
                if let Some(jit) = &mut self.jit {
                    jit.kill(block.span.start);
                }
            }
            first.heat = UNTRANSLATABLE;
            let first = key.phys() & !(PAGE_SIZE - 1);
            for page in [first, block.second] {
                if let Some(keys) = self.pages.get_mut(&page) {
                    keys.retain(|&k| k != key);
                }
            }
        }
    }

    /// Drops every block that has a byte in `phys..phys + len`. Write access comes back when a page has no blocks left.
    pub fn invalidate(&mut self, memory: &GuestMemory, phys: u64, len: u64) {
        let end = phys.saturating_add(len);
        let mut page = phys & !(PAGE_SIZE - 1);
        while page < end {
            if let Some(keys) = self.pages.get(&page) {
                let dead: Vec<Key> = keys
                    .iter()
                    .copied()
                    .filter(|k| {
                        self.blocks.get(k).is_none_or(|b| {
                            let start = k.phys();
                            // A crossing instruction's second part counts as the start of its page.
                            let hit = start < end && start + u64::from(b.len) > phys;
                            hit || b.second == page && phys & (PAGE_SIZE - 1) < 15
                        })
                    })
                    .collect();
                for key in dead {
                    self.kill(key);
                }
                if self.pages.get(&page).is_some_and(Vec::is_empty) {
                    self.pages.remove(&page);
                    memory.set_code(page, false);
                }
            }
            page += PAGE_SIZE;
        }
    }

    /// Drops everything.
    pub fn clear(&mut self, memory: &GuestMemory) {
        for &page in self.pages.keys() {
            memory.set_code(page, false);
        }
        if let Some(jit) = &mut self.jit {
            jit.clear(self.insns.len());
        }
        self.insns.clear();
        self.blocks.clear();
        self.pages.clear();
        self.generation += 1;
        self.marks_base += self.marks.len();
        self.marks.clear();
    }
}

const JUMPS: usize = 4096;

#[derive(Debug, Clone, Copy)]
struct Jump {
    linear: u64,
    key: u64,
    span: Span,
}

/// Direct-mapped: linear address → block, valid for one set of translations (`key`; that of global pages changes less often).
pub(crate) struct JumpCache(Box<[Jump; JUMPS]>);

impl Default for JumpCache {
    fn default() -> Self {
        let none = Jump { linear: 0, key: 0, span: Span { start: 0, count: 0 } };
        Self(vec![none; JUMPS].into_boxed_slice().try_into().unwrap_or_else(|_| unreachable!("the length is JUMPS")))
    }
}

impl JumpCache {
    #[inline(always)]
    fn index(linear: u64) -> usize {
        (linear ^ linear >> 12) as usize & (JUMPS - 1)
    }

    #[inline(always)]
    pub fn get(&self, linear: u64, key: u64, global: u64) -> Option<Span> {
        let e = &self.0[Self::index(linear)];
        (e.linear == linear && (e.key == key || e.key == global)).then_some(e.span)
    }

    /// Whether what `get` just found is valid until global pages change.
    pub fn is_global(&self, linear: u64, global: u64) -> bool {
        let e = &self.0[Self::index(linear)];
        e.linear == linear && e.key == global
    }

    pub fn forget(&mut self, linear: u64) {
        self.0[Self::index(linear)].key = 0;
    }

    pub fn put(&mut self, linear: u64, key: u64, span: Span) {
        self.0[Self::index(linear)] = Jump { linear, key, span };
    }
}

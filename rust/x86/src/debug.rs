//! Hardware breakpoints: DR0–DR3 as DR7 enables them (SDM vol. 3, chapter 18). While one is enabled the loop goes instruction by
//! instruction, and pages with data breakpoints stay out of the TLB's fast path.

use crate::core::{Core, DB};
use crate::state::flags;

const CR4_DE: u64 = 1 << 3;

/// DR7's two bits for what is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum On {
    Execute,
    Write,
    Port,
    Access,
}

#[derive(Debug, Clone, Copy)]
struct Breakpoint {
    on: On,
    first: u64,
    last: u64,
    /// Its bit in DR6.
    bit: u64,
}

/// What DR0–DR3 and DR7 amount to. Derived; rebuilt whenever they change.
#[derive(Debug, Default)]
pub struct Breakpoints {
    armed: Vec<Breakpoint>,
    /// Any is enabled.
    pub active: bool,
    /// Any watches memory.
    pub data: bool,
    /// DR6 bits of those that the running instruction, or one whose trap MOV SS holds back, has hit.
    pub hit: u64,
    /// The frame of a #DB is being written.
    pub muted: bool,
}

impl Breakpoints {
    fn new(dr: &[u64; 8], cr4: u64, long: bool) -> Self {
        let mut b = Self::default();
        for n in 0..4 {
            if dr[7] >> (2 * n) & 3 == 0 {
                continue;
            }
            let control = dr[7] >> (16 + 4 * n);
            let on = match control & 3 {
                0 => On::Execute,
                1 => On::Write,
                2 if cr4 & CR4_DE != 0 => On::Port,
                // Undefined without CR4.DE: never hits.
                2 => continue,
                _ => On::Access,
            };
            let len = match (on, control >> 2 & 3) {
                (On::Execute, _) | (_, 0) => 1,
                (_, 1) => 2,
                (_, 2) => 8,
                _ => 4,
            };
            let address = if long { dr[n] } else { dr[n] & 0xffff_ffff };
            let first = address & !(len - 1);
            b.armed.push(Breakpoint { on, first, last: first.wrapping_add(len - 1), bit: 1 << n });
        }
        b.active = !b.armed.is_empty();
        b.data = b.armed.iter().any(|p| matches!(p.on, On::Write | On::Access));
        b
    }

    fn hits(&self, from: u64, len: u64, kinds: &[On]) -> u64 {
        let to = from.wrapping_add(len - 1);
        let overlaps = |p: &&Breakpoint| kinds.contains(&p.on) && p.first <= to && from <= p.last;
        self.armed.iter().filter(overlaps).fold(0, |bits, p| bits | p.bit)
    }
}

impl Core {
    /// After a change of DR0–DR3, DR7, CR4.DE or the mode.
    pub fn refresh_breakpoints(&mut self) {
        let hit = self.breakpoints.hit;
        let data = self.breakpoints.data;
        self.breakpoints = Breakpoints { hit, ..Breakpoints::new(&self.cpu.dr, self.cpu.cr4, self.cpu.long_mode()) };
        if data || self.breakpoints.data {
            self.flush_tlb_all();
        }
    }

    /// Raises #DB for `causes`, bits of DR6. B0–B3 show this one's, the others add up until the guest clears them.
    pub(crate) fn debug_exception(&mut self, causes: u64) {
        self.cpu.dr[6] = self.cpu.dr[6] & !0xf | causes;
        self.raise(DB, None);
    }

    /// DR6 bits of the breakpoints on the instruction at RIP; none while RF is set.
    pub(crate) fn code_breakpoint(&self) -> u64 {
        if self.cpu.flags & flags::RF != 0 {
            return 0;
        }
        let at = self.linear(self.cpu.seg[crate::state::CS].base, self.cpu.rip);
        let at = if self.cpu.code_size == crate::state::CodeSize::Bits64 { self.cpu.rip } else { at };
        self.breakpoints.hits(at, 1, &[On::Execute])
    }

    /// A page with a data breakpoint takes the slow path.
    pub(crate) fn watched_page(&self, lin: u64) -> bool {
        self.breakpoints.hits(lin & !0xfff, 0x1000, &[On::Write, On::Access]) != 0
    }

    /// Notes that memory was accessed.
    pub(crate) fn watch_access(&mut self, lin: u64, len: u64, write: bool) {
        let kinds: &[On] = if write { &[On::Write, On::Access] } else { &[On::Access] };
        self.breakpoints.hit |= self.breakpoints.hits(lin, len, kinds);
    }

    /// Notes that a port was accessed.
    pub(crate) fn watch_port(&mut self, port: u16, width: u8) {
        if self.breakpoints.active {
            self.breakpoints.hit |= self.breakpoints.hits(u64::from(port), u64::from(width), &[On::Port]);
        }
    }
}

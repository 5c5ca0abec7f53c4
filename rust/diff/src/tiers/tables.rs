//! Page tables of the little machine: two roots over the same memory, and changes of entries that come with a flush.

use super::routines::{FLUSH_ALL, FLUSH_CR3, FLUSH_PAGE, SCRATCH};
use super::world::{self, ALIAS, CODE, CODE_LEN, DATA, DEVICE, FRESH, Frame, HOLE, LARGE, LAST, NOBODY, READ_ONLY, STACK};
use super::world::{APIC, SUPERVISOR, get, physical, put};
use crate::rng::Rng;

pub const ROOTS: [u64; 2] = [0x1000, 0xc000];
const PDPT: [u64; 2] = [0x2000, 0xd000];
const PD: [u64; 2] = [0x3000, 0xe000];
const PT: [u64; 2] = [0x4000, 0xf000];
/// For addresses in the last 2 GiB. The second lies where the hole would be.
const PDPT_LAST: [u64; 2] = [0xb000, 0x1_8000];

const APIC_GPA: u64 = 0xfee0_0000;
const NOBODY_GPA: u64 = 0x9000_0000;

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const A: u64 = 0x20;
const D: u64 = 0x40;
const PS: u64 = 0x80;
const G: u64 = 0x100;
const NX: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Pages whose entries change.
const PAGES: [u64; 16] = [
    CODE,
    CODE,
    CODE + 0x1000,
    CODE + 0x2000,
    CODE + 0x3000,
    DATA,
    DATA,
    DATA + 0x1000,
    READ_ONLY,
    HOLE,
    FRESH,
    STACK,
    STACK + 0x1000,
    DEVICE,
    ALIAS,
    LAST,
];

/// One change: up to two entries written, and the routine that flushes.
#[derive(Debug, Clone)]
pub struct Change {
    entries: [(u64, u64); 2],
    /// What INVLPG is given.
    linear: [u64; 3],
    flush: u64,
}

/// Changes that the guest's routine goes through, over and over.
pub const CHANGES: usize = 16;

/// Both sets of tables.
pub fn build(ram: &mut [u8], rng: &mut Rng, frame: Frame) {
    let global = if frame.global { G } else { 0 };
    let large = P | W | U | PS | global | if rng.chance(50) { NX } else { 0 };
    for root in 0..2 {
        let table = P | W | U | A;
        put(ram, ROOTS[root], PDPT[root] | table);
        put(ram, ROOTS[root] + 8 * 256, PDPT[root] | table);
        put(ram, ROOTS[root] + 8 * 511, PDPT_LAST[root] | table);
        put(ram, PDPT[root], PD[root] | table);
        put(ram, PDPT_LAST[root] + 8 * 510, PD[root] | table);
        put(ram, PD[root], PT[root] | table);
        put(ram, PD[root] + 8, large);
    }
    let mut set = |page: u64, entry: u64| put(ram, PT[0] + 8 * (page >> 12), entry);
    for page in 1..0x10 {
        set(page << 12, page << 12 | P | W | global);
    }
    let code = P | U | global | if rng.chance(80) { W } else { 0 };
    for page in (0..CODE_LEN).step_by(0x1000) {
        let gpa = physical(CODE + page);
        set(CODE + page, gpa | code);
        set(ALIAS + page, gpa | P | W | U | A | D);
    }
    let data = P | W | U | A | D | global | if rng.chance(70) { NX } else { 0 };
    for page in [DATA, DATA + 0x1000, STACK, STACK + 0x1000, LAST] {
        set(page, physical(page) | data);
    }
    set(READ_ONLY, READ_ONLY | P | U | A);
    set(SUPERVISOR, SUPERVISOR | P | W);
    set(FRESH, FRESH | P | W | U | NX);
    set(DEVICE, world::DEVICE_GPA | P | W | U);
    set(NOBODY, NOBODY_GPA | P | W | U);
    set(APIC, APIC_GPA | P | W | if rng.chance(50) { U } else { 0 });
    ram.copy_within(PT[0] as usize..PT[0] as usize + 0x1000, PT[1] as usize);
    // What is not global is elsewhere under the other root.
    let slot = |page: u64| PT[1] + 8 * (page >> 12);
    let mut swaps = vec![(ALIAS, ALIAS + 0x2000), (READ_ONLY, FRESH)];
    if !frame.global {
        swaps.extend([(CODE, CODE + 0x1000), (CODE + 0x2000, CODE), (DATA, LAST), (STACK, DATA + 0x1000)]);
    }
    for (a, b) in swaps {
        if rng.chance(50) {
            let (x, y) = (get(ram, slot(a)), get(ram, slot(b)));
            put(ram, slot(a), y);
            put(ram, slot(b), x);
        }
    }
}

/// The changes of a case, laid down where the routine finds them.
pub fn changes(ram: &mut [u8], rng: &mut Rng) -> Vec<Change> {
    let changes: Vec<Change> = (0..CHANGES).map(|_| if rng.chance(88) { leaf(ram, rng) } else { upper(ram, rng) }).collect();
    for (n, change) in changes.iter().enumerate() {
        let [(a, b), (c, d)] = change.entries;
        let [e, f, g] = change.linear;
        for (k, word) in [a, b, c, d, e, f, g, change.flush].into_iter().enumerate() {
            put(ram, super::routines::CHANGES + 64 * n as u64 + 8 * k as u64, word);
        }
    }
    changes
}

fn everywhere(address: u64) -> [u64; 3] {
    [0, 0xffff_8000_0000_0000, 0xffff_ffff_8000_0000].map(|base| base + address)
}

fn leaf(ram: &[u8], rng: &mut Rng) -> Change {
    let page = rng.pick(&PAGES) + if rng.chance(10) { 0x1000 } else { 0 };
    let slot = 8 * (page >> 12);
    let root = rng.below(2) as usize;
    let old = get(ram, PT[root] + slot);
    let value = match rng.below(10) {
        0..=2 => old,
        3 => old ^ W,
        4 => old ^ U,
        5 => old ^ NX,
        6 => old & !P,
        7 => old & !(A | D),
        _ => old & !ADDRESS | physical(rng.pick(&PAGES[..8])),
    };
    let global = old & G != 0;
    // Entries of a global page are the same under both roots.
    let second = if global { (PT[1 - root] + slot, value) } else { (SCRATCH, 0) };
    let flush = match rng.below(10) {
        0..=4 => FLUSH_PAGE,
        5..=7 if !global => FLUSH_CR3,
        _ => FLUSH_ALL,
    };
    Change { entries: [(PT[root] + slot, value), second], linear: everywhere(page + rng.below(0x1000)), flush }
}

/// A large page, or what covers everything.
fn upper(ram: &[u8], rng: &mut Rng) -> Change {
    let at = rng.pick(&[8, 8, 0]);
    let old = get(ram, PD[0] + at);
    let bits = if at == 8 { rng.pick(&[0, W, U, NX, P]) } else { rng.pick(&[0, U]) };
    let flush = match rng.below(3) {
        0 if at == 8 => FLUSH_PAGE,
        1 if old & G == 0 && at == 8 => FLUSH_CR3,
        _ => FLUSH_ALL,
    };
    let value = old ^ bits;
    Change { entries: [(PD[0] + at, value), (PD[1] + at, value)], linear: everywhere(LARGE + rng.below(0x20_0000)), flush }
}

/// Whether only the accessed and dirty bits of an entry differ, given a byte's place and what differs in it.
pub fn accessed_or_dirty(at: usize, differs: u8) -> bool {
    let table = at as u64 & !0xfff;
    at % 8 == 0
        && u64::from(differs) & !(A | D) == 0
        && [ROOTS, PDPT, PD, PT, PDPT_LAST].into_iter().flatten().any(|t| t == table)
}

/// Whether tables hold what neither was there before nor came with a flush. Accessed and dirty bits do not count.
pub fn spoiled(before: &[u8], now: &[u8], changes: &[Change]) -> bool {
    let bare = |entry: u64| entry & !(A | D);
    let tables = [ROOTS, PDPT, PD, PT, PDPT_LAST].into_iter().flatten();
    tables.flat_map(|table| (table..table + 0x1000).step_by(8)).any(|at| {
        let (old, new) = (bare(get(before, at)), bare(get(now, at)));
        old != new && !changes.iter().flat_map(|c| c.entries).any(|(a, v)| a == at && bare(v) == new)
    })
}

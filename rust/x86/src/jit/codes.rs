//! Each vCPU's table from linear addresses to translated code, for jumps whose target is not fixed.

use crate::tlb;

/// Entries of each half.
pub const ENTRIES: usize = 2048;
const ALL: usize = 2 * ENTRIES;

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Entry {
    linear: u64,
    code: u64,
}

/// Direct-mapped. A hit promises that fetching from the address is permitted at the half's privilege level and gives the block that
/// `code` was made of.
#[repr(C)]
pub struct Codes {
    entries: [Entry; ALL],
    used: Vec<u16>,
    used_global: Vec<u16>,
}

/// An address whose own entry is another one.
const fn never(index: usize) -> u64 {
    ((index & (ENTRIES - 1)) ^ 1) as u64
}

static NONE: [Entry; ALL] = {
    let mut entries = [Entry { linear: 0, code: 0 }; ALL];
    let mut n = 0;
    while n < ALL {
        entries[n].linear = never(n);
        n += 1;
    }
    entries
};

impl Default for Codes {
    fn default() -> Self {
        Self { entries: NONE, used: Vec::new(), used_global: Vec::new() }
    }
}

/// Bytes from the table's start to the entries of a TLB half.
pub const fn half(half: usize) -> usize {
    if half & tlb::USER != 0 { ENTRIES * size_of::<Entry>() } else { 0 }
}

impl Codes {
    fn index(linear: u64, half: usize) -> usize {
        let low = (linear ^ linear >> 12) as usize & (ENTRIES - 1);
        if half & tlb::USER != 0 { low + ENTRIES } else { low }
    }

    pub fn put(&mut self, linear: u64, half: usize, code: u64, global: bool) {
        let index = Self::index(linear, half);
        let list = if global { &mut self.used_global } else { &mut self.used };
        if list.len() == 2 * ALL {
            self.clear();
        }
        let list = if global { &mut self.used_global } else { &mut self.used };
        list.push(index as u16);
        self.entries[index] = Entry { linear, code };
    }

    pub fn forget(&mut self, linear: u64, half: usize) {
        let index = Self::index(linear, half);
        self.entries[index].linear = never(index);
    }

    /// Entries of pages that are not global.
    pub fn flush(&mut self) {
        for n in self.used.drain(..) {
            self.entries[usize::from(n)].linear = never(usize::from(n));
        }
    }

    pub fn clear(&mut self) {
        self.flush();
        for n in self.used_global.drain(..) {
            self.entries[usize::from(n)].linear = never(usize::from(n));
        }
    }
}

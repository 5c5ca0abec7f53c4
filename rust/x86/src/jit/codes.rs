//! Two ways to translated code for jumps whose target is not fixed: each vCPU's table of linear addresses, and the machine's of
//! physical ones, which is asked when the first does not know (any more: a CR3 write empties it of user code).

use crate::tlb;

/// Entries of each half.
pub const ENTRIES: usize = 8192;
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
    /// First, and on the heap: translated code begins with this word.
    entries: Box<[Entry; ALL]>,
    used: Vec<u16>,
    used_global: Vec<u16>,
}

/// An address whose own entry is another one: below 4096 an address is its own index.
const fn never(index: usize) -> u64 {
    ((index & (ENTRIES - 1) & 0xfff) ^ 1) as u64
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
        Self { entries: Box::new(NONE), used: Vec::new(), used_global: Vec::new() }
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

    pub fn get(&self, linear: u64, half: usize) -> Option<u64> {
        let entry = &self.entries[Self::index(linear, half)];
        (entry.linear == linear).then_some(entry.code)
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

/// Entries of [`Places`].
const PLACES: usize = 1 << 15;

#[derive(Debug, Clone, Copy)]
struct Place {
    key: u64,
    code: u64,
}

/// Direct-mapped: physical address of a block's first byte and TLB half → its living translation, of 64-bit code.
pub struct Places(Box<[Place]>);

impl Default for Places {
    fn default() -> Self {
        Self(vec![Place { key: u64::MAX, code: 0 }; PLACES].into_boxed_slice())
    }
}

impl Places {
    fn index(phys: u64) -> usize {
        (phys ^ phys >> 12) as usize & (PLACES - 1)
    }

    fn key(phys: u64, half: usize) -> u64 {
        phys << 1 | u64::from(half & tlb::USER != 0)
    }

    pub fn get(&self, phys: u64, half: usize) -> Option<u64> {
        let place = &self.0[Self::index(phys)];
        (place.key == Self::key(phys, half)).then_some(place.code)
    }

    pub fn put(&mut self, phys: u64, half: usize, code: u64) {
        self.0[Self::index(phys)] = Place { key: Self::key(phys, half), code };
    }

    pub fn forget(&mut self, phys: u64, half: usize) {
        let place = &mut self.0[Self::index(phys)];
        if place.key == Self::key(phys, half) {
            place.key = u64::MAX;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_entry_is_no_address_that_looks_there() {
        for half in [0, tlb::USER] {
            for index in 0..ENTRIES {
                let entry = if half == 0 { index } else { index + ENTRIES };
                assert_ne!(Codes::index(never(entry), half), entry);
                assert_eq!(NONE[entry].linear, never(entry));
            }
        }
    }
}

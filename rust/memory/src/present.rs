//! Finding the pages of an anonymous mapping that anybody has touched.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::PAGE_SIZE;
use crate::region::HostRange;

/// How the pages were found; reported, because the last way reads all of the region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scan {
    /// `PAGEMAP_SCAN` (Linux 6.7).
    PagemapScan,
    /// Reading `/proc/self/pagemap`.
    Pagemap,
    /// There is no page map to ask: every page is looked at.
    Whole,
}

impl Scan {
    pub fn name(self) -> &'static str {
        match self {
            Scan::PagemapScan => "pagemap-scan",
            Scan::Pagemap => "pagemap",
            Scan::Whole => "whole",
        }
    }
}

/// Touched runs of a region, in bytes from its start, ascending and disjoint: `(offset, length)`. Swapped pages count.
pub(crate) fn touched(host: HostRange, size: u64) -> (Vec<(u64, u64)>, Scan) {
    let Ok(pagemap) = File::open("/proc/self/pagemap") else { return (vec![(0, size)], Scan::Whole) };
    if let Ok(runs) = scan(&pagemap, host.address() as u64, size) {
        return (runs, Scan::PagemapScan);
    }
    match read(&pagemap, host.address() as u64, size) {
        Ok(runs) => (runs, Scan::Pagemap),
        Err(_) => (vec![(0, size)], Scan::Whole),
    }
}

fn push(runs: &mut Vec<(u64, u64)>, offset: u64, len: u64) {
    match runs.last_mut() {
        Some((start, have)) if *start + *have == offset => *have += len,
        _ => runs.push((offset, len)),
    }
}

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct ScanArgs {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region` of linux/fs.h.
#[repr(C)]
#[derive(Default, Clone, Copy)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

fn scan(pagemap: &File, address: u64, size: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut runs = Vec::new();
    let mut found = [PageRegion::default(); 512];
    let mut args = ScanArgs {
        size: size_of::<ScanArgs>() as u64,
        start: address,
        end: address + size,
        vec: found.as_mut_ptr() as u64,
        vec_len: found.len() as u64,
        category_inverted: PAGE_IS_PFNZERO,
        category_mask: PAGE_IS_PFNZERO,
        category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        return_mask: PAGE_IS_PRESENT,
        ..ScanArgs::default()
    };
    while args.start < args.end {
        // SAFETY: the kernel reads `args`, writes its `walk_end` and at most `vec_len` entries of `found`.
        let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut args) };
        if count < 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        }
        for region in &found[..count as usize] {
            push(&mut runs, region.start - address, region.end - region.start);
        }
        if args.walk_end <= args.start {
            return Err(io::Error::other("PAGEMAP_SCAN does not advance"));
        }
        args.start = args.walk_end;
    }
    Ok(runs)
}

/// Page map entries with bit 63 (present) or 62 (swapped): Documentation/admin-guide/mm/pagemap.rst.
const ENTRY_TOUCHED: u64 = 3 << 62;

fn read(pagemap: &File, address: u64, size: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut runs = Vec::new();
    let mut buffer = vec![0u8; 64 * 1024];
    let pages = size / PAGE_SIZE;
    let mut page = 0;
    while page < pages {
        let count = (pages - page).min(buffer.len() as u64 / 8);
        let entries = &mut buffer[..count as usize * 8];
        pagemap.read_exact_at(entries, (address / PAGE_SIZE + page) * 8)?;
        for (i, entry) in entries.chunks_exact(8).enumerate() {
            if u64::from_ne_bytes(entry.try_into().expect("8 bytes")) & ENTRY_TOUCHED != 0 {
                push(&mut runs, (page + i as u64) * PAGE_SIZE, PAGE_SIZE);
            }
        }
        page += count;
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GuestMemory, RegionLayout};

    #[test]
    fn every_way_finds_what_was_touched() {
        let size = 64 << 20;
        let memory = GuestMemory::new(&[RegionLayout { gpa: 0, size }]).unwrap();
        for page in [0u64, 1, 2, 77, 4096, 16383] {
            memory.write(page * PAGE_SIZE, &[1]).unwrap();
        }
        // Reading maps the shared zero page: not touched for `PAGEMAP_SCAN`, harmlessly so for the others.
        memory.read(9000 * PAGE_SIZE, &mut [0]).unwrap();
        let host = memory.regions()[0].host();
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let wanted =
            [(0, 3 * PAGE_SIZE), (77 * PAGE_SIZE, PAGE_SIZE), (4096 * PAGE_SIZE, PAGE_SIZE), (16383 * PAGE_SIZE, PAGE_SIZE)];
        let covers = |runs: &[(u64, u64)]| wanted.iter().all(|w| runs.iter().any(|r| r.0 <= w.0 && w.0 + w.1 <= r.0 + r.1));
        let runs = read(&pagemap, host.address() as u64, size).unwrap();
        assert!(covers(&runs), "{runs:?}");
        match scan(&pagemap, host.address() as u64, size) {
            Ok(runs) => assert!(covers(&runs), "{runs:?}"),
            Err(e) => assert_eq!(e.raw_os_error(), Some(libc::ENOTTY), "{e}"),
        }
        assert!(covers(&touched(host, size).0));
    }
}

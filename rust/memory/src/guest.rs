//! All RAM of one machine.

use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use crate::faults::Faults;
use crate::region::Region;
use crate::{MemoryError, PAGE_SIZE, RegionLayout, Source};

/// The page holds bytes that an engine has decoded or translated.
const PAGE_CODE: u8 = 1;
/// The page was written since tracking began.
const PAGE_DIRTY: u8 = 2;
/// The page was written since [`GuestMemory::take_changed`] was called last.
const PAGE_CHANGED: u8 = 4;
const PAGE_WRITTEN: u8 = PAGE_DIRTY | PAGE_CHANGED;

/// All RAM of one machine.
///
/// Guarantees: a pointer from [`GuestMemory::host_page`] stays valid while the `GuestMemory` lives; a chunk of a lazily
/// restored machine is verified before any byte of it can be seen through any method here; a device's write
/// to a page that holds translated code is reported by [`GuestMemory::take_code_writes`].
pub struct GuestMemory {
    /// Before the regions: its thread works on them.
    faults: Mutex<Option<Faults>>,
    regions: Vec<Region>,
    code_writes: Mutex<Vec<(u64, u64)>>,
    code_write_pending: AtomicBool,
}

impl GuestMemory {
    /// Maps zeroed RAM. Regions must be page aligned, ascending and disjoint.
    pub fn new(layout: &[RegionLayout]) -> Result<Self, MemoryError> {
        Self::build(layout.iter().map(|&region| (region, None)).collect())
    }

    /// Maps RAM whose bytes come from a snapshot, each chunk when it is first needed. [`GuestMemory::load_all`] takes
    /// them all at once.
    pub fn restore(regions: Vec<(RegionLayout, Source)>) -> Result<Self, MemoryError> {
        Self::build(regions.into_iter().map(|(region, source)| (region, Some(source))).collect())
    }

    fn build(regions: Vec<(RegionLayout, Option<Source>)>) -> Result<Self, MemoryError> {
        let mut end = 0;
        for (r, _) in &regions {
            if r.size == 0 || r.gpa % PAGE_SIZE != 0 || r.size % PAGE_SIZE != 0 || r.gpa < end {
                return Err(MemoryError::Layout(format!("region {:#x}+{:#x}", r.gpa, r.size)));
            }
            end = r.gpa.checked_add(r.size).ok_or_else(|| MemoryError::Layout("address overflow".into()))?;
        }
        let regions = regions.into_iter().map(|(r, source)| Region::new(r, source)).collect::<Result<_, _>>()?;
        Ok(Self {
            faults: Mutex::default(),
            regions,
            code_writes: Mutex::new(Vec::new()),
            code_write_pending: AtomicBool::new(false),
        })
    }

    pub(crate) fn keep_faults(&self, faults: Faults) {
        *self.faults.lock().unwrap_or_else(|e| e.into_inner()) = Some(faults);
    }

    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    pub(crate) fn regions_mut(&mut self) -> &mut [Region] {
        &mut self.regions
    }

    #[inline]
    fn region(&self, gpa: u64) -> Option<&Region> {
        self.regions.iter().find(|r| r.contains(gpa))
    }

    /// True when `gpa` is RAM.
    pub fn is_ram(&self, gpa: u64) -> bool {
        self.region(gpa).is_some()
    }

    /// Host address of the 4 KiB page that holds `gpa` (which may be unaligned), its contents verified; `None` when it is not RAM.
    #[inline]
    pub fn host_page(&self, gpa: u64) -> Result<Option<NonNull<u8>>, MemoryError> {
        let Some(region) = self.region(gpa) else { return Ok(None) };
        let offset = (gpa - region.layout().gpa) & !(PAGE_SIZE - 1);
        region.ensure(offset)?;
        Ok(Some(region.host().at(offset)))
    }

    /// Host address of `gpa` when all `len` bytes from there are RAM of one region, verified: one run of host memory for
    /// a disk to read into or write from. After writing through it call [`GuestMemory::written`].
    pub fn host_range(&self, gpa: u64, len: u64) -> Result<NonNull<u8>, MemoryError> {
        let not_ram = MemoryError::NotRam { gpa, len };
        let Some(region) = self.region(gpa) else { return Err(not_ram) };
        let offset = gpa - region.layout().gpa;
        if len > region.layout().size - offset {
            return Err(not_ram);
        }
        let mut at = offset;
        while at < offset + len {
            region.ensure(at)?;
            at += region.ensured_span(at);
        }
        Ok(region.host().at(offset))
    }

    /// Reads `data.len()` bytes at `gpa`; the range may cross pages and touching regions but not leave RAM.
    pub fn read(&self, gpa: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        self.check(gpa, data.len() as u64)?;
        self.for_each_span(gpa, data.len(), |region, offset, at, n| {
            region.ensure(offset)?;
            region.host().copy_out(offset, &mut data[at..at + n]);
            Ok(())
        })
    }

    /// Writes as a device or loader does: pages become dirty and translated code in them is reported. Nothing is
    /// written when part of the range is not RAM.
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.check(gpa, data.len() as u64)?;
        self.for_each_span(gpa, data.len(), |region, offset, at, n| {
            region.ensure(offset)?;
            region.host().copy_in(offset, &data[at..at + n]);
            Ok(())
        })?;
        self.written(gpa, data.len() as u64);
        Ok(())
    }

    /// Moves a program of `size` bytes at `gpa`: adds `delta` to the little-endian words of `width` bytes (4 or 8) at the addresses in
    /// `table` (32 bits each, little-endian, sign-extended). `link`: the address that `gpa` has in the table.
    /// Nothing is written when one of them is outside of the program.
    pub fn relocate(&self, gpa: u64, size: u64, link: u64, table: &[u8], width: u8, delta: i64) -> Result<(), MemoryError> {
        let width = if width == 8 { 8 } else { 4 };
        let Some(region) = self.region(gpa) else { return Err(MemoryError::NotRam { gpa, len: size }) };
        let first = gpa - region.layout().gpa;
        // Every chunk of it is there from here on.
        self.host_range(gpa, size)?;
        let offsets = || {
            table.chunks_exact(4).map(|word| {
                let address = i64::from(i32::from_le_bytes([word[0], word[1], word[2], word[3]])) as u64;
                address.wrapping_sub(link)
            })
        };
        if let Some(wild) = offsets().find(|&offset| offset > size || size - offset < width as u64) {
            return Err(MemoryError::Layout(format!("a relocation at {wild:#x} of a program of {size:#x} bytes")));
        }
        for offset in offsets() {
            let mut bytes = [0; 8];
            region.host().copy_out(first + offset, &mut bytes[..width]);
            let moved = u64::from_le_bytes(bytes).wrapping_add(delta as u64);
            region.host().copy_in(first + offset, &moved.to_le_bytes()[..width]);
        }
        self.written(gpa, size);
        Ok(())
    }

    /// To be called after writing `len` bytes at `gpa` through a pointer instead of [`GuestMemory::write`].
    /// What is not RAM of it is ignored.
    pub fn written(&self, gpa: u64, len: u64) {
        let Some(last) = len.checked_sub(1).map(|n| gpa.saturating_add(n)) else { return };
        for region in &self.regions {
            let layout = region.layout();
            let (from, to) = (gpa.max(layout.gpa), last.min(layout.gpa + (layout.size - 1)));
            if from > to {
                continue;
            }
            let pages = (from - layout.gpa) / PAGE_SIZE..=(to - layout.gpa) / PAGE_SIZE;
            let mut code = false;
            for flags in &region.pages[*pages.start() as usize..=*pages.end() as usize] {
                let was = flags.load(Ordering::Relaxed);
                if was & PAGE_WRITTEN != PAGE_WRITTEN {
                    flags.fetch_or(PAGE_WRITTEN, Ordering::Relaxed);
                }
                code |= was & PAGE_CODE != 0;
            }
            if code {
                self.code_writes.lock().unwrap_or_else(|e| e.into_inner()).push((from, to - from + 1));
                self.code_write_pending.store(true, Ordering::Release);
            }
        }
    }

    /// Whether [`GuestMemory::take_code_writes`] has something. One relaxed load: engines poll it.
    #[inline]
    pub fn code_write_pending(&self) -> bool {
        self.code_write_pending.load(Ordering::Relaxed)
    }

    /// Ranges (GPA, bytes) with code pages in them that a device wrote since the last call.
    pub fn take_code_writes(&self) -> Vec<(u64, u64)> {
        self.code_write_pending.store(false, Ordering::Release);
        std::mem::take(&mut *self.code_writes.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// Says whether the page holds decoded code. Only the engine that runs on this memory calls it.
    pub fn set_code(&self, gpa: u64, code: bool) {
        self.flags(
            gpa,
            |f| if code { f.fetch_or(PAGE_CODE, Ordering::Relaxed) } else { f.fetch_and(!PAGE_CODE, Ordering::Relaxed) },
        );
    }

    pub fn is_code(&self, gpa: u64) -> bool {
        self.flags(gpa, |f| f.load(Ordering::Relaxed)).unwrap_or(0) & PAGE_CODE != 0
    }

    /// The engine is about to hand out write access to this page.
    pub fn mark_dirty(&self, gpa: u64) {
        self.flags(gpa, |f| {
            if f.load(Ordering::Relaxed) & PAGE_WRITTEN != PAGE_WRITTEN {
                f.fetch_or(PAGE_WRITTEN, Ordering::Relaxed);
            }
        });
    }

    /// Chunks of region `index`, of `size` bytes, that were written since the last call, ascending. The engine must have taken back what
    /// write access it hands out (see [`GuestMemory::mark_dirty`]), or later writes are not seen.
    pub fn take_changed(&self, index: usize, size: u64) -> Vec<u64> {
        let Some(region) = self.regions.get(index) else { return Vec::new() };
        let per_chunk = (size / PAGE_SIZE).max(1) as usize;
        let take = |flags: &AtomicU8| {
            let changed = flags.load(Ordering::Relaxed) & PAGE_CHANGED != 0;
            if changed {
                flags.fetch_and(!PAGE_CHANGED, Ordering::Relaxed);
            }
            changed
        };
        let chunks = region.pages.chunks(per_chunk).enumerate();
        // All pages of a chunk are taken, not only the first that changed.
        chunks.filter(|(_, pages)| pages.iter().filter(|p| take(p)).count() > 0).map(|(n, _)| n as u64).collect()
    }

    #[inline]
    fn flags<R>(&self, gpa: u64, f: impl FnOnce(&AtomicU8) -> R) -> Option<R> {
        let region = self.region(gpa)?;
        Some(f(&region.pages[((gpa - region.layout().gpa) / PAGE_SIZE) as usize]))
    }

    /// That every byte of the range is RAM.
    fn check(&self, gpa: u64, len: u64) -> Result<(), MemoryError> {
        let mut left = len;
        let mut at = gpa;
        while left > 0 {
            let Some(region) = self.region(at) else { return Err(MemoryError::NotRam { gpa, len }) };
            let here = (region.layout().size - (at - region.layout().gpa)).min(left);
            left -= here;
            at = match at.checked_add(here) {
                Some(next) => next,
                None if left == 0 => break,
                None => return Err(MemoryError::NotRam { gpa, len }),
            };
        }
        Ok(())
    }

    /// Cuts a checked range where regions and chunks end: `f(region, offset in it, offset in the range, bytes)`.
    fn for_each_span(
        &self,
        gpa: u64,
        len: usize,
        mut f: impl FnMut(&Region, u64, usize, usize) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let mut done = 0;
        while done < len {
            let at = gpa + done as u64;
            let region = self.region(at).ok_or(MemoryError::NotRam { gpa, len: len as u64 })?;
            let offset = at - region.layout().gpa;
            let n = region.ensured_span(offset).min((len - done) as u64) as usize;
            f(region, offset, done, n)?;
            done += n;
        }
        Ok(())
    }
}

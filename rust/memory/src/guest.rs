use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use crate::{MemoryError, PAGE_SIZE};

/// What a region is asked to be. `gpa` and `size` in bytes, both multiples of the page size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionLayout {
    pub gpa: u64,
    pub size: u64,
}

/// The page holds bytes that an engine has decoded or translated.
const PAGE_CODE: u8 = 1;
/// The page was written since tracking began.
const PAGE_DIRTY: u8 = 2;

/// One mapped run of guest RAM.
pub struct Region {
    layout: RegionLayout,
    host: NonNull<u8>,
    pages: Box<[AtomicU8]>,
}

// SAFETY: the mapping lives as long as the region and is shared memory by nature: the guest's vCPUs and
// devices race on it exactly as they do on hardware. Nothing in it is a Rust reference.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn new(layout: RegionLayout) -> Result<Self, MemoryError> {
        // SAFETY: an anonymous private mapping at an address of the kernel's choice.
        let host = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                layout.size as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if host == libc::MAP_FAILED {
            return Err(MemoryError::Host {
                what: format!("cannot map {} bytes of guest RAM", layout.size),
                source: std::sync::Arc::new(std::io::Error::last_os_error()),
            });
        }
        let pages = (0..layout.size / PAGE_SIZE).map(|_| AtomicU8::new(0)).collect();
        Ok(Self { layout, host: NonNull::new(host.cast()).expect("mmap gave null"), pages })
    }

    pub fn layout(&self) -> RegionLayout {
        self.layout
    }

    fn contains(&self, gpa: u64) -> bool {
        gpa.wrapping_sub(self.layout.gpa) < self.layout.size
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `new`, and nobody can hold a pointer past the region.
        unsafe { libc::munmap(self.host.as_ptr().cast(), self.layout.size as usize) };
    }
}

/// All RAM of one machine.
///
/// Guarantees: a pointer from [`GuestMemory::host_page`] stays valid while the `GuestMemory` lives; a chunk of a lazily
/// restored machine is verified before any byte of it can be seen through any method here; a device's write
/// to a page that holds translated code is reported by [`GuestMemory::take_code_writes`].
pub struct GuestMemory {
    regions: Vec<Region>,
    code_writes: Mutex<Vec<(u64, u64)>>,
    code_write_pending: AtomicBool,
}

impl GuestMemory {
    /// Maps zeroed RAM. Regions must be page aligned, ascending and disjoint.
    pub fn new(layout: &[RegionLayout]) -> Result<Self, MemoryError> {
        let mut end = 0;
        for r in layout {
            if r.size == 0 || r.gpa % PAGE_SIZE != 0 || r.size % PAGE_SIZE != 0 || r.gpa < end {
                return Err(MemoryError::Layout(format!("region {:#x}+{:#x}", r.gpa, r.size)));
            }
            end = r.gpa.checked_add(r.size).ok_or_else(|| MemoryError::Layout("address overflow".into()))?;
        }
        let regions = layout.iter().map(|&r| Region::new(r)).collect::<Result<_, _>>()?;
        Ok(Self { regions, code_writes: Mutex::new(Vec::new()), code_write_pending: AtomicBool::new(false) })
    }

    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn region(&self, gpa: u64) -> Option<&Region> {
        self.regions.iter().find(|r| r.contains(gpa))
    }

    /// True when `gpa` is RAM.
    pub fn is_ram(&self, gpa: u64) -> bool {
        self.region(gpa).is_some()
    }

    /// Host address of the 4 KiB page that holds `gpa` (which may be unaligned), its contents verified; `None` when it is not RAM.
    pub fn host_page(&self, gpa: u64) -> Result<Option<NonNull<u8>>, MemoryError> {
        let Some(region) = self.region(gpa) else { return Ok(None) };
        let offset = (gpa - region.layout.gpa) & !(PAGE_SIZE - 1);
        // SAFETY: `offset` is inside the mapping because the region contains `gpa`.
        Ok(Some(unsafe { region.host.add(offset as usize) }))
    }

    /// Reads `data.len()` bytes at `gpa`; the range may cross pages but not leave RAM.
    pub fn read(&self, gpa: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        self.for_each_page(gpa, data.len(), |host, at, n| {
            // SAFETY: `host` points at `n` readable bytes of one guest page and `at..at + n` is inside `data`.
            unsafe { std::ptr::copy_nonoverlapping(host, data.as_mut_ptr().add(at), n) };
        })
    }

    /// Writes as a device or loader does: pages become dirty and translated code in them is reported.
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.for_each_page(gpa, data.len(), |host, at, n| {
            // SAFETY: `host` points at `n` writable bytes of one guest page and `at..at + n` is inside `data`.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr().add(at), host, n) };
        })?;
        self.written(gpa, data.len() as u64);
        Ok(())
    }

    /// To be called after writing `len` bytes at `gpa` through a pointer instead of [`GuestMemory::write`].
    pub fn written(&self, gpa: u64, len: u64) {
        let mut page = gpa & !(PAGE_SIZE - 1);
        while page < gpa + len {
            if self.flags(page, |f| f.fetch_or(PAGE_DIRTY, Ordering::Relaxed)).unwrap_or(0) & PAGE_CODE != 0 {
                self.code_writes.lock().unwrap_or_else(|e| e.into_inner()).push((gpa, len));
                self.code_write_pending.store(true, Ordering::Release);
            }
            page += PAGE_SIZE;
        }
    }

    /// Whether [`GuestMemory::take_code_writes`] has something. One relaxed load: engines poll it.
    pub fn code_write_pending(&self) -> bool {
        self.code_write_pending.load(Ordering::Relaxed)
    }

    /// Ranges (GPA, bytes) of code pages that a device wrote since the last call.
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
        self.flags(gpa, |f| f.fetch_or(PAGE_DIRTY, Ordering::Relaxed));
    }

    fn flags<R>(&self, gpa: u64, f: impl FnOnce(&AtomicU8) -> R) -> Option<R> {
        let region = self.region(gpa)?;
        Some(f(&region.pages[((gpa - region.layout.gpa) / PAGE_SIZE) as usize]))
    }

    fn for_each_page(&self, gpa: u64, len: usize, mut f: impl FnMut(*mut u8, usize, usize)) -> Result<(), MemoryError> {
        let mut done = 0;
        while done < len {
            let at = gpa.wrapping_add(done as u64);
            let page = self.host_page(at)?.ok_or(MemoryError::NotRam { gpa, len: len as u64 })?;
            let offset = (at & (PAGE_SIZE - 1)) as usize;
            let n = (PAGE_SIZE as usize - offset).min(len - done);
            // SAFETY: `offset` is less than a page and `page` points at a whole mapped page.
            f(unsafe { page.as_ptr().add(offset) }, done, n);
            done += n;
        }
        Ok(())
    }
}

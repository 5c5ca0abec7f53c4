//! One mapped run of guest RAM.

use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use crate::source::Loader;
use crate::{MemoryError, PAGE_SIZE, Source, SourceStats};

/// What a region is asked to be. `gpa` and `size` in bytes, both multiples of the page size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionLayout {
    pub gpa: u64,
    pub size: u64,
}

/// `count` zero bytes that cost nothing until they are touched: the allocator takes them from fresh pages. An error and
/// not an abort when there are none, because the count comes from a command line or a file.
pub(crate) fn zeroed_bytes(count: usize) -> Result<Box<[AtomicU8]>, MemoryError> {
    let refused = || {
        MemoryError::host(format!("cannot keep {count} flags of guest memory"), std::io::Error::from_raw_os_error(libc::ENOMEM))
    };
    let layout = Layout::array::<AtomicU8>(count).map_err(|_| refused())?;
    if count == 0 {
        return Ok(Box::default());
    }
    // SAFETY: the layout has a size.
    let bytes = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).ok_or_else(refused)?;
    // SAFETY: `count` bytes from the global allocator with the layout of this very slice, and zero is a valid `AtomicU8`.
    Ok(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(bytes.as_ptr().cast(), count)) })
}

/// The host memory of a region, by value: copying bytes in and out of guest RAM that others may race on.
#[derive(Clone, Copy)]
pub(crate) struct HostRange {
    start: NonNull<u8>,
    size: u64,
}

// SAFETY: an address; whoever uses it holds the region that owns the mapping, and guest RAM is racy by nature.
unsafe impl Send for HostRange {}
// SAFETY: as above.
unsafe impl Sync for HostRange {}

impl HostRange {
    #[inline]
    pub fn at(self, offset: u64) -> NonNull<u8> {
        debug_assert!(offset < self.size);
        // SAFETY: callers give an offset inside the mapping.
        unsafe { self.start.add(offset as usize) }
    }

    pub fn copy_in(self, offset: u64, bytes: &[u8]) {
        assert!(offset.checked_add(bytes.len() as u64).is_some_and(|end| end <= self.size));
        // SAFETY: the range is inside the mapping (checked) and `bytes` is a Rust slice, so it does not overlap guest RAM.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(offset).as_ptr(), bytes.len()) };
    }

    pub fn copy_out(self, offset: u64, bytes: &mut [u8]) {
        assert!(offset.checked_add(bytes.len() as u64).is_some_and(|end| end <= self.size));
        // SAFETY: as in `copy_in`.
        unsafe { std::ptr::copy_nonoverlapping(self.at(offset).as_ptr(), bytes.as_mut_ptr(), bytes.len()) };
    }

    pub fn size(self) -> u64 {
        self.size
    }

    /// Address in this process, for `/proc/self/pagemap`.
    pub fn address(self) -> usize {
        self.start.as_ptr() as usize
    }
}

/// One mapped run of guest RAM.
pub struct Region {
    layout: RegionLayout,
    host: HostRange,
    /// `PAGE_CODE | PAGE_DIRTY` of each page.
    pub(crate) pages: Box<[AtomicU8]>,
    /// Where chunks come from that nobody has touched since the restore.
    loader: Option<Arc<Loader>>,
}

impl Region {
    pub(crate) fn new(layout: RegionLayout, source: Option<Source>) -> Result<Self, MemoryError> {
        let loader = source.map(|source| Loader::new(source, layout.size)).transpose()?.map(Arc::new);
        let size = usize::try_from(layout.size)
            .map_err(|_| MemoryError::Layout(format!("region of {:#x} bytes on this host", layout.size)))?;
        // SAFETY: an anonymous private mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(MemoryError::last_os(format!("cannot map {size} bytes of guest RAM")));
        }
        let host = HostRange { start: NonNull::new(start.cast()).expect("mmap gave null"), size: layout.size };
        let mut region = Self { layout, host, pages: Box::default(), loader };
        region.pages = zeroed_bytes((layout.size / PAGE_SIZE) as usize)?;
        if region.loader.is_some() {
            // Scattered chunks of 64 KiB under huge pages cost seconds and make untouched pages real
            // (docs/design/memory.md). The advice may be unknown to the kernel: then it has no huge pages.
            // SAFETY: the mapping just made; the advice does not change its contents.
            unsafe { libc::madvise(start, size, libc::MADV_NOHUGEPAGE) };
        }
        Ok(region)
    }

    pub fn layout(&self) -> RegionLayout {
        self.layout
    }

    #[inline]
    pub(crate) fn contains(&self, gpa: u64) -> bool {
        gpa.wrapping_sub(self.layout.gpa) < self.layout.size
    }

    pub(crate) fn host(&self) -> HostRange {
        self.host
    }

    pub(crate) fn loader(&self) -> Option<&Loader> {
        self.loader.as_deref()
    }

    pub(crate) fn shared_loader(&self) -> Option<Arc<Loader>> {
        self.loader.clone()
    }

    /// Where it is in this process: for whoever maps it elsewhere.
    pub fn host_address(&self) -> usize {
        self.host.address()
    }

    /// Everything has been taken: the file may close.
    pub(crate) fn forget_source(&mut self) {
        self.loader = None;
    }

    /// Makes the chunk around `offset` (bytes into the region) real and verified. The one way to guest bytes.
    #[inline]
    pub(crate) fn ensure(&self, offset: u64) -> Result<(), MemoryError> {
        match &self.loader {
            None => Ok(()),
            Some(loader) => loader.ensure(offset, self.host),
        }
    }

    /// Bytes from `offset` to the end of what one `ensure` there covers.
    #[inline]
    pub(crate) fn ensured_span(&self, offset: u64) -> u64 {
        let chunk = self.loader.as_ref().map_or(self.layout.size, |loader| loader.source().chunk);
        (chunk - offset % chunk).min(self.layout.size - offset)
    }

    /// What has been taken from the snapshot; `None` when the region does not come from one.
    pub fn source_stats(&self) -> Option<SourceStats> {
        self.loader.as_deref().map(Loader::stats)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `new`, and nobody can hold a pointer past the region.
        unsafe { libc::munmap(self.host.start.as_ptr().cast(), self.layout.size as usize) };
    }
}

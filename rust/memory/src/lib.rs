//! Guest physical memory: regions of host memory, addressed by GPA.
//!
//! Every access path to guest RAM (TLB fill, page walk, DMA, snapshot writer, loader) goes through
//! [`GuestMemory`], because it is the one place that knows which chunks of a lazily restored machine are
//! still only in the snapshot, which pages hold translated code and which pages were written.

mod error;
mod guest;

pub use error::MemoryError;
pub use guest::{GuestMemory, Region, RegionLayout};

/// Bytes in a guest page.
pub const PAGE_SIZE: u64 = 4096;

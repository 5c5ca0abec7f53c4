//! Guest physical memory: regions of host memory, addressed by GPA.
//!
//! Every access path to guest RAM (TLB fill, page walk, DMA, snapshot writer, loader) goes through
//! [`GuestMemory`], because it is the one place that knows which chunks of a lazily restored machine are
//! still only in the snapshot, which pages hold translated code and which pages were written.

mod contents;
mod digests;
mod error;
mod faults;
mod guest;
mod image;
mod present;
mod region;
mod source;

pub use contents::Contents;
pub use digests::{Digest, DigestTable, hash};
pub use error::MemoryError;
pub use faults::OnDamage;
pub use guest::GuestMemory;
pub use image::{ImageStats, RegionImage};
pub use present::Scan;
pub use region::{Region, RegionLayout};
pub use source::{Source, SourceStats};

/// Bytes in a guest page.
pub const PAGE_SIZE: u64 = 4096;

/// Bytes that one digest covers in the snapshots that we write: `docs/design/memory.md` has the measurement.
pub const CHUNK_SIZE: u64 = 64 * 1024;

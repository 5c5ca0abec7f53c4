//! The snapshot file behind a region of a restored machine, and which of its chunks have been taken from it.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use crate::digests::{DigestTable, hash};
use crate::faults::Uffd;
use crate::region::{HostRange, zeroed_bytes};
use crate::{MemoryError, PAGE_SIZE};

/// A region's bytes as a snapshot has them. The open file is kept, so the directory may be removed.
///
/// `name` is what errors call the file. `chunk` is in bytes, a power of two of at least a page.
#[derive(Debug)]
pub struct Source {
    pub file: File,
    pub name: String,
    pub chunk: u64,
    pub digests: DigestTable,
}

/// How much of a lazily restored region has been taken from its source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SourceStats {
    /// Chunks that the snapshot stores (all others are zero and cost nothing).
    pub stored: u64,
    /// Of those, the ones that were read, verified and installed.
    pub loaded: u64,
}

// A chunk's state. Zero, which costs nothing to allocate: nothing of it is in memory yet.
/// Memory is the truth.
const PRESENT: u8 = 1;
/// The source's bytes are not the ones that were saved; `Loader::failures` says why.
const FAILED: u8 = 2;

/// Largest chunk that we read: each load holds one in a buffer, and the size comes from a file.
pub(crate) const MAX_CHUNK: u64 = 2 << 20;

/// Loads of different chunks rarely wait for one another.
const SHARDS: usize = 8;

/// Takes chunks out of a [`Source`], each once.
///
/// Guarantees: a byte is visible only after the chunk around it was read whole into a private buffer and hashed
/// *there*; what is installed is that copy; a chunk that failed once fails for ever; zero pages inside a chunk
/// are not touched.
pub(crate) struct Loader {
    source: Source,
    shift: u32,
    size: u64,
    states: Box<[AtomicU8]>,
    /// One scratch buffer a shard; holding it is the right to change the state of that shard's chunks.
    shards: [Mutex<Vec<u8>>; SHARDS],
    failures: Mutex<BTreeMap<u64, MemoryError>>,
    loaded: AtomicU64,
    /// Where others wait for pages: then these are put there by it.
    uffd: OnceLock<Arc<Uffd>>,
}

impl Loader {
    pub fn new(source: Source, size: u64) -> Result<Self, MemoryError> {
        let chunk = source.chunk;
        if !chunk.is_power_of_two() || !(PAGE_SIZE..=MAX_CHUNK).contains(&chunk) {
            return Err(MemoryError::Layout(format!("chunk size {chunk}")));
        }
        let chunks = size.div_ceil(chunk);
        if source.digests.chunks() != chunks {
            return Err(MemoryError::Layout(format!(
                "{}: {} chunks described, {chunks} expected",
                source.name,
                source.digests.chunks()
            )));
        }
        Ok(Self {
            shift: chunk.trailing_zeros(),
            size,
            states: zeroed_bytes(chunks as usize)?,
            shards: Default::default(),
            failures: Mutex::default(),
            loaded: AtomicU64::new(0),
            uffd: OnceLock::new(),
            source,
        })
    }

    pub fn source(&self) -> &Source {
        &self.source
    }

    pub fn stats(&self) -> SourceStats {
        SourceStats { stored: self.source.digests.stored(), loaded: self.loaded.load(Ordering::Relaxed) }
    }

    /// Makes the chunk around `offset` (bytes into the region) real. A load and a compare when it is.
    #[inline]
    pub fn ensure(&self, offset: u64, host: HostRange) -> Result<(), MemoryError> {
        let chunk = offset >> self.shift;
        if self.states[chunk as usize].load(Ordering::Acquire) == PRESENT {
            return Ok(());
        }
        self.load(chunk, host)
    }

    pub fn is_present(&self, chunk: u64) -> bool {
        self.states[chunk as usize].load(Ordering::Acquire) == PRESENT
    }

    #[cold]
    fn load(&self, chunk: u64, host: HostRange) -> Result<(), MemoryError> {
        let mut buffer = self.shards[chunk as usize % SHARDS].lock().unwrap_or_else(|e| e.into_inner());
        let state = &self.states[chunk as usize];
        match state.load(Ordering::Acquire) {
            PRESENT => return Ok(()),
            FAILED => return Err(self.failure(chunk)),
            _ => {}
        }
        if self.source.digests.get(chunk).is_some() {
            let len = self.chunk_len(chunk);
            buffer.resize(self.source.chunk as usize, 0);
            self.fetch(chunk, &mut buffer[..len])?;
            for (at, page) in (chunk << self.shift..).step_by(PAGE_SIZE as usize).zip(buffer[..len].chunks(PAGE_SIZE as usize)) {
                if !is_zero(page) {
                    self.install(host, at, page)?;
                }
            }
            self.loaded.fetch_add(1, Ordering::Relaxed);
        }
        state.store(PRESENT, Ordering::Release);
        Ok(())
    }

    fn install(&self, host: HostRange, at: u64, page: &[u8]) -> Result<(), MemoryError> {
        match self.uffd.get() {
            None => host.copy_in(at, page),
            Some(uffd) => uffd.copy(host, at, page).map_err(|e| MemoryError::host("cannot install guest memory", e))?,
        }
        Ok(())
    }

    /// From now on pages are put where others wait for them.
    pub fn install_by(&self, uffd: Arc<Uffd>) {
        let _ = self.uffd.set(uffd);
    }

    /// Bytes of the chunk: the last one of a region may be short.
    pub fn chunk_len(&self, chunk: u64) -> usize {
        (self.size - (chunk << self.shift)).min(self.source.chunk) as usize
    }

    /// Reads a stored chunk into `buffer` (its whole length) and verifies it there. A chunk that fails is failed from then on.
    pub fn fetch(&self, chunk: u64, buffer: &mut [u8]) -> Result<(), MemoryError> {
        if self.states[chunk as usize].load(Ordering::Acquire) == FAILED {
            return Err(self.failure(chunk));
        }
        let read = self.source.file.read_exact_at(buffer, chunk << self.shift);
        let why = match read {
            Ok(()) if Some(&hash(buffer)) == self.source.digests.get(chunk) => return Ok(()),
            Ok(()) => "its bytes are not the ones that were saved".to_string(),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => "the file ends before it".to_string(),
            Err(e) => format!("it cannot be read: {e}"),
        };
        let error = MemoryError::Damaged { file: self.source.name.clone(), chunk, why };
        self.failures.lock().unwrap_or_else(|e| e.into_inner()).insert(chunk, error.clone());
        self.states[chunk as usize].store(FAILED, Ordering::Release);
        Err(error)
    }

    fn failure(&self, chunk: u64) -> MemoryError {
        self.failures.lock().unwrap_or_else(|e| e.into_inner()).get(&chunk).cloned().unwrap_or_else(|| MemoryError::Damaged {
            file: self.source.name.clone(),
            chunk,
            why: "it failed before".into(),
        })
    }
}

/// Whether all bytes are zero. Length a multiple of 16; everything we ask about is a page.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Blocks of 64 bytes, no early exit inside one: this is what the compiler turns into vector code.
    bytes.chunks(64).all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
}

//! Writing a region into a snapshot's file, and taking all of one out of it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::digests::{Digest, DigestTable, hash};
use crate::present::{Scan, touched};
use crate::region::Region;
use crate::source::{MAX_CHUNK, is_zero};
use crate::{CHUNK_SIZE, GuestMemory, MemoryError, PAGE_SIZE};

/// What was written of one region.
#[derive(Debug)]
pub struct RegionImage {
    /// Bytes that one digest covers.
    pub chunk: u64,
    pub digests: DigestTable,
    pub stats: ImageStats,
}

/// Where the bytes of a region's image came from. Pages of 4 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageStats {
    pub scan: Scan,
    /// Pages that the host had given to the region.
    pub touched_pages: u64,
    /// Pages that were not all zero: the file's stored size.
    pub written_pages: u64,
    /// Chunks that nobody had touched since the restore: copied from the snapshot before, with their digest.
    pub carried_chunks: u64,
}

/// Where the bytes of a chunk are.
#[derive(Clone, Copy)]
enum From {
    /// In memory; the first of the touched runs that reach into the chunk.
    Memory { first_run: usize },
    /// Still only in the snapshot that the machine was restored from.
    Source,
}

/// Chunks that a worker takes at a time: enough to keep two of them out of each other's way.
const BATCH: usize = 16;

/// Chunks after which the disk is set to work on what was written, while the other thread goes on hashing.
const WRITEBACK: usize = 1024;

#[derive(Default)]
struct Done {
    digests: Vec<(u64, Digest)>,
    written_pages: u64,
    carried_chunks: u64,
}

impl GuestMemory {
    /// Writes region `index` into `file`, which is empty: sparse, its apparent size that of the region. Only pages
    /// that are not all zero are stored. Nothing may write to guest memory meanwhile. The caller syncs the file;
    /// writing back has been started.
    ///
    /// Chunks that a lazily restored machine has never touched are read from their source and verified, not installed.
    pub fn write_region(&self, index: usize, file: &File, threads: usize) -> Result<RegionImage, MemoryError> {
        self.write_region_in(index, file, threads, CHUNK_SIZE)
    }

    /// The same with chunks of another size, for measuring. A restored region keeps that of its source.
    pub fn write_region_in(
        &self,
        index: usize,
        file: &File,
        threads: usize,
        chunk_size: u64,
    ) -> Result<RegionImage, MemoryError> {
        if !chunk_size.is_power_of_two() || !(PAGE_SIZE..=MAX_CHUNK).contains(&chunk_size) {
            return Err(MemoryError::Layout(format!("chunk size {chunk_size}")));
        }
        let region = self.regions().get(index).ok_or_else(|| MemoryError::Layout(format!("there is no region {index}")))?;
        let size = region.layout().size;
        let chunk_size = region.loader().map_or(chunk_size, |loader| loader.source().chunk);
        file.set_len(size).map_err(|e| MemoryError::host("cannot set the file's size", e))?;
        let (runs, scan) = touched(region.host(), size);
        let jobs = jobs(region, chunk_size, &runs);

        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let work = || -> Result<Done, MemoryError> {
            let mut writer = ChunkWriter {
                region,
                file,
                chunk_size,
                runs: &runs,
                buffer: vec![0; chunk_size as usize],
                done: Done::default(),
            };
            while !stop.load(Ordering::Relaxed) {
                let at = next.fetch_add(BATCH, Ordering::Relaxed);
                let Some(batch) = jobs.get(at..jobs.len().min(at + BATCH)).filter(|batch| !batch.is_empty()) else { break };
                for &(chunk, from) in batch {
                    writer.write(chunk, from).inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
                }
                if at / WRITEBACK != (at + BATCH) / WRITEBACK {
                    start_writeback(file);
                }
            }
            Ok(writer.done)
        };
        let parts = in_threads(threads.min(jobs.len().div_ceil(BATCH)), &work)?;
        start_writeback(file);

        let mut digests: Vec<(u64, Digest)> = Vec::with_capacity(parts.iter().map(|p| p.digests.len()).sum());
        let mut stats =
            ImageStats { scan, touched_pages: runs.iter().map(|r| r.1 / PAGE_SIZE).sum(), written_pages: 0, carried_chunks: 0 };
        for part in parts {
            digests.extend(part.digests);
            stats.written_pages += part.written_pages;
            stats.carried_chunks += part.carried_chunks;
        }
        digests.sort_unstable_by_key(|d| d.0);
        Ok(RegionImage { chunk: chunk_size, digests: DigestTable::from_sorted(size.div_ceil(chunk_size), &digests), stats })
    }

    /// Takes every stored chunk out of the snapshot, verified, and lets go of its files. Before anybody uses the memory.
    pub fn load_all(&mut self, threads: usize) -> Result<(), MemoryError> {
        for region in self.regions_mut() {
            let Some(loader) = region.loader() else { continue };
            let chunk_size = loader.source().chunk;
            let stored: Vec<u64> = loader.source().digests.iter_stored().collect();
            let next = AtomicUsize::new(0);
            let shared: &Region = region;
            let work = || -> Result<(), MemoryError> {
                while let Some(chunk) = stored.get(next.fetch_add(1, Ordering::Relaxed)) {
                    // A failing chunk also ends the others' work: nothing is left to take.
                    shared.ensure(chunk * chunk_size).inspect_err(|_| next.store(stored.len(), Ordering::Relaxed))?;
                }
                Ok(())
            };
            in_threads(threads.min(stored.len().div_ceil(BATCH)), &work)?;
            region.forget_source();
        }
        Ok(())
    }
}

/// Runs `work` on `threads` threads (this one is one of them); the first error in thread order wins.
fn in_threads<T: Send>(threads: usize, work: &(impl Fn() -> Result<T, MemoryError> + Sync)) -> Result<Vec<T>, MemoryError> {
    std::thread::scope(|scope| {
        // A host that gives no more threads slows us down; it is no reason to fail.
        let others: Vec<_> = (1..threads)
            .filter_map(|_| std::thread::Builder::new().name("memory".into()).spawn_scoped(scope, work).ok())
            .collect();
        let mut parts = vec![work()];
        for other in others {
            parts.push(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        parts.into_iter().collect()
    })
}

/// The chunks that may hold something, ascending.
fn jobs(region: &Region, chunk_size: u64, runs: &[(u64, u64)]) -> Vec<(u64, From)> {
    let mut jobs: Vec<(u64, From)> = Vec::new();
    for (first_run, (offset, len)) in runs.iter().enumerate() {
        for chunk in offset / chunk_size..=(offset + len - 1) / chunk_size {
            if jobs.last().is_none_or(|(last, _)| *last < chunk) && region.loader().is_none_or(|loader| loader.is_present(chunk))
            {
                jobs.push((chunk, From::Memory { first_run }));
            }
        }
    }
    if let Some(loader) = region.loader() {
        jobs.extend(
            loader.source().digests.iter_stored().filter(|chunk| !loader.is_present(*chunk)).map(|chunk| (chunk, From::Source)),
        );
        jobs.sort_unstable_by_key(|job| job.0);
    }
    jobs
}

struct ChunkWriter<'a> {
    region: &'a Region,
    file: &'a File,
    chunk_size: u64,
    runs: &'a [(u64, u64)],
    buffer: Vec<u8>,
    done: Done,
}

impl ChunkWriter<'_> {
    fn write(&mut self, chunk: u64, from: From) -> Result<(), MemoryError> {
        let start = chunk * self.chunk_size;
        let len = (self.region.layout().size - start).min(self.chunk_size) as usize;
        let digest = match (from, self.region.loader()) {
            (From::Source, Some(loader)) => {
                loader.fetch(chunk, &mut self.buffer[..len])?;
                self.done.carried_chunks += 1;
                loader.source().digests.get(chunk).copied()
            }
            (From::Memory { first_run }, _) => {
                self.gather(start, len, first_run);
                None
            }
            (From::Source, None) => return Ok(()),
        };
        let bytes = &self.buffer[..len];
        let mut written = 0;
        let pages = bytes.chunks(PAGE_SIZE as usize).map(|page| !is_zero(page)).chain([false]).enumerate();
        let mut first = None;
        for (page, filled) in pages {
            match (filled, first) {
                (true, None) => first = Some(page),
                (false, Some(from)) => {
                    let run = &bytes[from * PAGE_SIZE as usize..(page * PAGE_SIZE as usize).min(len)];
                    self.file
                        .write_all_at(run, start + (from as u64) * PAGE_SIZE)
                        .map_err(|e| MemoryError::host("cannot write guest memory", e))?;
                    written += (page - from) as u64;
                    first = None;
                }
                _ => {}
            }
        }
        if written > 0 {
            self.done.written_pages += written;
            self.done.digests.push((chunk, digest.unwrap_or_else(|| hash(bytes))));
        }
        Ok(())
    }

    /// Copies the chunk's touched pages into the buffer; the rest of it is zero and stays untouched in the guest.
    fn gather(&mut self, start: u64, len: usize, first_run: usize) {
        let end = start + len as u64;
        self.buffer[..len].fill(0);
        for (offset, run) in self.runs[first_run..].iter().take_while(|(offset, _)| *offset < end) {
            let (from, to) = ((*offset).max(start), (offset + run).min(end));
            if from < to {
                self.region.host().copy_out(from, &mut self.buffer[(from - start) as usize..(to - start) as usize]);
            }
        }
    }
}

/// Lets the disk work while we prepare the rest. Only speed: `fsync` is what counts, and it comes later.
fn start_writeback(file: &File) {
    // SAFETY: a call on an open descriptor that takes no pointers.
    unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
}

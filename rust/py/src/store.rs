//! Guest memory to and from a snapshot's files. Which files, names and order: `freezeframe.store`.

use std::fs::File;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;

use memory::{DigestTable, GuestMemory, RegionLayout, Source};
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyDict};

use crate::errors;
use crate::memory::Memory;

/// Our own handle on a descriptor that Python opened (and will close).
fn file(fd: RawFd) -> PyResult<File> {
    if fd < 0 {
        return Err(errors::refused("not a file descriptor"));
    }
    // SAFETY: borrowed for the duration of the `dup` only; a closed descriptor makes that fail with EBADF.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    borrowed.try_clone_to_owned().map(File::from).map_err(|e| errors::io_failed("cannot keep the file open", &e))
}

/// BLAKE3 of `data`, 32 bytes.
#[pyfunction]
pub fn blake3<'py>(py: Python<'py>, data: PyBuffer<u8>) -> PyResult<Bound<'py, PyBytes>> {
    let bytes = data.to_vec(py)?;
    Ok(PyBytes::new(py, &py.detach(|| memory::hash(&bytes))))
}

/// Writes region `index` of a machine that stands still to `fd`, a new empty file; the caller syncs it.
///
/// Gives (chunk size in bytes, bit map of the chunks that are not zero, their BLAKE3 digests, statistics).
#[pyfunction]
#[allow(clippy::type_complexity)] // a tuple that Python unpacks at once
#[pyo3(signature = (memory, index, fd, threads, chunk_size = memory::CHUNK_SIZE))]
pub fn write_region<'py>(
    py: Python<'py>,
    memory: &Memory,
    index: usize,
    fd: RawFd,
    threads: usize,
    chunk_size: u64,
) -> PyResult<(u64, Bound<'py, PyBytes>, Bound<'py, PyBytes>, Bound<'py, PyDict>)> {
    let file = file(fd)?;
    let image = py.detach(|| memory.memory.write_region_in(index, &file, threads, chunk_size)).map_err(errors::memory)?;
    let (present, digests) = image.digests.to_packed();
    let stats = PyDict::new(py);
    stats.set_item("scan", image.stats.scan.name())?;
    stats.set_item("touched_pages", image.stats.touched_pages)?;
    stats.set_item("written_pages", image.stats.written_pages)?;
    stats.set_item("carried_chunks", image.stats.carried_chunks)?;
    stats.set_item("stored_chunks", image.digests.stored())?;
    Ok((image.chunk, PyBytes::new(py, &present), PyBytes::new(py, &digests), stats))
}

/// One region of a snapshot as Python describes it: guest address, size, descriptor, what errors call the file, chunk size
/// (all in bytes), map of the chunks that are not zero, their digests.
type RegionSource = (u64, u64, RawFd, String, u64, PyBackedBytes, PyBackedBytes);

/// RAM whose bytes come from a snapshot: chunk by chunk when they are first needed, or all of them now (`copy`).
/// The files stay open until then, so their names may go away.
#[pyfunction]
pub fn restore_memory(py: Python<'_>, regions: Vec<RegionSource>, copy: bool, threads: usize) -> PyResult<Memory> {
    let mut sources = Vec::new();
    for (gpa, size, fd, name, chunk, present, digests) in regions {
        let chunks = if chunk == 0 { return Err(errors::refused(format!("{name}: chunk size 0"))) } else { size.div_ceil(chunk) };
        let digests = DigestTable::from_packed(chunks, &present, &digests).map_err(errors::memory)?;
        sources.push((RegionLayout { gpa, size }, Source { file: file(fd)?, name, chunk, digests }));
    }
    let memory = py
        .detach(|| {
            let mut memory = GuestMemory::restore(sources)?;
            if copy {
                memory.load_all(threads)?;
            }
            Ok(memory)
        })
        .map_err(errors::memory)?;
    Ok(Memory { memory: Arc::new(memory) })
}

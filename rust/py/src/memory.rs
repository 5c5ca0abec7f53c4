//! `Memory`: guest RAM.

use std::sync::{Arc, Mutex};

use memory::{Contents, GuestMemory, RegionLayout};
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::engine::Engine;
use crate::errors;

/// All RAM of one machine, addressed by guest physical address.
#[pyclass(frozen, module = "freezeframe._core")]
pub struct Memory {
    pub memory: Arc<GuestMemory>,
}

#[pymethods]
impl Memory {
    /// Zeroed RAM. `regions`: (guest physical address, size), bytes, multiples of 4096, ascending and disjoint.
    #[new]
    fn new(py: Python<'_>, regions: Vec<(u64, u64)>) -> PyResult<Self> {
        let layout: Vec<_> = regions.into_iter().map(|(gpa, size)| RegionLayout { gpa, size }).collect();
        let memory = py.detach(|| GuestMemory::new(&layout)).map_err(errors::memory)?;
        Ok(Self { memory: Arc::new(memory) })
    }

    #[getter]
    fn regions(&self) -> Vec<(u64, u64)> {
        self.memory.regions().iter().map(|r| (r.layout().gpa, r.layout().size)).collect()
    }

    /// Of each region that is taken from a snapshot when needed: (chunks that the snapshot stores, chunks taken so far).
    /// `None` when nothing is left to take: a booted machine, or one restored with `copy`.
    #[getter]
    fn lazy(&self) -> Option<Vec<(u64, u64)>> {
        self.memory.regions().iter().map(|r| r.source_stats().map(|s| (s.stored, s.loaded))).collect()
    }

    /// `size` bytes from `gpa`; raises `Refused` when the range leaves RAM.
    fn read<'py>(&self, py: Python<'py>, gpa: u64, size: usize) -> PyResult<Bound<'py, PyBytes>> {
        // Checked first: the size may come from a guest, and nothing is to be allocated for a bad one.
        let inside = self.memory.regions().iter().any(|r| {
            let (base, len) = (r.layout().gpa, r.layout().size);
            gpa >= base && (gpa - base).checked_add(size as u64).is_some_and(|end| end <= len)
        });
        if !inside && size > 0 {
            return Err(errors::memory(memory::MemoryError::NotRam { gpa, len: size as u64 }));
        }
        PyBytes::new_with(py, size, |data| py.detach(|| self.memory.read(gpa, data)).map_err(errors::memory))
    }

    /// Adds `delta` to the words that `table` lists, as [`GuestMemory::relocate`] says; raises `Refused` when one is outside.
    /// `program`: (guest physical address, size, address that it was linked for).
    fn relocate(&self, py: Python<'_>, program: (u64, u64, u64), table: &[u8], width: u8, delta: i64) -> PyResult<()> {
        let (gpa, size, link) = program;
        py.detach(|| self.memory.relocate(gpa, size, link, table, width, delta)).map_err(errors::memory)
    }

    /// Copies `data` to `gpa`; raises `Refused` when the range leaves RAM.
    fn write(&self, py: Python<'_>, gpa: u64, data: PyBuffer<u8>) -> PyResult<()> {
        let bytes = data.to_vec(py)?;
        py.detach(|| self.memory.write(gpa, &bytes)).map_err(errors::memory)
    }
}

/// BLAKE3 of each chunk of a machine's RAM, following what its vCPUs and devices write. The software engine's.
#[pyclass(frozen, module = "freezeframe._core")]
pub struct MemoryContents {
    memory: Arc<GuestMemory>,
    contents: Mutex<Contents>,
}

impl MemoryContents {
    fn lock(&self) -> std::sync::MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(|e| e.into_inner())
    }
}

#[pymethods]
impl MemoryContents {
    /// The vCPUs must stand. One of these at a time for a machine.
    #[new]
    fn new(py: Python<'_>, memory: &Memory, engine: &Engine) -> PyResult<Self> {
        let memory = memory.memory.clone();
        let contents = py.detach(|| engine.contents(&memory))?;
        Ok(Self { memory, contents: Mutex::new(contents) })
    }

    /// Follows what was written since; one digest of everything, 32 bytes. The vCPUs must stand.
    fn update<'py>(&self, py: Python<'py>, engine: &Engine) -> PyResult<Bound<'py, PyBytes>> {
        let root = py.detach(|| {
            let mut contents = self.lock();
            engine.follow(&self.memory, &mut contents).map(|()| contents.root())
        })?;
        Ok(PyBytes::new(py, &root))
    }

    /// Where two memories of one shape differ, as of their last `update`: (guest address, bytes) of at most `most` chunks.
    fn differences(&self, other: &MemoryContents, most: usize) -> Vec<(u64, u64)> {
        let found = self.lock().differences(&other.lock(), most);
        let layouts: Vec<_> = self.memory.regions().iter().map(|r| r.layout()).collect();
        let at = |(region, offset, len): (usize, u64, u64)| {
            layouts.get(region).map(|l| (l.gpa + offset, len.min(l.size.saturating_sub(offset))))
        };
        found.into_iter().filter_map(at).collect()
    }
}

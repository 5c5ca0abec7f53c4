//! `Memory`: guest RAM.

use std::sync::Arc;

use memory::{GuestMemory, RegionLayout};
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

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

    /// Copies `data` to `gpa`; raises `Refused` when the range leaves RAM.
    fn write(&self, py: Python<'_>, gpa: u64, data: PyBuffer<u8>) -> PyResult<()> {
        let bytes = data.to_vec(py)?;
        py.detach(|| self.memory.write(gpa, &bytes)).map_err(errors::memory)
    }
}

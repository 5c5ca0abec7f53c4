//! `Bus`: a machine's address spaces, with Python and Rust devices side by side.

use std::sync::Arc;

use pyo3::prelude::*;
use vcpu::{Control, Device, EngineError, Space, Stop};

use crate::control;
use crate::errors;

/// Base of all devices whose registers live in Rust; what `Bus` takes besides Python objects.
#[pyclass(subclass, frozen, module = "freezeframe._core")]
pub struct CoreDevice {
    pub device: Arc<dyn Device>,
}

#[pymethods]
impl CoreDevice {
    /// One access of 1, 2, 4 or 8 bytes, as the bus makes it.
    fn read(&self, py: Python<'_>, offset: u64, size: usize) -> PyResult<u64> {
        let mut data = [0; 8];
        let data = data.get_mut(..size).filter(|d| !d.is_empty()).ok_or_else(|| errors::refused("an access of 1 to 8 bytes"))?;
        py.detach(|| self.device.read(offset, data));
        Ok(data.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    }

    fn write(&self, py: Python<'_>, offset: u64, size: usize, value: u64) -> PyResult<()> {
        let bytes = value.to_le_bytes();
        let data = bytes.get(..size).filter(|d| !d.is_empty()).ok_or_else(|| errors::refused("an access of 1 to 8 bytes"))?;
        py.detach(|| self.device.write(offset, data));
        Ok(())
    }
}

/// Registers in Python: `read(offset, size) -> int` and `write(offset, size, value)`. Taking the GIL is the price of each access.
/// An exception in there stops the machine: a device that failed half way has lost something that the guest was told.
struct PyDevice {
    object: Py<PyAny>,
    control: Arc<Control>,
}

impl PyDevice {
    fn failed(&self, py: Python<'_>, error: &PyErr) {
        let trace = error.traceback(py).and_then(|t| t.format().ok()).unwrap_or_default();
        let message = format!("a device failed: {error}\n{trace}");
        self.control.request_stop(Stop::Failed(EngineError::new("device", message)));
    }
}

impl Device for PyDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let size = data.len().min(8);
        let value = Python::attach(|py| {
            let got = self.object.bind(py).call_method1(pyo3::intern!(py, "read"), (offset, size));
            got.and_then(|v| v.extract::<u64>()).inspect_err(|e| self.failed(py, e)).unwrap_or(u64::MAX)
        });
        data[..size].copy_from_slice(&value.to_le_bytes()[..size]);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let size = data.len().min(8);
        let mut bytes = [0; 8];
        bytes[..size].copy_from_slice(&data[..size]);
        let value = u64::from_le_bytes(bytes);
        Python::attach(|py| {
            if let Err(e) = self.object.bind(py).call_method1(pyo3::intern!(py, "write"), (offset, size, value)) {
                self.failed(py, &e);
            }
        });
    }
}

/// Port and memory-mapped I/O of one machine.
#[pyclass(frozen, module = "freezeframe._core")]
pub struct Bus {
    pub bus: Arc<vcpu::Bus>,
    control: Arc<Control>,
}

impl Bus {
    fn add(&self, space: Space, base: u64, size: u64, device: &Bound<'_, PyAny>) -> PyResult<()> {
        let device: Arc<dyn Device> = match device.cast::<CoreDevice>() {
            Ok(core) => core.get().device.clone(),
            Err(_) => Arc::new(PyDevice { object: device.clone().unbind(), control: self.control.clone() }),
        };
        self.bus.insert(space, base, size, device).map_err(|e| errors::refused(e.to_string()))
    }
}

#[pymethods]
impl Bus {
    /// `control`: told when a Python device raises.
    #[new]
    fn new(control: &control::Control) -> Self {
        Self { bus: Arc::new(vcpu::Bus::default()), control: control.control.clone() }
    }

    /// Claims ports; raises `Refused` where they overlap another device's.
    fn add_pio(&self, base: u64, size: u64, device: &Bound<'_, PyAny>) -> PyResult<()> {
        self.add(Space::Pio, base, size, device)
    }

    fn add_mmio(&self, base: u64, size: u64, device: &Bound<'_, PyAny>) -> PyResult<()> {
        self.add(Space::Mmio, base, size, device)
    }

    fn remove_pio(&self, base: u64) -> bool {
        self.bus.remove(Space::Pio, base)
    }

    fn remove_mmio(&self, base: u64) -> bool {
        self.bus.remove(Space::Mmio, base)
    }

    /// Frees every range. A device in Python usually refers to what owns the bus: without this neither would ever go away.
    fn clear(&self) {
        self.bus.clear();
    }

    /// One access as a vCPU makes it (1, 2, 4 or 8 bytes); for tests and tools.
    fn read(&self, py: Python<'_>, space: &str, address: u64, size: usize) -> PyResult<u64> {
        let (space, size) = access(space, size)?;
        let mut data = [0; 8];
        py.detach(|| self.bus.read(space, address, &mut data[..size]));
        Ok(u64::from_le_bytes(data))
    }

    fn write(&self, py: Python<'_>, space: &str, address: u64, size: usize, value: u64) -> PyResult<()> {
        let (space, size) = access(space, size)?;
        py.detach(|| self.bus.write(space, address, &value.to_le_bytes()[..size]));
        Ok(())
    }
}

fn access(space: &str, size: usize) -> PyResult<(Space, usize)> {
    let space = match space {
        "pio" => Space::Pio,
        "mmio" => Space::Mmio,
        _ => return Err(errors::refused(format!("no address space {space:?}: pio or mmio"))),
    };
    if !matches!(size, 1 | 2 | 4 | 8) {
        return Err(errors::refused(format!("an access of {size} bytes: 1, 2, 4 or 8")));
    }
    Ok((space, size))
}

//! `Ioapic`, `IrqLine`, `MsiRelay`: interrupt pins and messages.

use std::sync::Arc;

use pyo3::prelude::*;
use vcpu::ioapic::IoapicState;

use crate::bus::CoreDevice;
use crate::errors;

/// The I/O APIC's registers, and its pins for devices in Python.
#[pyclass(extends = CoreDevice, frozen, module = "freezeframe._core")]
pub struct Ioapic {
    pub ioapic: Arc<vcpu::ioapic::Ioapic>,
}

impl Ioapic {
    fn made(py: Python<'_>, ioapic: vcpu::ioapic::Ioapic) -> PyResult<Py<Self>> {
        let ioapic = Arc::new(ioapic);
        Py::new(py, PyClassInitializer::from(CoreDevice { device: ioapic.clone() }).add_subclass(Self { ioapic }))
    }
}

#[pymethods]
impl Ioapic {
    /// As after power-on.
    #[staticmethod]
    fn cold(py: Python<'_>) -> PyResult<Py<Self>> {
        Self::made(py, vcpu::ioapic::Ioapic::default())
    }

    #[staticmethod]
    fn from_state(py: Python<'_>, state: &Bound<'_, PyAny>) -> PyResult<Py<Self>> {
        let refuse = |e: String| errors::raise("Incompatible", &format!("saved state of __ioapic: {e}"), &[]);
        let state: IoapicState = crate::saved::read(state).map_err(refuse)?;
        Self::made(py, vcpu::ioapic::Ioapic::from_state(state).map_err(|e| refuse(e.to_string()))?)
    }

    fn state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        Ok(pythonize::pythonize(py, &self.ioapic.state())?)
    }

    /// Holds the pin's input high or low.
    fn set_line(&self, pin: u32, level: bool) {
        self.ioapic.set_line(pin, level);
    }

    /// One rising edge and back.
    fn pulse(&self, pin: u32) {
        self.ioapic.pulse(pin);
    }
}

/// One input pin of the I/O APIC, pulled by any number of devices: high while any of them pulls.
#[pyclass(frozen, module = "freezeframe._core")]
pub struct IrqLine {
    pub line: Arc<virtio::SharedLine>,
}

#[pymethods]
impl IrqLine {
    #[new]
    fn new(ioapic: &Ioapic, pin: u32) -> Self {
        let ioapic = ioapic.ioapic.clone();
        Self { line: virtio::SharedLine::new(Box::new(move |high| ioapic.set_line(pin, high))) }
    }
}

/// The wire from a pair of 8259s to the boot CPU.
#[pyclass(frozen, module = "freezeframe._core")]
pub struct IntrLine {
    pub line: Arc<vcpu::irq::IntrLine>,
}

#[pymethods]
impl IntrLine {
    #[new]
    fn new() -> Self {
        Self { line: Arc::default() }
    }

    /// Whether the controllers ask for an interrupt.
    fn set(&self, level: bool) {
        self.line.set(level);
    }
}

/// Where devices send their message-signalled interrupts; an engine connects to it.
#[pyclass(frozen, module = "freezeframe._core")]
pub struct MsiRelay {
    pub relay: Arc<vcpu::MsiRelay>,
}

#[pymethods]
impl MsiRelay {
    #[new]
    fn new() -> Self {
        Self { relay: Arc::default() }
    }

    /// Takes out the messages (address, data) that wait because no engine is connected.
    fn take_waiting(&self) -> Vec<(u64, u32)> {
        self.relay.take_waiting()
    }
}

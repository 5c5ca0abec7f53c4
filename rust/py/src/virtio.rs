//! `VirtioFunction` and the devices: BAR 0 of virtio-pci functions.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Weak};

use ::virtio::blk::{Blk, BlkConfig, BlkState};
use ::virtio::console::{Console, ConsolePort, ConsoleState};
use ::virtio::disk::Disk;
use ::virtio::irq::IrqLine as Line;
use ::virtio::rng::{Entropy, FileEntropy, Rng, SeededEntropy};
use ::virtio::state::VirtioState;
use ::virtio::{Transport, VirtioDevice};
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vcpu::{Device, Work};

use crate::bus::CoreDevice;
use crate::console::{ConsoleOutput, bad_state, read_state, receive, with_fd};
use crate::control::Control;
use crate::errors;
use crate::irq::{IrqLine, MsiRelay};
use crate::memory::Memory;

/// A function's whole state: its registers, queues and vectors, and what is the device's own.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved<S> {
    virtio: VirtioState,
    device: S,
}

/// The state of a device that has none of its own.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

/// What all functions have in common, without their device's type.
trait Function: Device {
    fn set_msix_control(&self, enabled: bool, masked: bool);
    fn msix_control(&self) -> (bool, bool);
    fn set_intx(&self, line: Option<Box<dyn Line>>);
    fn set_intx_disabled(&self, disabled: bool);
    fn intx_pending(&self) -> bool;
    fn vectors(&self) -> u16;
    fn fault(&self) -> Option<String>;
    fn reset(&self);
}

impl<D: VirtioDevice> Function for Transport<D> {
    fn set_msix_control(&self, enabled: bool, masked: bool) {
        Transport::set_msix_control(self, enabled, masked);
    }

    fn msix_control(&self) -> (bool, bool) {
        Transport::msix_control(self)
    }

    fn set_intx(&self, line: Option<Box<dyn Line>>) {
        Transport::set_intx(self, line);
    }

    fn set_intx_disabled(&self, disabled: bool) {
        Transport::set_intx_disabled(self, disabled);
    }

    fn intx_pending(&self) -> bool {
        Transport::intx_pending(self)
    }

    fn vectors(&self) -> u16 {
        Transport::vectors(self)
    }

    fn fault(&self) -> Option<String> {
        Transport::fault(self)
    }

    fn reset(&self) {
        Transport::reset(self);
    }
}

/// BAR 0 of a virtio-pci function. Configuration space is the caller's, who passes on what this side must know of it.
#[pyclass(extends = CoreDevice, subclass, frozen, module = "freezeframe._core")]
pub struct VirtioFunction {
    function: Arc<dyn Function>,
}

#[pymethods]
impl VirtioFunction {
    /// The MSI-X capability's enable and function-mask bits.
    fn set_msix_control(&self, py: Python<'_>, enabled: bool, masked: bool) {
        py.detach(|| self.function.set_msix_control(enabled, masked));
    }

    fn msix_control(&self, py: Python<'_>) -> (bool, bool) {
        py.detach(|| self.function.msix_control())
    }

    /// The pin used while MSI-X is off; None for none.
    #[pyo3(signature = (line))]
    fn set_intx(&self, py: Python<'_>, line: Option<&IrqLine>) {
        let line = line.map(|l| Box::new(l.line.source()) as Box<dyn Line>);
        py.detach(|| self.function.set_intx(line));
    }

    /// The command register's interrupt-disable bit.
    fn set_intx_disabled(&self, py: Python<'_>, disabled: bool) {
        py.detach(|| self.function.set_intx_disabled(disabled));
    }

    /// The status register's interrupt bit.
    fn intx_pending(&self, py: Python<'_>) -> bool {
        py.detach(|| self.function.intx_pending())
    }

    /// MSI-X vectors: one for each queue and one for the configuration.
    #[getter]
    fn vectors(&self) -> u16 {
        self.function.vectors()
    }

    /// Why the device has stopped with NEEDS_RESET; None while it has not.
    fn fault(&self, py: Python<'_>) -> Option<String> {
        py.detach(|| self.function.fault())
    }

    /// Power-on state in place; files and unread input stay.
    fn reset(&self, py: Python<'_>) {
        py.detach(|| self.function.reset());
    }
}

/// A machine's parts that every device needs.
struct Parts<'a> {
    id: &'a str,
    memory: &'a Memory,
    msi: &'a MsiRelay,
    control: &'a Control,
}

impl Parts<'_> {
    /// `state` as saved; none for a cold function.
    fn saved<S: DeserializeOwned>(&self, state: Option<&Bound<'_, PyAny>>) -> PyResult<Option<Saved<S>>> {
        state.map(|s| read_state(self.id, s)).transpose()
    }

    fn transport<D: VirtioDevice>(&self, device: D, virtio: Option<VirtioState>) -> PyResult<Arc<Transport<D>>> {
        let virtio = virtio.unwrap_or_else(|| VirtioState::cold(device.queue_sizes()));
        let (memory, sink, control) = (self.memory.memory.clone(), self.msi.relay.clone(), self.control.control.clone());
        let made = Transport::from_state(device, virtio, memory, sink, control);
        Ok(Arc::new(made.map_err(|e| bad_state(self.id, e.inside("virtio")))?))
    }
}

fn initializer<D: VirtioDevice + 'static>(transport: &Arc<Transport<D>>) -> PyClassInitializer<VirtioFunction> {
    PyClassInitializer::from(CoreDevice { device: transport.clone() })
        .add_subclass(VirtioFunction { function: transport.clone() })
}

fn save<'py, S: Serialize>(py: Python<'py>, virtio: VirtioState, device: S) -> PyResult<Bound<'py, PyAny>> {
    Ok(pythonize::pythonize(py, &Saved { virtio, device })?)
}

fn queue_size(value: u16) -> PyResult<u16> {
    if value.is_power_of_two() {
        return Ok(value);
    }
    Err(errors::refused(format!("a queue of {value}: a power of two up to 32768")))
}

/// virtio-blk on a raw image that the caller has opened and locked.
#[pyclass(extends = VirtioFunction, frozen, module = "freezeframe._core")]
pub struct VirtioBlk {
    transport: Arc<Transport<Blk>>,
}

/// A flush has ended: its request is answered on the engine's thread.
struct Completed(Weak<Transport<Blk>>);

impl Work for Completed {
    fn run(&self) {
        if let Some(transport) = self.0.upgrade() {
            transport.complete();
        }
    }
}

impl VirtioBlk {
    /// Waits for what goes on elsewhere and answers it.
    fn drain(&self) {
        if let Some(flushes) = self.transport.device(|b| b.flushes()) {
            flushes.wait();
            self.transport.complete();
        }
    }

    fn disk<R: Send>(&self, py: Python<'_>, f: impl FnOnce(&mut Blk) -> R + Send) -> R {
        py.detach(|| self.transport.device(f))
    }
}

#[pymethods]
impl VirtioBlk {
    /// `fd`: duplicated, the lock on it stays. `serial`: at most 20 bytes. `sparse`: offer DISCARD and WRITE_ZEROES. `overlay`: an empty
    /// file for all changes: `fd` is only read then, nothing is synced, and all work is done where it is asked for.
    #[new]
    #[pyo3(signature = (id, memory, msi, control, fd, *, readonly, queues=1, queue_size=128, serial="", sparse=true, overlay=None, state=None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        id: &str,
        memory: &Memory,
        msi: &MsiRelay,
        control: &Control,
        fd: i32,
        readonly: bool,
        queues: u16,
        queue_size: u16,
        serial: &str,
        sparse: bool,
        overlay: Option<i32>,
        state: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let parts = Parts { id, memory, msi, control };
        if !(1..=1023).contains(&queues) {
            return Err(errors::refused(format!("{queues} queues: 1 to 1023")));
        }
        if serial.len() > 20 {
            return Err(errors::refused(format!("the disk serial {serial:?} is longer than 20 bytes")));
        }
        let config = BlkConfig { queues, queue_size: self::queue_size(queue_size)?, serial: serial.to_owned(), sparse };
        let saved = parts.saved::<BlkState>(state)?;
        let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map(File::from);
        let image = with_fd(fd, id, own)?;
        let disk = match overlay {
            Some(scratch) => Disk::with_overlay(image, with_fd(scratch, id, own)?, readonly),
            None => Disk::new(image, readonly),
        }
        .map_err(|e| errors::io_failed(id, &e))?;
        let blk =
            Blk::from_state(disk, &config, saved.as_ref().map(|s| &s.device)).map_err(|e| bad_state(id, e.inside("device")))?;
        let transport = parts.transport(blk, saved.map(|s| s.virtio))?;
        if !readonly && overlay.is_none() {
            let completed: Arc<dyn Work> = Arc::new(Completed(Arc::downgrade(&transport)));
            let control = control.control.clone();
            let started = transport.device(|b| b.flush_elsewhere(Box::new(move || control.post(completed.clone()))));
            started.map_err(|e| errors::io_failed(id, &e))?;
        }
        Ok(initializer(&transport).add_subclass(Self { transport }))
    }

    /// The machine must stand still.
    fn state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        py.detach(|| self.drain());
        let (virtio, device) = py.detach(|| (self.transport.state(), self.transport.device(|b| b.state())));
        save(py, virtio, device)
    }

    /// No request is in flight once it has returned.
    fn pause(&self, py: Python<'_>) {
        py.detach(|| self.drain());
    }

    /// Once before the machine runs again: looks into the queues for what was made available unnoticed.
    fn resume(&self, py: Python<'_>) {
        py.detach(|| self.transport.resume());
    }

    /// All that the guest wrote is on the medium.
    fn sync(&self, py: Python<'_>) -> PyResult<()> {
        self.disk(py, |b| b.disk.sync()).map_err(|e| errors::io_failed("cannot write the disk's data to its medium", &e))
    }

    /// The next write will have another time stamp than the image has at this moment.
    fn arm_write_barrier(&self, py: Python<'_>) {
        self.disk(py, |b| b.disk.arm_write_barrier());
    }

    /// Digest of all changes in their order, of a disk with an overlay.
    fn trail<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let trail = self.disk(py, |b| b.disk.trail());
        PyBytes::new(py, &trail)
    }

    /// CH's names; bytes, operations, and latencies in microseconds.
    fn counters(&self, py: Python<'_>) -> BTreeMap<&'static str, u64> {
        let c = self.disk(py, |b| b.counters);
        [
            ("read_bytes", c.read.bytes),
            ("read_ops", c.read.ops),
            ("read_latency_min", c.read.latency_min),
            ("read_latency_max", c.read.latency_max),
            ("read_latency_avg", c.read.latency_avg()),
            ("write_bytes", c.write.bytes),
            ("write_ops", c.write.ops),
            ("write_latency_min", c.write.latency_min),
            ("write_latency_max", c.write.latency_max),
            ("write_latency_avg", c.write.latency_avg()),
            ("io_errors", c.errors),
        ]
        .into()
    }
}

/// virtio-console with one port.
#[pyclass(extends = VirtioFunction, frozen, module = "freezeframe._core")]
pub struct VirtioConsole {
    pub port: Arc<ConsolePort>,
}

#[pymethods]
impl VirtioConsole {
    /// `size`: (columns, rows) of the terminal, None where there is none; in a restored machine the driver is told of a new one only
    /// when it was offered one at boot.
    #[new]
    #[pyo3(signature = (id, memory, msi, control, output, *, size=None, queue_size=256, state=None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        id: &str,
        memory: &Memory,
        msi: &MsiRelay,
        control: &Control,
        output: &ConsoleOutput,
        size: Option<(u16, u16)>,
        queue_size: u16,
        state: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let parts = Parts { id, memory, msi, control };
        let saved = parts.saved::<ConsoleState>(state)?;
        let (cols, rows) = size.unwrap_or_default();
        let cold = ConsoleState { sized: size.is_some(), cols, rows, ..ConsoleState::default() };
        let own = saved.as_ref().map_or(&cold, |s| &s.device);
        let console = Console::from_state(output.output.clone(), self::queue_size(queue_size)?, own)
            .map_err(|e| bad_state(id, e.inside("device")))?;
        let transport = parts.transport(console, saved.map(|s| s.virtio))?;
        let port = Arc::new(ConsolePort::new(transport.clone(), control.control.clone()));
        Ok(initializer(&transport).add_subclass(Self { port }))
    }

    fn state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let transport = &self.port.transport;
        let (virtio, device) = py.detach(|| (transport.state(), transport.device(|c| c.state())));
        save(py, virtio, device)
    }

    /// Bytes for the guest; gives how many there was room for.
    fn receive(&self, py: Python<'_>, data: PyBuffer<u8>) -> PyResult<usize> {
        receive(py, self.port.as_ref(), &data)
    }

    /// The terminal has another size.
    fn resize(&self, py: Python<'_>, cols: u16, rows: u16) {
        py.detach(|| self.port.resize(cols, rows));
    }

    /// Output stands still from now on.
    fn pause(&self, py: Python<'_>) {
        py.detach(|| self.port.output.pause());
    }

    /// Once before the machine runs again.
    fn resume(&self, py: Python<'_>) {
        py.detach(|| {
            self.port.output.resume();
            self.port.transport.resume();
        });
    }
}

/// virtio-rng.
#[pyclass(extends = VirtioFunction, frozen, module = "freezeframe._core")]
pub struct VirtioRng {
    transport: Arc<Transport<Rng>>,
}

#[pymethods]
impl VirtioRng {
    /// `fd`: the source, duplicated; with a `seed` all bytes follow from it, and there is none.
    #[new]
    #[pyo3(signature = (id, memory, msi, control, fd, *, seed=None, queue_size=256, state=None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        id: &str,
        memory: &Memory,
        msi: &MsiRelay,
        control: &Control,
        fd: Option<i32>,
        seed: Option<u64>,
        queue_size: u16,
        state: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let parts = Parts { id, memory, msi, control };
        let saved = parts.saved::<Nothing>(state)?;
        let source: Box<dyn Entropy> = match (fd, seed) {
            (Some(fd), None) => Box::new(FileEntropy(with_fd(fd, id, |fd| Ok(File::from(fd.try_clone_to_owned()?)))?)),
            (None, Some(seed)) => Box::new(SeededEntropy::new(seed)),
            _ => return Err(errors::refused("a virtio-rng has a file or a seed")),
        };
        let rng = Rng::new(source, self::queue_size(queue_size)?);
        let transport = parts.transport(rng, saved.map(|s| s.virtio))?;
        Ok(initializer(&transport).add_subclass(Self { transport }))
    }

    fn state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        save(py, py.detach(|| self.transport.state()), Nothing {})
    }

    fn pause(&self) {}

    fn resume(&self, py: Python<'_>) {
        py.detach(|| self.transport.resume());
    }
}

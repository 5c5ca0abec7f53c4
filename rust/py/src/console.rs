//! `ConsoleOutput`, `ConsoleInput`, `Serial`: host ends of consoles, and the serial port.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::virtio::host::{Input, InputSink, Output};
use ::virtio::serial::SerialState;
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::bus::CoreDevice;
use crate::control::Control;
use crate::errors;
use crate::irq::IrqLine;
use crate::virtio::VirtioConsole;

/// Runs `f` with the descriptor that Python names by number and keeps open meanwhile.
pub fn with_fd<R>(fd: i32, what: &str, f: impl FnOnce(BorrowedFd<'_>) -> std::io::Result<R>) -> PyResult<R> {
    // SAFETY: F_GETFD only asks whether there is such a descriptor.
    if fd < 0 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(errors::refused(format!("{what}: descriptor {fd} is not open")));
    }
    // SAFETY: it is open, and stays so during the call because the caller holds the GIL and owns it.
    let result = f(unsafe { BorrowedFd::borrow_raw(fd) });
    result.map_err(|e| errors::io_failed(what, &e))
}

/// A saved state as plain Python values; an error names the field.
pub fn read_state<T: serde::de::DeserializeOwned>(id: &str, state: &Bound<'_, PyAny>) -> PyResult<T> {
    crate::saved::read(state).map_err(|why| bad_state(id, why))
}

pub fn bad_state(id: &str, why: impl std::fmt::Display) -> PyErr {
    errors::raise("Incompatible", &format!("saved state of {id}: {why}"), &[])
}

/// Where a console's output goes. Paused at first; a device's `pause` and `resume` switch it.
#[pyclass(frozen, module = "freezeframe._core")]
pub struct ConsoleOutput {
    pub output: Arc<Output>,
}

#[pymethods]
impl ConsoleOutput {
    /// `fd`: duplicated; None for nowhere. `capture`: how many of the last bytes `read` can give.
    #[new]
    #[pyo3(signature = (fd=None, *, capture=0))]
    fn new(fd: Option<i32>, capture: usize) -> PyResult<Self> {
        let output = match fd {
            Some(fd) => with_fd(fd, "console output", |fd| Output::new(Some(fd), capture))?,
            None => Output::new(None, capture).map_err(|e| errors::io_failed("console output", &e))?,
        };
        Ok(Self { output })
    }

    /// Output from position `start` (bytes since the beginning) on; waits up to `timeout` seconds for the first byte, None: for ever.
    /// Gives the position behind the bytes.
    #[pyo3(signature = (start, timeout=None))]
    fn read<'py>(&self, py: Python<'py>, start: u64, timeout: Option<f64>) -> PyResult<(u64, Bound<'py, PyBytes>)> {
        let deadline = match timeout {
            None => None,
            Some(t) => {
                let wait = Duration::try_from_secs_f64(t.max(0.0)).unwrap_or(Duration::MAX);
                Some(Instant::now().checked_add(wait)).flatten()
            }
        };
        // In steps, so that a signal (Ctrl-C) is seen.
        loop {
            let step = Instant::now() + Duration::from_millis(100);
            let until = deadline.map_or(step, |d| d.min(step));
            let (end, bytes) = py.detach(|| self.output.read(start, Some(until)));
            if !bytes.is_empty() || deadline.is_some_and(|d| Instant::now() >= d) {
                return Ok((end, PyBytes::new(py, &bytes)));
            }
            py.check_signals()?;
        }
    }

    /// Waits until the host has taken everything, as long as it takes something within `patience` seconds.
    fn drain(&self, py: Python<'_>, patience: f64) {
        let patience = Duration::try_from_secs_f64(patience).unwrap_or_default();
        py.detach(|| self.output.drain(patience));
    }

    /// `{"written", "dropped"}`: bytes that the host took, and bytes lost because nobody read them.
    fn counters(&self) -> std::collections::BTreeMap<&'static str, u64> {
        let (written, dropped) = self.output.counters();
        [("written", written), ("dropped", dropped)].into()
    }
}

/// A thread that reads a descriptor for a console device. Paused at first.
#[pyclass(frozen, module = "freezeframe._core")]
pub struct ConsoleInput {
    input: std::sync::Mutex<Input>,
}

impl ConsoleInput {
    fn with<R: Send>(&self, py: Python<'_>, f: impl FnOnce(&mut Input) -> R + Send) -> R {
        py.detach(|| f(&mut self.input.lock().unwrap_or_else(|e| e.into_inner())))
    }
}

#[pymethods]
impl ConsoleInput {
    /// `fd`: duplicated. `device`: a `VirtioConsole` or a `Serial`.
    #[new]
    fn new(fd: i32, device: &Bound<'_, PyAny>) -> PyResult<Self> {
        let sink: Arc<dyn InputSink> = match device.cast::<VirtioConsole>() {
            Ok(console) => console.get().port.clone(),
            Err(_) => device.cast::<Serial>()?.get().serial.clone(),
        };
        let input = with_fd(fd, "console input", |fd| Input::new(fd, &sink))?;
        Ok(Self { input: std::sync::Mutex::new(input) })
    }

    /// Once it has returned, nothing is read until `resume`.
    fn pause(&self, py: Python<'_>) {
        self.with(py, |input| input.pause());
    }

    fn resume(&self, py: Python<'_>) {
        self.with(py, |input| input.resume());
    }

    /// Ends the thread.
    fn close(&self, py: Python<'_>) {
        self.with(py, |input| input.close());
    }
}

/// A 16550A: eight ports.
#[pyclass(extends = CoreDevice, frozen, module = "freezeframe._core")]
pub struct Serial {
    pub serial: Arc<::virtio::serial::Serial>,
}

#[pymethods]
impl Serial {
    /// `state`: None for a port after reset.
    #[new]
    #[pyo3(signature = (output, irq, control, state=None))]
    fn new(
        output: &ConsoleOutput,
        irq: &IrqLine,
        control: &Control,
        state: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let id = "__serial";
        let state: Option<SerialState> = state.map(|s| read_state(id, s)).transpose()?;
        let (output, control) = (output.output.clone(), control.control.clone());
        let serial =
            ::virtio::serial::Serial::from_state(state.unwrap_or_default(), output, Box::new(irq.line.source()), control)
                .map_err(|e| bad_state(id, e))?;
        Ok(PyClassInitializer::from(CoreDevice { device: serial.clone() }).add_subclass(Self { serial }))
    }

    fn state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        Ok(pythonize::pythonize(py, &self.serial.state())?)
    }

    /// Bytes for the guest; gives how many there was room for.
    fn receive(&self, py: Python<'_>, data: PyBuffer<u8>) -> PyResult<usize> {
        receive(py, self.serial.as_ref(), &data)
    }

    fn reset(&self, py: Python<'_>) {
        py.detach(|| self.serial.reset());
    }

    /// Output stands still from now on.
    fn pause(&self, py: Python<'_>) {
        py.detach(|| self.serial.output().pause());
    }

    fn resume(&self, py: Python<'_>) {
        py.detach(|| {
            self.serial.output().resume();
            self.serial.resume();
        });
    }
}

pub fn receive(py: Python<'_>, sink: &dyn InputSink, data: &PyBuffer<u8>) -> PyResult<usize> {
    let bytes = data.to_vec(py)?;
    let taken = sink.buffer().push(&bytes);
    sink.kick();
    Ok(taken)
}

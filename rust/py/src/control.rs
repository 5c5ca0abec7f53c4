//! `Control`: how other threads talk to a running engine.

use std::sync::Arc;

use pyo3::prelude::*;
use vcpu::{EngineError, Stop};

use crate::errors;

/// One machine's inbox.
#[pyclass(frozen, module = "freezeframe._core")]
pub struct Control {
    pub control: Arc<vcpu::Control>,
}

#[pymethods]
impl Control {
    #[new]
    fn new() -> Self {
        Self { control: Arc::new(vcpu::Control::default()) }
    }

    /// Asks the engine to return from `run` at the next instruction boundary: `"paused"`, `"poweroff"` or `"reset"`.
    /// The first request wins.
    fn request_stop(&self, reason: &str) -> PyResult<()> {
        self.control.request_stop(match reason {
            "paused" => Stop::Paused,
            "poweroff" => Stop::PowerOff,
            "reset" => Stop::Reset,
            _ => return Err(errors::refused(format!("no stop reason {reason:?}: paused, poweroff or reset"))),
        });
        Ok(())
    }

    /// The machine cannot go on; replaces any other reason.
    fn fail(&self, message: String) {
        self.control.request_stop(Stop::Failed(EngineError::new("device", message)));
    }
}

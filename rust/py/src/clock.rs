//! `Clock`: a machine's time.

use std::sync::Arc;

use pyo3::prelude::*;
use vcpu::ClockState;

use crate::errors;

/// Time of one machine, the host's or a count of instructions; stands still until `resume`.
#[pyclass(frozen, module = "freezeframe._core")]
pub struct Clock {
    pub clock: Arc<vcpu::Clock>,
}

impl Clock {
    fn count(&self) -> PyResult<&vcpu::Count> {
        self.clock.count().ok_or_else(|| errors::refused("this clock does not count instructions"))
    }
}

#[pymethods]
impl Clock {
    /// A clock that has never run. `tsc_khz`: the guest's TSC rate; `host_khz`: the host's, 0 when it has none that can be used.
    #[new]
    fn new(tsc_khz: u64, host_khz: u64) -> PyResult<Self> {
        check_rate(tsc_khz)?;
        Ok(Self { clock: Arc::new(vcpu::Clock::new(tsc_khz, host_khz)) })
    }

    /// A stopped clock that goes on from `state`; with `advance` it makes up for the time since then once it runs, step by step.
    #[staticmethod]
    fn from_state(state: &Bound<'_, PyAny>, host_khz: u64, advance: bool) -> PyResult<Self> {
        let state: ClockState =
            crate::saved::read(state).map_err(|e| errors::raise("Incompatible", &format!("bad clock state: {e}"), &[]))?;
        check_rate(state.tsc_khz)?;
        let make = if advance { vcpu::Clock::advancing } else { vcpu::Clock::from_state };
        Ok(Self { clock: Arc::new(make(state, host_khz)) })
    }

    /// A clock whose time is the instructions that the engine counts, from `state` on.
    #[staticmethod]
    fn counted(state: &Bound<'_, PyAny>) -> PyResult<Self> {
        let state: ClockState =
            crate::saved::read(state).map_err(|e| errors::raise("Incompatible", &format!("bad clock state: {e}"), &[]))?;
        check_rate(state.tsc_khz)?;
        Ok(Self { clock: Arc::new(vcpu::Clock::counted(state)) })
    }

    /// (instructions of all vCPUs, nanoseconds that they slept), of a counted clock.
    fn counts(&self) -> PyResult<(u64, u64)> {
        let count = self.count()?;
        Ok((count.retired(), count.idle_ns()))
    }

    /// A counted clock: the engine stops when so many instructions are retired.
    fn set_limit(&self, instructions: u64) -> PyResult<()> {
        self.count()?.set_limit(instructions);
        Ok(())
    }

    #[getter]
    fn tsc_khz(&self) -> u64 {
        self.clock.tsc_khz()
    }

    /// `{"tsc_khz", "tsc", "boot_ns", "wall_ns", "host_wall_ns"}` at this moment.
    fn state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        Ok(pythonize::pythonize(py, &self.clock.state())?)
    }

    /// Guest TSC now.
    fn tsc(&self) -> u64 {
        self.clock.tsc()
    }

    /// The ACPI PM timer: 3.579545 MHz, 32 bits.
    fn pm_timer(&self) -> u32 {
        (u128::from(self.clock.state().boot_ns) * 3_579_545 / 1_000_000_000) as u32
    }

    /// The guest's wall clock: nanoseconds since 1970.
    fn wall_ns(&self) -> u64 {
        self.clock.state().wall_ns
    }

    fn resume(&self) {
        self.clock.resume();
    }

    fn pause(&self) {
        self.clock.pause();
    }
}

/// What the guest's arithmetic (and ours) can live with: 1 MHz to 100 GHz.
fn check_rate(tsc_khz: u64) -> PyResult<()> {
    if (1_000..=100_000_000).contains(&tsc_khz) {
        return Ok(());
    }
    Err(errors::refused(format!("a TSC rate of {tsc_khz} kHz: 1000 to 100000000")))
}

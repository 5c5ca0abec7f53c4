//! `Engine`: the vCPUs of one machine.

use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use vcpu::profile::Switches;
use vcpu::{EngineConfig, EngineError, Stop, VcpuState};
use x86::SoftwareEngine;

use crate::bus::Bus;
use crate::clock::Clock;
use crate::control::Control;
use crate::errors;
use crate::irq::{IntrLine, Ioapic, MsiRelay};
use crate::memory::Memory;

/// All vCPUs of a machine. They stand still whenever `run` is not being called.
#[pyclass(frozen, module = "freezeframe._core")]
pub struct Engine {
    engine: Mutex<Either>,
}

/// The engine's own type, for what only one of them can do.
enum Either {
    Software(Box<SoftwareEngine>),
    Kvm(Box<kvm::KvmEngine>),
}

impl Either {
    fn any(&mut self) -> &mut dyn vcpu::Engine {
        match self {
            Self::Software(engine) => engine.as_mut(),
            Self::Kvm(engine) => engine.as_mut(),
        }
    }

    fn software(&mut self) -> PyResult<&mut SoftwareEngine> {
        match self {
            Self::Software(engine) => Ok(engine),
            Self::Kvm(_) => Err(errors::raise("NotSupported", "only the software engine can do this", &[])),
        }
    }
}

impl Engine {
    /// The engine, unless it runs on another thread.
    fn standing(&self) -> PyResult<MutexGuard<'_, Either>> {
        match self.engine.try_lock() {
            Ok(engine) => Ok(engine),
            Err(TryLockError::Poisoned(e)) => Ok(e.into_inner()),
            Err(TryLockError::WouldBlock) => Err(errors::raise("InvalidState", "the vCPUs are running", &[])),
        }
    }

    /// What memory holds, followed from now on; the vCPUs must stand.
    pub fn contents(&self, memory: &memory::GuestMemory) -> PyResult<memory::Contents> {
        self.standing()?.software()?.take_back_write_access();
        memory::Contents::new(memory).map_err(errors::memory)
    }

    /// Brings `contents` up to date.
    pub fn follow(&self, memory: &memory::GuestMemory, contents: &mut memory::Contents) -> PyResult<()> {
        self.standing()?.software()?.take_back_write_access();
        contents.update(memory).map_err(errors::memory)
    }
}

#[pymethods]
impl Engine {
    /// `name`: `software` or `kvm`. The vCPUs are in their reset state: the first one at the reset vector, the others waiting for INIT.
    /// Connects the I/O APIC and the message relay to their LAPICs. `changes` of the CPU profile: `+name` or `-name`. `tier`: what runs
    /// decoded blocks in the software engine, `interpreter` or `translator`. Raises `NotSupported` where this host's KVM cannot be used.
    #[new]
    #[pyo3(signature = (name, memory, bus, clock, control, ioapic, msi, *, vcpus, phys_bits, changes=vec![], tier="translator"))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        name: &str,
        memory: &Memory,
        bus: &Bus,
        clock: &Clock,
        control: &Control,
        ioapic: &Ioapic,
        msi: &MsiRelay,
        vcpus: usize,
        phys_bits: u8,
        changes: Vec<String>,
        tier: &str,
    ) -> PyResult<Self> {
        let config = EngineConfig {
            memory: memory.memory.clone(),
            bus: bus.bus.clone(),
            clock: clock.clock.clone(),
            control: control.control.clone(),
            vcpus,
            phys_bits,
            eoi: Some(ioapic.ioapic.clone()),
            switches: Switches::changed(&changes).map_err(errors::refused)?,
        };
        let mut engine = match name {
            "software" => {
                let tier = tier.parse().map_err(errors::refused)?;
                let made = SoftwareEngine::new(config, tier).map_err(|e| errors::refused(e.message))?;
                Either::Software(Box::new(made))
            }
            "kvm" => Either::Kvm(Box::new(py.detach(|| kvm::KvmEngine::new(config)).map_err(kvm_refused)?)),
            _ => return Err(errors::refused(format!("no engine {name:?}: software or kvm"))),
        };
        let sink = engine.any().irq_sink();
        ioapic.ioapic.connect(Arc::downgrade(&sink));
        msi.relay.connect(sink);
        Ok(Self { engine: Mutex::new(engine) })
    }

    /// Why the software engine interprets code although a translator was asked for: the host does not let it have one.
    #[getter]
    fn untranslated(&self) -> PyResult<Option<String>> {
        match &*self.standing()? {
            Either::Software(engine) => Ok(engine.untranslated().map(str::to_owned)),
            Either::Kvm(_) => Ok(None),
        }
    }

    /// `software` or `kvm`.
    #[getter]
    fn name(&self) -> PyResult<&'static str> {
        Ok(self.standing()?.any().name())
    }

    #[getter]
    fn vcpus(&self) -> PyResult<usize> {
        Ok(self.standing()?.any().vcpus())
    }

    /// Runs until something asks for a stop. Gives (`paused`, `poweroff`, `reset` or `failed`, code, message); the last two only
    /// for `failed`. Releases the GIL; devices in Python take it.
    fn run(&self, py: Python<'_>) -> PyResult<(&'static str, Option<&'static str>, Option<String>)> {
        let mut guard = self.standing()?;
        let engine: &mut dyn vcpu::Engine = guard.any();
        Ok(match py.detach(|| engine.run()) {
            Stop::Paused => ("paused", None, None),
            Stop::PowerOff => ("poweroff", None, None),
            Stop::Reset => ("reset", None, None),
            Stop::Failed(e) => ("failed", Some(e.code), Some(e.message)),
        })
    }

    /// Complete state of one vCPU (`VcpuState`, rust/vcpu/src/state.rs), without side effects.
    fn state<'py>(&self, py: Python<'py>, vcpu: usize) -> PyResult<Bound<'py, PyAny>> {
        let mut guard = self.standing()?;
        let engine = guard.any();
        check(vcpu, engine.vcpus())?;
        let state = engine.state(vcpu).map_err(errors::engine)?;
        // By way of JSON's types: what is saved must be lists, where pythonize makes tuples of Rust's arrays.
        let plain = serde_json::to_value(&state).map_err(|e| pyo3::exceptions::PyValueError::new_err(e.to_string()))?;
        Ok(pythonize::pythonize(py, &plain)?)
    }

    /// Wires a pair of 8259s to the boot CPU: `line` is their output, `acknowledge()` gives the vector. Raises `NotSupported` where the
    /// engine has no such input.
    fn connect_pic(&self, control: &Control, line: &IntrLine, acknowledge: Py<PyAny>) -> PyResult<()> {
        let control = control.control.clone();
        let answer = move || {
            Python::attach(|py| {
                acknowledge.call0(py).and_then(|v| v.extract::<u8>(py)).unwrap_or_else(|e| {
                    control.request_stop(Stop::Failed(EngineError::new("device", format!("the 8259 failed: {e}"))));
                    0
                })
            })
        };
        let mut guard = self.standing()?;
        guard
            .any()
            .connect_pic(line.line.clone(), Box::new(answer))
            .map_err(|e| errors::raise("NotSupported", &e.message, &[("hint", "ask for the software engine".into())]))
    }

    /// The software engine: whose turn it is, and how many instructions each vCPU has executed since the engine was made.
    fn turn(&self) -> PyResult<(usize, Vec<u64>)> {
        let mut guard = self.standing()?;
        let engine = guard.software()?;
        Ok((engine.whose_turn(), (0..vcpu::Engine::vcpus(engine)).map(|n| engine.instructions(n)).collect()))
    }

    /// The software engine: (address, bytes, text) of what a vCPU executes next, up to a branch or the end of the page.
    fn listing<'py>(&self, py: Python<'py>, vcpu: usize) -> PyResult<Vec<(u64, Bound<'py, PyBytes>, String)>> {
        let mut guard = self.standing()?;
        let engine = guard.software()?;
        check(vcpu, vcpu::Engine::vcpus(engine))?;
        let lines = engine.core(vcpu).listing();
        Ok(lines.into_iter().map(|l| (l.rip, PyBytes::new(py, &l.bytes), l.text)).collect())
    }

    /// Takes a state over; raises `Incompatible`, and then nothing has changed.
    fn set_state(&self, vcpu: usize, state: &Bound<'_, PyAny>) -> PyResult<()> {
        let mut guard = self.standing()?;
        let engine = guard.any();
        check(vcpu, engine.vcpus())?;
        let refuse = |e: String| errors::raise("Incompatible", &format!("state of vCPU {vcpu}: {e}"), &[]);
        let state: VcpuState = crate::saved::read(state).map_err(refuse)?;
        engine.set_state(vcpu, &state).map_err(|e: EngineError| refuse(e.message))
    }
}

fn kvm_refused(error: EngineError) -> PyErr {
    match error.code {
        "host" => errors::raise("NotSupported", &error.message, &[]),
        "damaged" => errors::raise("Damaged", &error.message, &[]),
        _ => errors::engine(error),
    }
}

/// What is found of this host's KVM now: (whether Linux can be expected to boot, the reason, whether `auto` takes it, whether that
/// holds until the host boots anew). Takes some milliseconds.
#[pyfunction]
pub fn kvm_probe(py: Python<'_>) -> (bool, String, bool, bool) {
    let probe = py.detach(kvm::probe);
    (probe.runs, probe.reason.clone(), probe.fit(), probe.lasting)
}

/// Why the KVM engine cannot have a restored machine's memory when it is touched; None where it can.
#[pyfunction]
pub fn faults_unavailable() -> Option<String> {
    memory::GuestMemory::faults_unavailable()
}

/// Says before anything is built whether a machine can be made, or one with these vCPUs' states can go on, on this host's KVM:
/// raises `NotSupported` where it needs the software engine, `Incompatible` where no engine can take it.
#[pyfunction]
#[pyo3(signature = (clock, memory, *, vcpus, phys_bits, states=None))]
pub fn kvm_check(
    py: Python<'_>,
    clock: &Clock,
    memory: &Memory,
    vcpus: usize,
    phys_bits: u8,
    states: Option<Vec<Bound<'_, PyAny>>>,
) -> PyResult<()> {
    let mut read: Vec<VcpuState> = Vec::new();
    for (number, state) in states.unwrap_or_default().iter().enumerate() {
        let refuse = |e: String| errors::raise("Incompatible", &format!("state of vCPU {number}: {e}"), &[]);
        read.push(crate::saved::read(state).map_err(refuse)?);
    }
    let (clock, memory) = (&clock.clock, &memory.memory);
    py.detach(|| kvm::check(clock, memory, vcpus, phys_bits, &read)).map_err(|e| match e.code {
        "state" => errors::raise("Incompatible", &e.message, &[]),
        _ => kvm_refused(e),
    })
}

fn check(vcpu: usize, vcpus: usize) -> PyResult<()> {
    if vcpu < vcpus { Ok(()) } else { Err(errors::refused(format!("no vCPU {vcpu}: the machine has {vcpus}"))) }
}

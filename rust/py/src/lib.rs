//! `freezeframe._core`: the only crate that names pyo3. One file a subject; each class here is described in `src/freezeframe/_core.pyi`.

use pyo3::prelude::*;

mod bus;
mod clock;
mod console;
mod control;
mod engine;
mod errors;
mod host;
mod http;
mod irq;
mod json;
mod memory;
mod saved;
mod store;
mod unpack;
mod virtio;

#[pymodule]
mod _core {
    #[pymodule_export]
    use super::build_profile;
    #[pymodule_export]
    use super::bus::{Bus, CoreDevice};
    #[pymodule_export]
    use super::clock::Clock;
    #[pymodule_export]
    use super::console::{ConsoleInput, ConsoleOutput, Serial};
    #[pymodule_export]
    use super::control::Control;
    #[pymodule_export]
    use super::engine::{Engine, faults_unavailable, kvm_check, kvm_probe};
    #[pymodule_export]
    use super::host::host_tsc_khz;
    #[pymodule_export]
    use super::http::{http_request, http_response};
    #[pymodule_export]
    use super::irq::{IntrLine, Ioapic, IrqLine, MsiRelay};
    #[pymodule_export]
    use super::json::{JsonSchema, debug_text, json_line};
    #[pymodule_export]
    use super::memory::{Memory, MemoryContents};
    #[pymodule_export]
    use super::store::{blake3, restore_memory, write_region};
    #[pymodule_export]
    use super::unpack::{unpack_lz4, unpack_zstd};
    #[pymodule_export]
    use super::virtio::{VirtioBlk, VirtioConsole, VirtioFunction, VirtioRng};
}

/// `"release"` or `"debug"`: a debug core is several times slower, callers warn about it.
#[pyfunction]
fn build_profile() -> &'static str {
    if cfg!(debug_assertions) { "debug" } else { "release" }
}

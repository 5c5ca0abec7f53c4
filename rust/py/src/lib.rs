//! `freezeframe._core`: the only crate that names pyo3.

use pyo3::prelude::*;

#[pymodule]
mod _core {
    #[pymodule_export]
    use super::build_profile;
}

/// `"release"` or `"debug"`: a debug core is several times slower, callers warn about it.
#[pyfunction]
fn build_profile() -> &'static str {
    if cfg!(debug_assertions) { "debug" } else { "release" }
}

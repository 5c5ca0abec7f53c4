//! Whose fault it is when a device cannot go on.

use memory::MemoryError;

/// Why a queue pass ended early.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The driver did something impossible: the device stops with NEEDS_RESET, the machine runs on.
    #[error("{0}")]
    Driver(String),
    /// Guest memory or the host failed: the machine must stop.
    #[error(transparent)]
    Machine(MemoryError),
}

impl Fault {
    pub fn driver(reason: impl Into<String>) -> Self {
        Self::Driver(reason.into())
    }
}

impl From<MemoryError> for Fault {
    fn from(error: MemoryError) -> Self {
        match error {
            MemoryError::NotRam { .. } => Self::Driver(error.to_string()),
            _ => Self::Machine(error),
        }
    }
}

/// A saved state that cannot belong to this device. `field` is the path inside the device's state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {why}")]
pub struct StateError {
    pub field: String,
    pub why: String,
}

impl StateError {
    pub fn new(field: impl Into<String>, why: impl Into<String>) -> Self {
        Self { field: field.into(), why: why.into() }
    }

    /// The same error seen from the component that holds `field`.
    pub fn inside(self, outer: &str) -> Self {
        Self { field: format!("{outer}.{}", self.field), why: self.why }
    }
}

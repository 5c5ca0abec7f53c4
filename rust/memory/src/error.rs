use std::sync::Arc;

/// What can go wrong with guest memory, by whose fault it is.
#[derive(Debug, Clone, thiserror::Error)]
pub enum MemoryError {
    /// The guest (or a device on its behalf) named an address that is not RAM.
    #[error("guest physical range {gpa:#x}+{len:#x} is not RAM")]
    NotRam { gpa: u64, len: u64 },
    /// The snapshot's bytes are not the ones that were written: the machine must stop, never run on.
    #[error("snapshot memory is damaged: {file}, chunk {chunk}: {why}")]
    Damaged { file: String, chunk: u64, why: String },
    /// The host refused memory or a read.
    #[error("{what}: {source}")]
    Host { what: String, source: Arc<std::io::Error> },
    /// The caller asked for a layout that cannot be.
    #[error("bad memory layout: {0}")]
    Layout(String),
}

impl MemoryError {
    pub(crate) fn host(what: impl Into<String>, source: std::io::Error) -> Self {
        Self::Host { what: what.into(), source: Arc::new(source) }
    }

    pub(crate) fn last_os(what: impl Into<String>) -> Self {
        Self::host(what, std::io::Error::last_os_error())
    }
}

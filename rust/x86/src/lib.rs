//! The software engine: x86-64 in plain Rust, no privilege, no device file, any host.
//!
//! Who does what (see docs/design/engine.md): [`state`] what is architectural; [`insn`] the decoded form and
//! the handlers' contract; [`core`] one vCPU with its TLBs; `exec` the handlers.

pub mod core;
pub mod insn;
pub mod state;

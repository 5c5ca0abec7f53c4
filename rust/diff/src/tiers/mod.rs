//! Interpreter against translator: random programs on random states, executed by both with turns of different lengths; after the
//! same number of instructions everything must be equal.
//!
//! [`world`] is the machine, [`program`] writes code for it, [`machine`] runs a tier, [`case`] makes and compares, [`shrink`] finds
//! the first instruction that differs and leaves out the rest.

pub mod campaign;
pub mod case;
pub mod machine;
pub mod program;
pub mod shrink;
pub mod world;

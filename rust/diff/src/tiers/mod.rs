//! Interpreter against translator: random programs on random states, executed by both with turns of different lengths; after the
//! same number of instructions everything must be equal.
//!
//! [`corpus`] takes a real guest's blocks instead, [`bytes`] is for the decoder alone. [`world`] is the machine with its [`tables`] and
//! [`routines`], [`program`] and [`gadgets`] write code for it, [`machine`] runs a tier, [`case`] makes and compares, [`stale`] knows
//! when they may differ, [`shrink`] finds the first instruction that differs and leaves out the rest.

pub mod bytes;
pub mod campaign;
pub mod case;
pub mod corpus;
pub mod gadgets;
pub mod machine;
pub mod program;
pub mod routines;
pub mod shrink;
pub mod stale;
pub mod tables;
pub mod world;

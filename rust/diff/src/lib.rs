//! Differential tests of the software engine: one instruction, random state, executed by the processor that this runs on and by
//! our engine; every register, flag, fault and memory byte is compared. Test only: nothing depends on this crate.
//!
//! [`generate`] makes cases, [`native`] and [`engine`] run them, [`compare`] knows what the manuals leave undefined,
//! [`campaign`] drives all of it and counts. A case is a function of (seed, number): both reproduce it anywhere.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

pub mod campaign;
pub mod case;
pub mod compare;
pub mod engine;
pub mod forms;
pub mod generate;
pub mod native;
pub mod rng;
pub mod tiers;
pub mod values;

//! A hundred thousand cases against this processor: enough to catch a broken family, quick enough for every run.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

use diff::campaign::{self, Options};
use diff::native;

fn clean(options: Options) {
    if !native::is_reference() {
        eprintln!(
            "not compared: the engine follows AMD's Zen 3 and later, and this is another processor (cargo run -p freezeframe-diff shows how they differ)"
        );
        return;
    }
    let summary = campaign::run(&options);
    assert!(summary.clean(), "{}", summary.text());
    assert!(summary.run > options.cases * 8 / 10, "{}", summary.text());
}

#[test]
fn code_of_64_bits() {
    clean(Options { seed: 64, cases: 60_000, ..Options::default() });
}

#[test]
fn code_of_32_bits() {
    clean(Options { seed: 32, cases: 30_000, bits: 32, ..Options::default() });
}

/// Flags and registers fresh from other instructions of the same block.
#[test]
fn after_other_instructions() {
    clean(Options { seed: 4, cases: 40_000, prelude: 4, ..Options::default() });
}

/// Prefixes and opcodes at random, most of them invalid.
#[test]
fn random_bytes() {
    clean(Options { seed: 5, cases: 50_000, raw: true, ..Options::default() });
    clean(Options { seed: 6, cases: 20_000, raw: true, bits: 32, ..Options::default() });
}

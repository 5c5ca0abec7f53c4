//! Interpreter and translator on the same random programs: enough for every run of the tests; fuzz/README.md has the long ones.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

use diff::tiers::bytes::Bytes;
use diff::tiers::campaign::{self, Options};

#[test]
fn both_tiers_agree() {
    let options = Options { seed: 2026, cases: 4000, ..Options::default() };
    let summary = campaign::run(&options, |report| eprintln!("{report}"));
    assert_eq!(summary.differing, 0, "{}", summary.text(options.seed));
    assert!(summary.translated > summary.cases && summary.early < summary.cases / 20, "{}", summary.text(options.seed));
}

/// The room for translated code and decoded blocks ends, and everything begins anew in the middle of a program.
#[test]
fn both_tiers_agree_when_there_is_no_room() {
    let options = Options { seed: 2029, cases: 4000, keep: true, ..Options::default() };
    let summary = campaign::run(&options, |report| eprintln!("{report}"));
    assert!(summary.differing == 0 && summary.refills > 0, "{}", summary.text(options.seed));
}

/// Turns are the host's choice as well: one tier with turns of different lengths.
#[test]
fn turns_do_not_matter() {
    let options = Options { seed: 2027, cases: 1500, threshold: Some(250), ..Options::default() };
    let summary = campaign::run(&options, |report| eprintln!("{report}"));
    assert_eq!(summary.differing, 0, "{}", summary.text(options.seed));
}

#[test]
fn the_decoder_takes_any_bytes() {
    let bytes = Bytes::default();
    for number in 0..20_000 {
        if let Err(text) = bytes.check(2028, number) {
            panic!("{text}");
        }
    }
}

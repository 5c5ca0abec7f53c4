//! A few ten thousand cases against this processor: enough to catch a broken family, quick enough for every run.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

use diff::campaign::{self, Options};

fn clean(options: Options) {
    let summary = campaign::run(&options);
    assert!(summary.clean(), "{}", summary.text());
    assert!(summary.run > options.cases * 9 / 10, "{}", summary.text());
}

#[test]
fn code_of_64_bits() {
    clean(Options { seed: 64, cases: 60_000, ..Options::default() });
}

#[test]
fn code_of_32_bits() {
    clean(Options { seed: 32, cases: 30_000, bits: 32, ..Options::default() });
}

//! The cases themselves: same seed, same cases; nearly every code reachable; the native side survives all of them.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

use std::collections::BTreeSet;

use diff::native::Native;
use diff::{forms, generate};

#[test]
fn same_seed_same_case_and_outcome() {
    let codes = forms::all(64);
    let mut native = Native::new();
    for number in 0..2000 {
        let Some(a) = generate::case(7, number, &codes, 64, 2) else { continue };
        let b = generate::case(7, number, &codes, 64, 2).expect("the same again");
        assert!(a.bytes == b.bytes && a.state == b.state && a.data == b.data);
        let (first, second) = (native.run(&a), native.run(&b));
        assert!(first.vector == second.vector && first.state.gpr == second.state.gpr, "case {number} {:?}", a.code);
    }
}

#[test]
fn every_code_is_reached() {
    let codes = forms::all(64);
    let reached: BTreeSet<_> =
        (0..60 * codes.len() as u64).filter_map(|n| generate::case(3, n, &codes, 64, 2)).map(|c| c.code as usize).collect();
    let missing: Vec<_> = codes.iter().filter(|c| !reached.contains(&(**c as usize))).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

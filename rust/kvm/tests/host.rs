//! What a machine may not be on this host is said beforehand, by name.

mod common;

use common::{Board, at_code, host_khz, host_tsc, kvm_is_here};
use vcpu::{Clock, ClockState, Engine};

fn clock(tsc: u64, khz: u64) -> Clock {
    Clock::from_state(ClockState { tsc_khz: khz, tsc, boot_ns: 0, wall_ns: 0, host_wall_ns: 0 }, host_khz())
}

#[test]
fn what_does_not_fit_is_named() {
    if !kvm_is_here() {
        return;
    }
    let board = Board::new(&[0xf4], 1);
    let state = at_code(board.engine().state(0).unwrap());
    let check = |clock: &Clock, vcpus, bits, states: &[_]| kvm::check(clock, &board.memory, vcpus, bits, states);
    let fine = clock(1000, host_khz());
    check(&fine, 1, 40, &[]).unwrap();
    check(&fine, 1, 40, std::slice::from_ref(&state)).unwrap();

    let refused = |done: Result<(), vcpu::EngineError>, code: &str, words: &str| {
        let error = done.expect_err(words);
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.contains(words), "{error}");
    };
    refused(check(&fine, 255, 40, &[]), "host", "255 vCPUs");
    refused(check(&fine, 1, 52, &[]), "host", "52 bits");
    refused(check(&clock(1000, host_khz() * 2), 1, 40, &[]), "host", "kHz");
    let mut bad = state.clone();
    bad.sregs.cr4 |= 1 << 18;
    refused(check(&fine, 1, 40, &[bad]), "state", "sregs.cr4: bits 0x40000");
    let mut bad = state.clone();
    bad.xcr0 = 7;
    refused(check(&fine, 1, 40, &[state.clone(), bad]), "state", "vCPU 1: xcr0: 0x7");
}

/// Hosts whose KVM offsets a guest's TSC, or has pages of 1 GiB, take these; others name them.
#[test]
fn what_only_some_hosts_have_is_taken_or_named() {
    if !kvm_is_here() {
        return;
    }
    let board = Board::new(&[0xf4], 1);
    let state = at_code(board.engine().state(0).unwrap());
    let host = kvm::probe();
    let ahead = clock(host_tsc() + host_khz() * 1000 * 3600, host_khz());
    let done = kvm::check(&ahead, &board.memory, 1, 40, std::slice::from_ref(&state));
    match host.tsc {
        Some(kvm::TscControl::Offset) => done.unwrap(),
        _ => assert!(done.unwrap_err().message.contains("backwards")),
    }
    let mut other = state.clone();
    other.msrs.insert("0x3b".into(), 5);
    let done = kvm::check(&clock(1000, host_khz()), &board.memory, 1, 40, &[state.clone(), other]);
    match host.tsc {
        Some(kvm::TscControl::Offset) => done.unwrap(),
        _ => assert!(done.unwrap_err().message.contains("TSC_ADJUST")),
    }
    // The second GiB as one page.
    board.put(0x2008, &(1u64 << 30 | 0x83).to_le_bytes());
    let done = kvm::check(&clock(1000, host_khz()), &board.memory, 1, 40, &[state]);
    match done {
        Ok(()) => assert!(!host.reason.contains("pdpe1gb")),
        Err(e) => assert!(e.message.contains("pages of 1 GiB") && host.reason.contains("pdpe1gb"), "{e}"),
    }
}

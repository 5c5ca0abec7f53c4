//! What a guest reads as its TSC, and its timers, across pauses and moves: on a KVM that offsets a guest's TSC and on one that
//! shows the host's.

mod common;

use std::time::Duration;

use common::{Board, CODE, host_khz, host_tsc, kvm_is_here, pause_after, paused};
use vcpu::{Clock, ClockState, Engine};

const TSC: &str = "0x10";
const TSC_ADJUST: &str = "0x3b";
const DEADLINE: &str = "0x6e0";

/// Stores the TSC at 0x6000 for ever.
const READ_TSC: &[u8] = &[
    0x0f, 0x31, // rdtsc
    0x66, 0xa3, 0x00, 0x60, // mov [0x6000], eax
    0x66, 0x89, 0x16, 0x04, 0x60, // mov [0x6004], edx
    0xeb, 0xf3, // jmp to the start
];

/// Waits for interrupt 0x40, whose handler stores the TSC at 0x6000 and asks for a stop.
const SLEEP: &[u8] = &[
    0xfb, // sti
    0xf4, // hlt
    0xeb, 0xfd, // jmp to the hlt
];
const TICK: &[u8] = &[
    0x0f, 0x31, // rdtsc
    0x66, 0xa3, 0x00, 0x60, // mov [0x6000], eax
    0x66, 0x89, 0x16, 0x04, 0x60, // mov [0x6004], edx
    0xe6, 0xe8, // out 0xe8, al
    0xcf, // iret
];

/// The board with [`SLEEP`] and its handler.
fn sleeper(clock: Clock) -> Board {
    let board = Board::with_clock(SLEEP, 1, clock);
    board.put(0x9000, TICK);
    board.put(0x40 * 4, &[0x00, 0x90, 0, 0]);
    board
}

fn clock(tsc: u64) -> Clock {
    let khz = host_khz();
    let wall = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    Clock::from_state(ClockState { tsc_khz: khz, tsc, boot_ns: 1_000_000, wall_ns: wall, host_wall_ns: wall }, khz)
}

#[test]
fn the_machines_clock_is_what_the_guest_reads() {
    if !kvm_is_here() {
        return;
    }
    let board = Board::with_clock(READ_TSC, 1, clock(1000));
    let mut engine = board.engine();
    let mut last = 0;
    for _ in 0..5 {
        pause_after(&board.control, Duration::from_millis(20));
        assert!(paused(&engine.run()));
        let (seen, now) = (board.u64_at(0x6000), board.clock.tsc());
        assert!(seen > last && seen <= now && now - seen < host_khz() * 1000, "the guest read {seen}, the clock is {now}");
        assert_eq!(engine.state(0).unwrap().msrs[TSC], now);
        last = now;
    }
}

#[test]
fn a_tsc_adjust_is_part_of_what_the_guest_reads() {
    if !kvm_is_here() {
        return;
    }
    const ADJUST: u64 = 12_345_678_901;
    let board = Board::with_clock(READ_TSC, 1, clock(1000));
    let mut engine = board.engine();
    let mut state = engine.state(0).unwrap();
    state.msrs.insert(TSC_ADJUST.into(), ADJUST);
    engine.set_state(0, &state).unwrap();
    pause_after(&board.control, Duration::from_millis(20));
    assert!(paused(&engine.run()));
    let (seen, now) = (board.u64_at(0x6000), board.clock.tsc() + ADJUST);
    assert!(seen <= now && now - seen < host_khz() * 1000, "the guest read {seen}, the clock is {now}");
    assert_eq!(engine.state(0).unwrap().msrs[TSC], now);
}

#[test]
fn a_deadline_is_as_far_away_as_it_was() {
    if !kvm_is_here() {
        return;
    }
    let khz = host_khz();
    for tsc in [1000, host_tsc() / 2] {
        let board = sleeper(clock(tsc));
        let mut engine = board.engine();
        let mut state = engine.state(0).unwrap();
        state.lapic.lvt_timer = 2 << 17 | 0x40;
        state.msrs.insert(DEADLINE.into(), tsc + 60 * khz);
        engine.set_state(0, &state).unwrap();
        // A pause before it is due: it does not come closer while the machine stands.
        pause_after(&board.control, Duration::from_millis(20));
        let started = board.clock.state().boot_ns;
        assert!(paused(&engine.run()));
        assert_eq!(board.u64_at(0x6000), 0, "too early");
        std::thread::sleep(Duration::from_millis(60));
        assert!(paused(&engine.run()));
        let lived = board.clock.state().boot_ns - started;
        assert!((59_000_000..1_000_000_000).contains(&lived), "{lived} ns");
        assert!(board.u64_at(0x6000) != 0, "it has come");
        assert_eq!(engine.state(0).unwrap().msrs[DEADLINE], 0);
    }
}

#[test]
fn a_guest_whose_tsc_would_go_back_is_refused_or_really_goes_on() {
    if !kvm_is_here() {
        return;
    }
    let ahead = host_tsc() + host_khz() * 1000 * 3600;
    let board = Board::with_clock(READ_TSC, 1, clock(ahead));
    let mut engine = board.engine();
    pause_after(&board.control, Duration::from_millis(50));
    match engine.run() {
        vcpu::Stop::Paused => assert!(board.u64_at(0x6000) > ahead, "the guest's TSC went back"),
        vcpu::Stop::Failed(e) => {
            assert_eq!(e.code, "host");
            assert!(e.message.contains("backwards") && e.message.contains("--engine software"), "{e}");
            assert_eq!(board.u64_at(0x6000), 0);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_counter_slightly_behind_is_waited_for() {
    if !kvm_is_here() {
        return;
    }
    let ahead = host_tsc() + host_khz() * 300;
    let board = Board::with_clock(READ_TSC, 1, clock(ahead));
    let mut engine = board.engine();
    pause_after(&board.control, Duration::from_millis(600));
    assert!(paused(&engine.run()));
    assert!(board.u64_at(0x6000) > ahead, "the guest's TSC went back");
}

#[test]
fn a_message_to_a_paused_guest_wakes_no_timer() {
    if !kvm_is_here() {
        return;
    }
    let board = Board::with_clock(&[0xeb, 0xfe], 1, clock(1000));
    let mut engine = board.engine();
    let mut state = engine.state(0).unwrap();
    state.lapic.lvt_timer = 2 << 17 | 0x40;
    state.msrs.insert(DEADLINE.into(), 1000 + host_khz() * 60_000);
    engine.set_state(0, &state).unwrap();
    engine.irq_sink().msi(0xfee0_0000, 0x51);
    let after = engine.state(0).unwrap();
    assert_eq!(after.lapic.irr, [0, 0, 1 << 17, 0, 0, 0, 0, 0]);
    assert_eq!(after.msrs[DEADLINE], state.msrs[DEADLINE]);
    assert_eq!(after.regs.rip, CODE);
}

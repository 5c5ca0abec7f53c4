//! What a guest reads as its TSC, and its timers, across pauses and moves: on a KVM that offsets a guest's TSC and on one that
//! shows the host's.

mod common;

use std::time::Duration;

use common::{Board, CODE, hex, host_khz, host_tsc, kvm_is_here, paused};
use vcpu::{Clock, ClockState, Engine, Stop};

const TSC: &str = "0x10";
const TSC_ADJUST: &str = "0x3b";
const DEADLINE: &str = "0x6e0";

/// Stores the TSC at 0x6000 and asks for a stop, again and again.
/// `1: rdtsc; mov [0x6000], eax; mov [0x6004], edx; out 0xe8, al; jmp 1b`
fn read_tsc() -> Vec<u8> {
    hex("0f318904250060000089142504600000 e6e8ebec")
}

/// Waits for interrupts: `sti; 1: hlt; jmp 1b`.
fn sleep() -> Vec<u8> {
    hex("fbf4ebfd")
}

/// `rdtsc; mov [0x6000], eax; mov [0x6004], edx; out 0xe8, al; iretq`
fn tick() -> Vec<u8> {
    hex("0f318904250060000089142504600000 e6e848cf")
}

/// Starts a timer of 200 000 ns with vector 0x51 and waits for interrupts. RBX keeps the LAPIC's address.
/// `mov rbx, 0xfee00000; mov dword [rbx + 0x320], 0x51; mov dword [rbx + 0x3e0], 0xb; mov dword [rbx + 0x380], 200000;
/// sti; 1: hlt; jmp 1b`
fn start_timer() -> Vec<u8> {
    hex("bb0000e0fec7832003000051000000c7 83e00300000b000000c7838003000040 0d0300fbf4ebfd")
}

/// Counts at 0x6000 and starts the timer again.
/// `inc dword [0x6000]; mov dword [rbx + 0xb0], 0; mov dword [rbx + 0x380], 200000; iretq`
fn link() -> Vec<u8> {
    hex("ff042500600000c783b0000000000000 00c78380030000400d030048cf")
}

/// Counts at 0x6000 and asks for a stop: `inc dword [0x6000]; mov dword [rbx + 0xb0], 0; out 0xe8, al; iretq`.
fn once() -> Vec<u8> {
    hex("ff042500600000c783b0000000000000 00e6e848cf")
}

/// The board with [`sleep`] and its handler.
fn sleeper(clock: Clock) -> Board {
    let board = Board::with_clock(&sleep(), 1, clock);
    board.handler(0x40, &tick());
    board
}

fn clock(tsc: u64) -> Clock {
    let khz = host_khz();
    let wall = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    Clock::from_state(ClockState { tsc_khz: khz, tsc, boot_ns: 1_000_000, wall_ns: wall, host_wall_ns: wall }, khz)
}

/// Returns when the host's counter has gone on by so many ticks: what all timers here are compared with.
fn pass(ticks: u64) {
    let from = host_tsc();
    while host_tsc().wrapping_sub(from) < ticks {
        std::thread::yield_now();
    }
}

#[test]
fn the_machines_clock_is_what_the_guest_reads() {
    if !kvm_is_here() {
        return;
    }
    let board = Board::with_clock(&read_tsc(), 1, clock(1000));
    let mut engine = board.engine();
    let mut last = 0;
    for _ in 0..5 {
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
    let board = Board::with_clock(&read_tsc(), 1, clock(1000));
    let mut engine = board.engine();
    let mut state = engine.state(0).unwrap();
    state.msrs.insert(TSC_ADJUST.into(), ADJUST);
    engine.set_state(0, &state).unwrap();
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
        board.control.request_stop(Stop::Paused);
        let started = board.clock.state().boot_ns;
        assert!(paused(&engine.run()));
        assert_eq!(board.u64_at(0x6000), 0, "too early");
        pass(60 * khz);
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
    let board = Board::with_clock(&read_tsc(), 1, clock(ahead));
    let mut engine = board.engine();
    match engine.run() {
        Stop::Paused => assert!(board.u64_at(0x6000) > ahead, "the guest's TSC went back"),
        Stop::Failed(e) => {
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
    let board = Board::with_clock(&read_tsc(), 1, clock(ahead));
    let mut engine = board.engine();
    assert!(paused(&engine.run()));
    assert!(board.u64_at(0x6000) > ahead, "the guest's TSC went back");
}

#[test]
fn a_message_to_a_paused_guest_wakes_no_timer() {
    if !kvm_is_here() {
        return;
    }
    let board = sleeper(clock(1000));
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

fn chain(handler: &[u8]) -> Board {
    let board = Board::with_clock(&start_timer(), 1, clock(1000));
    board.handler(0x51, handler);
    board
}

/// Each interrupt starts the next: one that is lost in a pause ends the chain.
#[test]
fn no_one_shot_timer_is_lost_in_a_pause() {
    if !kvm_is_here() {
        return;
    }
    let board = chain(&link());
    let mut engine = board.engine();
    for pause in 0..400u64 {
        let before = board.u64_at(0x6000);
        // Around the moment when it runs out, a little earlier or later each time.
        let control = board.control.clone();
        let asked = std::thread::spawn(move || {
            let at = std::time::Instant::now();
            while at.elapsed() < Duration::from_micros(150 + pause * 7 % 300) {
                std::hint::spin_loop();
            }
            control.request_stop(Stop::Paused);
        });
        assert!(paused(&engine.run()));
        asked.join().unwrap();
        // Moved: what the state does not say is gone.
        let state = engine.state(0).unwrap();
        drop(engine);
        engine = board.try_engine().unwrap();
        engine.set_state(0, &state).unwrap();
        assert_eq!(engine.state(0).unwrap(), state);
        if pause % 16 != 15 {
            continue;
        }
        let control = board.control.clone();
        let memory = board.memory.clone();
        let seen = std::thread::spawn(move || {
            let at = std::time::Instant::now();
            let mut bytes = [0; 8];
            while u64::from_le_bytes(bytes) <= before + 1 && at.elapsed() < Duration::from_secs(10) {
                memory.read(0x6000, &mut bytes).unwrap();
            }
            control.request_stop(Stop::Paused);
        });
        assert!(paused(&engine.run()));
        seen.join().unwrap();
        assert!(board.u64_at(0x6000) > before + 1, "the chain has ended after {pause} pauses: {state:?}");
    }
}

#[test]
fn a_one_shot_timer_that_has_run_out_comes_once() {
    if !kvm_is_here() {
        return;
    }
    let board = chain(&once());
    let mut engine = board.engine();
    assert!(paused(&engine.run()), "asked for by the handler");
    for _ in 0..20 {
        let state = engine.state(0).unwrap();
        assert_eq!((state.lapic.timer_initial, state.lapic.timer_current), (200_000, 0));
        drop(engine);
        engine = board.try_engine().unwrap();
        engine.set_state(0, &state).unwrap();
        let control = board.control.clone();
        let asked = std::thread::spawn(move || {
            pass(2 * host_khz());
            control.request_stop(Stop::Paused);
        });
        assert!(paused(&engine.run()));
        asked.join().unwrap();
        assert_eq!(board.u64_at(0x6000), 1);
    }
}

//! A machine that is asked to stop in the middle of an I/O instruction stands after it.

mod common;

use common::{Board, CODE, hex, kvm_is_here, paused};
use vcpu::Engine;

/// Each instruction that reaches [`common::STOP_PORT`], or the same offset in MMIO, asks for a pause at its first access.
/// ```text
///  0  in al, 0xe8                9  mov esi, 0xd0000008      17  mov edi, 0x6100      28  mov esi, 0x6100      34  out 0xe8, al
///  2  mov [0x6000], al           e  mov ebx, [rsi]           1c  mov edx, 0xe8        2d  mov ecx, 5           36  jmp 36
///                               10  mov [0x6008], ebx        21  mov ecx, 5           32  rep outsb
///                                                            26  rep insb
/// ```
fn io() -> Vec<u8> {
    hex("e4e888042500600000be080000d08b1e 891c2508600000bf00610000bae80000 00b905000000f36cbe00610000b90500 0000f36ee6e8ebfe")
}

#[test]
fn an_unfinished_access_is_finished_before_the_state_is_read() {
    if !kvm_is_here() {
        return;
    }
    let board = Board::new(&io(), 1);
    let mut engine = board.engine();
    let mut stops = Vec::new();
    loop {
        assert!(paused(&engine.run()));
        let state = engine.state(0).unwrap();
        let at = state.regs.rip - CODE;
        stops.push(at);
        match at {
            2 => assert_eq!(state.regs.rax & 0xff, 0x41),
            0x10 => assert_eq!(state.regs.rbx, 0x4242_4242),
            // In the middle of a repeated one: the count says how much is left, and as much was done.
            0x26 => assert_eq!(state.regs.rcx, 7 - *board.ports.reads.lock().unwrap()),
            0x32 => assert_eq!(state.regs.rcx, 5 - board.ports.written.lock().unwrap().len() as u64),
            0x28 | 0x34 => assert_eq!(state.regs.rcx, 0),
            0x36 => break,
            _ => panic!("stopped at {at:#x}"),
        }
        // What is not in the state is gone.
        drop(engine);
        engine = board.try_engine().unwrap();
        engine.set_state(0, &state).unwrap();
        assert!(stops.len() < 20, "{stops:x?}");
    }
    assert_eq!(board.u64_at(0x6000) & 0xff, 0x41);
    assert_eq!(board.u64_at(0x6008) & 0xffff_ffff, 0x4242_4242);
    assert_eq!(board.u64_at(0x6100) & 0xff_ffff_ffff, 0x47_4645_4443, "every byte read once");
    assert_eq!(*board.ports.reads.lock().unwrap(), 7);
    let written: Vec<u64> = board.ports.written.lock().unwrap().iter().map(|w| w.1).collect();
    assert_eq!(written, [0x43, 0x44, 0x45, 0x46, 0x47, 0x41]);
}

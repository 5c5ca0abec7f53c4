//! A device's doorbells are noted by the kernel and rung by a thread; none is lost at a pause or when the device moves.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{Board, hex, kvm_is_here, paused};
use vcpu::{Control, Device, Engine, Space, Stop};

const BELL: u64 = 0xe000_0000;
const MOVED: u64 = 0xe000_2000;

/// Counts its bells' rings (offset 0x10 is one) and other writes; a read asks for a stop.
struct Ringer {
    rings: AtomicU64,
    others: AtomicU64,
    control: Arc<Control>,
}

impl Device for Ringer {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
        self.control.request_stop(Stop::Paused);
    }

    fn write(&self, offset: u64, _: &[u8]) {
        if offset == 0x10 { &self.rings } else { &self.others }.fetch_add(1, Ordering::SeqCst);
    }

    fn doorbells(&self) -> Vec<u64> {
        vec![0x10]
    }
}

/// Moves the ringer from [`BELL`] to [`MOVED`], as a guest moves a BAR.
struct Mover {
    bus: std::sync::Weak<vcpu::Bus>,
    ringer: Arc<Ringer>,
}

impl Device for Mover {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _: u64, _: &[u8]) {
        let bus = self.bus.upgrade().unwrap();
        assert!(bus.remove(Space::Mmio, BELL));
        bus.insert(Space::Mmio, MOVED, 0x1000, self.ringer.clone()).unwrap();
    }
}

#[test]
fn no_ring_is_lost() {
    if !kvm_is_here() {
        return;
    }
    // mov esi, 0xe0000000; mov word [rsi + 0x10], 3; mov dword [rsi + 0x14], 1; mov eax, [rsi]; (stop)
    // mov dword [rsi + 0x10], 3; out 0xd0, al; (moves) mov esi, 0xe0002000; mov byte [rsi + 0x10], 3; mov eax, [rsi]; (stop) jmp $
    let code = "be000000e0 66c746100300 c7461401000000 8b06 c7461003000000 e6d0 be002000e0 c6461003 8b06 ebfe";
    let board = Board::new(&hex(code), 1);
    let ringer = Arc::new(Ringer { rings: AtomicU64::new(0), others: AtomicU64::new(0), control: board.control.clone() });
    board.bus.insert(Space::Mmio, BELL, 0x1000, ringer.clone()).unwrap();
    let mover = Mover { bus: Arc::downgrade(&board.bus), ringer: ringer.clone() };
    board.bus.insert(Space::Pio, 0xd0, 1, Arc::new(mover)).unwrap();
    let mut engine = board.engine();
    assert!(paused(&engine.run()));
    assert_eq!((ringer.rings.load(Ordering::SeqCst), ringer.others.load(Ordering::SeqCst)), (1, 1));
    assert!(paused(&engine.run()));
    assert_eq!((ringer.rings.load(Ordering::SeqCst), ringer.others.load(Ordering::SeqCst)), (3, 1));
}

#[test]
fn a_guest_that_only_rings_does_not_stop_for_it() {
    if !kvm_is_here() {
        return;
    }
    // mov esi, 0xe0000000; mov ecx, 10000; 1: mov word [rsi + 0x10], 0; dec ecx; jnz 1b; mov eax, [rsi]; jmp $
    let board = Board::new(&hex("be000000e0 b910270000 66c746100000 ffc9 75f6 8b06 ebfe"), 1);
    let ringer = Arc::new(Ringer { rings: AtomicU64::new(0), others: AtomicU64::new(0), control: board.control.clone() });
    board.bus.insert(Space::Mmio, BELL, 0x1000, ringer.clone()).unwrap();
    let mut engine = board.engine();
    assert!(paused(&engine.run()));
    let rings = ringer.rings.load(Ordering::SeqCst);
    assert!((1..=10_000).contains(&rings), "{rings}");
    eprintln!("10000 rings noted as {rings}");
}

//! A restored machine's memory is given to the processor when it is touched; what is damaged stops the machine by name.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use common::{Board, hex, host_khz, kvm_is_here, paused};
use memory::{CHUNK_SIZE, GuestMemory, RegionLayout, Source};
use vcpu::{Clock, Engine, Stop};

const SIZE: u64 = 64 << 20;
/// What the guest adds up: the first byte of each of these pages.
const FROM: u64 = 16 << 20;
const PAGES: u64 = 1024;
const STEP: u64 = 4096 * 5;

/// Adds up a byte of each of [`PAGES`] pages from [`FROM`], writes the sum to each page's second byte, and tells it.
/// `mov esi, FROM; mov ecx, PAGES; xor eax, eax; 1: movzx edx, byte [rsi]; add eax, edx; mov [rsi + 1], al; add esi, STEP; dec ecx;
/// jnz 1b; out 0xe4, eax; out 0xe8, al; jmp $`
const SUM: &str = "be00000001 b900040000 31c0 0fb616 01d0 884601 81c600500000 ffc9 75ee e7e4 e6e8 ebfe";

struct Saved {
    file: File,
    digests: memory::DigestTable,
    state: vcpu::VcpuState,
    sum: u64,
}

/// A machine before its first instruction, as a snapshot has it: half of the pages are zero.
fn saved() -> Saved {
    let memory = GuestMemory::new(&[RegionLayout { gpa: 0, size: SIZE }]).unwrap();
    let mut sum = 0;
    for page in (0..PAGES).filter(|p| p % 2 == 0) {
        memory.write(FROM + page * STEP, &[(page % 251) as u8 + 1]).unwrap();
        sum += page % 251 + 1;
    }
    // Never touched.
    memory.write(SIZE - CHUNK_SIZE, &[1; 4096]).unwrap();
    let board = Board::loaded(memory, &hex(SUM));
    let state = board.engine().state(0).unwrap();
    let file = tempfile::tempfile().unwrap();
    let image = board.memory.write_region(0, &file, 1).unwrap();
    Saved { file, digests: image.digests, state, sum }
}

fn restored(saved: &Saved) -> GuestMemory {
    let (file, digests) = (saved.file.try_clone().unwrap(), saved.digests.clone());
    let source = Source { file, name: "memory-region-0".into(), chunk: CHUNK_SIZE, digests };
    GuestMemory::restore(vec![(RegionLayout { gpa: 0, size: SIZE }, source)]).unwrap()
}

fn board(memory: GuestMemory) -> Board {
    Board::with_memory(memory, 1, Clock::new(host_khz(), host_khz()))
}

fn lazily() -> bool {
    let why = GuestMemory::faults_unavailable();
    if let Some(why) = &why {
        eprintln!("SKIPPED: {why}");
    }
    why.is_none() && kvm_is_here()
}

#[test]
fn memory_is_taken_when_it_is_touched() {
    if !lazily() {
        return;
    }
    let saved = saved();
    let board = board(restored(&saved));
    let mut engine = board.try_engine().unwrap();
    engine.set_state(0, &saved.state).unwrap();
    let loaded = |board: &Board| board.memory.regions()[0].source_stats().unwrap();
    assert!(loaded(&board).loaded < 10, "{:?}", loaded(&board));
    assert!(paused(&engine.run()));
    assert_eq!(board.ports.written.lock().unwrap()[0], (4, saved.sum));
    let stats = loaded(&board);
    assert!(stats.loaded < stats.stored, "{stats:?}");
    // A device's accesses, to what was taken, to zeros within it, and to what was not.
    let mut byte = [0];
    for (at, expected) in [(FROM, 1), (FROM + 4096, 0), (SIZE - CHUNK_SIZE, 1), (40 << 20, 0)] {
        board.memory.read(at, &mut byte).unwrap();
        assert_eq!(byte[0], expected, "{at:#x}");
    }
    board.memory.write(SIZE - 3 * CHUNK_SIZE + 5, &[7]).unwrap();
    // And the next snapshot has all of it.
    let file = tempfile::tempfile().unwrap();
    let image = board.memory.write_region(0, &file, 2).unwrap();
    assert!(image.stats.touched_pages < 2048, "{:?}", image.stats);
    let mut bytes = vec![0; SIZE as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let mut sum = 0;
    for page in 0..PAGES {
        let at = (FROM + page * STEP) as usize;
        sum += u64::from(bytes[at]);
        assert_eq!(bytes[at + 1], sum as u8, "page {page}");
    }
    assert_eq!((sum, bytes[(SIZE - 3 * CHUNK_SIZE) as usize + 5]), (saved.sum, 7));
}

#[test]
fn a_flipped_bit_stops_the_machine_by_name() {
    if !lazily() {
        return;
    }
    let saved = saved();
    let chunk = (FROM + 500 * STEP) / CHUNK_SIZE;
    let mut byte = [0];
    let at = chunk * CHUNK_SIZE + 4096 * 3 + 77;
    saved.file.read_exact_at(&mut byte, at).unwrap();
    saved.file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    let board = board(restored(&saved));
    let mut engine = board.try_engine().unwrap();
    engine.set_state(0, &saved.state).unwrap();
    let started = Instant::now();
    let Stop::Failed(error) = engine.run() else { panic!("it ran on") };
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(error.code, "damaged");
    assert!(error.message.contains(&format!("memory-region-0, chunk {chunk}")), "{error}");
    assert!(board.ports.written.lock().unwrap().is_empty(), "the guest has not been told a wrong sum");
    assert_eq!(engine.state(0).unwrap_err().code, "damaged");
    assert!(matches!(engine.run(), Stop::Failed(_)));
    // Taken at once it is refused.
    let mut eagerly = restored(&saved);
    let refused = eagerly.load_all(2).unwrap_err().to_string();
    assert!(refused.contains(&format!("memory-region-0, chunk {chunk}")), "{refused}");
}

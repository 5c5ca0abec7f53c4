//! A machine of a few instructions in 64-bit mode, and where its output goes.

// Each test file is a crate of its own and uses a part of this.
#![allow(dead_code, clippy::precedence)]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm::KvmEngine;
use memory::{GuestMemory, RegionLayout};
use vcpu::state::{Segment, Table, VcpuState};
use vcpu::{Bus, Clock, Control, Device, Engine, EngineConfig, EngineError, Space, Stop};

pub const CODE: u64 = 0x8000;
/// Interrupt handlers, see [`Board::handler`].
const HANDLER: u64 = 0x9000;
const STACK: u64 = 0x7000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PDS: u64 = 0x1_0000;
const IDT: u64 = 0x3000;
const GDT: u64 = 0x5000;
/// Writes are recorded, and reads give 0x41, 0x42 and so on; at the second of these, and at the same offset of the page at
/// [`MMIO`], they also ask for a pause.
pub const PORT: u64 = 0xe0;
pub const STOP_PORT: u64 = 0xe8;
pub const MMIO: u64 = 0xd000_0000;

/// Whether there is a KVM to test; says so where not.
pub fn kvm_is_here() -> bool {
    let here = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if !here {
        eprintln!("SKIPPED: /dev/kvm cannot be opened here");
    }
    here
}

/// The host's counter.
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC has no preconditions.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The host's TSC rate over 20 ms, in kHz: near enough for a test.
pub fn host_khz() -> u64 {
    static RATE: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *RATE.get_or_init(|| {
        let (from, at) = (host_tsc(), Instant::now());
        while at.elapsed() < Duration::from_millis(20) {
            std::hint::spin_loop();
        }
        (host_tsc() - from) * 1_000_000 / at.elapsed().as_nanos() as u64
    })
}

pub struct Ports {
    pub written: Mutex<Vec<(u64, u64)>>,
    pub reads: Mutex<u64>,
    control: Arc<Control>,
}

impl Device for Ports {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut reads = self.reads.lock().unwrap();
        *reads += 1;
        data.fill(0x40 | *reads as u8);
        if offset == STOP_PORT - PORT {
            self.control.request_stop(Stop::Paused);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let value = data.iter().rev().fold(0, |all, &byte| all << 8 | u64::from(byte));
        self.written.lock().unwrap().push((offset, value));
        if PORT + offset == STOP_PORT {
            self.control.request_stop(Stop::Paused);
        }
    }
}

pub struct Board {
    pub memory: Arc<GuestMemory>,
    pub bus: Arc<Bus>,
    pub clock: Arc<Clock>,
    pub control: Arc<Control>,
    pub ports: Arc<Ports>,
    pub vcpus: usize,
}

impl Board {
    pub fn new(code: &[u8], vcpus: usize) -> Self {
        Self::with_clock(code, vcpus, Clock::new(host_khz(), host_khz()))
    }

    pub fn with_clock(code: &[u8], vcpus: usize, clock: Clock) -> Self {
        Self::furnished(GuestMemory::new(&[RegionLayout { gpa: 0, size: 1 << 20 }]).unwrap(), code, vcpus, clock)
    }

    /// In memory of the caller's.
    pub fn loaded(memory: GuestMemory, code: &[u8]) -> Self {
        Self::furnished(memory, code, 1, Clock::new(host_khz(), host_khz()))
    }

    fn furnished(memory: GuestMemory, code: &[u8], vcpus: usize, clock: Clock) -> Self {
        memory.write(CODE, code).unwrap();
        // The first 4 GiB one to one.
        memory.write(PML4, &(PDPT | 3).to_le_bytes()).unwrap();
        for gib in 0..4 {
            memory.write(PDPT + 8 * gib, &(PDS + 4096 * gib | 3).to_le_bytes()).unwrap();
        }
        for page in 0..4 * 512u64 {
            memory.write(PDS + 8 * page, &(page << 21 | 0x83).to_le_bytes()).unwrap();
        }
        memory.write(GDT + 8, &0x00af_9b00_0000_ffffu64.to_le_bytes()).unwrap();
        memory.write(GDT + 16, &0x00cf_9300_0000_ffffu64.to_le_bytes()).unwrap();
        Self::with_memory(memory, vcpus, clock)
    }

    pub fn with_memory(memory: GuestMemory, vcpus: usize, clock: Clock) -> Self {
        let control = Arc::new(Control::default());
        let ports = Arc::new(Ports { written: Mutex::default(), reads: Mutex::default(), control: control.clone() });
        let bus = Arc::new(Bus::default());
        bus.insert(Space::Pio, PORT, 16, ports.clone()).unwrap();
        bus.insert(Space::Mmio, MMIO, 0x1000, ports.clone()).unwrap();
        Self { memory: Arc::new(memory), bus, clock: Arc::new(clock), control, ports, vcpus }
    }

    pub fn try_engine(&self) -> Result<KvmEngine, EngineError> {
        KvmEngine::new(EngineConfig {
            memory: self.memory.clone(),
            bus: self.bus.clone(),
            clock: self.clock.clone(),
            control: self.control.clone(),
            vcpus: self.vcpus,
            phys_bits: 46,
            eoi: None,
            switches: Default::default(),
        })
    }

    /// An interrupt gate to this code.
    pub fn handler(&self, vector: u64, code: &[u8]) {
        self.put(HANDLER, code);
        self.put(IDT + 16 * vector, &(0x0000_8e00_0008_0000 | HANDLER).to_le_bytes());
    }

    /// Its first vCPU at [`CODE`].
    pub fn engine(&self) -> KvmEngine {
        let mut engine = self.try_engine().unwrap();
        let state = at_code(engine.state(0).unwrap());
        engine.set_state(0, &state).unwrap();
        engine
    }

    pub fn u64_at(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read(gpa, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    pub fn put(&self, gpa: u64, bytes: &[u8]) {
        self.memory.write(gpa, bytes).unwrap();
    }
}

pub fn at_code(mut state: VcpuState) -> VcpuState {
    let s = &mut state.sregs;
    let flat = Segment { limit: !0, present: 1, s: 1, g: 1, ..Segment::default() };
    s.cs = Segment { selector: 8, type_: 11, l: 1, ..flat.clone() };
    let data = Segment { selector: 16, type_: 3, db: 1, ..flat };
    (s.ds, s.es, s.ss) = (data.clone(), data.clone(), data);
    s.gdt = Table { base: GDT, limit: 23 };
    s.idt = Table { base: IDT, limit: 0xfff };
    (s.cr0, s.cr3, s.cr4, s.efer) = (0x8000_0011, PML4, 0x220, 0x500);
    (state.regs.rip, state.regs.rsp) = (CODE, STACK);
    state.lapic.svr = 0x1ff;
    state
}

/// Bytes from hexadecimal digits.
pub fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|b| *b != b' ').map(|b| (b as char).to_digit(16).unwrap() as u8).collect();
    digits.chunks(2).map(|d| d[0] << 4 | d[1]).collect()
}

/// Whether that was a pause; shows what it was else.
pub fn paused(stop: &Stop) -> bool {
    if !matches!(stop, Stop::Paused) {
        eprintln!("{stop:?}");
    }
    matches!(stop, Stop::Paused)
}

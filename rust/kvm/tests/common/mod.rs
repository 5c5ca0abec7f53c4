//! A machine of a few instructions in real mode, and where its output goes.

// Each test file is a crate of its own and uses a part of this.
#![allow(dead_code)]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm::KvmEngine;
use memory::{GuestMemory, RegionLayout};
use vcpu::state::VcpuState;
use vcpu::{Bus, Clock, Control, Device, Engine, EngineConfig, EngineError, Space, Stop};

pub const CODE: u64 = 0x8000;
/// Writing here is recorded; the last port's writes also ask for a pause.
pub const PORT: u64 = 0xe0;
pub const STOP_PORT: u64 = 0xe8;

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
    control: Arc<Control>,
}

impl Device for Ports {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0x40 | offset as u8);
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
        let memory = GuestMemory::new(&[RegionLayout { gpa: 0, size: 1 << 20 }]).unwrap();
        memory.write(CODE, code).unwrap();
        Self::with_memory(memory, vcpus, clock)
    }

    pub fn with_memory(memory: GuestMemory, vcpus: usize, clock: Clock) -> Self {
        let control = Arc::new(Control::default());
        let ports = Arc::new(Ports { written: Mutex::default(), control: control.clone() });
        let bus = Arc::new(Bus::default());
        bus.insert(Space::Pio, PORT, 16, ports.clone()).unwrap();
        bus.insert(Space::Mmio, 0xd000_0000, 0x1000, ports.clone()).unwrap();
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
        })
    }

    /// Its first vCPU at [`CODE`] in real mode, with a stack below.
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
    state.sregs.cs.base = 0;
    state.sregs.cs.selector = 0;
    state.regs.rip = CODE;
    state.regs.rsp = 0x7000;
    state.lapic.svr = 0x1ff;
    state
}

/// A pause asked for in a while by another thread.
pub fn pause_after(control: &Arc<Control>, time: Duration) {
    let control = control.clone();
    std::thread::spawn(move || {
        std::thread::sleep(time);
        control.request_stop(Stop::Paused);
    });
}

pub fn paused(stop: &Stop) -> bool {
    matches!(stop, Stop::Paused)
}

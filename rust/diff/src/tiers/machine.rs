//! One tier of the engine with a machine of its own.

use std::sync::Arc;

use memory::{GuestMemory, RegionLayout};
use vcpu::{Bus, Clock, Control, Space};
use x86::cache::Cache;
use x86::core::{Core, Shared};
use x86::run::RunExit;
use x86::state::Cpu;

use super::world::{DEVICE_GPA, Probe, RAM};
use crate::rng::Rng;

/// Why a machine stopped before its count of instructions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Early {
    Halted,
    TripleFault,
    /// Exceptions and nothing else: how many were delivered depends on the slices.
    Storm,
    Failed(String),
}

/// How many instructions a turn has.
#[derive(Debug, Clone, Copy)]
pub enum Slices {
    Whole,
    UpTo(u64),
}

pub struct Side {
    pub memory: Arc<GuestMemory>,
    probe: Arc<Probe>,
    bus: Arc<Bus>,
    control: Arc<Control>,
    clock: Arc<Clock>,
    pub cache: Cache,
    pub core: Core,
    slices: Slices,
    rng: Rng,
    /// Instructions executed before the last reset.
    pub executed: u64,
}

impl Side {
    pub fn new() -> Self {
        let memory = Arc::new(GuestMemory::new(&[RegionLayout { gpa: 0, size: RAM as u64 }]).expect("128 KiB of guest memory"));
        let probe = Arc::new(Probe::default());
        let bus = Arc::new(Bus::default());
        bus.insert(Space::Mmio, DEVICE_GPA, 0x1000, probe.clone()).expect("the only device");
        let control = Arc::new(Control::default());
        // Never resumed: time stands still.
        let clock = Arc::new(Clock::new(1_000_000, 0));
        let shared = Shared::new(memory.clone(), bus.clone(), clock.clone(), control.clone(), 1, 40, None);
        let core = Core::new(Arc::new(shared), 0);
        let (slices, rng) = (Slices::Whole, Rng::new(0, 0));
        Self { memory, probe, bus, control, clock, cache: Cache::new(), core, slices, rng, executed: 0 }
    }

    /// A new machine in all that matters.
    pub fn reset(&mut self, ram: &[u8], cpu: &Cpu, slices: Slices, rng: Rng) {
        self.executed += self.core.cpu.icount;
        self.cache.clear(&self.memory);
        self.memory.write(0, ram).expect("inside guest memory");
        self.probe.reset();
        let (memory, bus) = (self.memory.clone(), self.bus.clone());
        let shared = Shared::new(memory, bus, self.clock.clone(), self.control.clone(), 1, 40, None);
        self.core = Core::new(Arc::new(shared), 0);
        self.core.cpu = cpu.clone();
        self.core.refresh_breakpoints();
        self.core.flush_tlb_all();
        self.core.refresh();
        (self.slices, self.rng) = (slices, rng);
    }

    /// Executes until `count` instructions are done since the reset.
    pub fn run_to(&mut self, count: u64) -> Option<Early> {
        let mut stuck = 0;
        while self.core.cpu.icount < count {
            let before = self.core.cpu.icount;
            let slice = match self.slices {
                Slices::Whole => u64::MAX,
                Slices::UpTo(n) => 1 + self.rng.below(n),
            };
            match self.core.run(&mut self.cache, slice.min(count - before)) {
                RunExit::Budget | RunExit::Pause => {}
                RunExit::Events => {
                    if let Some(stop) = self.control.service() {
                        return Some(Early::Failed(format!("{stop:?}")));
                    }
                    stuck = if self.core.cpu.icount == before { stuck + 1 } else { 0 };
                    if stuck > 2 {
                        return Some(Early::Storm);
                    }
                }
                RunExit::Halted => return Some(Early::Halted),
                RunExit::TripleFault => return Some(Early::TripleFault),
                RunExit::Failed(error) => return Some(Early::Failed(format!("{}: {}", error.code, error.message))),
            }
        }
        None
    }

    pub fn ram(&self, into: &mut [u8]) {
        self.memory.read(0, into).expect("inside guest memory");
    }

    pub fn device(&self) -> u64 {
        self.probe.state()
    }
}

impl Default for Side {
    fn default() -> Self {
        Self::new()
    }
}

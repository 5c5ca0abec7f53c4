//! One tier of the engine with a machine of its own.

use std::sync::Arc;

use memory::{GuestMemory, RegionLayout};
use vcpu::{Bus, Clock, ClockState, Control, Space};
use x86::apics::{FIXED, Message, NMI};
use x86::cache::Cache;
use x86::core::{Core, Shared};
use x86::run::RunExit;
use x86::state::{Activity, Cpu};

use super::case::Turn;
use super::world::{DEVICE_GPA, Probe, RAM};
use crate::rng::Rng;

/// Where a clock that counts begins.
const TIME: ClockState = ClockState { tsc_khz: 2_100_000, tsc: 1_234_567, boot_ns: 1_000_000, wall_ns: 1 << 60, host_wall_ns: 0 };

/// Why a machine stopped before its count of instructions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Early {
    /// It waits for an interrupt.
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
    /// The machine's vCPUs.
    pub cores: Vec<Core>,
    /// Blocks stay where they are from case to case, dead, until there is no room for more.
    pub keep: bool,
    slices: Slices,
    rng: Rng,
}

impl Side {
    pub fn new() -> Self {
        let memory = Arc::new(GuestMemory::new(&[RegionLayout { gpa: 0, size: RAM as u64 }]).expect("128 KiB of guest memory"));
        let probe = Arc::new(Probe::default());
        let bus = Arc::new(Bus::default());
        bus.insert(Space::Mmio, DEVICE_GPA, 0x1000, probe.clone()).expect("the only device");
        let control = Arc::new(Control::default());
        // Never resumed: time stands still.
        // A fixed time for all machines: guests find it by kvm-clock.
        let clock = Arc::new(Clock::from_state(ClockState { tsc_khz: 1_000_000, ..TIME }, 0));
        let (slices, rng) = (Slices::Whole, Rng::new(0, 0));
        Self { memory, probe, bus, control, clock, cache: Cache::new(), cores: Vec::new(), keep: false, slices, rng }
    }

    /// A new machine in all that matters. `interrupts`: its device sends some. `counted`: its time is the count of instructions (of one
    /// vCPU), else it stands still.
    pub fn reset(&mut self, ram: &[u8], cpus: &[Cpu], (interrupts, counted): (bool, bool), slices: Slices, rng: Rng) {
        if !self.keep {
            self.cache.clear(&self.memory);
        }
        self.memory.write(0, ram).expect("inside guest memory");
        let (memory, bus) = (self.memory.clone(), self.bus.clone());
        let clock = if counted { Arc::new(Clock::counted(TIME)) } else { self.clock.clone() };
        let shared = Shared::new(memory, bus, clock, self.control.clone(), cpus.len(), 40, None);
        let shared = Arc::new(shared);
        self.probe.reset(interrupts.then(|| shared.apics.clone()));
        self.cores.clear();
        for (n, cpu) in cpus.iter().enumerate() {
            let mut core = Core::new(shared.clone(), n);
            core.cpu = cpu.clone();
            core.lapic.svr = 0x1ff;
            core.lapic.update();
            core.lapic.publish(&shared.apics);
            core.refresh_breakpoints();
            core.flush_tlb_all();
            core.refresh();
            self.cores.push(core);
        }
        (self.slices, self.rng) = (slices, rng);
    }

    /// Instructions executed since the reset.
    pub fn executed(&self) -> u64 {
        self.cores.iter().map(|core| core.cpu.icount).sum()
    }

    /// What comes from outside after a turn.
    pub fn outside(&self, turn: &Turn) {
        for (at, bytes) in &turn.writes {
            self.memory.write(*at, bytes).expect("inside guest memory");
        }
        for &(vcpu, vector) in &turn.interrupts {
            self.interrupt(vcpu, vector);
        }
    }

    /// Posts an interrupt, or an NMI for vector 2.
    fn interrupt(&self, vcpu: usize, vector: u8) {
        let mode = if vector == 2 { NMI } else { FIXED };
        self.cores[vcpu].shared.apics.send_self(vcpu, Message { vector, mode, level: false });
    }

    /// Executes `count` instructions of a vCPU.
    pub fn run(&mut self, vcpu: usize, count: u64) -> Option<Early> {
        let core = &mut self.cores[vcpu];
        let end = core.cpu.icount + count;
        let (mut stuck, mut unsettled) = (0, false);
        loop {
            // Why a run came back is the host's business: whether the vCPU waits is the guest's.
            if core.cpu.activity != Activity::Running && !core.event_pending() {
                return Some(Early::Halted);
            }
            if core.cpu.icount >= end && !unsettled {
                return None;
            }
            // Called back for something, it has not looked yet whether an interrupt can be taken: every turn ends with that.
            unsettled = false;
            let before = core.cpu.icount;
            let slice = match self.slices {
                Slices::Whole => u64::MAX,
                Slices::UpTo(n) => 1 + self.rng.below(n),
            };
            match core.run(&mut self.cache, slice.min(end - before)) {
                RunExit::Budget | RunExit::Pause | RunExit::Halted => {}
                RunExit::Events => {
                    unsettled = true;
                    if let Some(stop) = self.control.service() {
                        return Some(Early::Failed(format!("{stop:?}")));
                    }
                }
                RunExit::TripleFault => return Some(Early::TripleFault),
                RunExit::Failed(error) => return Some(Early::Failed(format!("{}: {}", error.code, error.message))),
            }
            stuck = if core.cpu.icount == before { stuck + 1 } else { 0 };
            if stuck > 50 {
                return Some(Early::Storm);
            }
        }
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

//! The software engine: all vCPUs of a machine take turns on the calling thread.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vcpu::count::NS_PER_INSTRUCTION;
use vcpu::irq::{IntrAcknowledge, IntrLine};
use vcpu::{Count, Engine, EngineConfig, EngineError, IrqSink, Stop, VcpuState};

use crate::cache::Cache;
use crate::core::{Core, Pending, Shared};
use crate::exec;
use crate::run::RunExit;
use crate::state::{Activity, flags};
use crate::tier::Tier;

/// Instructions of one turn: about 0.2 ms, which bounds how late a timer or an IPI to another vCPU can be.
const SLICE: u64 = 50_000;
/// While another vCPU spins, or has just sent this one an interrupt: what it waits for may be done any moment.
const SHORT_SLICE: u64 = 5_000;
/// Between two steps of a clock that catches up: time for each vCPU's timer interrupt.
const STEP_EVERY: Duration = Duration::from_micros(250);
const STEP_AT_LAST: Duration = Duration::from_millis(50);
/// Undisturbed turns of a vCPU after which a step counts as digested: timer interrupt, its soft interrupt, the task that it woke.
const CALM: u8 = 2;
/// A timer so far away is none: a halted guest would wait for it for ever.
const NEVER_NS: u64 = 366 * 86_400 * 1_000_000_000;
/// What a turn without a single instruction takes where time is a count of them.
const FRUITLESS_NS: u64 = 1_000;
/// Executions after which a block is translated: the best value is anywhere between 8 and 256.
const HOT: u8 = 16;
/// What an APIC id of 8 bits can name, the broadcast excluded.
pub const MAX_VCPUS: usize = 255;

/// Guarantees: outside [`Engine::run`] every vCPU stands at an instruction boundary and nothing runs; the order of turns depends
/// on the guest, the clock and what other threads post, on nothing else. With a counted clock ([`Clock::counted`]) and nobody who
/// posts, the guest alone decides: [`Engine::run`] comes back with [`Stop::Paused`] when exactly the clock's limit is retired, or
/// earlier when no vCPU will ever run again; how often it was stopped on the way does not show.
pub struct SoftwareEngine {
    shared: Arc<Shared>,
    cores: Vec<Core>,
    cache: Cache,
    /// Why there is no translator although one was wanted.
    untranslated: Option<String>,
    /// Whose turn is next.
    turn: usize,
    /// Which vCPUs ended their last turn with PAUSE, and how many that are.
    spinning: Vec<bool>,
    spinners: usize,
    /// Of each vCPU: undisturbed turns since the clock's last step, while it catches up.
    calm: Vec<u8>,
    /// Counted clock only: what the vCPU whose turn it is may still execute of a turn that the limit cut.
    rest: u64,
    /// Counted clock only: the guests' clock pages have been written.
    begun: bool,
}

/// How a vCPU's turn ended.
enum Turn {
    /// It did something.
    Ran,
    /// It has nothing to do.
    Idle,
}

impl SoftwareEngine {
    /// vCPU 0 starts at the reset vector, the others wait for SIPI, until [`Engine::set_state`] says otherwise.
    /// `tier`: what runs decoded blocks.
    pub fn new(config: EngineConfig, tier: Tier) -> Result<Self, EngineError> {
        let EngineConfig { memory, bus, clock, control, vcpus, phys_bits, eoi, switches } = config;
        if vcpus == 0 || vcpus > MAX_VCPUS {
            return Err(EngineError::new("host", format!("{vcpus} vCPUs: the software engine runs 1 to {MAX_VCPUS}")));
        }
        if !(32..=52).contains(&phys_bits) {
            return Err(EngineError::new("host", format!("{phys_bits} physical address bits: 32 to 52 are possible")));
        }
        exec::host::supported()
            .map_err(|what| EngineError::new("host", format!("the software engine needs a CPU with {what}")))?;
        let shared = Arc::new(Shared { tier, switches, ..Shared::new(memory, bus, clock, control, vcpus, phys_bits, eoi) });
        let cores = (0..vcpus).map(|n| Core::new(shared.clone(), n)).collect();
        let mut cache = Cache::new();
        let untranslated = match shared.tier {
            Tier::Translator => cache.translate_after(HOT).err().map(|error| error.to_string()),
            Tier::Interpreter => None,
        };
        Ok(Self {
            shared,
            cores,
            cache,
            untranslated,
            turn: 0,
            spinning: vec![false; vcpus],
            spinners: 0,
            calm: vec![0; vcpus],
            rest: 0,
            begun: false,
        })
    }

    /// Why code is interpreted although a translator was asked for; `None` when there is nothing to say.
    pub fn untranslated(&self) -> Option<&str> {
        self.untranslated.as_deref()
    }

    /// Instructions that vCPU `n` has retired since this engine was made.
    pub fn instructions(&self, n: usize) -> u64 {
        self.cores[n].cpu.icount
    }

    /// The vCPU that runs next.
    pub fn whose_turn(&self) -> usize {
        self.turn
    }

    /// Runs vCPU 0 for exactly `n` instructions (one that halts, or only faults for ever, stops earlier) and leaves the clock
    /// alone: for tests and replay. Interrupts that are already there are taken. Gives the number of instructions executed.
    pub fn run_exactly(&mut self, n: u64) -> Result<u64, Stop> {
        let first = self.cores[0].cpu.icount;
        let core = &mut self.cores[0];
        let (mut before, mut stuck) = (first, 0);
        loop {
            let done = core.cpu.icount - first;
            stuck = if core.cpu.icount == before { stuck + 1 } else { 0 };
            before = core.cpu.icount;
            if done >= n || stuck > 16 {
                return Ok(done);
            }
            match core.run(&mut self.cache, n - done) {
                RunExit::Budget | RunExit::Pause => {}
                RunExit::Events => {
                    if let Some(stop) = self.shared.control.service() {
                        return Err(stop);
                    }
                }
                RunExit::Halted => return Ok(core.cpu.icount - first),
                RunExit::TripleFault => return Err(Stop::Reset),
                RunExit::Failed(error) => return Err(Stop::Failed(error)),
            }
        }
    }

    /// Takes back what write access the vCPUs were given, so that memory hears of their next write to each page.
    pub fn take_back_write_access(&mut self) {
        self.cores.iter_mut().for_each(|core| core.tlb.protect_all());
    }

    /// Direct access for tests and the differential runner.
    pub fn core(&mut self, n: usize) -> &mut Core {
        &mut self.cores[n]
    }

    /// Before the first instruction after a pause, restore or step of the clock: the guests' clock pages.
    fn begin(&mut self) -> Result<(), EngineError> {
        for core in &mut self.cores {
            if core.publish_kvmclock(true).is_err() {
                return Err(match core.fault.take() {
                    Some(Pending::Memory(error)) => EngineError::new("damaged", error.to_string()),
                    other => EngineError::new("host", format!("kvm-clock page of vCPU {}: {other:?}", core.vcpu)),
                });
            }
        }
        Ok(())
    }

    /// Instructions of a turn of vCPU `n` that begins now.
    fn slice(&self, n: usize) -> u64 {
        let others = self.spinners - usize::from(self.spinning[n]);
        // Who sent this vCPU an interrupt may wait for its answer, with or without PAUSE.
        let mail = self.shared.apics.count() > 1 && self.cores[n].has_mail();
        if others > 0 || mail { SHORT_SLICE } else { SLICE }
    }

    /// Whether vCPU `n` has something to do, now that its timer has been looked at.
    fn awake(&mut self, n: usize) -> bool {
        let core = &mut self.cores[n];
        let clock = &self.shared.clock;
        if core.lapic.timer_armed() {
            core.lapic.poll_timer(clock.tsc(), core.tsc_adjust, clock.tsc_khz());
        }
        core.cpu.activity == Activity::Running || core.event_pending()
    }

    /// One vCPU's turn.
    fn turn(&mut self, n: usize) -> Result<Turn, Stop> {
        let slice = self.slice(n);
        if !self.awake(n) {
            return Ok(Turn::Idle);
        }
        let exit = self.cores[n].run(&mut self.cache, slice);
        let spins = matches!(exit, RunExit::Pause);
        self.ended(n, spins, exit)
    }

    /// Its time is the count of instructions.
    fn counted_turns(&mut self) -> Stop {
        let shared = self.shared.clone();
        let Some(count) = shared.clock.count() else { return Stop::Paused };
        let mut idle = 0;
        while count.retired() < count.limit() {
            if shared.control.attention() {
                if let Some(stop) = shared.control.service() {
                    return stop;
                }
                idle = 0;
            }
            match self.counted_turn(self.turn, count) {
                Ok(Turn::Ran) => idle = 0,
                Ok(Turn::Idle) => idle += 1,
                Err(stop) => return stop,
            }
            if self.rest > 0 {
                continue;
            }
            self.turn = (self.turn + 1) % self.cores.len();
            if idle >= self.cores.len() {
                // Nobody else can wake a vCPU: without a timer they sleep for ever.
                match self.next_timer().map(|ticks| count.until(ticks)) {
                    Some(ns) if ns < NEVER_NS => count.sleep(ns),
                    _ => return Stop::Paused,
                }
                idle = 0;
            }
        }
        Stop::Paused
    }

    /// One vCPU's turn, or the rest of one that the limit cut: it goes on as if nothing had been. A turn also ends when the vCPU's own
    /// timer is due.
    fn counted_turn(&mut self, n: usize, count: &Count) -> Result<Turn, Stop> {
        let whole = match std::mem::take(&mut self.rest) {
            0 => {
                let slice = self.slice(n);
                if !self.awake(n) {
                    return Ok(Turn::Idle);
                }
                let core = &self.cores[n];
                let timer = core.lapic.timer_left(self.shared.clock.tsc(), core.tsc_adjust);
                slice.min(timer.map_or(u64::MAX, |ticks| count.until(ticks).div_ceil(NS_PER_INSTRUCTION).max(1)))
            }
            rest => rest,
        };
        let (before, limit) = (count.retired(), count.limit());
        let budget = whole.min(limit - before);
        let core = &mut self.cores[n];
        core.count_base = before.wrapping_sub(core.cpu.icount);
        let exit = core.run(&mut self.cache, budget);
        core.tell_count();
        if matches!(exit, RunExit::Events) && count.retired() == before {
            // Exceptions without end and not one instruction: only time can help.
            count.sleep(FRUITLESS_NS);
        }
        // What would have ended the turn must end it also where the limit does.
        let cut = budget < whole && matches!(exit, RunExit::Budget) && !core.yielded && !self.shared.control.attention();
        if cut {
            self.rest = whole - budget;
            return Ok(Turn::Ran);
        }
        let spins = matches!(exit, RunExit::Pause) || budget < whole && core.yielded;
        self.ended(n, spins, exit)
    }

    /// What the end of a turn means.
    fn ended(&mut self, n: usize, spins: bool, exit: RunExit) -> Result<Turn, Stop> {
        self.spinners = self.spinners - usize::from(self.spinning[n]) + usize::from(spins);
        self.spinning[n] = spins;
        match exit {
            RunExit::Budget | RunExit::Pause | RunExit::Events => Ok(Turn::Ran),
            RunExit::Halted => Ok(Turn::Idle),
            RunExit::TripleFault => Err(Stop::Reset),
            RunExit::Failed(error) => Err(Stop::Failed(error)),
        }
    }

    fn turns(&mut self) -> Stop {
        let mut idle = 0;
        let mut stepped = Instant::now();
        loop {
            if self.shared.clock.behind() && self.may_step(stepped.elapsed()) {
                self.shared.clock.catch_up();
                self.calm.fill(0);
                if let Err(error) = self.begin() {
                    return Stop::Failed(error);
                }
                (stepped, idle) = (Instant::now(), 0);
            }
            // Before looking at the vCPUs: what is posted later ends the sleep below.
            if self.shared.control.attention() {
                if let Some(stop) = self.shared.control.service() {
                    return stop;
                }
                idle = 0;
            }
            match self.turn(self.turn) {
                Ok(Turn::Ran) => {
                    idle = 0;
                    if self.shared.clock.behind() {
                        let calm = u8::from(interruptible(&self.cores[self.turn]));
                        self.calm[self.turn] = self.calm[self.turn].saturating_add(calm);
                    }
                }
                Ok(Turn::Idle) => {
                    idle += 1;
                    self.calm[self.turn] = CALM;
                }
                Err(stop) => return stop,
            }
            self.turn = (self.turn + 1) % self.cores.len();
            if idle >= self.cores.len() {
                self.sleep();
                idle = 0;
            }
        }
    }

    /// Whether the clock may move on again: every vCPU has digested the last step, that is halted or done some turns with
    /// interrupts on and none under way, and none is inside an interrupt's handler now (Linux's timer interrupt complains
    /// when time flies within it). One that never gets there (it spins with interrupts off) holds the clock up only so long.
    fn may_step(&self, since: Duration) -> bool {
        let digested = since >= STEP_EVERY && self.calm.iter().all(|&n| n >= CALM);
        digested && self.cores.iter().all(|c| c.cpu.activity != Activity::Running || interruptible(c)) || since >= STEP_AT_LAST
    }

    /// Ticks of the clock's TSC until the next timer that can wake somebody.
    fn next_timer(&self) -> Option<u64> {
        let now = self.shared.clock.tsc();
        let left = self.cores.iter().filter(|c| c.lapic.timer_wakes()).filter_map(|c| c.lapic.timer_left(now, c.tsc_adjust));
        left.min()
    }

    /// Until the next timer that can wake somebody, or until something is posted.
    fn sleep(&self) {
        let clock = &self.shared.clock;
        // Rounded up, so that the timer has expired when we wake.
        let wait = self.next_timer().map(|ticks| Duration::from_nanos(clock.ns(ticks).saturating_add(1)));
        let wait = if clock.behind() { Some(wait.map_or(STEP_EVERY, |d| d.min(STEP_EVERY))) } else { wait };
        let deadline = wait.and_then(|d| Instant::now().checked_add(d));
        self.shared.control.wait(deadline);
    }
}

/// Interrupts are on, and none is waiting or being served.
fn interruptible(core: &Core) -> bool {
    core.cpu.flags & flags::IF != 0 && core.lapic.isr == [0; 8] && !core.event_pending()
}

impl Engine for SoftwareEngine {
    fn name(&self) -> &'static str {
        "software"
    }

    fn vcpus(&self) -> usize {
        self.cores.len()
    }

    fn run(&mut self) -> Stop {
        self.shared.clock.resume();
        let counted = self.shared.clock.count().is_some();
        let begun = if counted && std::mem::replace(&mut self.begun, true) { Ok(()) } else { self.begin() };
        let stop = match begun {
            Ok(()) if counted => self.counted_turns(),
            Ok(()) => self.turns(),
            Err(error) => Stop::Failed(error),
        };
        self.shared.clock.pause();
        stop
    }

    fn state(&mut self, vcpu: usize) -> Result<VcpuState, EngineError> {
        match self.cores.get_mut(vcpu) {
            Some(core) => Ok(core.save()),
            None => Err(EngineError::new("state", format!("vCPU {vcpu}: there are {}", self.cores.len()))),
        }
    }

    fn set_state(&mut self, vcpu: usize, state: &VcpuState) -> Result<(), EngineError> {
        let count = self.cores.len();
        let Some(core) = self.cores.get_mut(vcpu) else {
            return Err(EngineError::new("state", format!("vCPU {vcpu}: there are {count}")));
        };
        core.restore(state)
    }

    fn irq_sink(&self) -> Arc<dyn IrqSink> {
        self.shared.apics.clone()
    }

    fn connect_pic(&mut self, line: Arc<IntrLine>, acknowledge: IntrAcknowledge) -> Result<(), EngineError> {
        if self.shared.apics.connect_pic(line, acknowledge) {
            return Ok(());
        }
        Err(EngineError::new("host", "this machine has 8259 interrupt controllers already"))
    }
}

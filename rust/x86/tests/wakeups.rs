//! A halted machine sleeps, and every interrupt, stop request and timer wakes it: no wake-up is lost.

mod common;

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use common::*;
use vcpu::{Bus, Clock, Control, Device, Engine, Space, Stop};
use x86::{EngineConfig, SoftwareEngine, msr};

const VECTOR: u8 = 0x61;
const TIMER: u8 = 0x62;

/// A port that counts writes and wakes who waits for them.
#[derive(Default)]
struct Counter {
    count: Mutex<u64>,
    changed: Condvar,
}
impl Device for Counter {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, _: u64, _: &[u8]) {
        *self.count.lock().unwrap() += 1;
        self.changed.notify_all();
    }
}
impl Counter {
    fn wait_for(&self, n: u64) {
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut count = self.count.lock().unwrap();
        while *count < n {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "interrupt {n} never came: {} did", *count);
            count = self.changed.wait_timeout(count, left).unwrap().0;
        }
    }
}

struct Sleeper {
    engine: SoftwareEngine,
    control: Arc<Control>,
    interrupts: Arc<Counter>,
    timers: Arc<Counter>,
}

/// vCPUs that do nothing but halt; their routines write port 0x80 (interrupt) or 0x81 (timer) and end the interrupt.
fn sleeper(vcpus: usize) -> Sleeper {
    let mut m = machine(vcpus);
    m.write(0x5000, &[0xfb, 0xf4, 0xeb, 0xfc]); // sti; hlt; jmp -2
    // out imm8, al; mov ecx, 0x80b; xor eax, eax; cdq; wrmsr; iretq
    m.write(0x6000, &[0xe6, 0x80, 0xb9, 0x0b, 0x08, 0, 0, 0x31, 0xc0, 0x99, 0x0f, 0x30, 0x48, 0xcf]);
    // The timer's: the same, then the next deadline at once (1): mov ecx, 0x6e0; inc eax; wrmsr before the EOI.
    m.write(
        0x6100,
        &[
            0xe6, 0x81, 0xb9, 0xe0, 0x06, 0, 0, 0x31, 0xc0, 0x99, 0xff, 0xc0, 0x0f, 0x30, 0xb9, 0x0b, 0x08, 0, 0, 0x31, 0xc0,
            0x0f, 0x30, 0x48, 0xcf,
        ],
    );
    let mut states = Vec::new();
    for n in 0..vcpus {
        m.long_mode(n, 0);
        m.gate64(VECTOR, CODE64, 0x6000, 0x8e, 0);
        m.gate64(TIMER, CODE64, 0x6100, 0x8e, 0);
        let c = &mut m.cores[n];
        c.cpu.gpr[4] = STACK1 + 0x400 * n as u64;
        c.write_msr(msr::APIC_BASE, c.lapic.base | 0x400).unwrap();
        c.write_msr(0x80f, 0x1ff).unwrap();
        states.push(c.save());
    }
    let bus = Arc::new(Bus::default());
    let (interrupts, timers) = (Arc::new(Counter::default()), Arc::new(Counter::default()));
    bus.insert(Space::Pio, 0x80, 1, interrupts.clone()).unwrap();
    bus.insert(Space::Pio, 0x81, 1, timers.clone()).unwrap();
    let control = Arc::new(Control::default());
    let mut engine = SoftwareEngine::new(
        EngineConfig {
            memory: m.shared.memory.clone(),
            bus,
            clock: Arc::new(Clock::from_state(m.shared.clock.state(), 0)),
            control: control.clone(),
            vcpus,
            phys_bits: 46,
            eoi: None,
            switches: Default::default(),
        },
        x86::Tier::default(),
    )
    .unwrap();
    for (n, state) in states.iter().enumerate() {
        engine.set_state(n, state).unwrap();
    }
    Sleeper { engine, control, interrupts, timers }
}

#[test]
fn every_message_wakes_its_vcpu() {
    let Sleeper { mut engine, control, interrupts, .. } = sleeper(3);
    let sink = engine.irq_sink();
    let runner = std::thread::spawn(move || {
        let stop = engine.run();
        (engine, stop)
    });
    for n in 0..5_000u64 {
        sink.msi(0xfee0_0000 | (n % 3) << 12, VECTOR.into());
        interrupts.wait_for(n + 1);
    }
    control.request_stop(Stop::Paused);
    let (mut engine, stop) = runner.join().unwrap();
    assert!(matches!(stop, Stop::Paused));
    // Nothing was taken twice or left behind, and all of them sleep again or are about to.
    assert_eq!(*interrupts.count.lock().unwrap(), 5_000);
    for n in 0..3 {
        assert_eq!(engine.state(n).unwrap().lapic.irr, [0; 8]);
    }
}

#[test]
fn stop_requests_end_the_sleep() {
    let Sleeper { mut engine, control, .. } = sleeper(1);
    for _ in 0..500 {
        let asking = control.clone();
        let asker = std::thread::spawn(move || asking.request_stop(Stop::Paused));
        assert!(matches!(engine.run(), Stop::Paused));
        asker.join().unwrap();
    }
}

#[test]
fn timers_end_the_sleep() {
    let Sleeper { mut engine, control, timers, .. } = sleeper(1);
    let core = engine.core(0);
    core.write_msr(0x832, 0x4_0000 | u64::from(TIMER)).unwrap();
    let soon = core.tsc() + 2_000_000;
    core.write_msr(msr::TSC_DEADLINE, soon).unwrap();
    let runner = std::thread::spawn(move || engine.run());
    timers.wait_for(1_000);
    control.request_stop(Stop::Paused);
    assert!(matches!(runner.join().unwrap(), Stop::Paused));
}

#[test]
fn an_idle_machine_uses_no_host_cpu() {
    fn used() -> Duration {
        // SAFETY: `rusage` is plain data that the call fills in.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is to a live local.
        unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) };
        let time = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
        time(usage.ru_utime) + time(usage.ru_stime)
    }
    let Sleeper { mut engine, control, timers, .. } = sleeper(4);
    // One timer far enough away that a machine that polls would burn what is measured here.
    let core = engine.core(0);
    core.write_msr(0x832, 0x4_0000 | u64::from(TIMER)).unwrap();
    let later = core.tsc() + KHZ * 500;
    core.write_msr(msr::TSC_DEADLINE, later).unwrap();
    let runner = std::thread::spawn(move || {
        let before = used();
        engine.run();
        used() - before
    });
    timers.wait_for(1);
    control.request_stop(Stop::Paused);
    let cost = runner.join().unwrap();
    assert!(cost < Duration::from_millis(50), "{cost:?} of host CPU for half a second of nothing");
}

//! Time as a count of instructions: a run is the same each time, to the bit, however it is stopped on the way.

mod common;

use std::sync::{Arc, Mutex};

use common::*;
use memory::GuestMemory;
use vcpu::{Bus, Clock, ClockState, Control, Device, Engine, EngineConfig, IrqSink, Space, Stop, VcpuState};
use x86::{SoftwareEngine, Tier, msr};

const TIMER: u8 = 0x62;
const IPI: u8 = 0x63;
const DEVICE: u8 = 0x64;
const FAR_AWAY: u64 = 3_000_000;

/// A device whose registers are the machine's time: reads give it, writes note it and send an interrupt to some vCPU.
struct TimePort {
    clock: Arc<Clock>,
    notes: Mutex<Vec<(u64, u64)>>,
    sink: Mutex<Option<Arc<dyn IrqSink>>>,
    vcpus: u64,
}
impl Device for TimePort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let time = (self.clock.state().boot_ns + offset).to_le_bytes();
        data.copy_from_slice(&time[..data.len()]);
    }
    fn write(&self, offset: u64, _: &[u8]) {
        let now = self.clock.tsc();
        self.notes.lock().unwrap().push((offset, now));
        if let Some(sink) = &*self.sink.lock().unwrap() {
            sink.msi(0xfee0_0000 | (now % self.vcpus) << 12, DEVICE.into());
        }
    }
}

struct Guest {
    engine: SoftwareEngine,
    memory: Arc<GuestMemory>,
    clock: Arc<Clock>,
    control: Arc<Control>,
    port: Arc<TimePort>,
}

/// What there is to compare of a run.
#[derive(PartialEq, Debug)]
struct Seen {
    stop: String,
    clock: ClockState,
    instructions: Vec<u64>,
    states: Vec<VcpuState>,
    memory: Vec<u8>,
    notes: Vec<(u64, u64)>,
}

impl Guest {
    /// vCPUs that read the time in every way, talk to a device on ports and in memory, send each other interrupts, spin, sleep until
    /// their timers and patch their own code. All of it lands in memory.
    fn new(vcpus: usize, tier: Tier) -> Self {
        let mut m = machine(vcpus);
        m.write(0x5000, &assembled());
        for (vector, at) in [(TIMER, 0x6000), (IPI, 0x6100), (DEVICE, 0x6100)] {
            m.gate64(vector, CODE64, at, 0x8e, 0);
        }
        m.write(0x6000, &timer_routine());
        m.write(0x6100, &[0x50, 0x51, 0x52, 0xb9, 0x0b, 0x08, 0, 0, 0x31, 0xc0, 0x99, 0x0f, 0x30, 0x5a, 0x59, 0x58, 0x48, 0xcf]);
        let mut states = Vec::new();
        for n in 0..vcpus {
            m.long_mode(n, 0);
            for (vector, at) in [(TIMER, 0x6000), (IPI, 0x6100), (DEVICE, 0x6100)] {
                m.gate64(vector, CODE64, at, 0x8e, 0);
            }
            let c = &mut m.cores[n];
            c.cpu.gpr[4] = 0x2_0000 + 0x1000 * n as u64; // rsp
            c.cpu.gpr[7] = 0x8_0000 + 0x1_0000 * n as u64; // rdi: where it writes
            c.cpu.gpr[15] = 1 + n as u64;
            c.cpu.flags |= 0x200;
            c.write_msr(msr::APIC_BASE, c.lapic.base | 0x400).unwrap();
            c.write_msr(0x80f, 0x1ff).unwrap();
            c.write_msr(0x832, 0x4_0000 | u64::from(TIMER)).unwrap();
            let soon = c.tsc() + 100_000 * (n as u64 + 1);
            c.write_msr(msr::TSC_DEADLINE, soon).unwrap();
            states.push(c.save());
        }
        let clock = Arc::new(Clock::counted(m.shared.clock.state()));
        let port =
            Arc::new(TimePort { clock: clock.clone(), notes: Mutex::default(), sink: Mutex::default(), vcpus: vcpus as u64 });
        let bus = Arc::new(Bus::default());
        bus.insert(Space::Pio, 0x80, 8, port.clone()).unwrap();
        bus.insert(Space::Mmio, 0x100_0000, 0x1000, port.clone()).unwrap();
        let control = Arc::new(Control::default());
        let mut engine = SoftwareEngine::new(
            EngineConfig {
                memory: m.shared.memory.clone(),
                bus,
                clock: clock.clone(),
                control: control.clone(),
                vcpus,
                phys_bits: 46,
                eoi: None,
                switches: Default::default(),
            },
            tier,
        )
        .unwrap();
        for (n, state) in states.iter().enumerate() {
            engine.set_state(n, state).unwrap();
        }
        *port.sink.lock().unwrap() = Some(engine.irq_sink());
        Self { engine, memory: m.shared.memory.clone(), clock, control, port }
    }

    fn run_to(&mut self, count: u64) -> Stop {
        self.clock.count().unwrap().set_limit(count);
        self.engine.run()
    }

    fn seen(&mut self, stop: &Stop) -> Seen {
        let mut memory = vec![0; 0x40_0000];
        self.memory.read(0, &mut memory).unwrap();
        let vcpus = self.engine.vcpus();
        Seen {
            stop: format!("{stop:?}"),
            clock: self.clock.state(),
            instructions: (0..vcpus).map(|n| self.engine.instructions(n)).collect(),
            states: (0..vcpus).map(|n| self.engine.state(n).unwrap()).collect(),
            memory,
            notes: std::mem::take(&mut *self.port.notes.lock().unwrap()),
        }
    }
}

/// The vCPUs' program at 0x5000. `rdi`: a page of its own; `r15`: a number of its own.
fn assembled() -> Vec<u8> {
    let mut code: Vec<u8> = Vec::new();
    // some work: mov ecx, 37; l: imul r15, r15, 0x5851f42d; add r15, rcx; loop l
    code.extend([0xb9, 37, 0, 0, 0, 0x4d, 0x69, 0xff, 0x2d, 0xf4, 0x51, 0x58, 0x49, 0x01, 0xcf, 0xe2, 0xf4]);
    // mov rax, r15; shr rax, 29; xor r15, rax
    code.extend([0x4c, 0x89, 0xf8, 0x48, 0xc1, 0xe8, 29, 0x49, 0x31, 0xc7]);
    // rdtsc; mov [rdi], eax; nop; rdtscp; mov [rdi+8], eax
    code.extend([0x0f, 0x31, 0x89, 0x07, 0x90, 0x0f, 0x01, 0xf9, 0x89, 0x47, 0x08]);
    // in eax, 0x80; add [rdi+16], eax
    code.extend([0xe5, 0x80, 0x01, 0x47, 0x10]);
    // mov ebx, 0x1000008; xor [rdi+24], ... : mov rax, [rbx]; xor [rdi+24], rax
    code.extend([0xbb, 0x08, 0, 0, 0x01, 0x48, 0x8b, 0x03, 0x48, 0x31, 0x47, 0x18]);
    // add dword [rbx], 3 (a device is read and written); mov dx, 0x84; out dx, eax
    code.extend([0x83, 0x03, 0x03, 0x66, 0xba, 0x84, 0, 0xef]);
    // mov ecx, 0x6e0; rdmsr; add [rdi+32], eax
    code.extend([0xb9, 0xe0, 0x06, 0, 0, 0x0f, 0x32, 0x01, 0x47, 0x20]);
    // test r15b, 7; jnz +...: an interrupt to the others (all excluding self): mov ecx, 0x830; xor edx, edx; mov eax, 0xc0063; wrmsr
    code.extend([0x41, 0xf6, 0xc7, 0x07, 0x75, 0x0e, 0xb9, 0x30, 0x08, 0, 0, 0x31, 0xd2, 0xb8, 0x63, 0, 0x0c, 0, 0x0f, 0x30]);
    // test r15b, 0x18; jnz +2; pause
    code.extend([0x41, 0xf6, 0xc7, 0x18, 0x75, 0x02, 0xf3, 0x90]);
    // test r15w, 0x3e0; jnz +1; hlt
    code.extend([0x66, 0x41, 0xf7, 0xc7, 0xe0, 0x03, 0x75, 0x01, 0xf4]);
    // rep stosd of some (in and out of what is plain): push rdi; lea rdi, [rdi+0xff0]; mov ecx, 20; rep stosd; pop rdi
    code.extend([0x57, 0x48, 0x8d, 0xbf, 0xf0, 0x0f, 0, 0, 0xb9, 20, 0, 0, 0, 0xf3, 0xab, 0x5f]);
    // push rsi; push rdi; mov esi, 0x1000010; lea rdi, [rdi+0x40]; mov ecx, 5; rep movsd (out of the device); pop rdi; pop rsi
    code.extend([0x56, 0x57, 0xbe, 0x10, 0, 0, 0x01, 0x48, 0x8d, 0x7f, 0x40, 0xb9, 5, 0, 0, 0, 0xf3, 0xa5, 0x5f, 0x5e]);
    // push rsi; lea rsi, [rdi]; mov edx, 0x84; mov ecx, 3; rep outsd; pop rsi
    code.extend([0x56, 0x48, 0x8d, 0x37, 0xba, 0x84, 0, 0, 0, 0xb9, 3, 0, 0, 0, 0xf3, 0x6f, 0x5e]);
    // patches the count of the first loop: mov al, r15b; and al, 31; inc al; mov [0x5001], al
    code.extend([0x44, 0x88, 0xf8, 0x24, 31, 0xfe, 0xc0, 0x88, 0x04, 0x25, 0x01, 0x50, 0, 0]);
    // jmp to the start
    let back = -(code.len() as i32 + 5);
    code.push(0xe9);
    code.extend(back.to_le_bytes());
    code
}

/// Counts, sets the next deadline some way off, ends the interrupt.
fn timer_routine() -> Vec<u8> {
    let mut code = vec![0x50, 0x51, 0x52, 0xff, 0x47, 0x30]; // push rax, rcx, rdx; inc dword [rdi+0x30]
    code.extend([0x0f, 0x31, 0x05]); // rdtsc; add eax, FAR_AWAY / 8
    code.extend((FAR_AWAY as u32 / 8).to_le_bytes());
    code.extend([0x83, 0xd2, 0, 0xb9, 0xe0, 0x06, 0, 0, 0x0f, 0x30]); // adc edx, 0; mov ecx, 0x6e0; wrmsr
    code.extend([0xb9, 0x0b, 0x08, 0, 0, 0x31, 0xc0, 0x99, 0x0f, 0x30, 0x5a, 0x59, 0x58, 0x48, 0xcf]); // EOI; iretq
    code
}

fn differ(a: &Seen, b: &Seen) -> String {
    let at = a.memory.iter().zip(&b.memory).position(|(x, y)| x != y);
    let state = a.states.iter().zip(&b.states).position(|(x, y)| x != y);
    format!(
        "{} {}; clock {:?} {:?}; instructions {:?} {:?}; state {state:?}; memory {at:x?}; notes {} {}",
        a.stop,
        b.stop,
        a.clock,
        b.clock,
        a.instructions,
        b.instructions,
        a.notes == b.notes,
        a.notes.len()
    )
}

const COUNT: u64 = 3_000_000;

#[test]
fn two_runs_are_the_same_on_every_tier() {
    for vcpus in [1, 3] {
        let mut runs = [Tier::Interpreter, Tier::Translator, Tier::Translator].map(|tier| Guest::new(vcpus, tier));
        let [a, b, c] = runs.each_mut().map(|guest| {
            let stop = guest.run_to(COUNT);
            guest.seen(&stop)
        });
        assert_eq!(a.instructions.iter().sum::<u64>(), COUNT, "{}", a.stop);
        assert!(vcpus > 1 || a.clock.boot_ns > COUNT + 100_000, "nobody ever slept: {:?}", a.clock);
        assert!(a.notes.len() > 1000);
        let timers = a.memory[0x8_0030];
        assert!(timers > 3, "{timers} timer interrupts");
        assert!(a == b, "vcpus {vcpus}: {}", differ(&a, &b));
        assert!(b == c, "vcpus {vcpus}: {}", differ(&b, &c));
    }
}

#[test]
fn where_a_run_was_stopped_does_not_show() {
    for (vcpus, tier) in [(1, Tier::Interpreter), (3, Tier::Interpreter), (1, Tier::Translator), (3, Tier::Translator)] {
        let mut whole = Guest::new(vcpus, tier);
        let stop = whole.run_to(COUNT / 10);
        let whole = whole.seen(&stop);
        for seed in 1..6u64 {
            let mut cut = Guest::new(vcpus, tier);
            let (mut at, mut random) = (0, seed);
            let mut stop = Stop::Paused;
            while at < COUNT / 10 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(seed);
                let step = 1 + (random >> 40) % [20, 50, 700, 40_000, 90_000][seed as usize - 1];
                at = (at + step).min(COUNT / 10);
                stop = cut.run_to(at);
                assert_eq!(cut.clock.count().unwrap().retired(), at);
                cut.engine.take_back_write_access();
                for n in 0..vcpus {
                    cut.engine.state(n).unwrap();
                }
            }
            let cut = cut.seen(&stop);
            assert!(whole == cut, "{vcpus} vCPUs, {tier:?}, steps {seed}: {}", differ(&whole, &cut));
        }
    }
}

#[test]
fn who_sleeps_for_ever_ends_the_run_and_input_wakes_it() {
    let mut guest = Guest::new(1, Tier::Interpreter);
    guest.memory.write(0x5000, &[0xfa, 0xf4, 0xeb, 0xfd]).unwrap(); // cli; hlt; jmp hlt
    assert!(matches!(guest.run_to(1000), Stop::Paused));
    let count = guest.clock.count().unwrap();
    // The timer's interrupt waits, masked: only an NMI would come through.
    assert_eq!(count.retired(), 2);
    guest.engine.irq_sink().msi(0xfee0_0000, 0x400);
    guest.gate_nmi();
    assert!(matches!(guest.run_to(1000), Stop::Paused));
    assert!(guest.clock.count().unwrap().retired() > 2);
}

impl Guest {
    fn gate_nmi(&self) {
        let at = IDT + 2 * 16;
        let low = 0x6200 & 0xffff | u64::from(CODE64) << 16 | 0x8e << 40;
        self.memory.write(at, &low.to_le_bytes()).unwrap();
        self.memory.write(at + 8, &[0; 8]).unwrap();
        self.memory.write(0x6200, &[0x90, 0x48, 0xcf]).unwrap(); // nop; iretq
    }
}

#[test]
fn a_stop_request_ends_it_before_its_limit() {
    let mut guest = Guest::new(2, Tier::default());
    guest.control.request_stop(Stop::Paused);
    assert!(matches!(guest.run_to(1_000_000_000), Stop::Paused));
    assert_eq!(guest.clock.count().unwrap().retired(), 0);
}

#[test]
fn exceptions_without_end_do_not_stop_time() {
    let mut guest = Guest::new(1, Tier::default());
    // Every instruction of the #UD routine is #UD, on a stack that begins anew each time: not one instruction is ever completed.
    guest.memory.write(0x5000, &[0x0f, 0x0b]).unwrap();
    let at = IDT + 6 * 16;
    let low = 0x5000u64 | u64::from(CODE64) << 16 | 1 << 32 | 0x8e << 40;
    guest.memory.write(at, &low.to_le_bytes()).unwrap();
    guest.memory.write(at + 8, &[0; 8]).unwrap();
    let (control, clock) = (guest.control.clone(), guest.clock.clone());
    let watcher = std::thread::spawn(move || {
        while clock.count().unwrap().idle_ns() < 100_000 {
            std::thread::yield_now();
        }
        control.request_stop(Stop::Paused);
    });
    assert!(matches!(guest.run_to(1000), Stop::Paused));
    watcher.join().unwrap();
    assert_eq!(guest.clock.count().unwrap().retired(), 0);
}

//! Guests that execute and write anything: whatever they do, the engine comes back, and what it comes back with can be saved.

mod common;

use std::sync::Arc;

use common::*;
use memory::{GuestMemory, RegionLayout};
use vcpu::ioapic::{IOAPIC_BASE, IOAPIC_SIZE};
use vcpu::{Bus, Control, Engine, Ioapic, IoapicState, Space, Stop, VcpuState};
use x86::{EngineConfig, SoftwareEngine};

const SIZE: usize = 0x40_0000;

struct Random(u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 8) % n
    }
    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

/// Openings of instructions that random bytes seldom form: system, far, string, port and MSR ones.
const OPENINGS: &[&[u8]] = &[
    &[0x0f, 0x22], // mov cr
    &[0x0f, 0x20],
    &[0x0f, 0x23], // mov dr
    &[0x0f, 0x00],
    &[0x0f, 0x01],
    &[0x0f, 0x30], // wrmsr
    &[0x0f, 0x32],
    &[0xb9, 0x80, 0x00, 0x00, 0xc0, 0x0f, 0x30],
    &[0xb9, 0x1b, 0x00, 0x00, 0x00, 0x0f, 0x30],
    &[0xb9, 0xe0, 0x06, 0x00, 0x00, 0x0f, 0x30],
    &[0x8e],
    &[0x0f, 0xb2],
    &[0xcf],
    &[0x48, 0xcf],
    &[0xcb],
    &[0xea],
    &[0x9a],
    &[0xff],
    &[0xcd],
    &[0xf3, 0xa4],
    &[0xf2, 0xae],
    &[0xf3, 0x6c],
    &[0x66, 0xf3, 0x6f],
    &[0xe6],
    &[0xed],
    &[0x0f, 0x05],
    &[0x48, 0x0f, 0x07],
    &[0x0f, 0x34],
    &[0x0f, 0x35],
    &[0x9d],
    &[0xfb],
    &[0xf4],
    &[0x0f, 0xae],
    &[0xdd],
    &[0xdb],
    &[0xf0, 0x0f, 0xc7],
    &[0xc8],
    &[0x0f, 0xa2],
    &[0xf3, 0x90],
    &[0x66, 0x0f, 0x38],
    &[0x66, 0x0f, 0x3a],
];

fn start(r: &mut Random) -> (Vec<u8>, Vec<VcpuState>) {
    let mut m = machine(2);
    match r.below(5) {
        0 => {
            let c = &mut m.cores[0];
            c.cpu.rip = 0x5000;
            c.set_segment(1, x86::state::Segment { base: 0, limit: 0xffff, selector: 0, attr: 0x9b });
        }
        1 => m.protected(0, 0),
        2 => m.protected(0, 3),
        3 => m.long_mode(0, 0),
        _ => m.long_mode(0, 3),
    }
    let mut code = Vec::new();
    while code.len() < 0x2000 {
        if r.below(3) == 0 {
            code.extend_from_slice(r.pick(OPENINGS));
        }
        let bytes = r.next().to_le_bytes();
        let n = 1 + r.below(6) as usize;
        code.extend_from_slice(&bytes[..n]);
    }
    m.write(0x5000, &code[..0x2000]);
    for vector in 0..=255u8 {
        let kind = r.pick(&[0x8e, 0xee, 0x8f, 0x85, 0x0e, 0xef]);
        let selector = r.pick(&[CODE64, CODE32, CONFORMING, USER_CODE64, 0]);
        let target = 0x5000 + r.below(0x1800);
        if m.cores[0].cpu.long_mode() {
            m.gate64(vector, selector, target, kind, r.below(2) as u8);
        } else {
            m.gate32(vector, selector, target, kind);
        }
    }
    let c = &mut m.cores[0].cpu;
    for n in 0..16 {
        c.gpr[n] = match r.below(5) {
            0 => r.next(),
            1 => r.below(SIZE as u64),
            2 => 0xfee0_0000 + (r.below(0x100) << 4),
            3 => r.below(0x100),
            _ => IOAPIC_BASE + r.below(2) * 0x10,
        };
    }
    c.gpr[4] = STACK1;
    c.set_rflags(r.next() & 0x0000_7ed7);
    if !c.long_mode() {
        (0..16).for_each(|n| c.gpr[n] &= 0xffff_ffff);
    }
    // Tables at the ends of the address space, breakpoints anywhere.
    let edge = |r: &mut Random| r.pick(&[0, 0x7fff_ffff_fff8, 0xffff_8000_0000_0000, 0xffff_ffff_ffff_fff8, 0xffff_fff0, GDT]);
    match r.below(12) {
        0 => c.gdtr.base = edge(r),
        1 => c.idtr.base = edge(r),
        2 => c.tr.base = edge(r),
        3 => (c.tr.limit, c.tr.attr) = (r.next() as u32 & 0xff, r.pick(&[0x8b, 0x83, 0x8b | 1 << 16])),
        4 => c.gdtr.limit = r.next() as u16,
        5 => {
            for n in 0..4 {
                c.dr[n] = [0x5000 + r.below(0x800), STACK1 - 8, r.next(), u64::MAX, 0x7fff_ffff_ffff][r.below(5) as usize];
            }
            c.dr[7] = r.next() & 0xffff_23ff | 0x400;
        }
        _ => {}
    }
    m.cores[0].lapic_write(0xf0, 4, 0x1ff);
    let mut contents = vec![0; SIZE];
    m.shared.memory.read(0, &mut contents).unwrap();
    (contents, m.cores.iter_mut().map(|c| c.save()).collect())
}

fn engine(contents: &[u8], states: &[VcpuState], ioapic: IoapicState) -> (SoftwareEngine, Arc<GuestMemory>, Arc<Ioapic>) {
    let memory = Arc::new(GuestMemory::new(&[RegionLayout { gpa: 0, size: SIZE as u64 }]).unwrap());
    memory.write(0, contents).unwrap();
    let ioapic = Arc::new(Ioapic::from_state(ioapic).unwrap());
    let bus = Arc::new(Bus::default());
    bus.insert(Space::Mmio, IOAPIC_BASE, IOAPIC_SIZE, ioapic.clone()).unwrap();
    let mut engine = SoftwareEngine::new(
        EngineConfig {
            memory: memory.clone(),
            bus,
            clock: clock(1_000_000),
            control: Arc::new(Control::default()),
            vcpus: states.len(),
            phys_bits: 46,
            eoi: Some(ioapic.clone()),
            switches: Default::default(),
        },
        x86::Tier::default(),
    )
    .unwrap();
    ioapic.connect(Arc::downgrade(&engine.irq_sink()));
    for (n, state) in states.iter().enumerate() {
        engine.set_state(n, state).unwrap_or_else(|e| panic!("{e}"));
    }
    (engine, memory, ioapic)
}

fn one(seed: u64) -> &'static str {
    let mut r = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let (contents, states) = start(&mut r);
    let (mut first, memory, ioapic) = engine(&contents, &states, IoapicState::default());
    let budget = 1 + r.below(3_000);
    let end = match first.run_exactly(budget) {
        Ok(n) if n == budget => "ran",
        Ok(_) => "halted",
        Err(Stop::Reset) => "reset",
        // No RAM under RIP, hardware task switches: refused with words, not with a crash.
        Err(Stop::Failed(e)) if e.code == "unsupported-instruction" && !e.message.contains("lacks the instruction") => "refused",
        Err(other) => panic!("seed {seed}: {other:?}"),
    };
    if end == "ran" || end == "halted" {
        // What a guest did to itself can be saved, restored, and goes on the same way.
        let mut now = vec![0; SIZE];
        memory.read(0, &mut now).unwrap();
        let saved: Vec<VcpuState> = (0..2).map(|n| first.state(n).unwrap()).collect();
        let (mut second, other, _) = engine(&now, &saved, ioapic.state());
        assert_eq!(second.state(0).unwrap(), saved[0], "seed {seed}");
        let more = 1 + r.below(500);
        let (a, b) = (first.run_exactly(more), second.run_exactly(more));
        assert_eq!(format!("{a:?}"), format!("{b:?}"), "seed {seed}");
        // One that only faults for ever is stopped after some number of faults, which is no boundary to compare at.
        let state = first.state(0).unwrap();
        if a.is_ok_and(|n| n == more) || state.mp_state != vcpu::state::MpState::Runnable {
            assert!(state == second.state(0).unwrap(), "seed {seed}: states differ");
            let mut then = vec![0; SIZE];
            memory.read(0, &mut now).unwrap();
            other.read(0, &mut then).unwrap();
            assert!(now == then, "seed {seed}: memory differs");
        }
    }
    end
}

/// `WILD_SEEDS=from-to` runs others.
#[test]
fn anything_goes() {
    let range = std::env::var("WILD_SEEDS").unwrap_or_else(|_| "0-300".into());
    let (from, to) = range.split_once('-').expect("WILD_SEEDS=from-to");
    let mut ends = std::collections::BTreeMap::new();
    for seed in from.parse::<u64>().unwrap()..to.parse().unwrap() {
        *ends.entry(one(seed)).or_insert(0) += 1;
    }
    println!("{ends:?}");
}

//! A flat 64-bit machine without devices: identity-mapped RAM, code as plain bytes, every exception ends in a HLT of its own.
#![allow(dead_code)]

use std::sync::Arc;

use memory::{GuestMemory, RegionLayout};
use vcpu::{Bus, Clock, Control};
use x86::cache::Cache;
use x86::core::{Core, Shared};
use x86::run::RunExit;
use x86::state::{CS, CodeSize, DS, ES, RSP, SS, Segment, Table};

pub const RAM: u64 = 16 << 20;
pub const PML4: u64 = 0x1000;
pub const PDPT: u64 = 0x2000;
pub const PD: u64 = 0x3000;
/// 4 KiB pages of the first 2 MiB.
pub const PT: u64 = 0x4000;
const GDT: u64 = 0x5000;
const IDT: u64 = 0x6000;
const STUBS: u64 = 0x8000;
pub const CODE: u64 = 0x1_0000;
pub const DATA: u64 = 0x2_0000;
pub const STACK: u64 = 0x3_0000;

pub const P: u64 = 1;
pub const W: u64 = 2;
pub const U: u64 = 4;
pub const A: u64 = 1 << 5;
pub const D: u64 = 1 << 6;
pub const PS: u64 = 1 << 7;
pub const G: u64 = 1 << 8;
pub const NX: u64 = 1 << 63;

pub struct Machine {
    pub core: Core,
    pub cache: Cache,
    pub memory: Arc<GuestMemory>,
}

/// An exception that the code ran into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caught {
    pub vector: u8,
    pub error: u32,
    pub rip: u64,
    pub cr2: u64,
}

impl Machine {
    /// `code` at [`CODE`], RSP at [`STACK`], everything mapped writable for supervisor and user.
    pub fn new(code: &[u8]) -> Self {
        Self::changed(code, &[])
    }

    /// As [`Machine::new`], with changes of the CPU profile.
    pub fn changed(code: &[u8], changes: &[&str]) -> Self {
        let memory = Arc::new(GuestMemory::new(&[RegionLayout { gpa: 0, size: RAM }]).unwrap());
        let w = |at: u64, v: u64| memory.write(at, &v.to_le_bytes()).unwrap();
        w(PML4, PDPT | P | W | U);
        w(PDPT, PD | P | W | U);
        w(PD, PT | P | W | U);
        for n in 1..8 {
            w(PD + 8 * n, n << 21 | P | W | U | PS);
        }
        for n in 0..512 {
            w(PT + 8 * n, n << 12 | P | W | U);
        }
        w(GDT + 8, 0x00af_9b00_0000_ffff);
        w(GDT + 16, 0x00cf_9300_0000_ffff);
        for n in 0..32u64 {
            let at = STUBS + 16 * n;
            w(IDT + 16 * n, at & 0xffff | 8 << 16 | 0x8e00 << 32 | at >> 16 << 48);
            memory.write(at, &[0xf4]).unwrap();
        }
        memory.write(CODE, code).unwrap();
        let clock = Arc::new(Clock::new(1_000_000, 0));
        let shared = Shared::new(memory.clone(), Arc::new(Bus::default()), clock, Arc::new(Control::default()), 1, 40, None);
        let switches = vcpu::profile::Switches::changed(changes).unwrap();
        let mut core = Core::new(Arc::new(Shared { switches, ..shared }), 0);
        let cpu = &mut core.cpu;
        cpu.cr0 = 0x8001_0031;
        cpu.cr3 = PML4;
        cpu.cr4 = 0xa0;
        cpu.efer = 0xd01;
        cpu.code_size = CodeSize::Bits64;
        cpu.cpl = 0;
        cpu.seg[CS] = Segment { base: 0, limit: u32::MAX, selector: 8, attr: 0xa09b };
        for s in [DS, ES, SS] {
            cpu.seg[s] = Segment { base: 0, limit: u32::MAX, selector: 16, attr: 0xc093 };
        }
        cpu.gdtr = Table { base: GDT, limit: 23 };
        cpu.idtr = Table { base: IDT, limit: 511 };
        cpu.rip = CODE;
        cpu.gpr[RSP] = STACK;
        cpu.set_rflags(2);
        core.flush_tlb_all();
        core.refresh();
        let mut cache = Cache::new();
        // The whole suite is run on both tiers.
        if std::env::var("FREEZEFRAME_TIER").is_ok_and(|tier| tier == "translator") {
            cache.translate_after(0).expect("this host does not let us translate");
        }
        Self { core, cache, memory }
    }

    /// With the translator: blocks are translated at their first execution.
    pub fn translating(code: &[u8]) -> Self {
        let mut machine = Self::new(code);
        machine.cache.translate_after(0).expect("this host does not let us translate");
        machine
    }

    pub fn gpr(&mut self, r: usize) -> &mut u64 {
        &mut self.core.cpu.gpr[r]
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write(at, bytes).unwrap();
    }

    pub fn read(&self, at: u64) -> u64 {
        let mut b = [0; 8];
        self.memory.read(at, &mut b).unwrap();
        u64::from_le_bytes(b)
    }

    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0; len];
        self.memory.read(at, &mut b).unwrap();
        b
    }

    /// Replaces a page table entry, as a guest without INVLPG would.
    pub fn entry(&self, at: u64, v: u64) {
        self.write(at, &v.to_le_bytes());
    }

    /// Exactly `n` instructions.
    pub fn steps(&mut self, n: u64) {
        let before = self.core.cpu.icount;
        match self.core.run(&mut self.cache, n) {
            RunExit::Budget => {}
            other => panic!("{other:?} after {}", self.core.cpu.icount - before),
        }
        assert_eq!(self.core.cpu.icount - before, n, "exactly the budget");
    }

    /// Until HLT. `None`: the code's own; else the exception whose stub it was.
    pub fn run(&mut self) -> Option<Caught> {
        match self.core.run(&mut self.cache, 100_000_000) {
            RunExit::Halted => {}
            other => panic!("{other:?} at {:#x}", self.core.cpu.rip),
        }
        let stub = (self.core.cpu.rip - 1).wrapping_sub(STUBS);
        if stub >= 512 {
            return None;
        }
        let vector = (stub / 16) as u8;
        let coded = matches!(vector, 8 | 10..=14 | 17);
        let sp = self.core.cpu.gpr[RSP];
        let error = if coded { self.read(sp) as u32 } else { 0 };
        let rip = self.read(sp + if coded { 8 } else { 0 });
        Some(Caught { vector, error, rip, cr2: if vector == 14 { self.core.cpu.cr2 } else { 0 } })
    }

    /// Makes a halted machine go on at `rip`.
    pub fn restart(&mut self, rip: u64) {
        self.core.cpu.activity = x86::state::Activity::Running;
        self.core.cpu.rip = rip;
    }
}

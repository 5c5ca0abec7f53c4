//! A small machine: RAM, descriptor tables, page tables, vCPUs in the mode that a test wants.
#![allow(dead_code)]

use std::sync::{Arc, Mutex};

use memory::{GuestMemory, RegionLayout};
use vcpu::{Bus, Clock, ClockState, Control, EoiListener};
use x86::core::{Core, Exception, Pending, Shared};
use x86::insn::Fault;
use x86::state::{CS, CodeSize, DS, ES, FS, GS, SS, Segment, Table};

pub const KHZ: u64 = 2_000_000;
pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x3000;
pub const TABLES: u64 = 0x10000;
pub const STACK0: u64 = 0x8000;
pub const STACK1: u64 = 0x9000;
pub const IST1: u64 = 0xa000;

/// Selectors of the GDT below.
pub const CODE64: u16 = 0x08;
pub const DATA0: u16 = 0x10;
pub const CODE32: u16 = 0x18;
pub const USER_DATA: u16 = 0x20 | 3;
pub const USER_CODE64: u16 = 0x28 | 3;
pub const USER_CODE32: u16 = 0x30 | 3;
pub const TASK: u16 = 0x38;
pub const ABSENT: u16 = 0x48;
pub const CONFORMING: u16 = 0x50;
pub const READ_ONLY: u16 = 0x58;
pub const EXECUTE_ONLY: u16 = 0x60;
pub const GDT_LEN: u16 = 0x68;

#[derive(Default)]
pub struct Eois(pub Mutex<Vec<u8>>);
impl EoiListener for Eois {
    fn eoi(&self, vector: u8) {
        self.0.lock().unwrap().push(vector);
    }
}

pub struct Machine {
    pub shared: Arc<Shared>,
    pub cores: Vec<Core>,
    pub eois: Arc<Eois>,
}

/// A clock that stands still at `tsc`.
pub fn clock(tsc: u64) -> Arc<Clock> {
    let state = ClockState { tsc_khz: KHZ, tsc, boot_ns: 1_000, wall_ns: 1_700_000_000_000_000_000, host_wall_ns: 0 };
    Arc::new(Clock::from_state(state, 0))
}

pub fn machine(vcpus: usize) -> Machine {
    machine_at(vcpus, 1_000_000)
}

pub fn machine_at(vcpus: usize, tsc: u64) -> Machine {
    let memory = Arc::new(GuestMemory::new(&[RegionLayout { gpa: 0, size: 0x40_0000 }]).unwrap());
    let eois = Arc::new(Eois::default());
    let shared = Arc::new(Shared::new(
        memory,
        Arc::new(Bus::default()),
        clock(tsc),
        Arc::new(Control::default()),
        vcpus,
        46,
        Some(eois.clone()),
    ));
    let cores = (0..vcpus).map(|n| Core::new(shared.clone(), n)).collect();
    Machine { shared, cores, eois }
}

impl Machine {
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.shared.memory.write(gpa, bytes).unwrap();
    }
    pub fn write64(&self, gpa: u64, value: u64) {
        self.write(gpa, &value.to_le_bytes());
    }
    pub fn read64(&self, gpa: u64) -> u64 {
        let mut b = [0; 8];
        self.shared.memory.read(gpa, &mut b).unwrap();
        u64::from_le_bytes(b)
    }

    fn tables(&self) {
        let entries: [u64; 13] = [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_9b00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x0000_8900_3000_0067,
            0,
            0x00cf_1300_0000_ffff,
            0x00cf_9f00_0000_ffff,
            0x00cf_9100_0000_ffff,
            0x00cf_9900_0000_ffff,
        ];
        for (n, e) in entries.iter().enumerate() {
            self.write64(GDT + 8 * n as u64, *e);
        }
        // 512 x 2 MiB, identity, user-accessible.
        self.write64(TABLES, (TABLES + 0x1000) | 7);
        self.write64(TABLES + 0x1000, (TABLES + 0x2000) | 7);
        for n in 0..512u64 {
            self.write64(TABLES + 0x2000 + 8 * n, n << 21 | 0xe7);
        }
    }

    /// vCPU `n` in 64-bit code at CPL 0 or 3, paging on, interrupts off.
    pub fn long_mode(&mut self, n: usize, cpl: u8) {
        self.tables();
        self.write64(TSS + 4, STACK0);
        self.write64(TSS + 0x24, IST1);
        let (code, data) = if cpl == 0 { (CODE64, DATA0) } else { (USER_CODE64, USER_DATA) };
        let dpl = u32::from(cpl) << 5;
        let core = &mut self.cores[n];
        let c = &mut core.cpu;
        c.cr0 = 0x8001_0031;
        c.cr4 = 0x6a0 & !0x400 | 0x400;
        c.cr3 = TABLES;
        c.efer = 0xd01;
        c.cpl = cpl;
        c.gdtr = Table { base: GDT, limit: GDT_LEN - 1 };
        c.idtr = Table { base: IDT, limit: 0xfff };
        c.tr = Segment { base: TSS, limit: 0x67, selector: TASK, attr: 0x8b };
        c.ldtr = Segment { attr: Segment::UNUSABLE, ..Segment::default() };
        let flat = |selector, attr| Segment { base: 0, limit: u32::MAX, selector, attr };
        core.set_segment(CS, flat(code, 0xa09b | dpl));
        for seg in [SS, DS, ES, FS, GS] {
            core.set_segment(seg, flat(data, 0xc093 | dpl));
        }
        core.cpu.gpr[4] = STACK1;
        core.cpu.rip = 0x5000;
        core.cpu.activity = x86::state::Activity::Running;
        assert_eq!(core.cpu.code_size, CodeSize::Bits64);
        core.flush_tlb_all();
        core.refresh();
    }

    /// vCPU `n` in flat 32-bit code, no paging.
    pub fn protected(&mut self, n: usize, cpl: u8) {
        self.long_mode(n, cpl);
        self.write64(TSS + 4, STACK0 | u64::from(DATA0) << 32);
        let core = &mut self.cores[n];
        core.cpu.cr0 = 0x11;
        core.cpu.cr4 = 0;
        core.cpu.efer = 0;
        let (selector, attr) = if cpl == 0 { (CODE32, 0xc09b) } else { (USER_CODE32, 0xc0fb) };
        core.set_segment(CS, Segment { base: 0, limit: u32::MAX, selector, attr });
        core.flush_tlb_all();
        core.refresh();
    }

    /// A 64-bit gate.
    pub fn gate64(&self, vector: u8, selector: u16, target: u64, attr: u8, ist: u8) {
        let at = IDT + u64::from(vector) * 16;
        let low = target & 0xffff
            | u64::from(selector) << 16
            | u64::from(ist) << 32
            | u64::from(attr) << 40
            | (target >> 16 & 0xffff) << 48;
        self.write64(at, low);
        self.write64(at + 8, target >> 32);
    }

    /// A 32-bit gate.
    pub fn gate32(&self, vector: u8, selector: u16, target: u64, attr: u8) {
        let at = IDT + u64::from(vector) * 8;
        self.write64(at, target & 0xffff | u64::from(selector) << 16 | u64::from(attr) << 40 | (target >> 16 & 0xffff) << 48);
    }
}

/// The exception that a failed call left behind.
pub fn fault(core: &mut Core, result: Result<impl std::fmt::Debug, Fault>) -> (u8, Option<u32>) {
    result.expect_err("a fault was expected");
    match core.fault.take() {
        Some(Pending::Exception(e)) => (e.vector, e.error),
        other => panic!("not an exception: {other:?}"),
    }
}

pub fn exception(vector: u8, error: Option<u32>) -> Exception {
    Exception { vector, error, cr2: 0 }
}

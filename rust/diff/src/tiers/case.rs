//! A case is a function of (seed, number): program, state, turns, and what is done to the machine from outside on the way.

use iced_x86::{Formatter, IntelFormatter};
use x86::core::Core;
use x86::state::Cpu;

use super::machine::{Early, Side, Slices};
use super::program::{Author, Item, Pools};
use super::routines::{self, FIRST_INTERRUPT};
use super::stale;
use super::tables::{self, Change};
use super::world::{self, CODE, Focus, Frame};
use crate::forms;
use crate::rng::Rng;

/// Some instructions of one vCPU; then both are compared, and then something comes from outside.
#[derive(Debug, Clone)]
pub struct Turn {
    pub vcpu: usize,
    pub length: u64,
    /// Done to memory as a device would.
    pub writes: Vec<(u64, Vec<u8>)>,
    /// Posted to a vCPU: vectors, 2 for an NMI.
    pub interrupts: Vec<(usize, u8)>,
}

impl Turn {
    pub fn quiet(length: u64) -> Self {
        Self { vcpu: 0, length, writes: Vec::new(), interrupts: Vec::new() }
    }
}

#[derive(Clone)]
pub struct Case {
    pub number: u64,
    pub frame: Frame,
    pub ram: Vec<u8>,
    pub cpus: Vec<Cpu>,
    pub items: Vec<Item>,
    pub turns: Vec<Turn>,
    pub changes: Vec<Change>,
    /// The device sends interrupts.
    pub interrupts: bool,
    /// Time is the count of instructions.
    pub counted: bool,
    pub slices: [Slices; 2],
    /// Executions after which a block is translated.
    pub threshold: u8,
    pub rng: Rng,
}

/// Both tiers.
pub struct Pair {
    pub interpreter: Side,
    pub translator: Side,
    /// An interpreter to look again at a case that differs.
    replay: Side,
    ram: [Vec<u8>; 2],
    /// Cases that ended before all their instructions, and those of them without a comparison.
    pub early: u64,
    pub storms: u64,
    /// Cases that differ and may: see [`stale`].
    pub stale: u64,
    /// Sums of [`routines::tally`], of cases with a comparison at the end.
    pub tally: [u64; 5],
}

impl Case {
    pub fn new(seed: u64, number: u64, pools: &Pools) -> Self {
        let mut rng = Rng::new(seed, number);
        let rng = &mut rng;
        let frame = Frame::any(rng);
        let mut ram = world::memory(rng, frame);
        let length = if rng.chance(80) { 4 + rng.below(60) } else { 4 + rng.below(300) };
        let (items, values) = Author::new(rng, pools, frame).write(length);
        for item in &items {
            place(&mut ram, item.at, &item.bytes);
        }
        let changes = tables::changes(&mut ram, rng);
        let starts: Vec<(u64, u32)> = items.iter().map(|i| (i.at, i.bits)).collect();
        world::set_resume(&mut ram, rng, frame, &starts);
        let cpus = (0..frame.vcpus).map(|n| {
            let mut cpu = world::registers(rng, frame, n);
            for &(r, v) in &values {
                cpu.gpr[r] = v;
            }
            let (at, bits) = if n == 0 { starts[0] } else { rng.pick(&starts) };
            cpu.rip = frame.base + at;
            if bits != 64 {
                world::in_compatibility_mode(&mut cpu, frame, at, bits);
            } else if n == 0 && rng.chance(4) {
                world::from_real_mode(&mut ram, &mut cpu, frame);
            }
            cpu
        });
        let cpus = cpus.collect();
        let turns = turns(rng, frame, &items);
        let slices = [0; 2].map(|_| match rng.below(5) {
            0 => Slices::UpTo(1),
            1 => Slices::UpTo(10),
            2 => Slices::UpTo(100),
            _ => Slices::Whole,
        });
        let threshold = rng.pick(&[0, 0, 1, 16]);
        let interrupts = rng.chance(if frame.focus == Focus::Interrupts { 80 } else { 20 });
        // vCPUs would have to share the count.
        let counted = frame.vcpus == 1 && rng.chance(20);
        Self { number, frame, ram, cpus, items, turns, changes, interrupts, counted, slices, threshold, rng: rng.clone() }
    }

    pub fn listing(&self) -> String {
        let mut text = String::new();
        for item in &self.items {
            let at = item.at as usize;
            let bytes: Vec<u8> = (at..at + item.bytes.len()).map(|a| self.ram[world::physical(a as u64) as usize]).collect();
            if bytes.iter().all(|&b| b == 0x90) {
                continue;
            }
            let text_of = disassemble(&bytes, item.bits, self.frame.base + item.at);
            let bits = if item.bits == 64 { String::new() } else { format!("  ({} bits)", item.bits) };
            text += &format!("  {:#x}: {text_of}{bits}\n", self.frame.base + item.at);
        }
        text
    }
}

pub fn disassemble(bytes: &[u8], bits: u32, at: u64) -> String {
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    let mut text = String::new();
    match forms::decode(bytes, bits, at) {
        Some(form) => IntelFormatter::new().format(&form.insn, &mut text),
        None => text.push('?'),
    }
    format!("{hex:30} {text}")
}

/// Puts bytes where the guest sees them at `at`.
pub fn place(ram: &mut [u8], at: u64, bytes: &[u8]) {
    for (n, &b) in bytes.iter().enumerate() {
        ram[world::physical(at + n as u64) as usize] = b;
    }
}

/// A device's write: mostly to code.
fn outside(rng: &mut Rng, items: &[Item]) -> (u64, Vec<u8>) {
    let near = items[rng.below(items.len() as u64) as usize].at + rng.below(4);
    let at = if rng.chance(60) { near } else { CODE + rng.below(0xc000) };
    let at = world::physical(at);
    let most = if rng.chance(50) { 2 } else { 40 };
    let len = (1 + rng.below(most)).min(world::RAM as u64 - at);
    (at, (0..len).map(|_| rng.bits() as u8).collect())
}

/// Who runs how long, and what happens in between.
fn turns(rng: &mut Rng, frame: Frame, items: &[Item]) -> Vec<Turn> {
    let busy = frame.focus == Focus::Interrupts;
    let (count, most) = match (frame.vcpus, busy) {
        (1, false) => (1 + rng.below(4), if rng.chance(90) { 400 } else { 4000 }),
        (1, true) => (2 + rng.below(12), rng.pick(&[20, 60, 300])),
        _ => (4 + rng.below(30), rng.pick(&[10, 40, 200])),
    };
    (0..count)
        .map(|_| {
            let vcpu = rng.below(frame.vcpus as u64) as usize;
            let length = 1 + rng.below(most);
            let writes = (0..rng.below(3)).map(|_| outside(rng, items)).collect();
            let some = if busy { rng.below(3) } else { u64::from(rng.chance(10)) };
            let interrupts = (0..some).map(|_| (rng.below(frame.vcpus as u64) as usize, vector(rng))).collect();
            Turn { vcpu, length, writes, interrupts }
        })
        .collect()
}

fn vector(rng: &mut Rng) -> u8 {
    if rng.chance(8) { 2 } else { FIRST_INTERRUPT + rng.below(0x100 - u64::from(FIRST_INTERRUPT)) as u8 }
}

impl Pair {
    pub fn new() -> Self {
        let ram = [vec![0; world::RAM], vec![0; world::RAM]];
        Self {
            interpreter: Side::new(),
            translator: Side::new(),
            replay: Side::new(),
            ram,
            early: 0,
            storms: 0,
            stale: 0,
            tally: [0; 5],
        }
    }

    /// Runs the case up to `most` instructions; what differs, and after how many at most.
    pub fn run(&mut self, case: &Case, most: u64) -> Result<(), (u64, String)> {
        self.translator.cache.translate_after(case.threshold).expect("this host does not let us translate");
        let mut rng = case.rng.clone();
        let rngs = [rng.bits(), rng.bits()].map(|seed| Rng::new(seed, 0));
        let [a, b] = rngs;
        let how = (case.interrupts, case.counted);
        self.interpreter.reset(&case.ram, &case.cpus, how, case.slices[0], a);
        self.translator.reset(&case.ram, &case.cpus, how, case.slices[1], b);
        let mut done = 0;
        for (n, turn) in case.turns.iter().enumerate() {
            let length = turn.length.min(most - done);
            done += length;
            let (a, b) = (self.interpreter.run(turn.vcpu, length), self.translator.run(turn.vcpu, length));
            if a == Some(Early::Storm) || b == Some(Early::Storm) {
                self.storms += 1;
                if a == b {
                    return Ok(());
                }
                self.interpreter.ram(&mut self.ram[0]);
                self.translator.ram(&mut self.ram[1]);
                if self.stale(case, done) {
                    self.stale += 1;
                    return Ok(());
                }
                return Err((done, format!("ended by {a:?}, {b:?}")));
            }
            let over = a.as_ref().is_some_and(|a| *a != Early::Halted);
            let last = over || done == most || n + 1 == case.turns.len();
            let mut lines = Vec::new();
            if a != b {
                lines.push(format!("ended by {a:?}, {b:?}"));
            }
            self.compare(turn.vcpu, (last, case.frame.global), &mut lines);
            if !lines.is_empty() && self.stale(case, done) {
                self.stale += 1;
                return Ok(());
            }
            if last && most == u64::MAX {
                // A program may well have written there: no single case counts for much.
                let tally = routines::tally(&self.ram[0]).map(|n| n.min(10_000));
                self.tally.iter_mut().zip(tally).for_each(|(sum, n)| *sum += n);
            }
            if !lines.is_empty() {
                return Err((done, lines.join("\n")));
            }
            if over {
                self.early += 1;
                return Ok(());
            }
            if last {
                break;
            }
            for side in [&self.interpreter, &self.translator] {
                side.outside(turn);
            }
        }
        Ok(())
    }

    /// Whether old translations may be why the tiers differ after `done` instructions.
    fn stale(&mut self, case: &Case, done: u64) -> bool {
        let sides = [&self.interpreter, &self.translator];
        let now = self.ram.iter().zip(sides).any(|(ram, side)| stale::now(case, ram, &side.cores));
        now || stale::ever(case, &mut self.replay, done)
    }

    /// What differs of a vCPU that has just run; memory only when it matters, for it takes longest. `global`: under the second root the
    /// same global pages have entries of their own, which nobody looks at while the TLB has the page from the first.
    fn compare(&mut self, vcpu: usize, (memory, global): (bool, bool), lines: &mut Vec<String>) {
        let (a, b) = (&mut self.interpreter.cores[vcpu], &mut self.translator.cores[vcpu]);
        if !same(a, b) {
            registers(a, b, lines);
        }
        if !memory && lines.is_empty() {
            return;
        }
        self.interpreter.ram(&mut self.ram[0]);
        self.translator.ram(&mut self.ram[1]);
        let [a, b] = &self.ram;
        if a != b {
            let by_chance = |n: usize| global && tables::accessed_or_dirty(n, a[n] ^ b[n]);
            let differing: Vec<usize> = (0..world::RAM).filter(|&n| a[n] != b[n] && !by_chance(n)).collect();
            for &n in differing.iter().take(8) {
                lines.push(format!("memory {n:#x}: {:02x}, {:02x}", a[n], b[n]));
            }
            if !differing.is_empty() {
                lines.push(format!("memory: {} bytes differ", differing.len()));
            }
        }
        let (a, b) = (self.interpreter.device(), self.translator.device());
        if a != b {
            lines.push("the device saw other accesses".into());
        }
    }
}

impl Default for Pair {
    fn default() -> Self {
        Self::new()
    }
}

fn same(a: &Core, b: &Core) -> bool {
    let (x, y) = (&a.cpu, &b.cpu);
    x.gpr[..16] == y.gpr[..16]
        && x.rip == y.rip
        && x.rflags() == y.rflags()
        && x.seg == y.seg
        && (x.ldtr, x.tr, x.gdtr, x.idtr) == (y.ldtr, y.tr, y.gdtr, y.idtr)
        && (x.cr0, x.cr2, x.cr3, x.cr4, x.efer) == (y.cr0, y.cr2, y.cr3, y.cr4, y.efer)
        && x.dr == y.dr
        && x.msr == y.msr
        && x.xmm == y.xmm
        && x.mxcsr == y.mxcsr
        && x.fpu == y.fpu
        && (x.cpl, x.code_size, x.activity, x.shadow) == (y.cpl, y.code_size, y.activity, y.shadow)
        && (x.nmi_masked, x.nmi_pending, x.icount) == (y.nmi_masked, y.nmi_pending, y.icount)
        && a.tsc_adjust == b.tsc_adjust
        && a.hwcr == b.hwcr
        && a.breakpoints.hit == b.breakpoints.hit
        && (a.lapic.irr, a.lapic.isr, a.lapic.tpr, a.lapic.esr) == (b.lapic.irr, b.lapic.isr, b.lapic.tpr, b.lapic.esr)
}

/// Names of what differs.
fn registers(a: &mut Core, b: &mut Core, lines: &mut Vec<String>) {
    if a.cpu.icount != b.cpu.icount {
        lines.push(format!("instructions: {}, {}", a.cpu.icount, b.cpu.icount));
    }
    if a.breakpoints.hit != b.breakpoints.hit {
        lines.push(format!("breakpoints hit: {}, {}", a.breakpoints.hit, b.breakpoints.hit));
    }
    let (a, b) = (format!("{:#x?}", a.save()), format!("{:#x?}", b.save()));
    let differing = a.lines().zip(b.lines()).filter(|(a, b)| a != b);
    lines.extend(differing.take(40).map(|(a, b)| format!("{}  |  {}", a.trim(), b.trim())));
}

//! A case is a function of (seed, number): program, state, turns, and what is done to the machine from outside on the way.

use iced_x86::{Formatter, IntelFormatter};
use x86::core::Core;
use x86::state::Cpu;

use super::machine::{Early, Side, Slices};
use super::program::{Author, Item, Pools};
use super::world::{self, CODE, Frame};
use crate::forms;
use crate::rng::Rng;

/// A point where both are compared, and then `writes` done to memory as a device would.
#[derive(Debug, Clone)]
pub struct Stop {
    pub count: u64,
    pub writes: Vec<(u64, Vec<u8>)>,
}

#[derive(Clone)]
pub struct Case {
    pub number: u64,
    pub frame: Frame,
    pub ram: Vec<u8>,
    pub cpu: Cpu,
    pub items: Vec<Item>,
    pub stops: Vec<Stop>,
    pub slices: [Slices; 2],
    /// Executions after which a block is translated.
    pub threshold: u8,
    pub rng: Rng,
}

/// Both tiers.
pub struct Pair {
    pub interpreter: Side,
    pub translator: Side,
    ram: [Vec<u8>; 2],
    /// Cases that ended before all their instructions, and those of them without a comparison.
    pub early: u64,
    pub storms: u64,
    /// Cases that differ after the guest has changed its page tables: how long an old translation lives is nobody's promise.
    pub stale: u64,
}

impl Case {
    pub fn new(seed: u64, number: u64, pools: &Pools) -> Self {
        let mut rng = Rng::new(seed, number);
        let rng = &mut rng;
        let cpl = if rng.chance(50) { 3 } else { 0 };
        let base = rng.pick(&[0, 0, 0xffff_8000_0000_0000, 0xffff_ffff_8000_0000]);
        let frame = Frame { cpl, base };
        let mut ram = world::memory(rng, frame);
        let mut cpu = world::registers(rng, frame);
        let length = if rng.chance(80) { 4 + rng.below(60) } else { 4 + rng.below(300) };
        let (items, values) = Author::new(rng, pools, frame).write(length);
        for (r, v) in values {
            cpu.gpr[r] = v;
        }
        for item in &items {
            place(&mut ram, item.at, &item.bytes);
        }
        let starts: Vec<u64> = items.iter().map(|i| i.at + base).collect();
        world::set_resume(&mut ram, rng, &starts);
        cpu.rip = base + items.first().map_or(CODE, |i| i.at);
        let mut count = 0;
        let stops = (0..1 + rng.below(4))
            .map(|_| {
                count += 1 + rng.below(if rng.clone().chance(90) { 400 } else { 4000 });
                let writes = (0..rng.below(3)).map(|_| outside(rng, &items)).collect();
                Stop { count, writes }
            })
            .collect();
        let slices = [0; 2].map(|_| match rng.below(5) {
            0 => Slices::UpTo(1),
            1 => Slices::UpTo(10),
            2 => Slices::UpTo(100),
            _ => Slices::Whole,
        });
        let threshold = rng.pick(&[0, 0, 1, 16]);
        Self { number, frame, ram, cpu, items, stops, slices, threshold, rng: rng.clone() }
    }

    pub fn listing(&self) -> String {
        let mut text = String::new();
        for item in &self.items {
            let at = item.at as usize;
            let bytes: Vec<u8> = (at..at + item.bytes.len()).map(|a| self.ram[world::physical(a as u64) as usize]).collect();
            if bytes.iter().all(|&b| b == 0x90) {
                continue;
            }
            text += &format!("  {:#x}: {}\n", self.frame.base + item.at, disassemble(&bytes, self.frame.base + item.at));
        }
        text
    }
}

pub fn disassemble(bytes: &[u8], at: u64) -> String {
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    let mut text = String::new();
    match forms::decode(bytes, 64, at) {
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

impl Pair {
    pub fn new() -> Self {
        let ram = [vec![0; world::RAM], vec![0; world::RAM]];
        Self { interpreter: Side::new(), translator: Side::new(), ram, early: 0, storms: 0, stale: 0 }
    }

    /// Runs the case up to `most` instructions; what differs, and after how many at most.
    pub fn run(&mut self, case: &Case, most: u64) -> Result<(), (u64, String)> {
        self.translator.cache.translate_after(case.threshold).expect("this host does not let us translate");
        let mut rng = case.rng.clone();
        let rngs = [rng.bits(), rng.bits()].map(|seed| Rng::new(seed, 0));
        let [a, b] = rngs;
        self.interpreter.reset(&case.ram, &case.cpu, case.slices[0], a);
        self.translator.reset(&case.ram, &case.cpu, case.slices[1], b);
        for stop in &case.stops {
            let count = stop.count.min(most);
            let (a, b) = (self.interpreter.run_to(count), self.translator.run_to(count));
            if a == Some(Early::Storm) || b == Some(Early::Storm) {
                self.storms += 1;
                return if a == b { Ok(()) } else { Err((count, format!("ended by {a:?}, {b:?}"))) };
            }
            let mut lines = Vec::new();
            if a != b {
                lines.push(format!("ended by {a:?}, {b:?}"));
            }
            self.compare(&mut lines);
            if !lines.is_empty() && self.ram.iter().any(|ram| world::changed_tables(&case.ram, ram)) {
                self.stale += 1;
                return Ok(());
            }
            if !lines.is_empty() {
                return Err((count, lines.join("\n")));
            }
            if a.is_some() {
                self.early += 1;
                return Ok(());
            }
            if count == most {
                break;
            }
            for (at, bytes) in &stop.writes {
                for side in [&self.interpreter, &self.translator] {
                    side.memory.write(*at, bytes).expect("inside guest memory");
                }
            }
        }
        Ok(())
    }

    fn compare(&mut self, lines: &mut Vec<String>) {
        let (a, b) = (&mut self.interpreter.core, &mut self.translator.core);
        if !same(a, b) {
            registers(a, b, lines);
        }
        self.interpreter.ram(&mut self.ram[0]);
        self.translator.ram(&mut self.ram[1]);
        let [a, b] = &self.ram;
        if a != b {
            let differing: Vec<usize> = (0..world::RAM).filter(|&n| a[n] != b[n]).collect();
            for &n in differing.iter().take(8) {
                lines.push(format!("memory {n:#x}: {:02x}, {:02x}", a[n], b[n]));
            }
            lines.push(format!("memory: {} bytes differ", differing.len()));
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

//! From a case that differs to the instruction that does it.

use super::case::{Case, Pair, disassemble};
use super::world;
use x86::state::CodeSize;

/// Text about the difference: the first instruction after which the tiers differ, how, and what of the program it needs.
pub fn report(pair: &mut Pair, case: &Case, seed: u64) -> String {
    let mut small = case.clone();
    let all = case.turns.iter().map(|t| t.length).sum();
    // Comparing more often changes what runs as one piece: so the count is found with the given stops.
    let mut count = first(pair, &small, all);
    for n in (0..small.items.len()).rev() {
        let before = small.ram.clone();
        let (at, len) = (small.items[n].at, small.items[n].bytes.len());
        super::case::place(&mut small.ram, at, &vec![0x90; len]);
        if pair.run(&small, count).is_err() {
            continue;
        }
        small.ram = before;
    }
    for n in 0..small.turns.len() {
        let kept = std::mem::take(&mut small.turns[n].writes);
        if pair.run(&small, count).is_ok() {
            small.turns[n].writes = kept;
        }
        let kept = std::mem::take(&mut small.turns[n].interrupts);
        if pair.run(&small, count).is_ok() {
            small.turns[n].interrupts = kept;
        }
    }
    count = first(pair, &small, count);
    let differences = match pair.run(&small, count) {
        Err((_, text)) => text,
        Ok(()) => "not again: it depends on what ran before".into(),
    };
    let _ = pair.run(&small, count - 1);
    let mut ram = vec![0; world::RAM];
    pair.interpreter.ram(&mut ram);
    let culprit = &mut pair.interpreter.cores[whose(&small, count)].cpu;
    let (rip, flags, gpr) = (culprit.rip, culprit.rflags(), culprit.gpr);
    let (bits, base) = match culprit.code_size {
        CodeSize::Bits16 => (16, world::CODE.wrapping_neg()),
        CodeSize::Bits32 => (32, 0),
        CodeSize::Bits64 => (64, small.frame.base),
    };
    let offset = rip.wrapping_sub(base);
    let instruction = if offset < world::DATA {
        let bytes: Vec<u8> = (offset..offset + 15).map(|a| ram[world::physical(a) as usize]).collect();
        let len = crate::forms::decode(&bytes, bits, rip).map_or(8, |f| f.bytes.len());
        disassemble(&bytes[..len], bits, rip)
    } else {
        "outside the code".into()
    };
    let registers: String = (0..16).map(|n| format!(" {:x}", gpr[n])).collect();
    format!(
        "seed {seed} case {} differs after {count} instructions (threshold {}, turns {:?}, {:?}), the last at {rip:#x}:\n  {instruction}\nflags {flags:#x}, registers{registers}\ninterpreter | translator:\n{differences}\nprogram (rest: NOP):\n{}turns {:?}\n",
        case.number,
        case.threshold,
        case.slices,
        case.frame,
        small.listing(),
        small.turns
    )
}

/// Which vCPU executes instruction number `count`.
fn whose(case: &Case, count: u64) -> usize {
    let mut done = 0;
    let turn = case.turns.iter().find(|turn| {
        done += turn.length;
        done >= count
    });
    turn.map_or(0, |turn| turn.vcpu)
}

/// The smallest count of instructions with a difference (as far as halving finds it).
fn first(pair: &mut Pair, case: &Case, all: u64) -> u64 {
    let (mut good, mut bad) = (0, all);
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        if pair.run(case, middle).is_err() { bad = middle } else { good = middle }
    }
    bad
}

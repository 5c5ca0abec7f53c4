//! Blocks of a real guest: each executed by both tiers on random states. A corpus is a row of records, little endian: address (u64),
//! how often it was executed (u64), instructions (u32), bytes (u32), a number that does not matter here (u32), then the bytes.

use super::case::{self, Case, Turn};
use super::machine::Slices;
use super::program::{self, Item};
use super::world::{self, CODE, Focus, Frame};
use crate::forms;
use crate::rng::Rng;
use crate::values;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    pub address: u64,
    pub bytes: Vec<u8>,
}

/// The blocks of a corpus; an error says where it ends in the middle of a record.
pub fn read(data: &[u8]) -> Result<Vec<Block>, String> {
    let mut blocks = Vec::new();
    let mut at = 0;
    while at < data.len() {
        let word = |from: usize, len: usize| -> Option<u64> {
            let mut word = [0; 8];
            word[..len].copy_from_slice(data.get(at + from..at + from + len)?);
            Some(u64::from_le_bytes(word))
        };
        let short = || format!("the record at {at} is cut off: is the file unpacked?");
        let (address, len) = word(0, 8).zip(word(20, 4)).ok_or_else(short)?;
        let bytes = data.get(at + 28..at + 28 + len as usize).ok_or_else(short)?;
        blocks.push(Block { address, bytes: bytes.to_vec() });
        at += 28 + len as usize;
    }
    Ok(blocks)
}

/// Try number `number` of a block: it is executed over and over, with registers of which most point somewhere.
pub fn case(seed: u64, number: u64, block: &Block) -> Option<Case> {
    let mut rng = Rng::new(seed, number);
    let rng = &mut rng;
    let kernel = block.address >> 63 != 0;
    let (cpl, base) = if kernel { (0, 0xffff_ffff_8000_0000) } else { (3, 0) };
    let frame = Frame { cpl, base, global: rng.chance(50), focus: Focus::None, vcpus: 1 };
    let mut ram = world::memory(rng, frame);
    let mut cpu = world::registers(rng, frame, 0);
    for g in &mut cpu.gpr[..16] {
        *g = match rng.below(10) {
            0..=6 => program::target(rng, frame, 64),
            7 => rng.below(64),
            _ => values::integer(rng),
        };
    }
    cpu.gpr[4] = world::stack(rng, frame);
    let start = CODE + (block.address & 0xfff);
    let mut items = Vec::new();
    let mut at = 0;
    while at < block.bytes.len() {
        let len = forms::decode(&block.bytes[at..], 64, 0).map_or(block.bytes.len() - at, |f| f.bytes.len());
        items.push(Item::fixed(&block.bytes[at..at + len], start + at as u64));
        at += len;
    }
    // Room for it, and back to its start.
    let back = start + at as u64;
    let jump = [&[0xe9][..], &(start.wrapping_sub(back + 5) as u32).to_le_bytes()].concat();
    items.push(Item::fixed(&jump, back));
    if back + 0x20 > CODE + world::CODE_LEN {
        return None;
    }
    for item in &items {
        case::place(&mut ram, item.at, &item.bytes);
    }
    cpu.rip = start + frame.base;
    world::set_resume(&mut ram, rng, frame, &[(start, 64)]);
    let count = 20 + rng.below(150);
    let turns = vec![Turn::quiet(count), Turn::quiet(count)];
    let slices = [rng.pick(&[Slices::Whole, Slices::UpTo(1), Slices::UpTo(10)]), rng.pick(&[Slices::Whole, Slices::UpTo(30)])];
    let threshold = rng.pick(&[0, 0, 2]);
    let changes = Vec::new();
    Some(Case {
        number,
        frame,
        ram,
        cpus: vec![cpu],
        items,
        turns,
        changes,
        interrupts: false,
        counted: false,
        slices,
        threshold,
        rng: rng.clone(),
    })
}

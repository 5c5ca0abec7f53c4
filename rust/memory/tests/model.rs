//! Random histories of writing, saving and restoring, against a plain array of bytes.

use std::fs::File;

use memory::{GuestMemory, PAGE_SIZE, RegionLayout, Source, hash};

/// xorshift64*: the same histories every time.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

const BASE: u64 = 0x20_0000;

struct Machine {
    memory: GuestMemory,
    model: Vec<u8>,
    chunk: u64,
}

impl Machine {
    fn new(pages: u64, chunk: u64) -> Self {
        let size = pages * PAGE_SIZE;
        let memory = GuestMemory::new(&[RegionLayout { gpa: BASE, size }]).unwrap();
        Self { memory, model: vec![0; size as usize], chunk }
    }

    /// A range anywhere, mostly short, sometimes long; now and then at the very end.
    fn range(&self, dice: &mut Dice) -> (u64, usize) {
        let size = self.model.len() as u64;
        let at = if dice.below(8) == 0 { size - 1 } else { dice.below(size) };
        let bound = [1, 16, PAGE_SIZE, 3 * PAGE_SIZE, 200 * 1024][dice.below(5) as usize];
        (at, (dice.below(bound) + 1).min(size - at) as usize)
    }

    fn write(&mut self, dice: &mut Dice) {
        let (at, len) = self.range(dice);
        let byte = if dice.below(3) == 0 { 0 } else { dice.next() as u8 };
        let data: Vec<u8> = (0..len).map(|i| if byte == 0 { 0 } else { byte.wrapping_add((i / 512) as u8) }).collect();
        if dice.below(2) == 0 {
            self.memory.write(BASE + at, &data).unwrap();
        } else {
            let host = self.memory.host_range(BASE + at, len as u64).unwrap();
            // SAFETY: `host_range` gave `len` bytes of guest memory, and nobody else uses it.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), host.as_ptr(), len) };
            self.memory.written(BASE + at, len as u64);
        }
        self.model[at as usize..at as usize + len].copy_from_slice(&data);
    }

    fn read(&self, dice: &mut Dice) {
        let (at, len) = self.range(dice);
        let mut data = vec![0xa5; len];
        self.memory.read(BASE + at, &mut data).unwrap();
        assert!(data == self.model[at as usize..at as usize + len], "{len} bytes at {at:#x}");
    }

    /// Saves and comes back from the image, lazily or not.
    fn reincarnate(&mut self, dice: &mut Dice) {
        let file = tempfile::tempfile().unwrap();
        let image = self.memory.write_region_in(0, &file, 1 + dice.below(3) as usize, self.chunk).unwrap();
        self.check(&file, &image);
        let source = Source { file, name: "image".into(), chunk: image.chunk, digests: image.digests };
        let layout = self.memory.regions()[0].layout();
        self.memory = GuestMemory::restore(vec![(layout, source)]).unwrap();
        if dice.below(4) == 0 {
            self.memory.load_all(2).unwrap();
        }
    }

    /// The image against its definition: bytes, digests, no digest of a zero chunk, nothing stored of a zero page.
    fn check(&self, file: &File, image: &memory::RegionImage) {
        use std::os::unix::fs::FileExt;
        assert_eq!(image.chunk, self.chunk);
        let mut bytes = vec![0; self.model.len()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == self.model);
        for (number, chunk) in self.model.chunks(self.chunk as usize).enumerate() {
            let zero = chunk.iter().all(|byte| *byte == 0);
            assert_eq!(image.digests.get(number as u64).copied(), (!zero).then(|| hash(chunk)), "chunk {number}");
        }
        let filled = self.model.chunks(PAGE_SIZE as usize).filter(|page| page.iter().any(|byte| *byte != 0)).count();
        assert_eq!(image.stats.written_pages, filled as u64);
        assert!(image.stats.touched_pages <= self.model.len() as u64 / PAGE_SIZE);
    }
}

#[test]
fn histories() {
    for seed in 1..=20u64 {
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15 ^ seed);
        let pages = 1 + dice.below(300);
        let chunk = [4096, 16384, 65536, 65536, 65536, 1 << 21][dice.below(6) as usize];
        let mut machine = Machine::new(pages, chunk);
        for _ in 0..40 {
            match dice.below(10) {
                0..5 => machine.write(&mut dice),
                5..8 => machine.read(&mut dice),
                _ => machine.reincarnate(&mut dice),
            }
        }
        machine.reincarnate(&mut dice);
        let mut all = vec![0; machine.model.len()];
        machine.memory.read(BASE, &mut all).unwrap();
        assert!(all == machine.model, "seed {seed}");
    }
}

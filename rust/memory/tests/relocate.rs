//! Moving a program that lies in guest memory.

use memory::{GuestMemory, MemoryError, RegionLayout};

const LINK: u64 = 0xffff_ffff_8100_0000;
const AT: u64 = 0x20_0000;
const SIZE: u64 = 0x1000;

fn machine() -> GuestMemory {
    GuestMemory::new(&[RegionLayout { gpa: 0, size: 4 << 20 }]).unwrap()
}

fn table(offsets: &[u64]) -> Vec<u8> {
    offsets.iter().flat_map(|&offset| ((LINK.wrapping_add(offset)) as u32).to_le_bytes()).collect()
}

fn words(memory: &GuestMemory, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    memory.read(AT + offset, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

#[test]
fn listed_words_move_and_nothing_else_does() {
    let memory = machine();
    memory.write(AT, &[0xff; SIZE as usize]).unwrap();
    memory.relocate(AT, SIZE, LINK, &table(&[3, 0xff8]), 8, 0x20_0000).unwrap();
    memory.relocate(AT, SIZE, LINK, &table(&[0x101, 0xfe0]), 4, -1).unwrap();
    assert_eq!(words(&memory, 3), 0x1f_ffff);
    assert_eq!(words(&memory, 0xff8), 0x1f_ffff);
    assert_eq!(words(&memory, 0x101), 0xffff_ffff_ffff_fffe);
    assert_eq!(words(&memory, 0xfe0), 0xffff_ffff_ffff_fffe);
    assert_eq!(words(&memory, 11), u64::MAX);
}

#[test]
fn a_word_that_is_not_inside_is_refused_before_anything_moves() {
    let memory = machine();
    for (wild, width) in [(SIZE - 3, 4), (SIZE - 7, 8), (SIZE, 4), (u64::MAX, 4), (0x7000_0000, 8)] {
        let refused = memory.relocate(AT, SIZE, LINK, &table(&[0, wild]), width, 1);
        assert!(matches!(refused, Err(MemoryError::Layout(_))), "{wild:#x}");
        assert_eq!(words(&memory, 0), 0);
    }
    assert!(matches!(memory.relocate(4 << 20, SIZE, LINK, &[], 4, 1), Err(MemoryError::NotRam { .. })));
    assert!(matches!(memory.relocate(AT, 4 << 20, LINK, &[], 4, 1), Err(MemoryError::NotRam { .. })));
}

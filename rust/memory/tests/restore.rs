//! Images written and read back: eager, lazy, second generation, damaged.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use memory::{CHUNK_SIZE, DigestTable, GuestMemory, MemoryError, PAGE_SIZE, RegionImage, RegionLayout, Source};

const SIZE: u64 = 8 << 20;
const LAYOUT: RegionLayout = RegionLayout { gpa: 0x10_0000, size: SIZE };

fn base(chunk: u64) -> u64 {
    LAYOUT.gpa + chunk * CHUNK_SIZE
}

/// Chunk 0 dense, chunk 3 one page, chunk 5 touched but zero, chunk 7 last page, chunk 127 (the last) first byte.
fn sample() -> GuestMemory {
    let memory = GuestMemory::new(&[LAYOUT]).unwrap();
    let dense: Vec<u8> = (0..CHUNK_SIZE).map(|i| (i * 7 % 251) as u8 + 1).collect();
    memory.write(base(0), &dense).unwrap();
    memory.write(base(3) + 5 * PAGE_SIZE + 17, b"three").unwrap();
    memory.write(base(5), &[0; 9000]).unwrap();
    memory.write(base(8) - 1, &[9]).unwrap();
    memory.write(base(127), &[1]).unwrap();
    memory
}

fn contents(memory: &GuestMemory) -> Vec<u8> {
    let mut all = vec![0; SIZE as usize];
    memory.read(LAYOUT.gpa, &mut all).unwrap();
    all
}

fn save(memory: &GuestMemory) -> (File, RegionImage) {
    let file = tempfile::tempfile().unwrap();
    let image = memory.write_region(0, &file, 2).unwrap();
    (file, image)
}

fn source(file: &File, digests: &DigestTable) -> Source {
    Source { file: file.try_clone().unwrap(), name: "memory-region-0".into(), chunk: CHUNK_SIZE, digests: digests.clone() }
}

fn restored(file: &File, digests: &DigestTable) -> GuestMemory {
    GuestMemory::restore(vec![(LAYOUT, source(file, digests))]).unwrap()
}

#[test]
fn an_image_is_sparse_and_complete() {
    let (file, image) = save(&sample());
    let meta = file.metadata().unwrap();
    assert_eq!(meta.len(), SIZE);
    assert_eq!(image.stats.written_pages, 16 + 1 + 1 + 1);
    assert_eq!(image.digests.iter_stored().collect::<Vec<_>>(), [0, 3, 7, 127]);
    assert!(meta.blocks() * 512 <= image.stats.written_pages * PAGE_SIZE + 64 * 1024, "{} blocks", meta.blocks());
    assert_eq!(image.stats.carried_chunks, 0);
    let mut bytes = vec![0; SIZE as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, contents(&sample()));
}

#[test]
fn an_image_comes_back_lazily_and_eagerly() {
    let memory = sample();
    let (file, image) = save(&memory);
    let lazy = restored(&file, &image.digests);
    assert_eq!(lazy.regions()[0].source_stats().unwrap().loaded, 0);
    let mut five = [0; 5];
    lazy.read(base(3) + 5 * PAGE_SIZE + 17, &mut five).unwrap();
    assert_eq!(&five, b"three");
    let stats = lazy.regions()[0].source_stats().unwrap();
    assert_eq!((stats.stored, stats.loaded), (4, 1));
    assert_eq!(contents(&lazy), contents(&memory));

    let mut eager = restored(&file, &image.digests);
    eager.load_all(2).unwrap();
    assert_eq!(eager.regions()[0].source_stats(), None);
    file.set_len(0).unwrap();
    assert_eq!(contents(&eager), contents(&memory));
}

#[test]
fn every_way_in_loads_the_chunk() {
    let (file, image) = save(&sample());
    let fresh = || restored(&file, &image.digests);
    let byte = |p: std::ptr::NonNull<u8>| {
        // SAFETY: a pointer into the guest memory that the caller still holds.
        unsafe { p.as_ptr().read() }
    };
    let memory = fresh();
    assert_eq!(byte(memory.host_page(base(0)).unwrap().unwrap()), 1);
    let memory = fresh();
    assert_eq!(byte(memory.host_range(base(127), 1).unwrap()), 1);
    let memory = fresh();
    memory.host_range(LAYOUT.gpa, SIZE).unwrap();
    assert_eq!(memory.regions()[0].source_stats().unwrap().loaded, 4);
    let memory = fresh();
    memory.write(base(7), b"x").unwrap();
    let mut last = [0];
    memory.read(base(8) - 1, &mut last).unwrap();
    assert_eq!(last, [9], "a write must not lose the rest of the chunk");
    assert!(matches!(memory.host_range(LAYOUT.gpa + SIZE - 1, 2), Err(MemoryError::NotRam { .. })));
    assert!(matches!(memory.host_range(LAYOUT.gpa, u64::MAX), Err(MemoryError::NotRam { .. })));
    assert!(memory.host_page(0).unwrap().is_none());
}

#[test]
fn holes_are_zero_whatever_the_file_has() {
    let (file, image) = save(&sample());
    file.write_all_at(b"garbage in a hole", 9 * CHUNK_SIZE).unwrap();
    let memory = restored(&file, &image.digests);
    let mut bytes = [1; 17];
    memory.read(base(9), &mut bytes).unwrap();
    assert_eq!(bytes, [0; 17]);
}

#[test]
fn a_flipped_bit_is_found_and_stays_found() {
    let (file, image) = save(&sample());
    let at = 3 * CHUNK_SIZE + 6 * PAGE_SIZE + 1;
    file.write_all_at(&[4], at).unwrap();
    let memory = restored(&file, &image.digests);
    let mut byte = [0];
    for _ in 0..2 {
        let error = memory.read(base(3), &mut byte).unwrap_err();
        assert!(matches!(&error, MemoryError::Damaged { file, chunk: 3, .. } if file == "memory-region-0"), "{error}");
        assert_eq!(byte, [0]);
        assert!(memory.write(base(3), &[1]).is_err() && memory.host_page(base(3)).is_err());
    }
    file.write_all_at(&[0], at).unwrap();
    assert!(memory.host_page(base(3)).is_err(), "repaired too late");
    let out = tempfile::tempfile().unwrap();
    assert!(matches!(memory.write_region(0, &out, 2), Err(MemoryError::Damaged { chunk: 3, .. })), "no snapshot over it");
    file.write_all_at(&[4], at).unwrap();
    let mut eager = restored(&file, &image.digests);
    assert!(matches!(eager.load_all(2), Err(MemoryError::Damaged { chunk: 3, .. })));
    memory.read(base(0), &mut byte).unwrap();
}

#[test]
fn a_short_file_is_found() {
    let (file, image) = save(&sample());
    file.set_len(SIZE - 1).unwrap();
    let memory = restored(&file, &image.digests);
    let error = memory.host_page(base(127)).unwrap_err();
    assert!(matches!(&error, MemoryError::Damaged { chunk: 127, why, .. } if why.contains("ends")), "{error}");
}

#[test]
fn a_second_generation_carries_what_nobody_touched() {
    let (file, image) = save(&sample());
    let memory = restored(&file, &image.digests);
    memory.write(base(3), b"changed").unwrap();
    memory.write(base(50), b"new").unwrap();
    let (second, again) = save(&memory);
    assert_eq!(again.stats.carried_chunks, 3);
    assert_eq!(memory.regions()[0].source_stats().unwrap().loaded, 1, "writing must not install chunks");
    for chunk in [0, 7, 127] {
        assert_eq!(again.digests.get(chunk), image.digests.get(chunk));
    }
    assert_ne!(again.digests.get(3), image.digests.get(3));
    let wanted = contents(&memory);
    drop((file, memory));
    assert_eq!(contents(&restored(&second, &again.digests)), wanted);
    let (third, same) = save(&restored(&second, &again.digests));
    assert_eq!(same.digests, again.digests);
    assert_eq!(same.stats.carried_chunks, 5);
    assert_eq!(contents(&restored(&third, &same.digests)), wanted);
}

#[test]
fn a_second_generation_does_not_launder_damage() {
    let (file, image) = save(&sample());
    file.write_all_at(&[0xee], 7 * CHUNK_SIZE).unwrap();
    let memory = restored(&file, &image.digests);
    let out = tempfile::tempfile().unwrap();
    assert!(matches!(memory.write_region(0, &out, 2), Err(MemoryError::Damaged { chunk: 7, .. })));
}

#[test]
fn a_chunk_that_became_zero_has_no_digest() {
    let (file, image) = save(&sample());
    let memory = restored(&file, &image.digests);
    memory.write(base(0), &vec![0; CHUNK_SIZE as usize]).unwrap();
    let (_, again) = save(&memory);
    assert_eq!(again.digests.get(0), None);
}

#[test]
fn many_threads_load_each_chunk_once() {
    let memory = GuestMemory::new(&[LAYOUT]).unwrap();
    memory.write(LAYOUT.gpa, &vec![3; SIZE as usize]).unwrap();
    let (file, image) = save(&memory);
    let lazy = restored(&file, &image.digests);
    std::thread::scope(|scope| {
        for t in 0..4 {
            let lazy = &lazy;
            scope.spawn(move || {
                for i in 0..128u64 {
                    let mut byte = [0];
                    lazy.read(base((i * 37 + t * 11) % 128) + 4095, &mut byte).unwrap();
                    assert_eq!(byte, [3]);
                }
            });
        }
    });
    assert_eq!(lazy.regions()[0].source_stats().unwrap().loaded, 128);
}

#[test]
fn a_region_that_is_no_multiple_of_a_chunk_has_a_short_last_one() {
    let layout = RegionLayout { gpa: 0, size: CHUNK_SIZE + PAGE_SIZE };
    let memory = GuestMemory::new(&[layout]).unwrap();
    memory.write(CHUNK_SIZE + 100, b"end").unwrap();
    let (file, image) = save(&memory);
    assert_eq!(image.digests.chunks(), 2);
    let lazy = GuestMemory::restore(vec![(layout, source(&file, &image.digests))]).unwrap();
    let mut end = [0; 3];
    lazy.read(CHUNK_SIZE + 100, &mut end).unwrap();
    assert_eq!(&end, b"end");
}

#[test]
fn absurd_sources_are_refused() {
    let (file, image) = save(&sample());
    for chunk in [0, 1, 4095, 4096 * 3, 4 << 20, u64::MAX] {
        let source = Source { chunk, ..source(&file, &image.digests) };
        assert!(matches!(GuestMemory::restore(vec![(LAYOUT, source)]), Err(MemoryError::Layout(_))), "{chunk}");
    }
    let wrong = RegionLayout { size: SIZE * 2, ..LAYOUT };
    assert!(matches!(GuestMemory::restore(vec![(wrong, source(&file, &image.digests))]), Err(MemoryError::Layout(_))));
}

#[test]
fn more_than_there_can_be_is_an_error() {
    // Address space for the RAM may be had, memory for its flags not; either way nobody aborts.
    for shift in [44, 46, 52, 62] {
        match GuestMemory::new(&[RegionLayout { gpa: 0, size: 1 << shift }]) {
            Ok(memory) => memory.write((1 << shift) - 1, &[1]).unwrap(),
            Err(MemoryError::Host { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn ranges_outside_ram_change_nothing() {
    let memory =
        GuestMemory::new(&[RegionLayout { gpa: 0, size: PAGE_SIZE }, RegionLayout { gpa: PAGE_SIZE, size: PAGE_SIZE }]).unwrap();
    memory.write(PAGE_SIZE - 2, b"four").unwrap();
    let mut four = [0; 4];
    memory.read(PAGE_SIZE - 2, &mut four).unwrap();
    assert_eq!(&four, b"four", "touching regions are one run of addresses");
    assert!(memory.write(2 * PAGE_SIZE - 1, b"xx").is_err());
    let mut last = [7];
    memory.read(2 * PAGE_SIZE - 1, &mut last).unwrap();
    assert_eq!(last, [0], "nothing of a refused write arrives");
    assert!(memory.read(u64::MAX, &mut four).is_err());
    assert!(memory.read(u64::MAX - 1, &mut []).is_ok());
    memory.written(u64::MAX - 3, u64::MAX);
    memory.set_code(0, true);
    memory.written(0, u64::MAX);
    assert_eq!(memory.take_code_writes(), [(0, PAGE_SIZE)]);
    assert!(!memory.code_write_pending());
}

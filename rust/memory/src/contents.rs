//! What guest memory holds, as digests that follow it while it changes.

use crate::digests::{Digest, hash};
use crate::source::is_zero;
use crate::{CHUNK_SIZE, GuestMemory, MemoryError, PAGE_SIZE};

/// BLAKE3 of each chunk of a machine's RAM; `None` for all zero.
///
/// Guarantees: equal contents give equal digests, however they came about and whether or not they have been taken from a snapshot yet.
pub struct Contents {
    regions: Vec<Chunks>,
}

struct Chunks {
    size: u64,
    digests: Vec<Option<Digest>>,
}

impl Contents {
    /// Of memory that nobody writes to meanwhile. What is still only in a snapshot counts with the digest that it has there.
    pub fn new(memory: &GuestMemory) -> Result<Self, MemoryError> {
        let regions = memory.regions().iter().enumerate().map(|(index, region)| {
            let size = region.loader().map_or(CHUNK_SIZE, |loader| loader.source().chunk);
            let count = region.layout().size.div_ceil(size);
            memory.take_changed(index, size);
            let mut buffer = vec![0; size as usize];
            let mut chunks = Chunks { size, digests: Vec::with_capacity(count as usize) };
            for chunk in 0..count {
                let source = region.loader().filter(|loader| !loader.is_present(chunk));
                chunks.digests.push(match source {
                    Some(loader) => loader.source().digests.get(chunk).copied(),
                    None => digest(memory, index, size, chunk, &mut buffer)?,
                });
            }
            Ok(chunks)
        });
        Ok(Self { regions: regions.collect::<Result<_, _>>()? })
    }

    /// Follows what was written since. As for [`GuestMemory::take_changed`], the engine must have taken back write access.
    pub fn update(&mut self, memory: &GuestMemory) -> Result<(), MemoryError> {
        for (index, chunks) in self.regions.iter_mut().enumerate() {
            let mut buffer = vec![0; chunks.size as usize];
            for chunk in memory.take_changed(index, chunks.size) {
                chunks.digests[chunk as usize] = digest(memory, index, chunks.size, chunk, &mut buffer)?;
            }
        }
        Ok(())
    }

    /// One digest of everything.
    pub fn root(&self) -> Digest {
        let mut all = blake3::Hasher::new();
        for chunks in &self.regions {
            all.update(&chunks.size.to_le_bytes());
            all.update(&(chunks.digests.len() as u64).to_le_bytes());
            for (chunk, digest) in chunks.digests.iter().enumerate() {
                if let Some(digest) = digest {
                    all.update(&(chunk as u64).to_le_bytes());
                    all.update(digest);
                }
            }
        }
        *all.finalize().as_bytes()
    }

    /// Where two memories of one shape differ: (region, offset in it, bytes) of each chunk, ascending; at most `most`.
    pub fn differences(&self, other: &Self, most: usize) -> Vec<(usize, u64, u64)> {
        let pairs = self.regions.iter().zip(&other.regions).enumerate();
        pairs
            .flat_map(|(index, (a, b))| {
                let differ = a.digests.iter().zip(&b.digests).enumerate().filter(|(_, (x, y))| x != y);
                differ.map(move |(chunk, _)| (index, chunk as u64 * a.size, a.size))
            })
            .take(most)
            .collect()
    }
}

fn digest(memory: &GuestMemory, index: usize, size: u64, chunk: u64, buffer: &mut [u8]) -> Result<Option<Digest>, MemoryError> {
    let layout = memory.regions()[index].layout();
    let len = (layout.size - chunk * size).min(size) as usize;
    let bytes = &mut buffer[..len];
    memory.read(layout.gpa + chunk * size, bytes)?;
    // By pages, as the chunk's table in a snapshot says what is zero.
    Ok(if bytes.chunks(PAGE_SIZE as usize).all(is_zero) { None } else { Some(hash(bytes)) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RegionLayout;

    fn memory() -> GuestMemory {
        GuestMemory::new(&[RegionLayout { gpa: 0, size: 1 << 20 }, RegionLayout { gpa: 1 << 32, size: 0x5000 }]).unwrap()
    }

    #[test]
    fn they_follow_what_is_written_and_say_where_two_differ() {
        let (a, b) = (memory(), memory());
        a.write(0x1_2345, b"before").unwrap();
        let (mut of_a, mut of_b) = (Contents::new(&a).unwrap(), Contents::new(&b).unwrap());
        assert_ne!(of_a.root(), of_b.root());
        assert_eq!(of_a.differences(&of_b, 9), [(0, 0x1_0000, 0x1_0000)]);
        b.write(0x1_2345, b"before").unwrap();
        a.write((1 << 32) + 0x4fff, &[1]).unwrap();
        b.write((1 << 32) + 0x4fff, &[2]).unwrap();
        of_a.update(&a).unwrap();
        of_b.update(&b).unwrap();
        assert_eq!(of_a.differences(&of_b, 9), [(1, 0, 0x1_0000)]);
        b.write((1 << 32) + 0x4fff, &[1]).unwrap();
        of_b.update(&b).unwrap();
        assert_eq!(of_a.root(), of_b.root());
        // What was written and put back, or cleared, is what it was.
        a.write(0x1_2345, &[0; 6]).unwrap();
        of_a.update(&a).unwrap();
        assert_ne!(of_a.root(), of_b.root());
        a.write(0x1_2345, b"before").unwrap();
        of_a.update(&a).unwrap();
        assert_eq!(of_a.root(), of_b.root());
        assert_eq!(Contents::new(&a).unwrap().root(), of_b.root());
    }

    #[test]
    fn each_change_is_taken_once() {
        let memory = memory();
        memory.write(0xfffe, &[1; 4]).unwrap();
        memory.mark_dirty(0x8_0000);
        assert_eq!(memory.take_changed(0, 0x1_0000), [0, 1, 8]);
        assert!(memory.take_changed(0, 0x1_0000).is_empty());
        assert!(memory.take_changed(7, 0x1_0000).is_empty());
    }
}

//! Which chunks of a region hold anything, and the BLAKE3 of each that does.

use crate::MemoryError;

/// BLAKE3 of a chunk.
pub type Digest = [u8; 32];

/// BLAKE3 of `bytes`.
pub fn hash(bytes: &[u8]) -> Digest {
    *blake3::hash(bytes).as_bytes()
}

/// Digests of a region's chunks in order; a chunk without one is all zero by definition.
///
/// Kept packed (a bitmap, a running count for each of its words, the digests in order), so that the table of a
/// large and mostly empty region costs a bit per chunk and not 32 bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DigestTable {
    chunks: u64,
    present: Vec<u64>,
    /// Digests before each word of `present`.
    before: Vec<u32>,
    digests: Vec<Digest>,
}

impl DigestTable {
    /// From what a snapshot says: bit `i % 8` of `present[i / 8]` is set when chunk `i` has a digest, and
    /// `digests` are those, 32 bytes each, in order. Untrusted input.
    pub fn from_packed(chunks: u64, present: &[u8], digests: &[u8]) -> Result<Self, MemoryError> {
        let wrong = |what: String| Err(MemoryError::Layout(what));
        if present.len() as u64 != chunks.div_ceil(8) {
            return wrong(format!("the map of {chunks} chunks has {} bytes, not {}", present.len(), chunks.div_ceil(8)));
        }
        if chunks % 8 != 0 && present.last().is_some_and(|last| last >> (chunks % 8) != 0) {
            return wrong(format!("the map of {chunks} chunks names a chunk that is not there"));
        }
        let words: Vec<u64> = present
            .chunks(8)
            .map(|bytes| {
                let mut word = [0; 8];
                word[..bytes.len()].copy_from_slice(bytes);
                u64::from_le_bytes(word)
            })
            .collect();
        let count: u64 = words.iter().map(|w| u64::from(w.count_ones())).sum();
        if digests.len() as u64 != count * 32 {
            return wrong(format!("{count} chunks want {} bytes of digests, not {}", count * 32, digests.len()));
        }
        let digests = digests.chunks_exact(32).map(|d| d.try_into().expect("32 bytes")).collect();
        Ok(Self::build(chunks, words, digests))
    }

    /// From chunk numbers with their digests, ascending and each below `chunks`.
    pub fn from_sorted(chunks: u64, sorted: &[(u64, Digest)]) -> Self {
        let mut words = vec![0u64; chunks.div_ceil(64) as usize];
        for (chunk, _) in sorted {
            words[(chunk / 64) as usize] |= 1 << (chunk % 64);
        }
        Self::build(chunks, words, sorted.iter().map(|(_, digest)| *digest).collect())
    }

    fn build(chunks: u64, present: Vec<u64>, digests: Vec<Digest>) -> Self {
        let mut count = 0;
        let before = present
            .iter()
            .map(|word| {
                let here = count;
                count += word.count_ones();
                here
            })
            .collect();
        Self { chunks, present, before, digests }
    }

    /// Chunks in the region.
    pub fn chunks(&self) -> u64 {
        self.chunks
    }

    /// Chunks that are not all zero.
    pub fn stored(&self) -> u64 {
        self.digests.len() as u64
    }

    /// The digest of a chunk; `None` means all zero.
    pub fn get(&self, chunk: u64) -> Option<&Digest> {
        let word = *self.present.get((chunk / 64) as usize)?;
        let bit = 1 << (chunk % 64);
        let index = self.before[(chunk / 64) as usize] + (word & (bit - 1)).count_ones();
        (word & bit != 0).then(|| &self.digests[index as usize])
    }

    /// Numbers of the chunks that have a digest, ascending.
    pub fn iter_stored(&self) -> impl Iterator<Item = u64> + '_ {
        self.present.iter().enumerate().filter(|(_, word)| **word != 0).flat_map(|(i, word)| {
            let word = *word;
            (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| i as u64 * 64 + bit)
        })
    }

    /// The two halves that [`DigestTable::from_packed`] takes.
    pub fn to_packed(&self) -> (Vec<u8>, Vec<u8>) {
        let mut present: Vec<u8> = self.present.iter().flat_map(|word| word.to_le_bytes()).collect();
        present.truncate(self.chunks.div_ceil(8) as usize);
        (present, self.digests.concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_and_unpacks() {
        for chunks in [1u64, 7, 8, 9, 63, 64, 65, 1000] {
            let sorted: Vec<_> = (0..chunks).filter(|c| c % 3 != 1).map(|c| (c, hash(&c.to_le_bytes()))).collect();
            let table = DigestTable::from_sorted(chunks, &sorted);
            let (present, digests) = table.to_packed();
            assert_eq!(present.len() as u64, chunks.div_ceil(8));
            assert_eq!(DigestTable::from_packed(chunks, &present, &digests).unwrap(), table);
            assert_eq!(table.iter_stored().collect::<Vec<_>>(), sorted.iter().map(|s| s.0).collect::<Vec<_>>());
            for chunk in 0..chunks {
                assert_eq!(table.get(chunk), sorted.iter().find(|s| s.0 == chunk).map(|s| &s.1));
            }
            assert_eq!(table.get(chunks + 64), None);
        }
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let one = [7u8; 32];
        assert!(DigestTable::from_packed(9, &[1], &one).is_err(), "map too short");
        assert!(DigestTable::from_packed(9, &[1, 0, 0], &one).is_err(), "map too long");
        assert!(DigestTable::from_packed(9, &[1, 2], &[one, one].concat()).is_err(), "chunk 9 of 9");
        assert!(DigestTable::from_packed(9, &[3, 0], &one).is_err(), "digest missing");
        assert!(DigestTable::from_packed(9, &[0, 0], &one).is_err(), "digest too many");
        assert!(DigestTable::from_packed(9, &[1, 0], &one[..31]).is_err(), "digest cut");
        assert!(DigestTable::from_packed(9, &[1, 1], &[one, one].concat()).is_ok());
    }
}

//! Writes that go elsewhere: a disk whose image stays as it is.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::disk::transfer;

/// What is copied when a part of it is written.
const BLOCK: u64 = 4096;

/// A scratch file over an image that is never written.
///
/// Guarantees: what was written is read, from everywhere else the image; nothing is ever synced, because nothing outlives this; `trail`
/// is a digest of all changes in their order.
pub struct Overlay {
    scratch: File,
    /// Bit `n % 64` of word `n / 64`: block `n` is in the scratch file.
    blocks: BTreeMap<u64, u64>,
    /// Bytes of the disk.
    size: u64,
    trail: [u8; 32],
}

impl Overlay {
    /// `scratch`: an empty file that nobody else uses.
    pub fn new(scratch: File, size: u64) -> io::Result<Self> {
        scratch.set_len(size)?;
        Ok(Self { scratch, blocks: BTreeMap::new(), size, trail: [0; 32] })
    }

    pub fn trail(&self) -> [u8; 32] {
        self.trail
    }

    fn has(&self, block: u64) -> bool {
        self.blocks.get(&(block / 64)).is_some_and(|word| word >> (block % 64) & 1 != 0)
    }

    fn add(&mut self, from: u64, to: u64) {
        for block in from..to {
            *self.blocks.entry(block / 64).or_default() |= 1 << (block % 64);
        }
    }

    /// Fills all of `ranges` from `offset` on; the caller vouches for them.
    pub fn read(&self, image: &File, ranges: &mut [libc::iovec], offset: u64) -> io::Result<()> {
        let mut rest = ranges;
        let mut at = offset;
        while let Some(range) = rest.first_mut() {
            if range.iov_len == 0 {
                rest = &mut rest[1..];
                continue;
            }
            // As far as one file goes.
            let ours = self.has(at / BLOCK);
            let mut end = (at / BLOCK + 1) * BLOCK;
            while end < at + range.iov_len as u64 && self.has(end / BLOCK) == ours {
                end += BLOCK;
            }
            let n = (range.iov_len as u64).min(end - at) as usize;
            let mut part = [libc::iovec { iov_base: range.iov_base, iov_len: n }];
            transfer(if ours { &self.scratch } else { image }, &mut part, at, |fd, list, count, at| {
                // SAFETY: `list` has `count` ranges that the caller vouches for.
                unsafe { libc::preadv(fd, list, count, at) }
            })?;
            range.iov_base = range.iov_base.cast::<u8>().wrapping_add(n).cast();
            range.iov_len -= n;
            at += n as u64;
        }
        Ok(())
    }

    /// Writes all of `ranges` from `offset` on; the caller vouches for them.
    pub fn write(&mut self, image: &File, ranges: &mut [libc::iovec], offset: u64) -> io::Result<()> {
        let len: u64 = ranges.iter().map(|r| r.iov_len as u64).sum();
        if len == 0 {
            return Ok(());
        }
        let mut data = Vec::with_capacity(len as usize);
        for range in ranges.iter().filter(|r| r.iov_len > 0) {
            // SAFETY: the caller vouches for the range; the copy is what is hashed and written, whatever the guest does meanwhile.
            data.extend_from_slice(unsafe { std::slice::from_raw_parts(range.iov_base.cast::<u8>(), range.iov_len) });
        }
        self.follow(b"write", offset, len, &data);
        self.fill_edges(image, offset, len)?;
        self.scratch.write_all_at(&data, offset)?;
        self.add(offset / BLOCK, (offset + len).div_ceil(BLOCK));
        Ok(())
    }

    /// Makes a range read as zeros.
    pub fn zero(&mut self, image: &File, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        self.follow(b"zero", offset, len, &[]);
        self.fill_edges(image, offset, len)?;
        self.clear(offset, len)?;
        self.add(offset / BLOCK, (offset + len).div_ceil(BLOCK));
        Ok(())
    }

    /// Blocks that a change covers in part take the rest from the image.
    fn fill_edges(&mut self, image: &File, offset: u64, len: u64) -> io::Result<()> {
        let end = offset + len;
        for (edge, block) in [(offset, offset / BLOCK), (end, end / BLOCK)] {
            if edge % BLOCK == 0 || self.has(block) {
                continue;
            }
            let start = block * BLOCK;
            let mut bytes = vec![0; (self.size.saturating_sub(start)).min(BLOCK) as usize];
            image.read_exact_at(&mut bytes, start)?;
            self.scratch.write_all_at(&bytes, start)?;
            self.add(block, block + 1);
        }
        Ok(())
    }

    fn clear(&self, offset: u64, len: u64) -> io::Result<()> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let bad = || io::Error::from_raw_os_error(libc::EINVAL);
        let (at, size) = (i64::try_from(offset).map_err(|_| bad())?, i64::try_from(len).map_err(|_| bad())?);
        // SAFETY: only works on our own file.
        if unsafe { libc::fallocate(self.scratch.as_raw_fd(), mode, at, size) } == 0 {
            return Ok(());
        }
        let zeros = [0u8; 65536];
        let mut done = 0;
        while done < len {
            let n = (len - done).min(zeros.len() as u64);
            self.scratch.write_all_at(&zeros[..n as usize], offset + done)?;
            done += n;
        }
        Ok(())
    }

    fn follow(&mut self, what: &[u8], offset: u64, len: u64, data: &[u8]) {
        let step = [&self.trail[..], what, &offset.to_le_bytes(), &len.to_le_bytes(), &memory::hash(data)].concat();
        self.trail = memory::hash(&step);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Disk;

    fn file(name: &str, bytes: &[u8]) -> File {
        let path = std::env::temp_dir().join(format!("overlay-{name}-{}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.write_all_at(bytes, 0).unwrap();
        file
    }

    fn ranges(parts: &mut [Vec<u8>]) -> Vec<libc::iovec> {
        parts.iter_mut().map(|p| libc::iovec { iov_base: p.as_mut_ptr().cast(), iov_len: p.len() }).collect()
    }

    fn whole(disk: &Disk, size: usize) -> Vec<u8> {
        let mut parts = [vec![0; 700], vec![0; size - 700]];
        disk.read(&mut ranges(&mut parts), 0).unwrap();
        parts.concat()
    }

    /// A disk with an overlay beside plain bytes: what is done to one is done to the other.
    #[test]
    fn it_reads_as_a_written_disk_and_the_image_stays() {
        let size = 21 * 512 + 2 * 4096;
        let before: Vec<u8> = (0..size).map(|i| (i * 7 % 251) as u8).collect();
        let image = file("image", &before);
        let make = |name| Disk::with_overlay(image.try_clone().unwrap(), file(name, &[]), false).unwrap();
        let (mut disk, mut again) = (make("a"), make("b"));
        let mut model = before.clone();
        let steps = [(512, 512), (4096, 4096), (0, 512), (3584, 1024), (9216, 4608), (size as u64 - 512, 512), (1024, 8192)];
        for (n, (offset, len)) in steps.into_iter().enumerate() {
            let at = offset as usize;
            let data = vec![n as u8 + 1; len as usize];
            for disk in [&mut disk, &mut again] {
                let mut parts = [data[..100].to_vec(), data[100..].to_vec()];
                disk.write(&mut ranges(&mut parts), offset).unwrap();
            }
            model[at..at + len as usize].copy_from_slice(&data);
            assert_eq!(whole(&disk, size), model, "step {n}");
        }
        for disk in [&mut disk, &mut again] {
            disk.discard(2048, 5120).unwrap();
            disk.write_zeroes(512, 512, true).unwrap();
            disk.sync().unwrap();
        }
        model[2048..2048 + 5120].fill(0);
        model[512..1024].fill(0);
        assert_eq!(whole(&disk, size), model);
        assert_eq!(disk.trail(), again.trail());
        disk.discard(0, 512).unwrap();
        assert_ne!(disk.trail(), again.trail());
        let mut now = vec![0; size];
        image.read_exact_at(&mut now, 0).unwrap();
        assert_eq!(now, before);
    }
}

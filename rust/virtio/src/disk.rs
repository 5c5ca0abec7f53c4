//! A raw disk image: a file or block device that somebody else has opened and locked.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::overlay::Overlay;

pub const SECTOR: u64 = 512;

/// Reads and writes at offsets, straight between the file and the ranges given. Never by mapping it.
pub struct Disk {
    file: File,
    size: u64,
    read_only: bool,
    /// The coarse clock's reading that writes must not share, see [`Disk::arm_write_barrier`].
    barrier: Option<Duration>,
    /// Something may have been written that is not on the medium. At first true: nobody knows what was done to the file before.
    unsynced: AtomicBool,
    /// Writing to the medium has failed and the guest does not know. The kernel says so once, and then takes what is lost for written.
    lost: AtomicBool,
    /// Where changes go instead of into the file.
    overlay: Option<Overlay>,
}

/// The clock that a file system stamps files with (`ktime_get_coarse_real_ts64`): it moves once a tick.
fn coarse_clock() -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes a timespec of ours.
    unsafe { libc::clock_gettime(libc::CLOCK_REALTIME_COARSE, &mut now) };
    Duration::new(now.tv_sec.max(0) as u64, now.tv_nsec as u32)
}

fn check(n: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Calls `call` until all of `ranges` have been moved from `offset` on.
pub(crate) fn transfer(
    file: &File,
    mut ranges: &mut [libc::iovec],
    mut offset: u64,
    call: impl Fn(i32, *const libc::iovec, i32, i64) -> libc::ssize_t,
) -> io::Result<()> {
    while !ranges.is_empty() {
        let count = ranges.len().min(libc::UIO_MAXIOV as usize) as i32;
        let at = i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        let mut done = match check(call(file.as_raw_fd(), ranges.as_ptr(), count, at)) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        offset += done as u64;
        while let Some(first) = ranges.first_mut() {
            if done < first.iov_len {
                first.iov_base = first.iov_base.cast::<u8>().wrapping_add(done).cast();
                first.iov_len -= done;
                break;
            }
            done -= first.iov_len;
            ranges = &mut ranges[1..];
        }
    }
    Ok(())
}

impl Disk {
    pub fn new(file: File, read_only: bool) -> io::Result<Self> {
        let (unsynced, lost) = (AtomicBool::new(true), AtomicBool::new(false));
        let mut disk = Self { file, size: 0, read_only, barrier: None, unsynced, lost, overlay: None };
        disk.size = disk.length()?;
        Ok(disk)
    }

    /// A disk whose changes go into `scratch`, an empty file: `file` is only read, and nothing is ever synced.
    pub fn with_overlay(file: File, scratch: File, read_only: bool) -> io::Result<Self> {
        let mut disk = Self::new(file, read_only)?;
        disk.overlay = Some(Overlay::new(scratch, disk.size)?);
        *disk.unsynced.get_mut() = false;
        Ok(disk)
    }

    /// Digest of all changes in their order; zeros where there is no overlay, which alone follows them.
    pub fn trail(&self) -> [u8; 32] {
        self.overlay.as_ref().map_or([0; 32], Overlay::trail)
    }

    /// Bytes, also of a block device.
    fn length(&self) -> io::Result<u64> {
        // SAFETY: lseek on a live descriptor; nobody uses its position.
        let end = unsafe { libc::lseek(self.file.as_raw_fd(), 0, libc::SEEK_END) };
        u64::try_from(end).map_err(|_| io::Error::last_os_error())
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// For flushing on another thread.
    pub fn file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// For whoever stops the guest: all that was written is on the medium, or the guest has been told that it is not. Once this has failed
    /// it fails until then. Costs nothing when nothing was written since the last time.
    pub fn sync(&self) -> io::Result<()> {
        if self.lost.load(Ordering::Acquire) {
            return Err(io::Error::other("what was written before is lost, and the guest has not asked for it yet"));
        }
        self.write_out().inspect_err(|_| self.lost.store(true, Ordering::Release))
    }

    /// As [`Disk::sync`], for the guest, who is told what comes out.
    pub fn flush(&self) -> io::Result<()> {
        let lost = self.take_lost();
        self.write_out()?;
        if lost { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }

    /// Whether the guest is to be told of a loss now; then it knows.
    pub fn take_lost(&self) -> bool {
        self.lost.swap(false, Ordering::AcqRel)
    }

    fn write_out(&self) -> io::Result<()> {
        if self.read_only || !self.unsynced.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.file.sync_data().inspect_err(|_| self.unsynced.store(true, Ordering::Release))
    }

    /// The next write waits until the file system's clock has moved on from now: its time stamp will differ from those that
    /// the file has at this moment.
    pub fn arm_write_barrier(&mut self) {
        self.barrier = Some(coarse_clock());
    }

    /// Before every change of the file.
    fn before_write(&mut self) {
        *self.unsynced.get_mut() = true;
        self.pass_barrier();
    }

    fn pass_barrier(&mut self) {
        let Some(armed) = self.barrier.take() else { return };
        // A tick is 1 to 10 ms; a clock that was set back moves too.
        while coarse_clock() == armed {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Fills all of `ranges` from `offset` on.
    ///
    /// The caller guarantees that each range is mapped and writable for the whole call.
    pub fn read(&self, ranges: &mut [libc::iovec], offset: u64) -> io::Result<()> {
        if let Some(overlay) = &self.overlay {
            return overlay.read(&self.file, ranges, offset);
        }
        transfer(&self.file, ranges, offset, |fd, list, count, at| {
            // SAFETY: `list` has `count` ranges that the caller vouches for.
            unsafe { libc::preadv(fd, list, count, at) }
        })
    }

    /// Writes all of `ranges` from `offset` on.
    pub fn write(&mut self, ranges: &mut [libc::iovec], offset: u64) -> io::Result<()> {
        if let Some(overlay) = &mut self.overlay {
            return overlay.write(&self.file, ranges, offset);
        }
        self.before_write();
        transfer(&self.file, ranges, offset, |fd, list, count, at| {
            // SAFETY: `list` has `count` ranges that the caller vouches for.
            unsafe { libc::pwritev(fd, list, count, at) }
        })
    }

    /// Frees the range's blocks; they read as zeros. Where the file system cannot, nothing happens (discarding is a hint).
    pub fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        if let Some(overlay) = &mut self.overlay {
            return overlay.zero(&self.file, offset, len);
        }
        match self.allocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, len) {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
            result => result,
        }
    }

    /// Makes the range read as zeros; with `free` its blocks may go.
    pub fn write_zeroes(&mut self, offset: u64, len: u64, free: bool) -> io::Result<()> {
        if let Some(overlay) = &mut self.overlay {
            return overlay.zero(&self.file, offset, len);
        }
        let how = if free { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
        match self.allocate(how | libc::FALLOC_FL_KEEP_SIZE, offset, len) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENODEV | libc::ENOSYS)) => {}
            result => return result,
        }
        let zeros = [0u8; 65536];
        let mut done = 0;
        while done < len {
            let n = (len - done).min(zeros.len() as u64) as usize;
            let mut range = [libc::iovec { iov_base: zeros.as_ptr().cast_mut().cast(), iov_len: n }];
            self.write(&mut range, offset + done)?;
            done += n as u64;
        }
        Ok(())
    }

    fn allocate(&mut self, mode: i32, offset: u64, len: u64) -> io::Result<()> {
        self.before_write();
        let bad = || io::Error::from_raw_os_error(libc::EINVAL);
        let (at, size) = (i64::try_from(offset).map_err(|_| bad())?, i64::try_from(len).map_err(|_| bad())?);
        loop {
            // SAFETY: only works on the file.
            if unsafe { libc::fallocate(self.file.as_raw_fd(), mode, at, size) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn only_what_was_written_is_synced() {
        let path = std::env::temp_dir().join(format!("sync-{}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        (&file).write_all(&[1; 4096]).unwrap();
        let mut disk = Disk::new(file, false).unwrap();
        assert!(disk.unsynced.load(Ordering::Relaxed), "what others wrote before is synced once");
        disk.sync().unwrap();
        assert!(!disk.unsynced.load(Ordering::Relaxed));
        let mut data = [7u8; 512];
        let mut range = [libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: 512 }];
        disk.write(&mut range, 0).unwrap();
        assert!(disk.unsynced.load(Ordering::Relaxed));
        disk.sync().unwrap();
        let _ = disk.discard(0, 512);
        assert!(disk.unsynced.load(Ordering::Relaxed));
    }

    #[test]
    fn a_loss_is_not_forgotten_before_the_guest_is_told() {
        // Has a size of 0, can be written, and cannot be synced.
        let mut disk = Disk::new(File::options().read(true).write(true).open("/dev/zero").unwrap(), false).unwrap();
        assert!(disk.flush().is_err());
        assert!(!disk.take_lost(), "the guest was told");
        assert!(disk.sync().is_err());
        // As a kernel that has said so once.
        let path = std::env::temp_dir().join(format!("lost-{}", std::process::id()));
        disk.file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(disk.sync().is_err() && disk.sync().is_err());
        assert!(disk.flush().is_err());
        assert!(disk.sync().is_ok() && disk.flush().is_ok());
    }

    #[test]
    fn the_barrier_separates_time_stamps() {
        let path = std::env::temp_dir().join(format!("barrier-{}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        (&file).write_all(&[1; 4096]).unwrap();
        let mut disk = Disk::new(file, false).unwrap();
        for _ in 0..20 {
            let mut data = [7u8; 512];
            let mut range = [libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: 512 }];
            disk.write(&mut range, 0).unwrap();
            let before = disk.file.metadata().unwrap().modified().unwrap();
            disk.arm_write_barrier();
            let mut range = [libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: 512 }];
            disk.write(&mut range, 512).unwrap();
            assert_ne!(before, disk.file.metadata().unwrap().modified().unwrap());
        }
    }
}

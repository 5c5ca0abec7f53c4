//! Memory for translated code, mapped twice: writable here, executable there, never both at one address.

use std::io::{Error, Result};

/// Guarantees: `len` bytes of the same memory are mapped writable at `write` and executable at `exec` until this is dropped; bytes
/// that nothing was written to read as zero and cost no memory.
pub struct Region {
    write: *mut u8,
    exec: *const u8,
    len: usize,
}

// SAFETY: the mappings belong to the process, not to a thread; writing needs `&mut self`.
unsafe impl Send for Region {}

impl Region {
    pub fn new(len: usize) -> Result<Self> {
        // SAFETY: the name is a C string; the result is checked.
        let fd = unsafe { libc::memfd_create(c"freezeframe-code".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(Error::last_os_error());
        }
        let mapped = Self::map(fd, len);
        // SAFETY: `fd` is ours and the mappings do not need it.
        unsafe { libc::close(fd) };
        mapped
    }

    fn map(fd: i32, len: usize) -> Result<Self> {
        let mapping = |protection| {
            // SAFETY: a new mapping at an address of the kernel's choice touches nothing of ours.
            let at = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, fd, 0) };
            if at == libc::MAP_FAILED { Err(Error::last_os_error()) } else { Ok(at.cast::<u8>()) }
        };
        // SAFETY: `fd` is an open memfd.
        if unsafe { libc::ftruncate(fd, len as libc::off_t) } != 0 {
            return Err(Error::last_os_error());
        }
        let write = mapping(libc::PROT_READ | libc::PROT_WRITE)?;
        match mapping(libc::PROT_READ | libc::PROT_EXEC) {
            Ok(exec) => Ok(Self { write, exec, len }),
            Err(error) => {
                // SAFETY: mapped above, known to nobody else.
                unsafe { libc::munmap(write.cast(), len) };
                Err(error)
            }
        }
    }

    /// Address at which the byte at `offset` is executed.
    pub fn address(&self, offset: usize) -> u64 {
        self.exec as u64 + offset as u64
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Copies code in. What is overwritten must not be running.
    pub fn put(&mut self, offset: usize, code: &[u8]) {
        assert!(offset <= self.len && code.len() <= self.len - offset, "code outside its region");
        // SAFETY: inside the mapping, as just checked; `&mut self` makes us the only writer.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.add(offset), code.len()) };
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: both were mapped with this length in `map` and are used by nobody but `self`.
        unsafe {
            libc::munmap(self.write.cast(), self.len);
            libc::munmap(self.exec.cast_mut().cast(), self.len);
        }
    }
}

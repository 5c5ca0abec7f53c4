//! Host ends of consoles: an output that never blocks a vCPU, and a thread that reads input.
//!
//! Both stand still while a machine is paused: a byte is either in the machine's state or still on its side of the host,
//! never in both and never in neither.

mod input;
mod output;

pub use input::{Input, InputBuffer, InputSink};
pub use output::Output;

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// How a descriptor is kept from blocking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Regular files and the like: reads and writes end by themselves.
    Plain,
    /// An open file description of our own with `O_NONBLOCK`.
    NonBlocking,
    /// `MSG_DONTWAIT`.
    Socket,
    /// Shared with other processes and not to be had otherwise: small transfers after `poll`.
    Polled,
}

fn stat(fd: BorrowedFd<'_>) -> io::Result<libc::stat> {
    // SAFETY: all zeros is a valid `stat`, and `fstat` only writes into it.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: a live descriptor and a `stat` of ours.
    if unsafe { libc::fstat(fd.as_raw_fd(), &mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stat)
}

/// A descriptor for the same file that can be used without blocking. `O_NONBLOCK` is a property of the open file description,
/// which a terminal or pipe shares with the shell and its other children: so those are opened anew.
fn without_blocking(fd: BorrowedFd<'_>, write: bool) -> io::Result<(OwnedFd, Kind)> {
    let stat = stat(fd)?;
    let format = stat.st_mode & libc::S_IFMT;
    // SAFETY: isatty only looks at a descriptor.
    let tty = unsafe { libc::isatty(fd.as_raw_fd()) } == 1;
    // Opening a pty's master side again would make another pty.
    let ptmx = format == libc::S_IFCHR && libc::major(stat.st_rdev) == 5 && libc::minor(stat.st_rdev) == 2;
    if format == libc::S_IFSOCK {
        return Ok((fd.try_clone_to_owned()?, Kind::Socket));
    }
    if format != libc::S_IFIFO && !tty && !ptmx {
        return Ok((fd.try_clone_to_owned()?, Kind::Plain));
    }
    // SAFETY: F_GETFL only reads a flag word.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags >= 0 && flags & libc::O_NONBLOCK != 0 {
        return Ok((fd.try_clone_to_owned()?, Kind::NonBlocking));
    }
    if !ptmx {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let opened = OpenOptions::new().read(!write).write(write).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
        if let Ok(file) = opened {
            return Ok((file.into(), Kind::NonBlocking));
        }
    }
    Ok((fd.try_clone_to_owned()?, Kind::Polled))
}

/// Waits for `events` on any of the descriptors; true for each that has some. `timeout` in ms, negative: for ever.
fn poll<const N: usize>(fds: [(&OwnedFd, libc::c_short); N], timeout: i32) -> [bool; N] {
    let mut list = fds.map(|(fd, events)| libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 });
    // SAFETY: a list of N entries of ours; interruption counts as "nothing yet".
    let count = unsafe { libc::poll(list.as_mut_ptr(), N as libc::nfds_t, timeout) };
    list.map(|entry| count > 0 && entry.revents != 0)
}

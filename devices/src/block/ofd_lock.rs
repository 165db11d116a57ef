//! Open file description locks (`fcntl_locking(2)`): they belong to the open file, not the process, and are
//! released with its last descriptor, however the process ends. None of our dependencies wraps them safely.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Operation on the lock of a whole file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Exclusive,
    Shared,
    Unlock,
}

/// Changes the lock without waiting. `WouldBlock` if another open file holds it.
pub(super) fn change(file: &File, operation: Operation) -> io::Result<()> {
    let kind = match operation {
        Operation::Exclusive => libc::F_WRLCK,
        Operation::Shared => libc::F_RDLCK,
        Operation::Unlock => libc::F_UNLCK,
    };
    // SAFETY: `flock` is plain data for which all zeroes are valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = i16::try_from(kind).map_err(io::Error::other)?;
    lock.l_whence = i16::try_from(libc::SEEK_SET).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open as long as `file`, and the kernel only reads `lock`.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Err(io::ErrorKind::WouldBlock.into()),
        _ => Err(error),
    }
}

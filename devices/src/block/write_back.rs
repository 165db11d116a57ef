//! Starts to write a part of a file to its storage (`sync_file_range(2)`), so that a later flush finds little to do.
//! None of our dependencies wraps it safely.
#![allow(unsafe_code)]

use super::backend::ByteRange;
use std::fs::File;
use std::os::fd::AsRawFd;

/// Starts to write what the page cache holds of `range`. A hint: nothing is durable before a flush, which also reports
/// errors.
pub(super) fn start(file: &File, range: ByteRange) {
    let ByteRange { offset_bytes, len_bytes } = range;
    let (Ok(offset), Ok(len)) = (i64::try_from(offset_bytes), i64::try_from(len_bytes)) else {
        return;
    };
    let flags = libc::SYNC_FILE_RANGE_WRITE;
    // SAFETY: the descriptor is open as long as `file`, and the call takes no memory.
    let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, flags) };
}

//! Whole runs of guest pages from and into RAM, in one system call for many of them. Called by
//! `socket` only. One of the crate's exceptions from the ban on unsafe code: the standard library has
//! no vectored I/O on memory that a guest writes at the same time.
#![expect(unsafe_code, reason = "iovecs on guest RAM")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::{AtomicBitmap, WithBitmapSlice};

/// A piece of guest RAM. It borrows the mapping, so it cannot outlive it.
pub type PageSlice<'a> = VolatileSlice<'a, <AtomicBitmap as WithBitmapSlice<'a>>::S>;

/// Most pieces that the kernel takes at once (`UIO_MAXIOV`).
const MAX_PIECES: usize = 1024;

fn result(moved: isize) -> io::Result<usize> {
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

fn iovecs(head: &[u8], pages: &[PageSlice<'_>]) -> Vec<libc::iovec> {
    let head = (!head.is_empty())
        .then(|| libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() });
    let pages = pages.iter().map(|page| libc::iovec {
        iov_base: page.ptr_guard_mut().as_ptr().cast(),
        iov_len: page.len(),
    });
    head.into_iter().chain(pages).take(MAX_PIECES).collect()
}

/// Writes `head`, then `pages`, as far as the kernel takes them.
pub(super) fn send(
    socket: BorrowedFd<'_>,
    head: &[u8],
    pages: &[PageSlice<'_>],
) -> io::Result<usize> {
    let mut iovecs = iovecs(head, pages);
    // SAFETY: `msghdr` is plain data, for which all zeroes is a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_mut_ptr();
    message.msg_iovlen = iovecs.len();
    // SAFETY: `message` points to `iovecs`, whose entries lie within `head` and `pages`, all borrowed
    // until the call returns. The kernel only reads them; that a guest writes its pages meanwhile is
    // a race between the guest and the kernel, not within this program.
    result(unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) })
}

/// Reads into `pages`, as far as there is something to read.
pub(super) fn receive(socket: BorrowedFd<'_>, pages: &[PageSlice<'_>]) -> io::Result<usize> {
    let iovecs = iovecs(&[], pages);
    let count = libc::c_int::try_from(iovecs.len()).map_err(io::Error::other)?;
    // SAFETY: each entry is a piece of mapped guest RAM, borrowed until the call returns; Rust holds
    // no reference into guest RAM, so the kernel may write there.
    result(unsafe { libc::readv(socket.as_raw_fd(), iovecs.as_ptr(), count) })
}

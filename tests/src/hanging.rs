//! A disk image whose storage can be made to hang, to be slow or to fail.
//!
//! It is a file system of our own, with one file in memory, that stops answering when told to. Like a
//! network file system whose server is gone: whoever reads, writes, flushes, opens or asks for a size
//! waits, until it is told to go on, or is killed.
//!
//! It speaks to the kernel's FUSE directly, as far as one file of fixed size needs: a request is read from
//! `/dev/fuse` whole, and answered. While it hangs, requests are not even read, so that the kernel lets a
//! killed process go.

#![expect(clippy::host_endian_bytes, reason = "these are the kernel's own structures")]

use crate::hosts::Hosts;
use anyhow::{Context, Result, ensure};
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Requests, as `linux/fuse.h` numbers them.
mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const RELEASEDIR: u32 = 29;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
}

const ROOT: u64 = 1;
const IMAGE: u64 = 2;
/// The one file.
const NAME: &str = "image";
/// Length of a request's header, and of an answer's.
const IN_HEADER: usize = 40;
/// What one request may write.
const MAX_WRITE: u32 = 128 << 10;
/// A close waits for nothing (`FOPEN_NOFLUSH`): else a process could not end while this hangs.
const NO_FLUSH: u32 = 1 << 5;

#[derive(Default)]
struct State {
    hangs: bool,
    /// It has stopped reading requests.
    parked: bool,
    ends: bool,
    /// How long a write to the beginning of a block of 4 KiB takes, and each flush.
    write_takes: Duration,
    flush_takes: Duration,
    /// The next flush alone.
    backlog: Duration,
    /// Reads, or writes, fail.
    fails_reads: bool,
    fails_writes: bool,
    /// How many there have been, of those writes and of flushes.
    writes: u32,
    flushes: u32,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes as long as a request of this kind does; `body` is what follows its header.
    fn take_time(&self, opcode: u32, body: &[u8]) -> Result<()> {
        let mut state = self.state();
        let takes = match opcode {
            opcode::WRITE if u64_at(body, 8)?.is_multiple_of(4096) => {
                state.writes += 1;
                self.changed.notify_all();
                state.write_takes
            }
            opcode::FSYNC => {
                state.flushes += 1;
                state.flush_takes + std::mem::take(&mut state.backlog)
            }
            _ => return Ok(()),
        };
        let waited = self.changed.wait_timeout_while(state, takes, |state| !state.ends);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        Ok(())
    }
}

/// A file that can be made to hang. Goes on, and is unmounted, when dropped.
pub struct HangingImage {
    folder: PathBuf,
    device: Arc<File>,
    shared: Arc<Shared>,
    wake: std::io::PipeWriter,
    thread: Option<JoinHandle<()>>,
}

impl HangingImage {
    /// Mounts one of `bytes` zeroes for a test, at `NAME/image` in the folder of host `a`.
    ///
    /// # Panics
    /// If it cannot be mounted: the test `#[needs(fuse)]`.
    pub fn for_test(hosts: &Hosts, name: &str, bytes: usize) -> Self {
        let folder = hosts.at("a", name);
        std::fs::create_dir(&folder).expect("a folder to mount at");
        Self::mount(&folder, bytes).expect("it is mounted")
    }

    /// Mounts one of `bytes` zeroes at `folder`.
    pub fn mount(folder: &Path, bytes: usize) -> Result<Self> {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/fuse")
            .context("/dev/fuse")?;
        let options =
            format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let (at, options) = (CString::new(folder.as_os_str().as_bytes())?, CString::new(options)?);
        let flags = libc::MS_NOSUID | libc::MS_NODEV;
        // SAFETY: all four are strings that end with a zero byte and outlive the call.
        let mounted = unsafe {
            let kind = c"fuse".as_ptr();
            libc::mount(kind, at.as_ptr(), kind, flags, options.as_ptr().cast())
        };
        if mounted != 0 {
            return Err(std::io::Error::last_os_error()).context("mount");
        }
        let (mut woken, wake) = std::io::pipe()?;
        let (device, shared) = (Arc::new(device), Arc::<Shared>::default());
        let (serves, state) = (device.clone(), shared.clone());
        let thread = std::thread::spawn(move || {
            let mut bytes = vec![0; bytes];
            while wait_to_serve(&serves, &mut woken, &state) {
                if let Err(error) = serve_one(&serves, &mut bytes, &state) {
                    eprintln!("the file system that can hang: {error:#}");
                    return;
                }
            }
        });
        Ok(Self { folder: folder.to_owned(), device, shared, wake, thread: Some(thread) })
    }

    /// The image.
    pub fn path(&self) -> PathBuf {
        self.folder.join(NAME)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.shared.state());
        self.shared.changed.notify_all();
        // It may be waiting for a request.
        let _ = (&self.wake).write(&[0]);
    }

    /// From now on nothing is answered.
    ///
    /// # Panics
    /// If the thread that answers is gone.
    pub fn hang(&self) {
        self.change(|state| state.hangs = true);
        let state = self.shared.state();
        let limit = Duration::from_secs(30);
        let waited = self.shared.changed.wait_timeout_while(state, limit, |state| !state.parked);
        let parked = waited.unwrap_or_else(PoisonError::into_inner).0.parked;
        assert!(parked, "the file system does not stop answering");
    }

    /// While it hangs: waits until somebody waits for an answer.
    ///
    /// # Panics
    /// If nobody does.
    pub fn wait_until_asked(&self) {
        let mut asked = [polled(self.device.as_raw_fd())];
        assert_eq!(poll(&mut asked, 30_000), 1, "nobody asks the file system for anything");
    }

    /// From now on each write to the beginning of a block of 4 KiB takes so long, and whatever comes next
    /// waits for it: one of a batch of sectors, that is.
    pub fn writes_take(&self, time: Duration) {
        self.change(|state| state.write_takes = time);
    }

    /// From now on each flush takes so long.
    pub fn flushes_take(&self, time: Duration) {
        self.change(|state| state.flush_takes = time);
    }

    /// The next flush takes so much longer, as with much in a cache, and those after it do not.
    pub fn next_flush_takes(&self, time: Duration) {
        self.change(|state| state.backlog = time);
    }

    /// Waits until there have been `count` more of those writes.
    ///
    /// # Panics
    /// If that takes too long.
    pub fn wait_for_writes(&self, count: u32) {
        let state = self.shared.state();
        let wanted = state.writes + count;
        let limit = Duration::from_secs(30);
        let waited =
            self.shared.changed.wait_timeout_while(state, limit, |state| state.writes < wanted);
        let late = waited.unwrap_or_else(PoisonError::into_inner).1.timed_out();
        assert!(!late, "fewer than {count} writes in {limit:?}");
    }

    /// From now on each read fails, or none does any more.
    pub fn fail_reads(&self, fails: bool) {
        self.change(|state| state.fails_reads = fails);
    }

    /// The same for each write.
    pub fn fail_writes(&self, fails: bool) {
        self.change(|state| state.fails_writes = fails);
    }

    /// How many flushes there have been.
    pub fn flushes(&self) -> u32 {
        self.shared.state().flushes
    }

    /// Everything is answered.
    pub fn go_on(&self) {
        self.change(|state| state.hangs = false);
    }
}

impl Drop for HangingImage {
    fn drop(&mut self) {
        self.change(|state| (state.hangs, state.ends) = (false, true));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Ok(folder) = CString::new(self.folder.as_os_str().as_bytes()) {
            // Lazily: who still has the file open gets errors as soon as the device is closed.
            // SAFETY: a string that ends with a zero byte and outlives the call.
            unsafe { libc::umount2(folder.as_ptr(), libc::MNT_DETACH) };
        }
    }
}

fn polled(fd: RawFd) -> libc::pollfd {
    libc::pollfd { fd, events: libc::POLLIN, revents: 0 }
}

fn poll(fds: &mut [libc::pollfd], timeout_ms: i32) -> i32 {
    let count = libc::nfds_t::try_from(fds.len()).unwrap_or(libc::nfds_t::MAX);
    // SAFETY: a slice of initialised descriptors, with its length.
    unsafe { libc::poll(fds.as_mut_ptr(), count, timeout_ms) }
}

/// Waits for a request; false if it is to end.
fn wait_to_serve(device: &File, woken: &mut std::io::PipeReader, shared: &Shared) -> bool {
    loop {
        let mut state = shared.state();
        while state.hangs && !state.ends {
            state.parked = true;
            shared.changed.notify_all();
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked = false;
        if state.ends {
            return false;
        }
        drop(state);
        let mut fds = [polled(device.as_raw_fd()), polled(woken.as_raw_fd())];
        poll(&mut fds, -1);
        if fds[1].revents != 0 {
            let _ = woken.read(&mut [0; 64]);
        } else if fds[0].revents != 0 {
            return true;
        }
    }
}

fn number<const N: usize>(request: &[u8], at: usize) -> Result<[u8; N]> {
    let bytes = request.get(at..at + N).context("a short request")?;
    Ok(bytes.try_into()?)
}

fn u32_at(request: &[u8], at: usize) -> Result<u32> {
    Ok(u32::from_ne_bytes(number(request, at)?))
}

fn u64_at(request: &[u8], at: usize) -> Result<u64> {
    Ok(u64::from_ne_bytes(number(request, at)?))
}

/// `struct fuse_attr` of a file or of the folder.
fn attributes(node: u64, size: usize) -> Vec<u8> {
    let (mode, size) = if node == ROOT {
        (libc::S_IFDIR | 0o755, 0)
    } else {
        (libc::S_IFREG | 0o600, size as u64)
    };
    let mut out = Vec::with_capacity(88);
    // Number, size and blocks, then three times of day.
    for word in [node, size, size / 512, 0, 0, 0] {
        out.extend(word.to_ne_bytes());
    }
    // Their nanoseconds, mode, links, user, group, device, block size, flags.
    for word in [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0] {
        out.extend(word.to_ne_bytes());
    }
    out
}

/// Reads a request, if there is one, and answers it.
fn serve_one(mut device: &File, bytes: &mut [u8], shared: &Shared) -> Result<()> {
    let mut request = vec![0; MAX_WRITE as usize + 4096];
    let len = match device.read(&mut request) {
        Ok(len) => len,
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR | libc::ENOENT)) =>
        {
            return Ok(());
        }
        // It was unmounted.
        Err(error) => return Err(error.into()),
    };
    let request = &request[..len];
    let (opcode, unique, node) = (u32_at(request, 4)?, u64_at(request, 8)?, u64_at(request, 16)?);
    let body = request.get(IN_HEADER..).context("a short request")?;
    shared.take_time(opcode, body)?;
    let (fails_reads, fails_writes) = {
        let state = shared.state();
        (state.fails_reads, state.fails_writes)
    };
    let answer = match opcode {
        opcode::READ if fails_reads => Err(libc::EIO),
        opcode::WRITE if fails_writes => Err(libc::EIO),
        opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => return Ok(()),
        opcode::INIT => Ok(init(body)?),
        opcode::LOOKUP if body == [NAME.as_bytes(), &[0]].concat() => {
            // Number and generation; neither name nor attributes may be remembered.
            let mut out = [IMAGE, 0, 0, 0, 0].map(u64::to_ne_bytes).concat();
            out.extend(attributes(IMAGE, bytes.len()));
            Ok(out)
        }
        opcode::LOOKUP => Err(libc::ENOENT),
        opcode::GETATTR | opcode::SETATTR => {
            let mut out = [0u64, 0].map(u64::to_ne_bytes).concat();
            out.extend(attributes(node, bytes.len()));
            Ok(out)
        }
        opcode::OPEN | opcode::OPENDIR => {
            let mut out = 0u64.to_ne_bytes().to_vec();
            out.extend([NO_FLUSH, 0].map(u32::to_ne_bytes).concat());
            Ok(out)
        }
        opcode::READ | opcode::WRITE => {
            let at = usize::try_from(u64_at(body, 8)?)?.min(bytes.len());
            let end = (at + u32_at(body, 16)? as usize).min(bytes.len());
            if opcode == opcode::READ {
                Ok(bytes[at..end].to_vec())
            } else {
                let data = body.get(40..40 + end - at).context("a short write")?;
                bytes[at..end].copy_from_slice(data);
                Ok([u32::try_from(end - at)?, 0].map(u32::to_ne_bytes).concat())
            }
        }
        // A great deal of space.
        opcode::STATFS => {
            let mut out = [1u64 << 30, 1 << 29, 1 << 29, 2, 0].map(u64::to_ne_bytes).concat();
            out.extend([4096u32, 255, 4096, 0, 0, 0, 0, 0, 0, 0].map(u32::to_ne_bytes).concat());
            Ok(out)
        }
        opcode::RELEASE | opcode::RELEASEDIR | opcode::FSYNC | opcode::DESTROY => Ok(Vec::new()),
        _ => Err(libc::ENOSYS),
    };
    let (error, payload) = match answer {
        Ok(payload) => (0, payload),
        Err(error) => (-error, Vec::new()),
    };
    let mut out = u32::try_from(16 + payload.len())?.to_ne_bytes().to_vec();
    out.extend(error.to_ne_bytes());
    out.extend(unique.to_ne_bytes());
    out.extend(payload);
    match device.write(&out) {
        Ok(written) => ensure!(written == out.len(), "an answer was taken in part"),
        // Who asked has been killed meanwhile.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// The answer to the first request: version 7.31, nothing special.
fn init(body: &[u8]) -> Result<Vec<u8>> {
    let read_ahead = u32_at(body, 8)?;
    let mut out = [7, 31, read_ahead, 0].map(u32::to_ne_bytes).concat();
    // Requests in the background, and when they are too many.
    out.extend([64u16, 48].map(u16::to_ne_bytes).concat());
    // Largest write, resolution of times, and what is left of the 64 bytes.
    out.extend([MAX_WRITE, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0].map(u32::to_ne_bytes).concat());
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use std::sync::mpsc::channel;

    #[test]
    #[ferry_tests::needs(fuse)]
    fn it_holds_what_is_written_and_hangs_when_told_to() {
        let folder = tempfile::tempdir().unwrap();
        let image = HangingImage::mount(folder.path(), 1 << 20).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(image.path()).unwrap();
        file.write_all_at(&[7; 5000], 300_000).unwrap();
        file.sync_data().unwrap();
        image.hang();
        let (done, written) = channel();
        let writer = std::thread::spawn(move || {
            file.write_all_at(&[8; 512], 0).unwrap();
            done.send(file).unwrap();
        });
        image.wait_until_asked();
        assert!(written.try_recv().is_err(), "it hangs");
        image.go_on();
        let file = written.recv_timeout(Duration::from_secs(30)).unwrap();
        writer.join().unwrap();
        let mut back = [0; 5001];
        file.read_exact_at(&mut back, 300_000).unwrap();
        assert_eq!((back[0], back[4999], back[5000]), (7, 7, 0));
    }
}

//! Writing to where nobody may be reading: a terminal that is stopped, a pipe whose reader hangs.
//!
//! The console's output is written by the vCPU that made it. A plain blocking write would then hold
//! the vCPU for as long as the reader likes, and with it every pause and every migration. This writer
//! waits for a bounded time, once; after that it drops what finds no room, until there is room again.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Bytes that a pipe takes without blocking once it is ready for any (`PIPE_BUF`).
const ATOMIC_BYTES: usize = 4096;

/// A file that is written only when it has room.
#[derive(Debug)]
pub struct PatientWriter {
    file: File,
    /// None for what is always ready, which epoll refuses: regular files and `/dev/null`.
    readiness: Option<Epoll>,
    patience: Duration,
    stuck: bool,
}

impl PatientWriter {
    /// Writes to `file`, waiting at most `patience` for a reader that does not keep up.
    ///
    /// # Errors
    /// If the host gives no epoll.
    pub fn new(file: File, patience: Duration) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let interest = EpollEvent::new(EventSet::OUT, 0);
        let readiness = match epoll.ctl(ControlOperation::Add, file.as_raw_fd(), interest) {
            Ok(()) => Some(epoll),
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => None,
            Err(error) => return Err(error),
        };
        Ok(Self { file, readiness, patience, stuck: false })
    }

    fn wait_for_room(&mut self) -> io::Result<()> {
        let Some(epoll) = &self.readiness else { return Ok(()) };
        let patience = if self.stuck { Duration::ZERO } else { self.patience };
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout_ms = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
            match epoll.wait(timeout_ms, &mut [EpollEvent::default()]) {
                Ok(0) if timeout_ms == 0 => {
                    self.stuck = true;
                    return Err(io::ErrorKind::TimedOut.into());
                }
                // A kick of the vCPU must not cut the patience short, nor stretch it.
                Ok(0) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
                // An error or a closed reader counts as ready: the write will tell.
                Ok(_) => {
                    self.stuck = false;
                    return Ok(());
                }
            }
        }
    }
}

impl Write for PatientWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wait_for_room()?;
        let len = bytes.len().min(ATOMIC_BYTES);
        self.file.write(bytes.get(..len).unwrap_or(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;

    fn pipe(patience: Duration) -> (PatientWriter, io::PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        (PatientWriter::new(File::from(OwnedFd::from(writer)), patience).unwrap(), reader)
    }

    #[test]
    fn a_reader_that_hangs_costs_one_wait_and_then_only_its_bytes() {
        let patience = Duration::from_millis(50);
        let (mut writer, mut reader) = pipe(patience);
        let start = Instant::now();
        let mut written = 0;
        while writer.write_all(&[7]).is_ok() {
            written += 1;
        }
        assert!(start.elapsed() >= patience, "it waited");
        let start = Instant::now();
        for _ in 0..1000 {
            assert_eq!(writer.write(&[7]).unwrap_err().kind(), io::ErrorKind::TimedOut);
        }
        assert!(start.elapsed() < patience * 1000, "it does not wait for each");
        let mut read = vec![0; written];
        reader.read_exact(&mut read).unwrap();
        assert!(writer.write_all(&[8]).is_ok(), "room again, so output again");
        reader.read_exact(&mut read[..1]).unwrap();
        assert_eq!(read[0], 8, "what was dropped is not sent late");
    }

    #[test]
    fn a_reader_that_has_gone_is_an_error() {
        let (mut writer, reader) = pipe(Duration::from_secs(60));
        drop(reader);
        assert_eq!(writer.write(&[7]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn files_and_dev_null_are_always_ready() {
        for file in [tempfile::tempfile().unwrap(), File::create("/dev/null").unwrap()] {
            let mut writer = PatientWriter::new(file, Duration::ZERO).unwrap();
            writer.write_all(&[7; 100_000]).unwrap();
        }
    }
}

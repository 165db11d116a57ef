//! What a test prints: its end, and all of it in a file. A test that never stops printing costs no memory, and
//! no more of the disk than is bounded.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};

/// How much is kept in memory of standard output and of standard error, each.
const TAIL_BYTES: usize = 64 << 10;
/// How much is written to a file.
const MAX_LOG_BYTES: u64 = 64 << 20;

/// The end of a stream.
#[derive(Debug, Default)]
pub(super) struct Tail(VecDeque<u8>);

impl Tail {
    fn add(&mut self, bytes: &[u8]) {
        let bytes = bytes.last_chunk::<TAIL_BYTES>().map_or(bytes, |last| &last[..]);
        let room = TAIL_BYTES - bytes.len();
        self.0.drain(..self.0.len().saturating_sub(room));
        self.0.extend(bytes);
    }

    /// As text, with line ends as here.
    pub fn text(&self) -> String {
        let bytes: Vec<u8> = self.0.iter().copied().collect();
        String::from_utf8_lossy(&bytes).replace("\r\n", "\n")
    }
}

/// The file that gets both streams as they come.
pub(super) struct Log {
    file: Option<File>,
    left_bytes: u64,
}

impl Log {
    /// To `file`, if there is one.
    pub fn new(file: Option<File>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self { file, left_bytes: MAX_LOG_BYTES }))
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let len = bytes.len() as u64;
        if len <= self.left_bytes {
            self.left_bytes -= len;
            return file.write_all(bytes);
        }
        writeln!(file, "\nferry: what came after {MAX_LOG_BYTES} bytes is not kept")?;
        self.file = None;
        Ok(())
    }
}

/// Reads a stream to its end; returns its end, and whether all could be kept.
pub(super) fn drain(mut stream: impl Read, log: &Mutex<Log>) -> (Tail, io::Result<()>) {
    let mut tail = Tail::default();
    let mut kept = Ok(());
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return (tail, kept),
            Ok(count) => {
                let bytes = &buffer[..count];
                tail.add(bytes);
                let written = log.lock().unwrap_or_else(PoisonError::into_inner).write(bytes);
                kept = kept.and(written);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return (tail, Err(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_kept_in_memory_and_all_of_it_in_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let log = Log::new(Some(file.reopen().unwrap()));
        let text = "line\r\n".repeat(40_000) + "last";
        let (tail, kept) = drain(text.as_bytes(), &log);
        kept.unwrap();
        let end = tail.text();
        assert!(end.ends_with("line\nlast") && end.len() <= TAIL_BYTES);
        assert_eq!(std::fs::read_to_string(file.path()).unwrap(), text);
    }

    #[test]
    fn a_flood_ends_the_file_and_not_the_reading() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let log = Log::new(Some(file.reopen().unwrap()));
        log.lock().unwrap().left_bytes = 10_000;
        let flood = io::repeat(b'x').take(1 << 20);
        let (tail, kept) = drain(flood, &log);
        kept.unwrap();
        assert_eq!(tail.text().len(), TAIL_BYTES);
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert!(text.len() < 12_000 && text.ends_with("is not kept\n"), "{}", text.len());
    }
}

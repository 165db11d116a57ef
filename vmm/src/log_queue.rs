//! Asynchronous messages: a bounded queue and a thread that writes to standard error, so that neither a
//! vCPU that logs nor the main thread blocks on a stalled reader.

use std::collections::VecDeque;
use std::fmt::Display;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Capacity in bytes. Lines beyond it are counted and dropped.
const QUEUE_BYTES: usize = 256 << 10;

/// The queue; clones share it.
#[derive(Clone, Default)]
pub struct LogQueue(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    dropped_lines: u64,
    is_writing: bool,
    has_thread: bool,
}

/// The process's queue in front of standard error.
pub fn stderr() -> &'static LogQueue {
    static STDERR: LazyLock<LogQueue> = LazyLock::new(LogQueue::default);
    &STDERR
}

/// Tells the user something, whatever the log level.
pub fn say(text: impl Display) {
    say_line(&format!("ferry: {text}"));
}

/// The same, without the program's name.
pub fn say_line(line: &str) {
    stderr().push(format!("{line}\n").as_bytes(), &open_stderr);
}

fn open_stderr() -> Box<dyn Write + Send> {
    Box::new(io::stderr())
}

impl LogQueue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The logger's target: one line per write.
    pub fn writer(&self) -> impl Write + Send + 'static {
        Writer { queue: self.clone(), open: Box::new(open_stderr) }
    }

    /// Waits until all lines are written, at most for `limit`.
    pub fn flush(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut state = self.state();
        while state.is_writing || !state.lines.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.0.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Queues a line. The first one starts the thread: most processes log nothing.
    fn push(&self, line: &[u8], open: &dyn Fn() -> Box<dyn Write + Send>) {
        let mut state = self.state();
        if state.bytes + line.len() > QUEUE_BYTES {
            state.dropped_lines += 1;
            return;
        }
        state.bytes += line.len();
        state.lines.push_back(line.to_vec());
        if !std::mem::replace(&mut state.has_thread, true) {
            let (queue, output) = (self.clone(), open());
            let thread = std::thread::Builder::new().name("log".into()).stack_size(256 << 10);
            // Without a thread, lines are kept; the next line retries.
            state.has_thread = thread.spawn(move || queue.write_all_to(output)).is_ok();
        }
        drop(state);
        self.0.changed.notify_all();
    }

    fn write_all_to(&self, mut output: impl Write) {
        loop {
            let mut state = self.state();
            let line = loop {
                if let Some(line) = state.lines.pop_front() {
                    state.bytes -= line.len();
                    break line;
                }
                state.is_writing = false;
                self.0.changed.notify_all();
                state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            };
            state.is_writing = true;
            drop(state);
            // A failure of standard error cannot be reported anywhere.
            let _ = output.write_all(&line);
            let dropped = std::mem::take(&mut self.state().dropped_lines);
            if dropped > 0 {
                let _ = writeln!(
                    output,
                    "ferry: {dropped} log lines were dropped: standard error was not read"
                );
            }
        }
    }
}

struct Writer {
    queue: LogQueue,
    open: Box<dyn Fn() -> Box<dyn Write + Send> + Send>,
}

impl Write for Writer {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.queue.push(line, &*self.open);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{PipeReader, Read};

    fn to_pipe() -> (LogQueue, Writer, PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        let queue = LogQueue::default();
        let open = move || -> Box<dyn Write + Send> { Box::new(writer.try_clone().unwrap()) };
        (queue.clone(), Writer { queue, open: Box::new(open) }, reader)
    }

    #[test]
    fn lines_come_out_in_order_and_a_flush_waits_for_them() {
        let (queue, mut writer, mut reader) = to_pipe();
        for number in 0..100 {
            writer.write_all(format!("line {number}\n").as_bytes()).unwrap();
        }
        queue.flush(Duration::from_secs(60));
        let expected: String = (0..100).map(|number| format!("line {number}\n")).collect();
        let mut text = vec![0; expected.len()];
        reader.read_exact(&mut text).unwrap();
        assert_eq!(text, expected.as_bytes());
    }

    #[test]
    fn a_reader_that_hangs_holds_nobody_and_learns_what_it_missed() {
        let (queue, mut writer, mut reader) = to_pipe();
        const LINES: usize = 1000;
        for _ in 0..LINES {
            // Would block forever if it waited for the reader.
            writer.write_all(&[&[b'x'; 1023][..], b"\n"].concat()).unwrap();
        }
        queue.flush(Duration::from_millis(20));
        assert!(queue.state().bytes <= QUEUE_BYTES);
        let (mut text, mut buffer) = (String::new(), [0; 4096]);
        let accounted = |text: &str| {
            let reports = text.lines().filter_map(|line| line.strip_prefix("ferry: "));
            let dropped =
                reports.filter_map(|line| line.split_once(" log lines")?.0.parse::<usize>().ok());
            let written = text.matches("x\n").count();
            (written, dropped.sum::<usize>())
        };
        loop {
            let (written, dropped) = accounted(&text);
            if written + dropped == LINES {
                assert!(dropped > 0, "all fitted");
                break;
            }
            let count = reader.read(&mut buffer).unwrap();
            text.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
        }
    }
}

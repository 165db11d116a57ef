//! Text that a process prints, collected by a thread of its own and waited for by line.
//!
//! Used for serial output, for `ferry migrate --json` and for error output. The raw text is kept as
//! well: a handover may fall in the middle of a line, whose rest then comes from another process.

use anyhow::{Result, bail};
use regex::Regex;
use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Lines collected so far, and those still to come. Clones share them.
#[derive(Clone)]
pub struct Lines(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    text: String,
    lines: Vec<String>,
    /// Where the unfinished line begins in `text`.
    unfinished: usize,
    first_byte: Option<Instant>,
    ended: bool,
}

impl State {
    fn add(&mut self, text: &str) {
        self.text.push_str(text);
        while let Some(len) = self.text[self.unfinished..].find('\n') {
            let line = self.text[self.unfinished..self.unfinished + len].trim_end_matches('\r');
            self.lines.push(line.to_owned());
            self.unfinished += len + 1;
        }
    }

    fn end(&mut self) {
        if self.unfinished < self.text.len() {
            self.lines.push(self.text[self.unfinished..].to_owned());
            self.unfinished = self.text.len();
        }
        self.ended = true;
    }
}

/// A line that was waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Which line it is, from 0.
    pub index: usize,
    /// The line, without its end.
    pub text: String,
}

impl Lines {
    /// Starts to collect what `input` gives, until its end.
    pub fn collect(mut input: impl Read + Send + 'static) -> Self {
        let lines = Self(Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() }));
        let shared = lines.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                // A broken pipe has ended, too.
                let len = input.read(&mut buffer).unwrap_or(0);
                let mut state = shared.lock();
                if len == 0 {
                    state.end();
                } else {
                    state.first_byte.get_or_insert_with(Instant::now);
                    state.add(&String::from_utf8_lossy(&buffer[..len]));
                }
                shared.0.changed.notify_all();
                if len == 0 {
                    return;
                }
            }
        });
        lines
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done` gives something, or the text ends, or time is up.
    fn wait_until<T>(
        &self,
        limit: Duration,
        mut done: impl FnMut(&State) -> Option<T>,
    ) -> (Option<T>, bool) {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            if let Some(result) = done(&state) {
                return (Some(result), state.ended);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                return (None, state.ended);
            }
            state = match self.0.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Waits for a line from number `from` on that matches `pattern`.
    pub fn wait_from(&self, from: usize, pattern: &str, limit: Duration) -> Result<Found> {
        let regex = Regex::new(pattern)?;
        let mut next = from;
        let (found, ended) = self.wait_until(limit, |state| {
            while let Some(line) = state.lines.get(next) {
                if regex.is_match(line) {
                    return Some(Found { index: next, text: line.clone() });
                }
                next += 1;
            }
            None
        });
        let Some(found) = found else {
            let why = if ended { "the output ended" } else { "time is up" };
            bail!(
                "no line matches {pattern:?} after line {from}: {why}. Last lines:\n{}",
                self.tail()
            );
        };
        Ok(found)
    }

    /// Waits for a line that matches, the ones already there included.
    pub fn wait_for(&self, pattern: &str, limit: Duration) -> Result<Found> {
        self.wait_from(0, pattern, limit)
    }

    /// Waits for a line that comes after this call.
    pub fn wait_next(&self, pattern: &str, limit: Duration) -> Result<Found> {
        self.wait_from(self.count(), pattern, limit)
    }

    /// Waits until what came after the first `from_bytes` matches, in whole lines or not: what is drawn on a terminal
    /// has none.
    pub fn wait_text(&self, from_bytes: usize, pattern: &str, limit: Duration) -> Result<()> {
        let regex = Regex::new(pattern)?;
        let matches = |state: &State| regex.is_match(state.text.get(from_bytes..)?).then_some(());
        match self.wait_until(limit, matches).0 {
            Some(()) => Ok(()),
            None => bail!("nothing matches {pattern:?} after byte {from_bytes}: {}", self.tail()),
        }
    }

    /// Whether there will be no more.
    pub fn has_ended(&self) -> bool {
        self.wait_until(Duration::ZERO, |_| None::<()>).1
    }

    /// Waits for the end of the output.
    pub fn wait_end(&self, limit: Duration) -> Result<()> {
        let (end, _) = self.wait_until(limit, |state| state.ended.then_some(()));
        if end.is_none() {
            bail!("the output goes on after {limit:?}. Last lines:\n{}", self.tail());
        }
        Ok(())
    }

    /// Waits for the first byte and tells when it came.
    pub fn wait_first_byte(&self, limit: Duration) -> Result<Instant> {
        let (first, _) = self.wait_until(limit, |state| state.first_byte);
        first.ok_or_else(|| anyhow::anyhow!("no output within {limit:?}"))
    }

    /// How many whole lines have come.
    pub fn count(&self) -> usize {
        self.lock().lines.len()
    }

    /// All whole lines from number `from` on.
    pub fn from(&self, from: usize) -> Vec<String> {
        self.lock().lines.get(from..).unwrap_or_default().to_vec()
    }

    /// Everything, with an unfinished line.
    pub fn text(&self) -> String {
        self.lock().text.clone()
    }

    /// The last few lines, for error messages.
    pub fn tail(&self) -> String {
        let state = self.lock();
        let start = state.lines.len().saturating_sub(8);
        let mut tail = state.lines[start..].join("\n");
        tail.push('\n');
        tail.push_str(&state.text[state.unfinished..]);
        tail
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn lines_are_found_from_where_one_looks_and_the_unfinished_one_at_the_end() {
        let lines = Lines::collect(&b"HB n=1\nHB n=2\r\nCHECK\nrest"[..]);
        assert_eq!(lines.wait_for("^HB", SOON).unwrap().text, "HB n=1");
        assert_eq!(
            lines.wait_from(1, "^HB", SOON).unwrap(),
            Found { index: 1, text: "HB n=2".into() }
        );
        lines.wait_end(SOON).unwrap();
        assert_eq!(lines.from(2), ["CHECK", "rest"]);
        assert!(lines.wait_for("never", SOON).unwrap_err().to_string().contains("output ended"));
    }
}

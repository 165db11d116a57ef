//! Limits how often one cause may log, for messages that a guest or a failing host can repeat at will.
//!
//! One [`LogLimit`] per cause, as a `static` or a field. It never blocks for longer than a few
//! instructions of another thread, so a vCPU may ask it.
//!
//! ```
//! use devices::log_limit::LogLimit;
//!
//! static BAD_QUEUE: LogLimit = LogLimit::new();
//! if let Some(suppressed) = BAD_QUEUE.allow() {
//!     log::warn!("queue 3 is not ready{suppressed}");
//! }
//! ```

use std::fmt;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Lines that one cause may log in an [`INTERVAL`].
pub const LINES: u32 = 5;
/// The interval, from the first of these lines.
pub const INTERVAL: Duration = Duration::from_secs(10);

/// How many lines were suppressed since the last one. Displays as nothing or as a note to append to
/// the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Suppressed(pub u64);

impl fmt::Display for Suppressed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            count => write!(f, " (and {count} more like this, suppressed)"),
        }
    }
}

/// At most [`LINES`] lines per [`INTERVAL`].
#[derive(Debug)]
pub struct LogLimit(Mutex<Window>);

#[derive(Debug)]
struct Window {
    began: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

impl LogLimit {
    /// A limit that has not counted anything yet.
    pub const fn new() -> Self {
        Self(Mutex::new(Window { began: None, lines: 0, suppressed: 0 }))
    }

    /// Counts one line: the note to append if it may be logged, `None` if it is suppressed.
    pub fn allow(&self) -> Option<Suppressed> {
        self.allow_at(Instant::now())
    }

    fn allow_at(&self, now: Instant) -> Option<Suppressed> {
        crate::lock(&self.0).allow(now)
    }
}

impl Default for LogLimit {
    fn default() -> Self {
        Self::new()
    }
}

impl Window {
    fn allow(&mut self, now: Instant) -> Option<Suppressed> {
        let is_over = |began| now.saturating_duration_since(began) >= INTERVAL;
        if self.began.is_none_or(is_over) {
            self.began = Some(now);
            self.lines = 0;
        }
        if self.lines == LINES {
            self.suppressed = self.suppressed.saturating_add(1);
            return None;
        }
        self.lines += 1;
        Some(Suppressed(std::mem::take(&mut self.suppressed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_speaks_a_few_times_and_then_says_how_much_it_kept_to_itself() {
        let limit = LogLimit::new();
        let start = Instant::now();
        for _ in 0..LINES {
            assert_eq!(limit.allow_at(start), Some(Suppressed(0)));
        }
        let late = start + INTERVAL - Duration::from_millis(1);
        for now in [start, late, late] {
            assert_eq!(limit.allow_at(now), None);
        }
        assert_eq!(limit.allow_at(start + INTERVAL), Some(Suppressed(3)));
        assert_eq!(limit.allow_at(start + INTERVAL), Some(Suppressed(0)), "told once");
    }

    #[test]
    fn a_clock_that_steps_back_neither_panics_nor_opens_the_gate() {
        let limit = LogLimit::new();
        let start = Instant::now() + INTERVAL;
        let allowed = (0..100).filter(|_| limit.allow_at(start).is_some()).count();
        assert_eq!(allowed, LINES as usize);
        assert_eq!(limit.allow_at(start - INTERVAL), None);
    }

    #[test]
    fn the_note_is_there_only_if_there_is_something_to_note() {
        assert_eq!(Suppressed(0).to_string(), "");
        assert_eq!(Suppressed(7).to_string(), " (and 7 more like this, suppressed)");
    }
}
